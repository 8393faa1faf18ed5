"""A Qwen-VL model with its tokenizer and image processor: encode, generate, hidden states.

Their shared conventions: prompts are padded on the left, completions on the right, each prompt has
one image, and every forward gets ``mm_token_type_ids``, without which the positions of image tokens
are silently wrong in some versions of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kepo.data import open_rgb
from kepo.errors import KepoCheckpointError, KepoConfigError, KepoDataError
from kepo.sampling import Sampled, SamplingLaw

IMAGE_CACHE_BYTES = 256 * 2**20
"""Patches kept per VLM, so that an image met every epoch is decoded once."""


@dataclass(frozen=True)
class Prompt:
    """Text without chat markup and the image it is about."""

    text: str
    image: Path


@dataclass(frozen=True)
class Inputs:
    """B encoded prompts with one image each; all tensors on the model's device."""

    input_ids: Tensor  # (B, L) int64, padded on the left
    attention_mask: Tensor  # (B, L) int64, 0 on padding
    mm_token_type_ids: Tensor  # (B, L) int64, 1 on image tokens
    pixel_values: Tensor  # (sum of patches, values per patch), the images one after another
    image_grid_thw: Tensor  # (B, 3) int64, patches of each image in time, height, width

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def repeat(self, n: int) -> Inputs:
        """Each prompt n times in a row: p0 p0 .. p1 p1 .."""
        if n < 1:
            raise KepoConfigError(f"Inputs.repeat: n is {n}; expected a number >= 1")
        return self.select(torch.arange(len(self)).repeat_interleave(n))

    def select(self, indices: Sequence[int] | Tensor) -> Inputs:
        """The prompts at these places, in this order; repeats are allowed. The padding stays."""
        rows = torch.as_tensor(indices, device=self.input_ids.device)
        if rows.dtype == torch.bool or rows.dim() != 1:
            raise KepoConfigError(
                f"Inputs.select: indices have dtype {rows.dtype} and shape {tuple(rows.shape)}; "
                "expected a list of whole numbers"
            )
        rows = rows.long()
        images = self.pixel_values.split(self.image_grid_thw.prod(-1).tolist())
        chosen = [images[i] for i in rows.tolist()]
        return Inputs(
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            mm_token_type_ids=self.mm_token_type_ids[rows],
            pixel_values=torch.cat(chosen) if chosen else self.pixel_values[:0],
            image_grid_thw=self.image_grid_thw[rows],
        )


@dataclass
class VLM:
    """The model and what turns prompts into its tensors."""

    model: Any
    tokenizer: Any
    image_processor: Any
    _patches: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, path: str | Path, *, dtype: str = "float32", device: str = "cpu") -> VLM:
        """Read a folder or Hub name: config, safetensors, tokenizer, image processor.

        dtype: "float32", "bfloat16" or "float16". Raises KepoConfigError for another dtype,
        KepoCheckpointError if something is missing or the model is not an image-text model.
        """
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        dtypes = ("float32", "bfloat16", "float16")
        if dtype not in dtypes:
            raise KepoConfigError(f"VLM.load: dtype is {dtype!r}; expected one of {dtypes}")
        try:
            model = AutoModelForImageTextToText.from_pretrained(path, dtype=getattr(torch, dtype))
            tokenizer = AutoTokenizer.from_pretrained(path)
            image_processor = image_processor_class().from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise KepoCheckpointError(
                f"VLM.load: cannot load a vision-language model from {path}: {error}; expected "
                "config.json, *.safetensors, tokenizer files and preprocessor_config.json"
            ) from error
        vlm = cls(model.to(device).eval(), tokenizer, image_processor)
        vlm._check()
        return vlm

    def save(self, path: str | Path) -> None:
        """Write the layout that ``load`` and ``from_pretrained`` read."""
        for part in (self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(path)

    @property
    def lm_head(self) -> Tensor:
        """Output embedding ``(V, H)``; V may exceed the tokenizer's length (padding rows)."""
        return self.model.get_output_embeddings().weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.device

    # ---- prompts and text ----

    def encode(self, prompts: Sequence[Prompt]) -> Inputs:
        """Apply the chat template, expand image placeholders, pad on the left.

        Raises KepoDataError if there are no prompts, if an image is unreadable, or if a text itself
        contains an image placeholder.
        """
        if not prompts:
            raise KepoDataError("VLM.encode: prompts is empty; expected at least one")
        images = [self._image(Path(prompt.image)) for prompt in prompts]
        merge = self.image_processor.merge_size**2
        rows = []
        for prompt, ids, (_, grid) in zip(prompts, self._chat_ids(prompts), images, strict=True):
            if ids.count(self._image_id) != 1:
                raise KepoDataError(
                    f"VLM.encode: the prompt {prompt.text!r} gives {ids.count(self._image_id)} "
                    "image placeholders; expected 1: take the placeholder out of the text, and "
                    "check that the chat template writes one per image"
                )
            at = ids.index(self._image_id)
            count = int(grid.prod()) // merge
            rows.append(ids[:at] + [self._image_id] * count + ids[at + 1 :])

        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(length) >= (length - lengths)[:, None]
        on_device = dict(device=self.device, non_blocking=True)
        return Inputs(
            input_ids=input_ids.to(**on_device),
            attention_mask=mask.long().to(**on_device),
            mm_token_type_ids=(mask & (input_ids == self._image_id)).long().to(**on_device),
            pixel_values=torch.cat([patches for patches, _ in images]).to(**on_device),
            image_grid_thw=torch.stack([grid for _, grid in images]).to(**on_device),
        )

    def encode_completions(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Texts as ``(completion_ids, completion_mask)`` of ``generate``, end token included."""
        rows = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        rows = [row + [self.tokenizer.eos_token_id] for row in rows]
        length = max(map(len, rows), default=0)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows]).long()
        lengths = torch.tensor([len(row) for row in rows]).long()
        mask = torch.arange(length) < lengths[:, None]
        return ids.to(self.device), mask.to(self.device)

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Text of each row where mask is True; control tokens are left out, format tags stay."""
        rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    # ---- model ----

    def generate(
        self,
        inputs: Inputs,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        num_return_sequences: int = 1,
    ) -> Sampled:
        """Sample ``num_return_sequences`` completions per prompt, those of a prompt in a row.

        A row that is True throughout in the mask and has no end token was cut off.

        temperature: 0.0 is greedy. Placeholder, pad and padding-row tokens cannot be sampled.
        Randomness comes from torch's global generator: seed it before. Leaves the mode
        (train or eval) as it was.
        """
        if max_new_tokens < 1 or num_return_sequences < 1:
            raise KepoConfigError(
                f"VLM.generate: max_new_tokens={max_new_tokens} and num_return_sequences="
                f"{num_return_sequences}; expected both >= 1"
            )
        if not temperature >= 0 or not 0 < top_p <= 1:
            raise KepoConfigError(
                f"VLM.generate: temperature={temperature} and top_p={top_p}; expected "
                "temperature >= 0 (0 is greedy) and 0 < top_p <= 1"
            )
        from transformers import GenerationConfig

        law = SamplingLaw(temperature, top_p) if temperature > 0 else None
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=law is not None,
            temperature=1.0,
            top_p=1.0,
            top_k=0 if law else 50,
            suppress_tokens=self._never_sampled(),
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            repetition_penalty=1.0,
            num_beams=1,
            use_cache=True,
        )
        repeated = inputs.repeat(num_return_sequences)
        with _eval_mode(self.model), torch.no_grad():
            sequences = self.model.generate(
                **vars(repeated),
                generation_config=settings,
                logits_processor=[law] if law else [],
            )
        completion_ids = sequences[:, inputs.input_ids.shape[1] :]
        logprobs = law.logprobs(completion_ids) if law else torch.zeros(completion_ids.shape)
        ended = completion_ids == self.tokenizer.eos_token_id
        completion_mask = (ended.cumsum(-1) - ended.long()) == 0  # nothing before me ended
        pad = completion_ids.new_tensor(self.tokenizer.pad_token_id)
        return Sampled(
            torch.where(completion_mask, completion_ids, pad),
            completion_mask,
            torch.where(completion_mask, logprobs.to(completion_ids.device), 0.0),
        )

    def completion_hidden(
        self, inputs: Inputs, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor:
        """Last hidden states ``(B, T, H)``; the one at t predicts ``completion_ids[:, t]``.

        ``completion_hidden @ lm_head.T`` are the model's logits. completion_ids ``(B, T)``,
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
        keep = completion_mask.bool()
        pad = completion_ids.new_tensor(self.tokenizer.pad_token_id)
        filled = torch.where(keep, completion_ids, pad)
        states = self.model.model(
            input_ids=torch.cat([inputs.input_ids, filled], dim=1),
            attention_mask=torch.cat([inputs.attention_mask, keep.long()], dim=1),
            mm_token_type_ids=torch.cat(
                [inputs.mm_token_type_ids, torch.zeros_like(filled)], dim=1
            ),
            pixel_values=inputs.pixel_values,
            image_grid_thw=inputs.image_grid_thw,
            use_cache=False,
        ).last_hidden_state
        return states[:, length - 1 : -1]

    # ---- private ----

    def _check(self) -> None:
        if getattr(self.model.config, "image_token_id", None) is None:
            raise KepoCheckpointError(
                f"VLM.load: {type(self.model).__name__} has no image_token_id in its config; "
                "expected a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model"
            )
        for name in ("pad_token_id", "eos_token_id", "chat_template"):
            if getattr(self.tokenizer, name, None) is None:
                raise KepoCheckpointError(f"VLM.load: the tokenizer has no {name}; set it and save")

    @property
    def _image_id(self) -> int:
        return self.model.config.image_token_id

    def _never_sampled(self) -> list[int]:
        config = self.model.config
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {getattr(config, name, None) for name in names} - {None}
        ids |= {self.tokenizer.pad_token_id} - {self.tokenizer.eos_token_id}
        return sorted(ids | set(range(len(self.tokenizer), self.lm_head.shape[0])))

    def _chat_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": prompt.text}],
                }
            ]
            for prompt in prompts
        ]
        texts = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def _image(self, path: Path) -> tuple[Tensor, Tensor]:
        """Patches ``(n, values)`` and grid ``(3,)`` of an image file, cached while unchanged."""
        try:
            stat = path.stat()
        except OSError as error:
            raise KepoDataError(f"VLM.encode: image {path} cannot be read: {error}") from error
        key = (str(path), stat.st_mtime_ns, stat.st_size)
        if key not in self._patches:
            out = self.image_processor(images=[open_rgb(path)], return_tensors="pt")
            entry = (out["pixel_values"], out["image_grid_thw"][0])
            room = IMAGE_CACHE_BYTES - entry[0].nbytes
            held = sum(patches.nbytes for patches, _ in self._patches.values())
            while self._patches and held > room:
                held -= self._patches.pop(next(iter(self._patches)))[0].nbytes  # oldest first
            self._patches[key] = entry
        return self._patches[key]


def image_processor_class() -> Any:
    """The image processor that needs no torchvision, under the name this transformers gives it."""
    try:
        from transformers import Qwen2VLImageProcessorPil  # 5.4 and later

        return Qwen2VLImageProcessorPil
    except ImportError:
        from transformers import Qwen2VLImageProcessor  # before, this name was the PIL one

        return Qwen2VLImageProcessor


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
