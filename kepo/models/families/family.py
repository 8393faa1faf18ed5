"""The record of a model family, and what several families have in common."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

Make = Callable[..., Tensor]
"""A function that makes a tensor of a shape: (*shape) -> tensor."""
Piece = tuple[nn.Module, Callable[[], Tensor]]
"""A part of a model, and a call that runs it once."""


@dataclass(frozen=True)
class Pictures:
    """How a model's pictures become rows of ``pixel_values`` and tokens of a prompt.

    A picture's grid is three numbers (3,) int64 whose product is its number of rows.
    """

    processor: Any
    """The image processor of transformers that is saved beside the model."""
    token: int
    """The id that the chat template writes once for a picture, and of all the picture's tokens."""
    read: Callable[[Any, Any], tuple[Tensor, Tensor]]
    """A function: processor, picture -> rows of pixel_values, grid."""
    count: Callable[[Any, Tensor], int]
    """A function: processor, grid -> number of the picture's tokens."""
    count_by_size: Callable[[Any, int, int], int]
    """A function: processor, width, height in pixels -> number of the picture's tokens. Raises
    ValueError, the processor's, for a shape that it refuses."""
    before: tuple[int, ...] = ()
    """Ids that the model wants before a picture's tokens and its template does not write."""
    after: tuple[int, ...] = ()
    """Ids that it wants after them."""
    vllm: Callable[[Any], dict[str, Any]] | None = None
    """A function: processor -> settings by which vLLM resizes pictures as it does; None if vLLM is
    not known to read this family's pictures alike."""

    def tokens(self, count: int) -> list[int]:
        """Return the ids that a picture of so many tokens is in a prompt."""
        return [*self.before, *[self.token] * count, *self.after]


class TinySize(NamedTuple):
    """The sizes of a tiny model, for tests and the demonstration."""

    hidden: int
    layers: int
    heads: int
    vision_hidden: int
    vision_depth: int
    tied: bool = False
    """True if the head is the embedding."""


class Tiny(NamedTuple):
    """How tiny models of a family are made on the spot."""

    loads: str
    """The name of transformers' class."""
    config: Callable[[Any, TinySize], Any]
    """A function: tokenizer, sizes -> transformers' config."""
    finish: Callable[[Path, Any], None]
    """A function that writes tokenizer, chat template and preprocessor into a model's folder."""
    control_tokens: tuple[str, ...] = ()
    """Tokens that enclose pictures, if the tokenizer needs more than Qwen's."""


class Tower(NamedTuple):
    """A vision tower as the planner takes it apart; all its blocks are alike.

    Pictures are given as patches: a picture of n tokens has ``n * patches_per_token``.
    """

    blocks: nn.ModuleList
    patches_per_token: int
    patch_values: int
    """Numbers of a patch in ``pixel_values``."""
    default_tokens: Callable[[int | None, int | None], int]
    """A function: fewest, most pixels of a picture (None = no limit) -> the tokens of one of
    384 x 384 pixels within them."""
    features: int
    """Copies of a picture's tokens that go to the language model: one for its first layer, and one
    for each that DeepStack feeds."""
    block: Callable[[Make, int, int], Piece]
    """A function: make, pictures, patches of each -> one block's run on them."""
    embed: Callable[[Make, int], Piece]
    """A function: make, patches -> the run that makes states of pixels, which are float32."""
    mergers: Callable[[Make, int], Sequence[Piece]]
    """A function: make, patches -> the runs that make tokens of states, the last block's last."""


@dataclass(frozen=True)
class Family:
    """What the loop, the loader and the planner must know of a model family."""

    name: str
    model_types: tuple[str, ...]
    """The ``model_type`` of its configs; () = every causal language model that no other claims."""
    loads: str
    """The name of the auto class of transformers that loads it."""
    pictures: Callable[[str | Path, Any, Any], Pictures] | None
    """A function: path, config, tokenizer -> how pictures are read. None = it sees none."""
    marks: Callable[[Any, Any], set[int]]
    """A function: config, tokenizer -> the tokens that stand for pictures or enclose them. They
    are no text and are never sampled."""
    check: Callable[[Any], None]
    """A function that raises KepoCheckpointError for a model that this package cannot train."""
    positions: Callable[[Any, Any], Tensor]
    """A function: model, Inputs -> (axes, B, L) int64 on the CPU, the positions of the prompts'
    tokens; 0 on padding. A completion goes on from the largest, the same on all axes."""
    arguments: Callable[[Any, Any], dict[str, Any]]
    """A function: model, Inputs -> what forward takes beside ids, mask and pictures."""
    unshareable: Callable[[Any], str | None]
    """A function: config -> why completions cannot share a prompt's row, or None."""
    decoder: Callable[[Any], Any]
    """A function: model -> the module that has ``layers`` and, after them, ``norm``."""
    adapted: str
    """The layers that LoRA adapts: a pattern for their names, or peft's ``all-linear``."""
    vision: Callable[[Any], list[nn.Module]] = lambda model: []
    """A function: model -> the modules that only pictures go through; [] if it sees none."""
    features: Callable[[Any, Any], Any] | None = None
    """A function: model, Inputs -> the features of all their pictures, each once."""
    placed: Callable[[Any, Any, Sequence[int]], Any] | None = None
    """A function: features, Inputs, places -> the features of the pictures at these places."""
    tower: Callable[[Any], Tower] | None = None
    """A function: model -> its vision tower, taken apart; None if it sees no pictures."""
    unplanned: tuple[str, ...] = ()
    """Those of ``model_types`` whose memory the planner cannot count."""
    tiny: Tiny | None = None


def layers_of(family: Family, model: Any) -> list[nn.Module]:
    """Return the layers of the language model and the blocks of the vision tower."""
    blocks: Iterable[nn.Module] = family.tower(model).blocks if family.tower else ()
    return [*family.decoder(model).layers, *blocks]


def taken(kind: Any) -> frozenset[str]:
    """Return the names of the arguments that the forward of a module's class takes."""
    return _names(kind.forward)


@functools.cache
def _names(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def plain_positions(model: Any, inputs: Any) -> Tensor:
    """Return (1, B, L): tokens counted from 0, for models that do not tell pictures from text."""
    return (inputs.attention_mask.cpu().cumsum(-1) - 1).clamp(min=0)[None]


def plain_arguments(model: Any, inputs: Any) -> dict[str, Any]:
    """Return the positions: the padding on the left would be counted without them."""
    positions = plain_positions(model, inputs)[0]
    return {"position_ids": positions.to(inputs.input_ids.device)}


def windows(config: Any) -> str | None:
    """Return why a model's rows cannot be packed, None if they can: a packed row has one mask for
    all layers, so every layer must see all tokens before a token."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        window = getattr(text, "sliding_window", None)
        uses = window is not None and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention"] if uses else []
    others = sorted({kind for kind in kinds if kind != "full_attention"})
    if not others:
        return None
    return (
        f"{config.model_type} has layers of {' and '.join(others)}, which take masks of their own"
    )
