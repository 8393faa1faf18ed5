"""The ways to take a whole step that step.py knows, each an entry of a table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.loop import ours, trl_steps
from benchmarks.loop.on_disk import Sizes

Run = Callable[[Path, str, Sizes], None]
"""Takes steps in a folder of `on_disk`, under a name there, as `orders` tells it to."""


def _anywhere(sizes: Sizes) -> str:
    return ""


class Variant(NamedTuple):
    run: Run
    colour: str
    words: str
    """Its name in the plot."""
    cannot: Callable[[Sizes], str] = _anywhere
    """Says why it cannot be run here, or nothing."""
    taught: Run | None = None
    """What follows in a process of its own where there is a teacher, which ``run`` does not ask."""

    def parts(self, sizes: Sizes) -> list[Run]:
        return [self.run] + ([self.taught] if self.taught and sizes.teacher else [])


def _without_trl(sizes: Sizes) -> str:
    missing = [name for name in ("trl", "datasets", "accelerate") if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}; pip install 'kepo[bench]'" if missing else ""


def _without_liger(sizes: Sizes) -> str:
    if sizes.device != "cuda":
        return "TRL's Liger path is Triton kernels for layers, which need a GPU"
    return _without_trl(sizes) or ("" if find_spec("liger_kernel") else "no liger-kernel here")


def _ours(colour: str, words: str, **changed: object) -> Variant:
    return Variant(partial(ours.run, changed=changed), colour, words)


def _trl(
    colour: str, words: str, cannot: Callable[[Sizes], str], fused: bool = False, **changed: object
) -> Variant:
    grpo = partial(trl_steps.grpo, changed=changed, fused=fused)
    return Variant(grpo, colour, words, cannot, partial(trl_steps.distillation, fused=fused))


VARIANTS = {
    "shared": _ours("#c0392b", "ours", share_prompts=True),
    "rows": _ours("#e59866", "ours, a prompt for each completion", share_prompts=False),
    "trl": _trl("#2980b9", "TRL", _without_trl),
    "trl-kepo": _trl("#8e44ad", "TRL, our losses", _without_trl, fused=True),
    "trl-liger": _trl("#16a085", "TRL, Liger's layers", _without_liger, use_liger_kernel=True),
}
