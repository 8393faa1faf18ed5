"""The patterns for others' trainers: they run, stand in the page as they are, and are right."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT
from several import torchrun

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

FOLDER = ROOT / "examples" / "in_trainers"
RUN_HERE = {"transformers_trainer.py", "accelerate_loop.py", "trl_grpo.py"}
LINES = 15


def pattern(name: str) -> str:
    """The lines of an example that its page shows."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    [shown] = re.findall(r"^# ---- shown in \S+\n(.*?)^# ---- end$", text, re.M | re.S)
    return shown.strip() + "\n"


def run(name: str, *words: str, folder: Path) -> str:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), ACCELERATE_USE_CPU="true")
    command = [sys.executable, str(FOLDER / name), *words]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", sorted(RUN_HERE))
def test_the_page_shows_what_is_run(name):
    shown = pattern(name)
    assert len([line for line in shown.splitlines() if line]) <= LINES
    page = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    assert f"```python\n{shown}```" in page


def two_numbers(out: str) -> tuple[float, float]:
    return tuple(
        map(float, re.search(r"first \w+ (-?\d.\d+), of the last (-?\d.\d+)", out).groups())
    )


@pytest.mark.slow
def test_the_trainer_of_transformers_learns(tmp_path):
    first, last = two_numbers(run("transformers_trainer.py", folder=tmp_path))
    assert 0 < last < 0.8 * first


@pytest.mark.slow
def test_a_loop_with_accelerate_learns(tmp_path):
    first, last = two_numbers(run("accelerate_loop.py", folder=tmp_path))
    assert last > first + 0.3


def load(name: str):
    made = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


STEP = dict(max_steps=1, learning_rate=1.0, optim="sgd", max_grad_norm=0.0, disable_tqdm=True)


def step_of(folder: Path, batch: int, accumulate: int = 1) -> dict[str, torch.Tensor]:
    """The weights after one step of SGD by the example's trainer, and before."""
    example = load("transformers_trainer")
    batches = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate)
    trainer = example.trainer(str(folder), **STEP, **batches)
    trainer.train()
    return trainer.model.state_dict()


def far(found: dict, expected: dict) -> float:
    return max(float((found[name] - x).abs().max()) for name, x in expected.items())


@pytest.mark.slow
def test_micro_batches_are_one_batch(tmp_path):
    """Where completions differ in length; and evaluation has a loss."""
    whole = step_of(tmp_path, 8)
    assert far(step_of(tmp_path, 2, accumulate=4), whole) < 1e-6
    assert far(load("transformers_trainer").tiny(0).state_dict(), whole) > 1e-3
    trainer = load("transformers_trainer").trainer(str(tmp_path))
    losses = [trainer.evaluate(trainer.train_dataset[:n])["eval_loss"] for n in (4, 8)]
    assert all(torch.tensor(losses).isfinite()) and losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_take_the_step_of_one(tmp_path):
    code = (
        "import os, sys, torch\n"
        f"sys.path.append({str(Path(__file__).parent)!r})\n"
        "from test_in_trainers import step_of\n"
        f"torch.save(step_of({str(tmp_path)!r}, 4), f\"{tmp_path}/{{os.environ['RANK']}}.pt\")\n"
    )
    (tmp_path / "step.py").write_text(code)
    ended = torchrun(tmp_path / "step.py", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = ended.communicate(timeout=250)
    assert ended.returncode == 0, output[-4000:]
    whole = step_of(tmp_path, 8)
    for rank in range(2):
        assert far(torch.load(tmp_path / f"{rank}.pt"), whole) < 1e-6


# ---- accelerate


def loop_step(micro: int, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights after one step of SGD by the example's loop on 8 completions."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    example = load("accelerate_loop")
    made = torch.Generator().manual_seed(0)
    whole = dict(ids=torch.randint(1, 30, (8, 10), generator=made), mask=mask)
    whole["advantages"] = torch.randn(8, generator=made)
    places = torch.arange(8).chunk(micro)
    batches = [{name: x[place] for name, x in whole.items()} for place in places]
    model = example.tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro)
    example.train(accelerator, model, optimizer, batches)
    return model.state_dict()


def test_micro_batches_of_a_loop_are_one_batch():
    """Where they have 8 and 36 tokens."""
    mask = (torch.arange(10) < torch.tensor([3, 3, 3, 3, 10, 10, 10, 10])[:, None]).float()
    whole = loop_step(1, mask)
    assert far(loop_step(2, mask), whole) < 1e-6
    assert far(load("accelerate_loop").tiny().state_dict(), whole) > 1e-3


def test_a_batch_without_a_token_of_the_loss_changes_nothing(tmp_path):
    before = load("accelerate_loop").tiny().state_dict()
    assert far(loop_step(2, torch.zeros(8, 10)), before) == 0.0
    example = load("transformers_trainer")
    trainer = example.trainer(str(tmp_path), **STEP, per_device_train_batch_size=8)
    trainer.train_dataset = [
        row | {"labels": torch.full_like(row["labels"], -100)} for row in trainer.train_dataset
    ]
    trainer.train()
    assert far(trainer.model.state_dict(), example.tiny(0).state_dict()) == 0.0


def test_the_trainers_bf16_reaches_the_loss(monkeypatch, tmp_path):
    """The model's forward has been wrapped by then: autocast is on inside of the head."""
    seen = []
    example = load("transformers_trainer")
    computed = example.fused_kepo_loss

    def loss(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return computed(*args, **kwargs)

    monkeypatch.setattr(example, "fused_kepo_loss", loss)
    example.trainer(str(tmp_path), **STEP, per_device_train_batch_size=8, bf16=True).train()
    assert seen == [True]
