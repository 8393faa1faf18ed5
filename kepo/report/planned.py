"""The memory that a run took, beside what `kepo plan` says of its phases."""

from __future__ import annotations

from typing import Any

from kepo.config import from_mapping
from kepo.errors import disk_sentence
from kepo.report.collect import RunRecord, numbers

GIB = 2**30


def memory(run: RunRecord) -> dict[str, Any]:
    """Return the largest of each ``mem/`` number in GiB, and the plan's phases if there is a plan;
    ``why`` says why there is none."""
    measured: dict[str, float] = {}
    for record in run.steps:
        for key, value in numbers(record).items():
            if key.startswith("mem/"):
                name = key.removeprefix("mem/").removesuffix("_gb").replace("_", " ")
                measured[name] = max(value * 1e9 / GIB, measured.get(name, 0.0))
    phases, why = _plan(run)
    on_cpu = not str(run.config.get("device")).startswith("cuda")
    return {"measured": measured, "phases": phases, "why": why, "cpu": on_cpu}


def _plan(run: RunRecord) -> tuple[list[dict[str, Any]], str]:
    """Return ``(phases of the plan, why there are none)``; the models' configs are read for it."""
    if not run.config:
        return [], "The settings are not known, so there is no plan."
    if run.config.get("sampler") == "vllm":
        return [], "vLLM takes a share of the GPU's memory, whose size the run does not record."
    from kepo.planner.memory import Setup, phases
    from kepo.planner.standing import ITEMS, Machine

    device = "cuda" if str(run.config.get("device")).startswith("cuda") else "cpu"
    processes = run.processes if device == "cuda" else 1
    try:
        config = from_mapping(run.config, str(run.folder))
        # The size of a GPU decides what fits, not what is held.
        found = phases(Setup(config, Machine(processes, 80 * GIB, device)))
    except OSError as error:
        return [], f"The plan cannot be made here: {disk_sentence(error)}."
    except Exception as error:  # a config of a model may make transformers raise anything
        return [], f"The plan cannot be made here: {error}."
    return [
        {
            "name": phase.name,
            "moment": phase.moment,
            "total": phase.total / GIB,
            "held": {item: phase.held[item] / GIB for item in ITEMS if phase.held[item]},
        }
        for phase in found
    ], ""
