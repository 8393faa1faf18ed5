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
