"""Image files: finding them inside a root, decoding them, telling their contents apart."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from kepo.errors import KepoDataError
from kepo.example import Example
from kepo.records import BadRecord, Sources

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""The only decoders that files of a dataset get to meet."""
_DECODERS = 8  # threads; decoding leaves Python's lock


def load_image(example: Example, number: int = 0) -> Image.Image:
    """One of the example's images as RGB; KepoDataError if it cannot be decoded."""
    return open_rgb(example.images[number])


def open_rgb(path: Path) -> Image.Image:
    """Decode an image file fully, as RGB; KepoDataError names the file that cannot be decoded.

    16-bit grey keeps its upper byte, as browsers show it. Of an animation the first frame.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255: all white
                grey = np.asarray(image).astype(np.uint16) >> 8
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode} has no agreed white; save it with 8 bits")
            return image.convert("RGB")
    except Exception as error:  # of broken bytes a decoder may raise anything
        raise KepoDataError(
            f"open_rgb: cannot read the image {path}: {error}; expected a readable PNG or JPEG"
        ) from error


def locate(sources: Sources, root: Path) -> tuple[Path, ...]:
    """Absolute paths of existing files inside root; bytes are first written to the cache.

    Raises BadRecord if there are none, and for a path that leads out of root, also by a link, or to
    no file.
    """
    found = sources() if callable(sources) else sources
    if not found:
        raise BadRecord("image missing", "has no images")
    return tuple(_locate(source, root) for source in found)


def _locate(source: str | bytes, root: Path) -> Path:
    if isinstance(source, bytes):
        return _cached(source)
    if not source:
        raise BadRecord("image missing", "has neither the image nor its path")
    try:
        image = (root / source).resolve()  # follows links, so one inside root cannot lead out
        inside, exists = image.is_relative_to(root), image.is_file()
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, a name too long, links in a ring
        raise BadRecord("image missing", f"image {source!r} is no path: {error}") from error
    if not inside:
        raise BadRecord(
            "image outside",
            f"image {source!r} leads to {image}, outside {root}; images must stay inside it",
        )
    if not exists:
        raise BadRecord("image missing", f"image not found at {image}")
    return image


def _cached(content: bytes) -> Path:
    """A file of this content, under $KEPO_CACHE or ~/.cache/kepo; its name is the content's."""
    home = Path(os.environ.get("KEPO_CACHE") or Path.home() / ".cache" / "kepo")
    name = hashlib.sha256(content).hexdigest()
    file = (home / "images" / name[:2] / name).absolute()
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{name}.{os.getpid()}")
        part.write_bytes(content)
        part.replace(file)
    return file.resolve()


def digests_of(
    images: Iterable[Path], *, progress: bool = False
) -> dict[Path, str | KepoDataError]:
    """SHA-256 of size and pixels of each image, equal however the picture is stored.

    Decodes every image once; for one that cannot be decoded the error stands in its place.
    progress: show a bar.
    """
    distinct = list(dict.fromkeys(images))
    with ThreadPoolExecutor(min(_DECODERS, os.cpu_count() or 1)) as pool:
        found = pool.map(_digest, distinct)
        bar = tqdm(found, total=len(distinct), desc="images", disable=not progress, delay=1)
        try:
            return dict(zip(distinct, bar, strict=True))
        except BaseException:  # a signal: do not decode the others first
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _digest(path: Path) -> str | KepoDataError:
    try:
        image = open_rgb(path)
    except KepoDataError as error:
        return error
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
