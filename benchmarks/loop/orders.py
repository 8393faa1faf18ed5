"""How a process that trains is told to take its next step, and tells what the step took.

It reads a line of JSON from its standard input for each step, and writes one in answer; the end of
the input ends it. What libraries print goes to its standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.loop.gauge import Gauge


class Orders:
    """The steps of one process: each begins with `wait` and ends with `done`."""

    def __init__(self, device: str) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._gauge = Gauge(torch.device(device))
        self._held = self._started = 0.0
        self.steps = 0
        """Steps that have begun."""

    def wait(self) -> bool:
        """Return once the next step is asked for; False if there will be none."""
        line = sys.stdin.readline()
        if not line:
            return False
        order = json.loads(line)
        self._held = self._gauge.settle() if order["watched"] else 0.0
        self._gauge.warm(order["warm_mib"])
        self.steps += 1
        self._started = time.perf_counter()
        return True

    @property
    def first(self) -> bool:
        """Whether this is the step whose completions are everybody's, and compared."""
        return self.steps == 1

    def now(self) -> float:
        if self._gauge.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def done(self, **found: float) -> None:
        seconds = self.now() - self._started
        memory = {"held_mib": self._held, "peak_mib": self._gauge.most()}
        self._say({"seconds": seconds, **memory, **found})

    def _say(self, words: Mapping[str, float]) -> None:
        self._answers.write(json.dumps(words) + "\n")
        self._answers.flush()


class Shared:
    """The completions of the first step, which all processes train on, by a prompt's tokens.

    The process that comes first samples and keeps them, the others take them in place of their own.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "completions.pt"
        self.sampled: dict[tuple[int, ...], list[list[int]]] | None = None
        """Those of an earlier process; None in the first."""
        if self._file.exists():
            self.sampled = torch.load(self._file)
        self._kept: dict[tuple[int, ...], list[list[int]]] = defaultdict(list)

    def keep(self, prompt: Sequence[int], completion: Sequence[int]) -> None:
        self._kept[tuple(prompt)].append(list(completion))
        torch.save(dict(self._kept), self._file)

    def take(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return one completion for each prompt; those of equal prompts in order."""
        left = {prompt: iter(completions) for prompt, completions in self.sampled.items()}
        return [next(left[tuple(prompt)]) for prompt in prompts]


def keep_gradients(folder: Path, name: str, gradients: Mapping[str, Tensor | None]) -> None:
    """Write a first step's gradients, before they are clipped, for `gradient_gap`."""
    found = {n: g.detach().float().cpu().clone() for n, g in gradients.items() if g is not None}
    torch.save(found, folder / f"gradients-{name}.pt")


def reward_of(text: str) -> float:
    """Return a number in [0, 1) that any other text changes: random text has an advantage."""
    return zlib.crc32(text.encode()) % 997 / 997
