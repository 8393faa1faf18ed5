"""A model with its encoder: generate, hidden states, save and load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kepo.distributed.processes import any_rank, is_rank0, world_size
from kepo.distributed.sharding import gathered, whole_state, whole_tensor
from kepo.errors import KepoConfigError, KepoDataError
from kepo.models.device import known_device
from kepo.models.encoding import Encoder, Inputs, Prompt
from kepo.models.families.family import Family
from kepo.models.families.registry import family_of
from kepo.models.packing import on_their_axes, pack, prompt_positions, why_not_packed
from kepo.models.reading import load_encoder, read_model
from kepo.models.sampling import Sampled, SamplingLaw, SamplingParams, Written, greedy
from kepo.models.vision import check_length, forward_inputs
from kepo_kernels import Head, head_of

T = TypeVar("T")
CPU = torch.device("cpu")


@dataclass
class VLM:
    """A model, the encoder that turns prompts into its tensors, and how its weights are held."""

    model: Any
    encoder: Encoder
    device: torch.device = CPU
    wrapper: nn.Module | None = None
    """The module through which the ranks compute with the model, see kepo.distributed.sharding;
    None = `run_wrapped` calls its work directly."""
    sharded: bool = False
    """True if each rank has a share of the weights: then every forward needs all ranks."""
    gathers: bool = False
    """True if sharded weights are gathered while the model is `ready` to sample."""
    adapters: Any = None
    """The peft wrapper, where adapters are trained and saved in place of the model; else None."""
    share_prompts: bool = False
    """True if `completion_states` computes a prompt once for all its completions."""
    _gathered: bool = False

    @classmethod
    def load(cls, path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> VLM:
        """Read a folder or Hub name: config, safetensors, tokenizer, image processor.

        Only safetensors are read, and no code of the folder is run. dtype: "float32", "bfloat16" or
        "float16". device: as `known_device` takes it. Raises KepoConfigError for another dtype or
        device, KepoCheckpointError if something is missing or broken, if the files contradict each
        other (kepo.models.conventions), or if the model is of no family (kepo.models.families).
        """
        dtypes = ("float32", "bfloat16", "float16")
        if dtype not in dtypes:
            raise KepoConfigError(f"VLM.load: dtype is {dtype!r}; expected one of {dtypes}")
        place = known_device(device)
        model = read_model(path, getattr(torch, dtype))
        encoder = load_encoder(path, model)
        return cls(model.to(place).eval(), encoder, place)

    def save(self, path: str | Path) -> None:
        """Write the layout that ``load`` and ``from_pretrained`` read; for adapters, peft's.

        All ranks of a sharded model call; rank 0 writes.
        """
        saved = self.adapters or self.model
        settings: dict[str, Any] = {}
        if self.sharded:
            only = "lora_" if self.adapters else ""
            settings["state_dict"] = whole_state(saved, only)
        if not is_rank0():
            return
        if self.adapters:
            settings["save_embedding_layers"] = False
        saved.save_pretrained(path, **settings)
        for part in (self.encoder.tokenizer, self.encoder.image_processor):
            if part is not None:
                part.save_pretrained(path)

    def run_wrapped(self, work: Callable[[], T]) -> T:
        """Return ``work()``, with the weights there for it and the gradients shared afterwards.

        `generate` does this itself; a loss on `completion_states` and `head` is computed within
        one such call, if the model may be spread over ranks. All ranks call.
        """
        return work() if self.wrapper is None else self.wrapper(work)

    @property
    def family(self) -> Family:
        return family_of(self.model.config)

    @property
    def head(self) -> Head:
        """The head with all that the model does to its logits, as the losses take it. Its (V, H)
        weight may have more rows than the tokenizer has tokens."""
        return head_of(self.model)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter unsharded, one at a time, with its name. All ranks iterate."""
        for name, parameter in self.model.named_parameters():
            yield name, whole_tensor(parameter.detach())

    @property
    def head_rows(self) -> int:
        """The number V of rows of the head, perhaps of a sharded weight."""
        return self.model.get_output_embeddings().weight.shape[0]

    def never_sampled(self) -> list[int]:
        """Return the ids that are no text and no end: placeholders, padding, rows of the head that
        the tokenizer has no token for."""
        ids = self.family.marks(self.model.config, self.tokenizer)
        ids |= {self.tokenizer.pad_token_id} - set(self.encoder.end_ids)
        return sorted(ids | set(range(len(self.tokenizer), self.head_rows)))

    # ---- prompts and text: the encoder's, on the model's device ----

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    def encode(self, prompts: Sequence[Prompt]) -> Inputs:
        return self.encoder.encode(prompts).to(self.device)

    def encode_completions(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self.encoder.encode_completions(texts)
        return ids.to(self.device), mask.to(self.device)

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        return self.encoder.decode(ids, mask)

    # ---- as a Sampler ----

    @property
    def collective(self) -> bool:
        return self.sharded and not self._gathered

    @contextmanager
    def ready(self) -> Iterator[None]:
        if not (self.sharded and self.gathers):
            yield
            return
        assert self.wrapper is not None, "a sharded model is wrapped"
        with gathered(self.wrapper):
            self._gathered = True
            try:
                yield
            finally:
                self._gathered = False

    def write(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int] | None
    ) -> list[Written]:
        """Return the texts of what `sample` returns."""
        ids, mask, _ = self.sample(prompts, params, seeds)
        return [*map(Written, self.decode(ids, mask), mask.sum(-1).tolist())]

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
    ) -> Sampled:
        """Return the result of `generate` for prompts, on the CPU."""
        sampled = self.generate(self.encode(prompts), params, seeds)
        return Sampled(*(x.cpu() for x in sampled))

    def close(self) -> None:
        """Do nothing: the model samples with what it trains, so there is nothing to free."""

    # ---- model ----

    def generate(
        self,
        inputs: Inputs,
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
    ) -> Sampled:
        """Sample ``params.n`` completions per prompt, those of a prompt in a row.

        A row that is True throughout in the mask and has none of ``encoder.end_ids`` was cut off.

        Placeholder, pad and padding-row tokens cannot be sampled. Only the end tokens of the
        model's generation_config.json are obeyed: its top_k, penalties and banned words would make
        the sampling law differ from the one that is trained. seeds: one per completion, and then a
        completion does not depend on which others are sampled beside it, rounding apart. None draws
        them from torch's global generator. Leaves the mode (train or eval) as it was.
        """
        from kepo.models.generation import Generation, generate  # imports transformers

        check_length(self.model, inputs, params.max_tokens)
        choose: Any = greedy
        if not params.greedy:
            seeds = params.seeds_for(len(inputs), seeds)
            assert seeds is not None, "only greedy sampling has no seeds"
            choose = SamplingLaw(params.temperature, params.top_p, seeds, params.max_tokens)
        never = torch.tensor(self.never_sampled(), dtype=torch.long, device=inputs.input_ids.device)

        def draw(logits: Tensor, rows: Tensor, place: int) -> tuple[Tensor, Tensor]:
            return choose(logits.float().index_fill_(1, never, -torch.inf), rows, place)

        together = self.collective and world_size() > 1
        any_goes_on = any_rank if together else bool
        how = Generation(params.n, params.max_tokens, self.encoder.end_ids, any_goes_on)
        with _eval_mode(self.model):
            completion_ids, logprobs = self.run_wrapped(
                lambda: generate(self.model, inputs, draw, how)
            )
        ended = torch.isin(completion_ids, completion_ids.new_tensor(self.encoder.end_ids))
        completion_mask = (ended.cumsum(-1) - ended.long()) == 0  # nothing before me ended
        pad = completion_ids.new_tensor(self.tokenizer.pad_token_id)
        return Sampled(
            torch.where(completion_mask, completion_ids, pad),
            completion_mask,
            torch.where(completion_mask, logprobs, 0.0),
        )

    @property
    def why_not_packed(self) -> str | None:
        """Why the model cannot `share_prompts`, by its attention or its family; None if it can."""
        return why_not_packed(self.model.config)

    def completion_states(
        self, prompts: Sequence[Prompt], completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor:
        """Return last hidden states ``(B, T, H)`` of B completions under B prompts, on the model's
        device; the one at t predicts ``completion_ids[:, t]``.

        `head` makes the model's logits of them (for most models ``completion_states @
        head.weight.T``).
        completion_ids ``(B, T)``,
        completion_mask ``(B, T)`` bool, both on the CPU; what stands at masked places does not
        matter, and the states there mean nothing. Equal prompts are computed once if
        `share_prompts`, else each time. Carries gradients unless the caller turned them off.
        """
        if not self.share_prompts:
            inputs, *completions = self.encoder.encode(prompts), completion_ids, completion_mask
            return self.completion_hidden(
                inputs.to(self.device), *(x.to(self.device) for x in completions)
            )
        number: dict[Prompt, int] = {}
        prompt_of = [number.setdefault(prompt, len(number)) for prompt in prompts]
        inputs = self.encoder.encode(list(number))
        return self.packed_hidden(inputs, completion_ids, completion_mask, prompt_of)

    def packed_hidden(
        self,
        inputs: Inputs,
        completion_ids: Tensor,
        completion_mask: Tensor,
        prompt_of: Sequence[int],
    ) -> Tensor:
        """Return what `completion_hidden` returns for ``inputs.select(prompt_of)``, up to rounding,
        from one row for each prompt with all its completions (kepo.models.packing).

        All inputs are on the CPU. prompt_of: for each completion the number of its prompt.
        """
        check_length(self.model, inputs, completion_ids.shape[1])
        positions = prompt_positions(self.model, inputs)
        rows = pack(inputs, positions, completion_ids, completion_mask.bool(), prompt_of)
        rows = rows.to(self.device)
        given = forward_inputs(self.model, inputs.to(self.device)) | {
            "input_ids": rows.input_ids,
            "position_ids": on_their_axes(rows.positions),
            "attention_mask": rows.attention_mask(self.model.dtype),
        }
        if "mm_token_type_ids" in given:
            given["mm_token_type_ids"] = rows.types
        return rows.predicting(self.model.base_model(**given, use_cache=False).last_hidden_state)

    def completion_hidden(
        self, inputs: Inputs, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor:
        """Return last hidden states ``(B, T, H)``; the one at t predicts ``completion_ids[:, t]``.

        `head` makes the model's logits of them. completion_ids ``(B, T)``,
        completion_mask ``(B, T)`` bool; what stands at masked places does not matter, and the
        states there mean nothing. Carries gradients unless the caller turned them off.
        """
        batch, length = inputs.input_ids.shape
        if completion_ids.shape != completion_mask.shape or completion_ids.shape[0] != batch:
            raise KepoDataError(
                f"VLM.completion_hidden: {batch} prompts, completion_ids "
                f"{tuple(completion_ids.shape)}, completion_mask {tuple(completion_mask.shape)}; "
                "expected one completion per prompt (see Inputs.repeat) and equal shapes"
            )
        check_length(self.model, inputs, completion_ids.shape[1])
        keep = completion_mask.bool()
        pad = completion_ids.new_tensor(self.tokenizer.pad_token_id)
        filled = torch.where(keep, completion_ids, pad)
        states = self.model.base_model(
            **forward_inputs(self.model, inputs.followed_by(filled, keep)),
            use_cache=False,
        ).last_hidden_state
        return states[:, length - 1 : -1]


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
