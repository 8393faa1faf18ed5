"""The memory of a model's two towers, from one layer of each and what passes between them.

With checkpointing a layer keeps only its input, and computes everything a second time when its
own backward runs.
"""

from __future__ import annotations

from typing import NamedTuple

from kepo.planner.model_sizes import ModelSizes
from kepo.planner.trace import Traced


class Kept(NamedTuple):
    """The bytes of a tower that runs with gradients."""

    kept: int
    """Bytes kept from forward to backward."""
    forward: int
    """The most bytes during forward."""
    backward: int
    """The most bytes during backward, above ``kept``."""


def text_training(
    model: ModelSizes, rows: int, length: int, checkpointing: bool, packed: bool
) -> Kept:
    """Return the bytes of the language model when it runs with gradients."""
    layer, norm = model.layer(rows, length, True, packed), model.norm(rows, length, True)
    states = state_bytes(model, rows, length)
    shared = states + _shared(model, rows, length, packed)
    last = norm.kept
    if not checkpointing:
        kept = shared + len(model.layers) * layer.kept + last
        return Kept(kept, kept - last + layer.forward - layer.kept, layer.backward)
    kept = shared + len(model.layers) * states + last
    forward = kept - last + model.layer(rows, length, False, packed).forward
    return Kept(kept, forward, layer.kept + layer.backward)


def _shared(model: ModelSizes, rows: int, length: int, packed: bool) -> int:
    """Return the bytes that all layers share: the mask, and the sines and cosines."""
    width = model.dtype.itemsize if packed else 1
    mask = width * rows * length * length if model.masks else 0
    return mask + 2 * rows * length * model.head_dim * model.dtype.itemsize


def vision_training(model: ModelSizes, images: int, patches: int, checkpointing: bool) -> Kept:
    """Return the bytes of the vision tower, which keeps only its outputs if it is not trained; none
    without pictures."""
    if not images * patches:
        return Kept(0, 0, 0)
    train = model.trains_vision
    run = _VisionRun.of(model, images, patches, train)
    if not train:
        return Kept(run.outputs, run.outputs + run.most, 0)
    embedded = model.patch_embedding(images * patches, train).kept
    block = run.block
    backward = max(block.backward, *(merger.backward for merger in run.mergers))
    if not checkpointing:
        kept = run.outputs + embedded + len(model.blocks) * block.kept
        return Kept(kept, kept + block.forward - block.kept, backward)
    kept = run.outputs + (1 + len(model.blocks)) * embedded
    again = model.block(images, patches, False).forward
    return Kept(kept, kept + again, block.kept + backward)


class _VisionRun(NamedTuple):
    """One forward of the vision tower."""

    block: Traced
    mergers: list[Traced]
    outputs: int
    """Bytes of the pixels, and of the tokens made of them."""

    @classmethod
    def of(cls, model: ModelSizes, images: int, patches: int, train: bool) -> _VisionRun:
        mergers = model.mergers(images * patches, train)
        outputs = image_bytes(model, images, patches, train)
        return cls(model.block(images, patches, train), mergers, outputs)

    @property
    def most(self) -> int:
        """The most bytes beside ``outputs`` in a forward that keeps nothing."""
        return self.block.kept + max(self.block.forward, *(m.forward for m in self.mergers))


def image_bytes(model: ModelSizes, images: int, patches: int, train: bool = False) -> int:
    """Return the bytes of the pixels, in fp32, and of what the mergers keep: without gradients,
    only the tokens made of the pixels."""
    if not images * patches:
        return 0
    tokens = sum(merger.kept for merger in model.mergers(images * patches, train))
    return pixel_bytes(model, images, patches) + tokens


def pixel_bytes(model: ModelSizes, images: int, patches: int) -> int:
    return images * patches * model.patch_values * 4


def placed_bytes(model: ModelSizes, rows: int, image_tokens: int) -> int:
    """Return the bytes of the images' features, copied into every row that shows them."""
    return rows * image_tokens * model.hidden * model.dtype.itemsize * model.features


def state_bytes(model: ModelSizes, rows: int, length: int) -> int:
    """Return the bytes of (rows, length) hidden states."""
    return rows * length * model.hidden * model.dtype.itemsize


def inference(
    model: ModelSizes, rows: int, length: int, images: int, patches: int, packed: bool
) -> int:
    """Return the most bytes at a time in a forward without gradients, from images to states."""
    seen = most = 0
    if images * patches:
        run = _VisionRun.of(model, images, patches, False)
        seen, most = run.outputs, run.most
    states = state_bytes(model, rows, length)
    text = (
        states
        + _shared(model, rows, length, packed)
        + model.layer(rows, length, False, packed).forward
    )
    return seen + max(most, text)
