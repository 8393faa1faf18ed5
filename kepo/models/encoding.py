"""Prompts as tensors, and completions as text: the tokenizer and image processor of a model.

Their conventions: prompts are padded on the left, completions on the right, a prompt's images come
before its text, and image tokens are marked in ``mm_token_type_ids``, without which their positions
are silently wrong in some versions of transformers. Nothing is ever truncated. How a picture
becomes numbers and tokens is its family's affair (kepo.models.families).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kepo.data.images import open_rgb, size_of
from kepo.errors import KepoConfigError, KepoDataError
from kepo.models.conventions import closed, turn
from kepo.models.families.family import Pictures
from kepo_kernels.compute.devices import moved

IMAGE_CACHE_BYTES = 256 * 2**20
"""Bytes of patches kept per encoder, so that an image met every epoch is decoded once."""


@dataclass(frozen=True)
class Prompt:
    """Text without chat markup, and the images it is about, shown before it in this order."""

    text: str
    images: tuple[Path, ...] = ()
    """Paths of the images; a single path may be given without a tuple."""
    earlier: tuple[tuple[str, str], ...] = ()
    """The turns before this one, (role, text) each, without images."""

    def __post_init__(self) -> None:
        given = self.images
        paths = (given,) if isinstance(given, str | Path) else tuple(given)
        object.__setattr__(self, "images", tuple(Path(path) for path in paths))


@dataclass(frozen=True)
class Inputs:
    """B encoded prompts; all tensors on one device.

    An image is there once however many prompts show it, so a model's vision tower has to see it
    once: ``image_places`` says which images each prompt shows.
    """

    input_ids: Tensor  # (B, L) int64, padded on the left
    attention_mask: Tensor  # (B, L) int64, 0 on padding
    mm_token_type_ids: Tensor  # (B, L) int64, 1 on image tokens
    pixel_values: Tensor  # (sum of rows, values of a row...), the images one after another
    image_grid_thw: Tensor  # (images, 3) int64, each one's grid; the product is its rows
    image_places: tuple[tuple[int, ...], ...]  # B times the rows of image_grid_thw, in order

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> Inputs:
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        there: dict[str, Any] = {name: moved(x, device) for name, x in tensors.items()}
        return replace(self, **there)

    def repeat(self, n: int) -> Inputs:
        """Return each prompt n times in a row: p0 p0 .. p1 p1 .."""
        if n < 1:
            raise KepoConfigError(f"Inputs.repeat: n is {n}; expected a number >= 1")
        return self.select(torch.arange(len(self)).repeat_interleave(n))

    def select(self, indices: Sequence[int] | Tensor) -> Inputs:
        """Return the prompts at these places, in order; repeats are allowed. The padding stays."""
        rows = torch.as_tensor(indices, device=self.input_ids.device)
        if rows.dtype == torch.bool or rows.dim() != 1:
            raise KepoConfigError(
                f"Inputs.select: indices have dtype {rows.dtype} and shape {tuple(rows.shape)}; "
                "expected a list of whole numbers"
            )
        rows = rows.long()
        chosen = [self.image_places[i] for i in rows.tolist()]
        shown = list(dict.fromkeys(place for places in chosen for place in places))
        now_at = {place: new for new, place in enumerate(shown)}
        return Inputs(
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            mm_token_type_ids=self.mm_token_type_ids[rows],
            pixel_values=self.patches(shown),
            image_grid_thw=self.image_grid_thw[shown],
            image_places=tuple(tuple(now_at[place] for place in places) for places in chosen),
        )

    def patches(self, places: Sequence[int]) -> Tensor:
        """Return ``pixel_values`` of the images at these places, one after another."""
        if list(places) == list(range(len(self.image_grid_thw))):
            return self.pixel_values
        images = self.pixel_values.split(self.image_grid_thw.prod(-1).tolist())
        return torch.cat([self.pixel_values[:0], *(images[place] for place in places)])

    def followed_by(self, completion_ids: Tensor, completion_mask: Tensor) -> Inputs:
        """Return the prompts with a completion ``(B, T)`` each, which has no image in it; T places
        of mask 0 are padding."""
        text = torch.zeros_like(completion_ids)
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, completion_ids], dim=1),
            attention_mask=torch.cat([self.attention_mask, completion_mask.long()], dim=1),
            mm_token_type_ids=torch.cat([self.mm_token_type_ids, text], dim=1),
        )


@dataclass
class Encoder:
    """A tokenizer and image processor that turn prompts into a model's inputs and its tokens into
    text. All tensors are on the CPU."""

    tokenizer: Any
    pictures: Pictures | None
    """How pictures are read; None for a model that sees none."""
    end_ids: tuple[int, ...] = ()
    """Tokens that end a completion, first the one that ends a worked answer. () = the tokenizer's
    own end token."""
    control_ids: frozenset[int] = frozenset()
    """Tokens that are no text: they are never decoded, and no text may hold them."""
    opened: str = ""
    """The text that the chat template starts an answer with (``<think>\\n``); a completion's text
    begins with it, though its tokens do not."""
    positions: int | None = None
    """The number of tokens that the model has positions for, prompt plus completion. None = any."""
    _patches: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _counts: dict[tuple, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.end_ids = tuple(self.end_ids) or (self.tokenizer.eos_token_id,)
        image = () if self.pictures is None else (self.pictures.token,)
        known = (*self.control_ids, *self.end_ids, *image, self.tokenizer.pad_token_id)
        self.control_ids = frozenset(known)

    @property
    def image_token_id(self) -> int | None:
        return None if self.pictures is None else self.pictures.token

    @property
    def image_processor(self) -> Any:
        return None if self.pictures is None else self.pictures.processor

    def encode(self, prompts: Sequence[Prompt]) -> Inputs:
        """Apply the chat template, expand image placeholders, pad on the left.

        Repeated prompts are tokenised once, and repeated images are read once. Raises KepoDataError
        if there are no prompts, if an image is unreadable or of a shape that the image processor
        refuses, or if a text has control tokens in it, which would end its turn.
        """
        if not prompts:
            raise KepoDataError("Encoder.encode: prompts is empty; expected at least one")
        distinct = list(dict.fromkeys(prompts))
        order: dict[tuple, int] = {}  # where each image comes
        images: list[tuple[Tensor, Tensor]] = []
        rows: dict[Prompt, list[int]] = {}
        places: dict[Prompt, tuple[int, ...]] = {}
        for prompt, ids in zip(distinct, self.chat_ids(distinct), strict=True):
            keys = [_key(path) for path in prompt.images]
            for path, key in zip(prompt.images, keys, strict=True):
                if key not in order:
                    order[key] = len(images)
                    images.append(self._image(path, key))
            places[prompt] = tuple(order[key] for key in keys)
            grids = [images[place][1] for place in places[prompt]]
            rows[prompt] = self._expanded(prompt, ids, grids)

        length = max(map(len, rows.values()))
        pad = self.tokenizer.pad_token_id
        input_ids = torch.tensor([[pad] * (length - len(rows[p])) + rows[p] for p in prompts])
        lengths = torch.tensor([len(rows[prompt]) for prompt in prompts])
        mask = torch.arange(length) >= (length - lengths)[:, None]
        return Inputs(
            input_ids=input_ids,
            attention_mask=mask.long(),
            mm_token_type_ids=(mask & self._is_image(input_ids)).long(),
            pixel_values=torch.cat([p for p, _ in images]) if images else torch.zeros(0, 0),
            image_grid_thw=torch.stack([grid for _, grid in images])
            if images
            else torch.zeros(0, 3, dtype=torch.long),
            image_places=tuple(places[prompt] for prompt in prompts),
        )

    def encode_completions(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts as ``(completion_ids, completion_mask)`` of ``generate``, with the end
        token.

        The text that the chat template starts an answer with (`opened`) is not repeated; a text
        that does not begin with it first closes it. Raises KepoDataError for a text with control
        tokens in it.
        """
        self._refuse_control_tokens("encode_completions", "completion", texts)
        rows = [row + [self.end_ids[0]] for row in self._ids([self._unsaid(t) for t in texts])]
        length = max(map(len, rows), default=0)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows]).long()
        lengths = torch.tensor([len(row) for row in rows]).long()
        mask = torch.arange(length) < lengths[:, None]
        return ids, mask

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Return each row's text where mask is True; control tokens are left out, format tags stay.

        It begins with the text that the chat template starts an answer with (`opened`), if any.
        """
        rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu().bool(), strict=True)]
        said = [[token for token in row if token not in self.control_ids] for row in rows]
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=False)
        return [self.opened + text if row else text for row, text in zip(rows, texts, strict=True)]

    def control_tokens_in(self, text: str) -> list[str]:
        """Return the control tokens that a text would be read as having, in order; [] if none."""
        found = [token for token in self._ids([text])[0] if token in self.control_ids]
        return self.tokenizer.convert_ids_to_tokens(found)

    def image_tokens(self, width: int, height: int) -> int:
        """Return how many tokens a picture of this size becomes.

        Raises ValueError, the image processor's, for a shape that it refuses.
        """
        assert self.pictures is not None, "the caller knows that this model sees"
        count = self.pictures.count_by_size(self.pictures.processor, width, height)
        return len(self.pictures.tokens(count))

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return each prompt's number of tokens, those of its images included; of an image only the
        header is read."""
        distinct = list(dict.fromkeys(prompts))
        known = dict(zip(distinct, self.text_lengths(distinct), strict=True))
        for prompt in distinct:
            known[prompt] += sum(self._tokens_of(path) for path in prompt.images)
        return [known[prompt] for prompt in prompts]

    def text_lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return each prompt's number of tokens without those of its images; no image is read."""
        image = self.image_token_id
        return [sum(token != image for token in ids) for ids in self.chat_ids(prompts)]

    def chat_ids(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return each prompt's ids as the chat template writes them, with one placeholder for each
        image, which is not read; raises KepoDataError as `encode` does."""
        said = [text for prompt in prompts for _, text in (*prompt.earlier, ("", prompt.text))]
        self._refuse_control_tokens("encode", "prompt", said)
        for prompt in prompts:
            if prompt.images and self.pictures is None:
                raise KepoDataError(
                    f"Encoder.encode: the prompt {prompt.text!r} shows {prompt.images[0]}, and the "
                    "model sees no pictures; expected text alone, or a vision-language model"
                )
        images = self.pictures is not None
        chats = [
            [
                *(turn(role, text, 0 if images else None) for role, text in prompt.earlier),
                turn("user", prompt.text, len(prompt.images) if images else None),
            ]
            for prompt in prompts
        ]
        texts = self.tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        return self._ids(texts)

    # ---- private ----

    def _is_image(self, ids: Tensor) -> Tensor:
        image = self.image_token_id
        return torch.zeros_like(ids, dtype=torch.bool) if image is None else ids == image

    def _refuse_control_tokens(self, function: str, what: str, texts: Sequence[str]) -> None:
        for text, ids in zip(texts, self._ids(texts), strict=True):
            if not self.control_ids.isdisjoint(ids):
                raise KepoDataError(
                    f"Encoder.{function}: the {what} {text!r} has the control tokens "
                    f"{self.control_tokens_in(text)} in it; expected text alone: take them out"
                )

    def _unsaid(self, text: str) -> str:
        """Return a completion's text without what the template has said already."""
        if not self.opened:
            return text
        for said in (self.opened, self.opened.strip()):
            if text.startswith(said):
                return text.removeprefix(said)
        return closed(self.opened) + text

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise whole texts, whatever truncation and padding the tokenizer's files ask for."""
        if not texts:
            return []
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise KepoDataError(
                    f"Encoder: the text {text!r} has half a character in it ({error}); expected "
                    "text that UTF-8 can write"
                ) from error
        plain = dict(add_special_tokens=False, truncation=False, padding=False)
        return self.tokenizer(list(texts), **plain)["input_ids"]

    def _expanded(self, prompt: Prompt, ids: list[int], grids: Sequence[Tensor]) -> list[int]:
        """Return the ids with each image's placeholder as often as the image has tokens."""
        found = sum(token == self.image_token_id for token in ids)
        if found != len(grids):
            raise KepoDataError(
                f"Encoder.encode: the prompt {prompt.text!r} gives {found} image placeholders; "
                f"expected {len(grids)}, one per image: check that the chat template writes them"
            )
        if self.pictures is None:
            return ids
        shown = [self.pictures.count(self.pictures.processor, grid) for grid in grids]
        runs = iter([self.pictures.tokens(count) for count in shown])
        return [
            token for one in ids for token in (next(runs) if one == self.pictures.token else [one])
        ]

    def _tokens_of(self, path: Path) -> int:
        key = _key(path)
        if key not in self._counts:
            width, height = size_of(path)
            try:
                self._counts[key] = self.image_tokens(width, height)
            except ValueError as error:
                raise _refused(path, width, height, error) from error
        return self._counts[key]

    def _image(self, path: Path, key: tuple) -> tuple[Tensor, Tensor]:
        """Return rows ``(n, values...)`` and grid ``(3,)`` of an image, cached while unchanged."""
        if key not in self._patches:
            assert self.pictures is not None, "refused before"
            image = open_rgb(path)
            try:
                entry = self.pictures.read(self.pictures.processor, image)
            except ValueError as error:
                raise _refused(path, image.width, image.height, error) from error
            room = IMAGE_CACHE_BYTES - entry[0].nbytes
            held = sum(patches.nbytes for patches, _ in self._patches.values())
            while self._patches and held > room:
                held -= self._patches.pop(next(iter(self._patches)))[0].nbytes  # oldest first
            self._patches[key] = entry
        return self._patches[key]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _refused(path: Path, width: int, height: int, error: ValueError) -> KepoDataError:
    return KepoDataError(
        f"Encoder.encode: the image processor refuses {path}, of {width} x {height} pixels: {error}"
    )


def _key(path: Path) -> tuple:
    """Return a key that stays the same as long as an image file does."""
    try:
        stat = path.stat()
    except OSError as error:
        raise KepoDataError(f"Encoder.encode: image {path} cannot be read: {error}") from error
    return str(path), stat.st_mtime_ns, stat.st_size
