"""Two runs that must be one: the same losses, weights and completions, but for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kepo.run.metrics import read_metrics

STEPS = 3
LR = 2e-4
WARM = dict(lr=LR, warmup_steps=STEPS)
"""AdamW's first update moves an element by lr whatever its gradient, and one in a hundred thousand
has one that is rounding for a good part: that update is kept short; later ones see the squares."""
CLOSE = 1e-5
ADAM_EPS = 1e-8
MEASURED = ("mem/", "time/", "step_time", "kepo/padding")  # of the machine, not of the run


def weights(run_dir: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    policy = run_dir / "checkpoints" / f"step-{step:08d}" / "policy"
    (file,) = policy.glob("*.safetensors")
    return load_file(file)


def assert_same_weights(one: Path, other: Path, step: int = STEPS) -> None:
    """Equal but for rounding.

    AdamW moves an element by lr g / (|g| + 1e-8), however small its gradient g is. Where |g| is
    under 1e-8 it is rounding itself: sums of another order give another one, and another step
    (5e-10 in one element of 36,864 was seen, and steps 7e-6 to 4e-5 apart). By `one`'s own record,
    the mean of g^2 times 1 - 0.999 a step: such elements may be off by what an element moves at
    most. Without a record in one file, as of a sharded run, none may.
    """
    mine, theirs = weights(one, step), weights(other, step)
    assert mine.keys() == theirs.keys()
    record = one / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors"
    state = load_file(record) if record.exists() else {}
    for name in mine:
        off = (mine[name] - theirs[name]).abs()
        squares = state.get(f"exp_avg_sq/{name}")
        if squares is not None:
            rounding = (squares > 0) & (squares <= step * 0.001 * ADAM_EPS**2)
            assert (off[rounding] <= LR * step).all(), f"{name}: {off[rounding].max():.1e}"
            off = off[~rounding]
        assert off.numel() == 0 or off.max() <= CLOSE, f"{name}: {off.max():.1e}"


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights and numbers, rounding apart, and the very same completions."""
    assert_same_weights(one, other)
    records = [read_metrics(run / "metrics.jsonl") for run in (one, other)]
    assert len(records[0]) == len(records[1]) >= STEPS
    for a, b in zip(*records, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if isinstance(a[key], dict):  # an evaluation
                assert a[key] == b[key]
            elif not key.startswith(MEASURED):
                assert a[key] == pytest.approx(b[key], rel=CLOSE, abs=CLOSE), key
    said = [
        [(r["step"], r["completion"], r["hint"]) for r in read_metrics(run / "completions.jsonl")]
        for run in (one, other)
    ]
    assert said[0] == said[1]
