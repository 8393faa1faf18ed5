"""What the planner says of tiny runs, against what they hold, by phase: within 15 %.

Measured is resident memory, as `memory_run` explains. Twelve megabytes beside that are allowed in a
phase: what a process's own bookkeeping came to where no tensor was large. On a CPU nothing is an
estimate, and no constant is a case's own. Its bf16 instructions are left alone: with them oneDNN
keeps buffers of its own, 43 MB of them in a run of 215 MB, which nobody counts.
"""

import pytest
from memory_cases import CASES, CPU, config_for, measured, prompts_of

from kepo.planner.memory import Setup, phases
from kepo_kernels.compute import gemm

BOOKKEEPING = 12e6
NEEDS = {"lora_rank": "peft", "optimizer": "bitsandbytes"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_planned_is_measured(name, made, tmp_path, monkeypatch):
    monkeypatch.setattr(gemm, "fast_bf16", lambda device: device.type != "cpu")
    case = CASES[name]
    for setting, package in NEEDS.items():
        if setting in case.settings:
            pytest.importorskip(package)
    config = config_for(case, made, tmp_path)
    planned = {p.name: p.total for p in phases(Setup(config, CPU, prompts_of(config)))}
    held = measured(case, config, made, tmp_path)
    most = max(held[phase] for phase in planned)
    assert max(planned.values()) == pytest.approx(most, rel=0.15)
    for phase, total in planned.items():
        assert total == pytest.approx(held[phase], rel=0.15, abs=BOOKKEEPING), (phase, held)
