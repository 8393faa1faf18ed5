"""A model taken apart on the meta device: the size of each part, and the memory to run it.

The layers of a tower are alike, so one layer is run (`kepo.planner.trace`) and counted once for
each of them. `kepo.planner.memory` adds up what the parts pass to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kepo.data.network import look_for_hub
from kepo.errors import KepoConfigError
from kepo.models.adapters import with_adapters
from kepo.models.families.family import Family, Tower
from kepo.models.families.registry import family_of
from kepo.models.packing import why_not_packed
from kepo.models.reading import auto_class, refused_attention
from kepo.planner.known_models import KNOWN, known_model
from kepo.planner.trace import Traced, trace_inference, trace_training
from kepo.sections import ModelsConfig


@dataclass(frozen=True, eq=False)
class ModelSizes:
    """A model without its weights."""

    model: Any
    dtype: torch.dtype
    device: str
    """The device whose attention kernels are counted: cpu or cuda."""
    attention: str | None = None
    """The attention that the run will use; None = transformers' own choice."""
    pixels: tuple[int | None, int | None] = (None, None)
    """The fewest and most pixels of a picture, as the settings have them."""

    # ---- sizes ----

    @property
    def text(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def hidden(self) -> int:
        return self.text.hidden_size

    @property
    def vocab(self) -> int:
        return self.text.vocab_size

    @property
    def tied(self) -> bool:
        return self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight

    @property
    def layers(self) -> nn.ModuleList:
        return self.family.decoder(self.model).layers

    @cached_property
    def family(self) -> Family:
        return family_of(self.model.config)

    @property
    def masks(self) -> bool:
        """Whether attention is given a mask; flash attention is not."""
        return not (self.attention and "flash" in self.attention)

    def shares_prompts(self, config: ModelsConfig) -> bool:
        """Return whether a run computes a prompt once for all its completions."""
        return config.share_prompts and why_not_packed(self.model.config, self.attention) is None

    @cached_property
    def tower(self) -> Tower | None:
        """The vision tower; None if the model sees no pictures."""
        return self.family.tower(self.model) if self.family.tower else None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.tower.blocks) if self.tower else []

    @property
    def patches_per_token(self) -> int:
        return self.tower.patches_per_token if self.tower else 0

    @property
    def default_image_tokens(self) -> int:
        """Tokens of an image of 384 x 384 pixels; more or fewer if the settings do not let it be as
        large."""
        return self.tower.default_tokens(*self.pixels) if self.tower else 0

    @property
    def features(self) -> int:
        """Copies of an image's tokens: one for the first layer, and one for each of DeepStack's."""
        return self.tower.features if self.tower else 1

    @property
    def patch_values(self) -> int:
        return self.tower.patch_values if self.tower else 0

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of the keys and values that all layers cache for one token."""
        heads = self.text.num_key_value_heads
        return 2 * len(self.layers) * heads * self.head_dim * self.dtype.itemsize

    @cached_property
    def counts(self) -> Counts:
        """The numbers of the model's parameters, in all and by part."""
        inside = {id(p) for layer in [*self.layers, *self.blocks] for p in layer.parameters()}
        named = dict(self.model.named_parameters())
        root = [p for p in named.values() if id(p) not in inside]
        return Counts(
            total=count(named.values()),
            trained=count(trained(named.values())),
            largest=max(p.numel() for p in named.values()),
            largest_trained=max((p.numel() for p in trained(named.values())), default=0),
            adapters=count(p for name, p in named.items() if "lora_" in name),
            layer=count(self.layers[0].parameters()),
            layer_trained=count(trained(self.layers[0].parameters())),
            root=count(root),
            root_trained=count(trained(root)),
            linear=sum(m.weight.numel() for m in self._inner_linears()),
            largest_linear=max(m.weight.numel() for m in self._inner_linears()),
        )

    @property
    def trains_vision(self) -> bool:
        modules = self.family.vision(self.model)
        return any(True for module in modules for _ in trained(module.parameters()))

    @property
    def trains_head(self) -> bool:
        return self.model.get_output_embeddings().weight.requires_grad

    def _inner_linears(self) -> list[nn.Linear]:
        return [
            module
            for name, module in self.model.base_model.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name
        ]

    @property
    def head_dim(self) -> int:
        text = self.text
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    # ---- pieces at work ----

    @lru_cache  # noqa: B019  lives as long as the process, as does the model
    def layer(self, sequences: int, length: int, train: bool, packed: bool) -> Traced:
        """Trace one decoder layer on (sequences, length) tokens, of packed rows or of others."""
        x, layer = self._meta(sequences, length, self.hidden, train=train), self.layers[0]
        rotary, mask = self._rotary(sequences, length), self._mask(sequences, length, length)
        if packed and mask is not None:  # as kepo.models.packing makes it
            mask = mask.to(self.dtype)
        return self._run(
            layer, lambda: layer(x, position_embeddings=rotary, attention_mask=mask), train
        )

    def decoding_layer(self, sequences: int, length: int) -> int:
        """Return the bytes that a decoder layer needs to compute one token, above a cache that
        holds ``length`` tokens, this one among them."""
        # With one query, everything grows linearly with the length.
        short, long = (self._decoding(sequences, n) for n in (512, 1024))
        return max(0, short + (long - short) * (length - 512) // 512)

    @lru_cache  # noqa: B019
    def _decoding(self, sequences: int, length: int) -> int:
        x, rotary = self._meta(sequences, 1, self.hidden), self._rotary(sequences, 1)
        mask = self._mask(sequences, 1, length)
        heads = self.text.num_key_value_heads
        keys, values = (self._meta(sequences, heads, length, self.head_dim) for _ in range(2))
        name = "cache" if "cache" in _argument_names(self.layers[0]) else "past_key_values"
        given = {name: _Filled(keys, values)}
        call = partial(self.layers[0], x, position_embeddings=rotary, attention_mask=mask, **given)
        return trace_inference(call, self.device).forward

    @lru_cache  # noqa: B019
    def norm(self, sequences: int, length: int, train: bool) -> Traced:
        """Trace the norm after the last layer."""
        x = self._meta(sequences, length, self.hidden, train=train)
        norm = self.family.decoder(self.model).norm
        return self._run(norm, lambda: norm(x), train)

    def block(self, images: int, patches: int, train: bool) -> Traced:
        """Trace one block of the vision tower on ``images`` of ``patches`` patches each."""
        if images <= 4:
            return self._block(images, patches, train)
        # Attention stays within an image, so beyond a few images everything grows linearly.
        few, some = (self._block(n, patches, train) for n in (2, 4))
        return some.further(few, (images - 4) / 2)

    @lru_cache  # noqa: B019
    def _block(self, images: int, patches: int, train: bool) -> Traced:
        assert self.tower is not None, "the caller asks models that see"
        make = partial(self._meta, train=train)
        return self._run(*self.tower.block(make, images, patches), train)

    @lru_cache  # noqa: B019
    def mergers(self, patches: int, train: bool) -> list[Traced]:
        """Trace the parts that turn patches into tokens, the one after the last block last."""
        assert self.tower is not None, "the caller asks models that see"
        pieces = self.tower.mergers(partial(self._meta, train=train), patches)
        return [self._run(*piece, train) for piece in pieces]

    @lru_cache  # noqa: B019
    def patch_embedding(self, patches: int, train: bool) -> Traced:
        assert self.tower is not None, "the caller asks models that see"
        return self._run(*self.tower.embed(partial(self._meta, train=train), patches), train)

    @lru_cache  # noqa: B019
    def drawing(self, sequences: int, temperature: float, top_p: float) -> int:
        """Return the bytes, above the head's output, that drawing one token for each sequence
        takes."""
        from kepo.models.sampling import SamplingLaw

        copies = 0 if self.dtype == torch.float32 else sequences * self.vocab * 4
        if temperature == 0:
            return copies
        scores = torch.empty(sequences, self.vocab, device="meta")
        law = SamplingLaw(temperature, top_p, [0] * sequences, 1)
        rows = torch.arange(sequences)
        return copies + trace_inference(lambda: law(scores, rows, 0), self.device).forward

    # ---- private ----

    def _run(self, module: nn.Module, call: Callable[[], Any], train: bool) -> Traced:
        if train:
            return trace_training(call, module.parameters(), self.device)
        return trace_inference(call, self.device)

    def _meta(self, *shape: int, train: bool = False) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="meta", requires_grad=train)

    def _mask(self, sequences: int, queries: int, keys: int) -> Tensor | None:
        if not self.masks:
            return None
        return torch.empty(sequences, 1, queries, keys, dtype=torch.bool, device="meta")

    def _rotary(self, sequences: int, length: int) -> tuple[Tensor, Tensor]:
        return (
            self._meta(sequences, length, self.head_dim),
            self._meta(sequences, length, self.head_dim),
        )


class _Filled(NamedTuple):
    """A layer's cache that has taken the token in already."""

    keys: Tensor
    values: Tensor

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters."""

    total: int
    trained: int
    largest: int
    """Parameters of the largest tensor."""
    largest_trained: int
    """Parameters of the largest tensor that is trained."""
    adapters: int
    layer: int
    """Parameters of one decoder layer."""
    layer_trained: int
    root: int
    """Parameters outside the layers of both towers: embedding, head, norms, and the parts around
    the vision tower's blocks."""
    root_trained: int
    linear: int
    """Parameters in matrices that quantisation makes smaller: every linear layer but the head."""
    largest_linear: int


def count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def trained(parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
    return (parameter for parameter in parameters if parameter.requires_grad)


@cache
def model_sizes(
    name: str,
    dtype: str,
    device: str,
    attention: str | None = None,
    lora_rank: int = 0,
    freeze_vision: bool = False,
    pixels: tuple[int | None, int | None] = (None, None),
) -> ModelSizes:
    """Return the model of that name as a run with these settings would hold it.

    attention: transformers' attn_implementation; None = its default. lora_rank: 0 = no adapters.
    pixels: the settings min_pixels and max_pixels.
    """
    config = read_config(name)
    with torch.device("meta"):
        try:
            model = auto_class(config).from_config(
                config,
                dtype=getattr(torch, dtype),
                # Flash attention need not be installed: without a mask sdpa keeps the same.
                attn_implementation="sdpa" if "flash" in (attention or "") else attention,
            )
        except (ValueError, ImportError) as error:
            refused = refused_attention(name, attention, error)
            if refused is None:
                raise
            raise refused from error
    model.tie_weights()
    if lora_rank:
        with_adapters(model, lora_rank, alpha=lora_rank, seed=0)
    elif freeze_vision:
        for module in family_of(config).vision(model):
            module.requires_grad_(False)
    decoder = family_of(config).decoder(model)
    if not (hasattr(decoder, "layers") and hasattr(decoder, "norm")):
        raise KepoConfigError(
            f"{name}: a {type(model).__name__} cannot be planned; expected a decoder with layers "
            "and a norm after them, as Qwen3 and Llama have"
        )
    return ModelSizes(model, getattr(torch, dtype), device, attention, pixels)


def read_config(name: str) -> Any:
    """Return the config of a model: from a folder, a bundled record, or the Hub, in this order.

    Raises KepoConfigError if the config cannot be read or is of no family that can be planned.
    """
    from transformers import AutoConfig

    known = known_model(name)
    if not Path(name).is_dir() and known is not None:
        return known.config()
    look_for_hub(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise KepoConfigError(
            f"{name}: its config cannot be read: {error}; expected a model's folder, a Hub "
            f"name that can be reached, or one of {', '.join(KNOWN)}"
        ) from error
    try:
        unplanned = family_of(config).unplanned
    except LookupError as error:
        raise KepoConfigError(f"{name} {error.args[0]}") from error
    if config.model_type in unplanned:
        raise KepoConfigError(
            f"{name} is a model of type {config.model_type!r}, which trains but whose memory "
            "cannot be counted here"
        )
    return config


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(inspect.unwrap(type(module).forward)).parameters)
