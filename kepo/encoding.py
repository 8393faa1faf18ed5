"""Prompts as tensors, and completions as text: the tokenizer and image processor of a model.

Their conventions: prompts are padded on the left, completions on the right, each prompt has one
image, and image tokens are marked in ``mm_token_type_ids``, without which their positions are
silently wrong in some versions of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kepo.errors import KepoConfigError, KepoDataError
from kepo.images import open_rgb

IMAGE_CACHE_BYTES = 256 * 2**20
"""Patches kept per encoder, so that an image met every epoch is decoded once."""


@dataclass(frozen=True)
class Prompt:
    """Text without chat markup and the image it is about."""

    text: str
    image: Path


@dataclass(frozen=True)
class Inputs:
    """B encoded prompts with one image each; all tensors on one device."""

    input_ids: Tensor  # (B, L) int64, padded on the left
    attention_mask: Tensor  # (B, L) int64, 0 on padding
    mm_token_type_ids: Tensor  # (B, L) int64, 1 on image tokens
    pixel_values: Tensor  # (sum of patches, values per patch), the images one after another
    image_grid_thw: Tensor  # (B, 3) int64, patches of each image in time, height, width

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> Inputs:
        moved = {name: x.to(device, non_blocking=True) for name, x in vars(self).items()}
        return replace(self, **moved)

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
class Encoder:
    """What turns prompts into a model's inputs and its tokens into text. Its tensors are on the
    CPU."""

    tokenizer: Any
    image_processor: Any
    image_token_id: int
    _patches: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def encode(self, prompts: Sequence[Prompt]) -> Inputs:
        """Apply the chat template, expand image placeholders, pad on the left.

        Raises KepoDataError if there are no prompts, if an image is unreadable, or if a text itself
        contains an image placeholder.
        """
        if not prompts:
            raise KepoDataError("Encoder.encode: prompts is empty; expected at least one")
        images = [self._image(Path(prompt.image)) for prompt in prompts]
        merge = self.image_processor.merge_size**2
        rows = []
        for prompt, ids, (_, grid) in zip(prompts, self._chat_ids(prompts), images, strict=True):
            found = ids.count(self.image_token_id)
            if found != 1:
                raise KepoDataError(
                    f"Encoder.encode: the prompt {prompt.text!r} gives {found} image placeholders; "
                    "expected 1: take the placeholder out of the text, and check that the chat "
                    "template writes one per image"
                )
            at = ids.index(self.image_token_id)
            count = int(grid.prod()) // merge
            rows.append(ids[:at] + [self.image_token_id] * count + ids[at + 1 :])

        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(length) >= (length - lengths)[:, None]
        return Inputs(
            input_ids=input_ids,
            attention_mask=mask.long(),
            mm_token_type_ids=(mask & (input_ids == self.image_token_id)).long(),
            pixel_values=torch.cat([patches for patches, _ in images]),
            image_grid_thw=torch.stack([grid for _, grid in images]),
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
        return ids, mask

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Text of each row where mask is True; control tokens are left out, format tags stay."""
        rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    # ---- private ----

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
            raise KepoDataError(f"Encoder.encode: image {path} cannot be read: {error}") from error
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
