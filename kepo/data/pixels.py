"""Turn every kind of picture that decoders give into 8-bit RGB, and limit how many are decoded at
a time."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import Image, ImageFile

MAX_PIXELS = 2**26
"""The pixels of the largest image that is decoded, 8192 x 8192: more than a radiograph or a
photograph has, and five times what a model's processor keeps. While an image is made RGB, a pixel
takes 9 to 13 bytes as measured, and 20 in a WebP file."""

LARGE = 2**22
"""The pixels above which an image is large: after it, free memory goes back to the system."""

CLIPPED = 0.001
"""The share of the pixels of deep grey that may be brighter than white."""

_ORIENTATION = 0x0112  # in EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_GREY_STEPS = {"1": 255, "L;2": 85, "L;4": 17}  # in PNG: steps between levels of 1, 2 or 4 bits
_PHOTOMETRIC, _TILE_WIDTH, _TILE_LENGTH = 262, 322, 323  # in TIFF


def pixels_of(image: Image.Image) -> int:
    """Return how many pixels are held in memory while the image is decoded; reads its header."""
    tags = getattr(image, "tag_v2", {})
    tile = int(tags.get(_TILE_WIDTH, 1)) * int(tags.get(_TILE_LENGTH, 1))
    return max(image.width * image.height, tile)


def give_back_memory() -> None:
    """Return freed memory to the system, which glibc otherwise keeps for each thread by itself."""
    with suppress(AttributeError, OSError, TypeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)


class Turns:
    """A limit on what threads use together: they enter in the order in which they come, each once
    its amount and those of the threads inside add up to at most ``limit``.

    A thread that asks for more than ``limit`` waits until no other is inside.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._taken = 0
        self._queue = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def of(self, amount: int) -> Iterator[None]:
        with self._queue, self._changed:  # whoever waits keeps later ones from overtaking
            self._changed.wait_for(lambda: self._taken == 0 or self._taken + amount <= self._limit)
            self._taken += amount
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()


def as_rgb(image: Image.Image) -> Image.Image:
    """Return the image decoded, upright, opaque on white, in mode RGB; see ``images.open_rgb``.

    Raises ValueError for pixels that have no agreed white.
    """
    _scale_key(image)
    low = _low_bytes(image)
    image.load()
    method = _UPRIGHT.get(_orientation(image))
    key = image.info.get("transparency")
    inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _from_deep_grey(image, key, inverted)
    elif low is not None and key is not None:
        image.paste((255, 255, 255), mask=_where_deep(image, low, key))
    elif key is not None or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = _on_white(image)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image if method is None else image.transpose(method)


def _scale_key(image: Image.Image) -> None:
    """Scale the transparent value of a PNG to 8 bits.

    PNG gives it in the file's bits, and Pillow compares it with 8 of them.
    """
    key, tile = image.info.get("transparency"), getattr(image, "tile", ())
    if key is None or image.format != "PNG" or not tile:
        return
    raw = tile[0][3]
    if raw in _GREY_STEPS and isinstance(key, int):
        image.info["transparency"] = key * _GREY_STEPS[raw]


def _low_bytes(image: Image.Image) -> Image.Image | None:
    """Return the lower bytes of a 16-bit colour PNG that has a transparent value; for any other
    image None. Pillow keeps the upper bytes, in which different values look alike.

    The image must not have been loaded yet.
    """
    if not isinstance(image, ImageFile.ImageFile):  # made, not opened from a file
        return None
    tile = image.tile
    key = image.info.get("transparency")
    if key is None or image.format != "PNG" or not tile or tile[0][3] != "RGB;16B":
        return None
    assert image.fp is not None, "an image that was not loaded has its file open"
    image.fp.seek(0)
    low = Image.open(image.fp, formats=["PNG"])
    place = low.tile[0][:3]
    # Little endian: it takes the second byte for the upper one. Pillow reads any tuple.
    low.tile = [(*place, "RGB;16L")]  # type: ignore[list-item]  # its class has no public name
    low.load()
    return low


def _where_deep(image: Image.Image, low: Image.Image, key: tuple[int, ...]) -> Image.Image:
    """Return a mask of the pixels whose 16 bits, put together from two bytes, equal the key."""
    mask = np.empty((image.height, image.width), np.uint8)
    for (top, upper), (_, lower) in zip(bands(image), bands(low), strict=True):
        same = (upper == [value >> 8 for value in key]) & (lower == [value & 255 for value in key])
        mask[top : top + len(upper)] = same.all(-1) * np.uint8(255)
    return Image.fromarray(mask)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF says nothing; the pixels were read all the same
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    image = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _from_deep_grey(image: Image.Image, key: object, inverted: bool) -> Image.Image:
    """Return deep grey as 8 bits. key: the transparent value, or None; inverted: 0 is white."""
    parts = [(part.min(), part.max(), (part != np.trunc(part)).any()) for _, part in bands(image)]
    low, high = min(low for low, _, _ in parts), max(high for _, high, _ in parts)
    # This comparison also refuses NaN, which is neither less nor more than a number.
    if not all(low >= 0 and high <= 65535 and not broken for low, high, broken in parts):
        raise ValueError(
            f"mode {image.mode} with values from {low} to {high} has no agreed white; save it with "
            "8 bits, or with whole numbers from 0 to 65535"
        )
    top = _brightest(image)
    shown = np.empty((image.height, image.width), np.uint8)
    for first, part in bands(image):
        rows = shown[first : first + len(part)]
        rows[:] = (part.astype(np.uint32) * 256 // (top + 1)).clip(0, 255)
        if inverted:
            rows[:] = 255 - rows
        if isinstance(key, int):
            rows[part == key] = 255
    return Image.fromarray(shown).convert("RGB")


def _brightest(image: Image.Image) -> int:
    """Return the value of deep grey that is shown as white; what is above it is white too.

    Few files of 16 bits say how many of them are in use, and scanners leave the upper ones empty: a
    slice of a 12-bit MR may end at 600. So white is the brightest value but for CLIPPED of the
    pixels, which a label, a vessel or a broken detector makes brighter than all the rest. Values
    below 256 stay as they are, and a picture that uses all 16 bits keeps its upper byte.
    """
    counts = np.zeros(2**16, np.int64)
    for _, part in bands(image):
        counts += np.bincount(part.astype(np.uint16).ravel(), minlength=2**16)
    total = counts.cumsum()
    allowed = int(CLIPPED * total[-1])
    top = int(np.searchsorted(total, total[-1] - allowed))
    return 2**16 - 1 if top >= 2**15 else max(top, 255)


def bands(image: Image.Image) -> Iterator[tuple[int, np.ndarray]]:
    """Yield ``(first row, pixels)`` of an image in parts of whole rows, about a million pixels
    each."""
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        below = min(top + rows, image.height)
        yield top, np.asarray(image.crop((0, top, image.width, below)))
