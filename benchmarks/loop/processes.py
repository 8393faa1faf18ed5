"""The processes of step.py: each variant steps in its own, so that memory is its own too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.loop.on_disk import Sizes
from benchmarks.loop.update import Mismatch, gradient_gap
from benchmarks.loop.variants import VARIANTS

WORKER = Path(__file__).with_name("worker.py")
SUMMED = ("seconds", "rollout_seconds", "teacher_seconds", "loss")
Step = dict[str, float]


class Process:
    """A process that takes the steps of a variant, or of one of its parts."""

    def __init__(self, folder: Path, name: str, part: int) -> None:
        self.gradients = folder / f"gradients-{name}.{part}.pt"
        self._log = folder / f"{name}.{part}.log"
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), str(folder), name, str(part)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._above = 0.0

    def step(self, watched: bool = False) -> Step:
        """Have it take a step. watched: it gives free memory back before, so that the step's can be
        seen; otherwise it first touches as much as a step needs, so that its time can."""
        order = {"watched": watched, "warm_mib": self._above}
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and its log says why
        answer = self._process.stdout.readline()
        if not answer:
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(f"{self._log.stem} has ended: {(said or ['without a word'])[-1]}")
        found = json.loads(answer)
        if watched:
            self._above = found["peak_mib"] - found["held_mib"]
        return found

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class Contender:
    """A variant with the processes of all its parts, whose steps come one after the other."""

    def __init__(self, folder: Path, name: str, sizes: Sizes) -> None:
        self.name, self.sizes, self._folder = name, sizes, folder
        self._parts: list[Process] = []
        self.steps: list[Step] = []
        """The timed ones."""
        self.first: Step = {}
        self.watched: Step = {}
        self.gap = float("nan")

    def start(self) -> Step:
        """Take the first step, on everybody's completions."""
        for part in range(len(VARIANTS[self.name].parts(self.sizes))):
            self._parts.append(Process(self._folder, self.name, part))
        self.first = self._step()
        return self.first

    def watch(self) -> None:
        self.watched = self._step(watched=True)

    def time(self) -> None:
        self.steps.append(self._step())

    def end(self) -> None:
        for part in self._parts:
            part.end()

    def gradients(self) -> Path:
        """Return a file with the first step's gradients, of all parts together."""
        if len(self._parts) == 1:
            return self._parts[0].gradients
        each = [torch.load(part.gradients) for part in self._parts]
        names = set().union(*each)
        total = {n: sum(found[n] for found in each if n in found) for n in names}
        file = self._folder / f"gradients-{self.name}.pt"
        torch.save(total, file)
        return file

    def compare(self, truth: Contender, tolerance: float) -> None:
        """Raise Mismatch if the first step's loss or gradients are not those of ``truth``."""
        self.gap = gradient_gap(self.gradients(), truth.gradients())
        mine, its = self.first["loss"], truth.first["loss"]
        # The policy term is the mean of advantages, 0 up to rounding: its loss has no scale.
        if not (abs(mine - its) <= tolerance * max(1.0, abs(its)) and self.gap <= tolerance):
            raise Mismatch(
                f"{self.name} has the loss {mine:.7g} and gradients off by {self.gap:.1e}, "
                f"{truth.name} the loss {its:.7g}; expected the same"
            )

    def _step(self, watched: bool = False) -> Step:
        found = [part.step(watched) for part in self._parts]
        for step in found:
            counts = {step["sampled"], step["trained"]}
            if counts != {self.sizes.tokens}:
                raise Mismatch(
                    f"{self.name} sampled {step['sampled']:g} tokens and trained on "
                    f"{step['trained']:g}; expected {self.sizes.tokens} of both"
                )
        top = max(found, key=lambda step: step["peak_mib"])
        return {
            **{name: sum(step[name] for step in found) for name in SUMMED},
            **{name: top[name] for name in ("peak_mib", "held_mib")},
        }
