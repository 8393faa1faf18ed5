"""Whole runs of `kepo train` on the device: a tiny model of every family, in every way to hold it.

Every run takes its first step on given completions, so that its losses and the length of its
gradient can be held against the same step on the CPU in float32; the steps after it sample for
themselves, with hints, evaluation and checkpoints. A run that fails is a row that says so, the
others are still made, and the section fails at its end.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.losses.table import Row

STEPS = 3
Record = dict[str, Any]  # a line of metrics.jsonl
SIZES: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")
FEWEST = 12.0  # seconds that must be left for one more run
LOSSES = ("kepo/policy_loss", "kepo/distill_loss", "grad_norm")
NEAR = {"float32": 2e-3, "bfloat16": 6e-2}  # cuDNN's convolutions of pictures are in tf32
QUANTISED = 0.15  # a tiny random model in 4 bits is another one: 0.056 on an H200
NVIDIA = ("sharding", "teacher_placement", "student_bits", "teacher_bits", "optimizer", "dtype")
"""Settings that are left out on the CPU, whose numbers they must not change beyond rounding."""


@dataclass(frozen=True)
class Way:
    """One run."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    family: str = "qwen3_vl"
    needs: str = ""
    """A package."""

    @property
    def near(self) -> float:
        if {"student_bits", "teacher_bits"} & self.settings.keys():
            return QUANTISED
        return NEAR[self.settings.get("dtype", "float32")]


BF16 = dict(dtype="bfloat16", lora_rank=8)
WAYS = (
    Way("float32"),
    Way("rows", dict(share_prompts=False)),
    Way("student_bits 4", BF16 | dict(student_bits=4), needs="bitsandbytes"),
    Way("teacher_bits 8", BF16 | dict(teacher_bits=8), needs="bitsandbytes"),
    Way("adamw_8bit", dict(optimizer="adamw_8bit"), needs="bitsandbytes"),
    Way("reference, two iterations", dict(kl_coef=0.1, num_iterations=2, mini_batches=2)),
    Way("scores on the device", dict(scores_on="device", micro_tokens=1500)),
    Way("sapo, entropy", BF16 | dict(policy_loss="sapo", entropy_coef=0.01)),
    Way("bfloat16", BF16),
    Way("bfloat16, checkpointing", BF16 | dict(gradient_checkpointing=True)),
    Way("fsdp2", dict(dtype="bfloat16", sharding="fsdp2", teacher_placement="fsdp2")),
    Way("teacher offloaded", BF16 | dict(teacher_placement="offload")),
    Way("qwen2_5_vl", BF16, family="qwen2_5_vl"),
    Way("internvl", BF16, family="internvl"),
    Way("text_only", BF16, family="text_only"),
)


def train(clock: Clock) -> Iterator[Row]:
    from importlib.util import find_spec

    failed = []
    ways = WAYS if clock.cuda else WAYS[:2]
    with tempfile.TemporaryDirectory() as name:
        truths: dict[str, Record] = {}
        for way in ways:
            row: Row = {"case": "train", "provider": way.name, "dtype": way.settings.get("dtype")}
            if clock.left() < FEWEST:
                yield row | {"note": "left out: the time is over"}
            elif way.needs and find_spec(way.needs) is None:
                yield row | {"note": f"left out: {way.needs} is not installed"}
            else:
                try:
                    yield row | one(Path(name), way, clock.kind, truths)
                except Exception as error:
                    traceback.print_exc(file=sys.stdout)
                    failed.append(way.name)
                    words = f"FAILS: {type(error).__name__}: {error}".splitlines()[0][:200]
                    yield row | {"note": words}
    if failed:
        raise AssertionError(f"{len(failed)} of {len(ways)} runs: {', '.join(failed)}")


def one(folder: Path, way: Way, device: str, truths: dict[str, Record]) -> Row:
    """Train on the device; hold the first step against the CPU's, and the rest against reason."""
    home = made(folder / way.family, way.family)
    there = {key: value for key, value in way.settings.items() if key not in NVIDIA}
    key = f"{way.family} {there}"
    if key not in truths:
        truths[key] = steps(home, f"truth-{len(truths)}", "cpu", there, 1)[0]
    began = time.perf_counter()
    records = steps(home, way.name.replace(" ", "-"), device, way.settings, STEPS)
    seconds = time.perf_counter() - began
    if [record["step"] for record in records] != list(range(1, STEPS + 1)):
        raise AssertionError(f"steps {[record['step'] for record in records]}")
    for record in records:
        for name in LOSSES:
            if not math.isfinite(record[name] if record[name] is not None else math.nan):
                raise AssertionError(f"step {record['step']}: {name} is {record[name]}")
    worst = max((gap(records[0][n], truths[key][n], truths[key]), n) for n in LOSSES)
    if not worst[0] <= way.near:
        mine, its = records[0][worst[1]], truths[key][worst[1]]
        raise AssertionError(f"{worst[1]} is {mine:.6g}, on the CPU {its:.6g}")
    peak = max(record.get("mem/peak_gb") or 0.0 for record in records)
    words = f"{worst[1]} off by {worst[0]:.1e}, {seconds:.1f} s with loading"
    step = records[-1]["step_time"]
    return {"seconds": step, "peak_mib": 1e9 * peak / 2**20, "grad_error": worst[0], "note": words}


def gap(mine: float, its: float, truth: Record) -> float:
    """The distance of two numbers, relative to the second, or to a hundredth of the losses."""
    usual = 0.01 * max(abs(truth[name]) for name in LOSSES[:2])
    return abs(mine - its) / max(abs(its), usual)


def made(home: Path, family: str) -> Path:
    """Write a student, a teacher and eight questions of two options, once."""
    from PIL import Image

    from kepo.digits.tiny import build_tiny
    from kepo.models.families.registry import FAMILIES

    if not home.exists():
        for seed, size in enumerate(SIZES):
            build_tiny(home / size, size=size, seed=seed, family=family)
        draws = torch.Generator().manual_seed(0)
        for number in range(8):
            pixels = torch.randint(0, 256, (64, 96, 3), generator=draws, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(home / f"{number}.png")
    sees = "yes" if FAMILIES[family].pictures is not None else "no"
    (home / "sees").write_text(sees, encoding="utf-8")
    return home


def questions(home: Path) -> list[Record]:
    records: list[Record] = []
    sees = (home / "sees").read_text(encoding="utf-8") == "yes"
    for number in range(8):
        sums = [str(number + offset) for offset in (3, 5)]
        record: Record = dict(id=f"q{number}", question=f"What is the sum of {number}?")
        record |= dict(options=sums, answer=sums[0])
        records.append(record | (dict(image=str(home / f"{number}.png")) if sees else {}))
    return records


def steps(home: Path, name: str, device: str, changed: dict[str, Any], count: int) -> list[Record]:
    """Train and return a record of metrics.jsonl for each step; its progress goes to the log."""
    import kepo
    from kepo.models.vlm import VLM
    from kepo.run.metrics import read_metrics

    usual: dict[str, Any] = dict(
        student=str(home / "student"),
        teacher=str(home / "teacher"),
        device=device,
        hint_trigger="failed",
        max_attempts=1,
        gate_reward=None,
        prompts_per_step=4,
        num_generations=4,
        micro_batch=8,
        max_completion_length=24,
        steps=count,
        lr=1e-4,
        save_every=2,
        eval_share=0.25,
        eval_every=2 if count > 1 else 0,
        run_dir=str(home / f"run-{name}"),
    )
    given = Given(VLM.sample)

    def sampled(policy: VLM, prompts: Sequence[Any], params: Any, seeds: Any = None) -> Any:
        return given.sample(policy, prompts, params, seeds)

    with mock.patch.object(VLM, "sample", sampled), redirect_stderr(sys.stdout):
        kepo.train(kepo.Config(**(usual | changed)), data=questions(home))
    records = read_metrics(home / f"run-{name}" / "metrics.jsonl")
    return [record for record in records if "grad_norm" in record]  # not those of an evaluation


class Given:
    """What samples in a run: at first texts of both answers by turns, then as the model does."""

    def __init__(self, really: Any) -> None:
        self._really, self._first = really, True

    def sample(self, policy: Any, prompts: Sequence[Any], params: Any, seeds: Any) -> Any:
        if params.n == 1 or not self._first:  # one completion each: an evaluation
            return self._really(policy, prompts, params, seeds)
        self._first = False
        from kepo.models.sampling import Sampled

        tokenizer = policy.encoder.tokenizer
        texts = [
            f"<think>{number % 7} + 3 = {number % 5}</think><answer>{'AB'[number % 2]}</answer>"
            for number in range(len(prompts) * params.n)
        ]
        each = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        rows = [[*ids, tokenizer.eos_token_id][: params.max_tokens] for ids in each]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(width) < lengths[:, None]
        return Sampled(ids, mask, torch.zeros(ids.shape))


SECTIONS = {"train": train}
