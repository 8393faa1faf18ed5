"""Image files: find them inside a root, decode them, and tell their contents apart."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from kepo.data.example import Example
from kepo.data.pixels import LARGE, MAX_PIXELS, Turns, as_rgb, bands, give_back_memory, pixels_of
from kepo.data.records import BadRecord, Sources, shown
from kepo.disk.durable import make_folder, write_durably
from kepo.disk.files import expanded, printable, require_regular
from kepo.errors import KepoDataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""The only decoders that are used on a dataset's files."""
MAX_IMAGE_BYTES = 16 * MAX_PIXELS
"""The largest image file that is opened, in bytes: MAX_PIXELS pixels of four floats each."""
NEARLY_BLACK = 32
"""A picture is nearly black if all but 0.1 % of its pixels are darker, of 255."""
FLAT = 16
"""A picture is flat if all but 0.1 % of its pixels at either end lie in fewer levels, of 256."""
_DECODERS = 8  # threads; decoding leaves Python's lock
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_turns = Turns(MAX_PIXELS)


def load_image(example: Example, number: int = 0) -> Image.Image:
    """Return one of the example's images as RGB; raises KepoDataError if it cannot be decoded."""
    return open_rgb(example.images[number])


def open_rgb(path: Path) -> Image.Image:
    """Decode an image file fully, as RGB; raises KepoDataError, which names the file, if it fails.

    Transparent parts lie on white, as in Qwen's own utilities. A picture is turned as its EXIF
    says. Of an animation or a file of several pages, the first picture is read.

    Grey of more than 8 bits is scaled so that its brightest value is white, the brightest 0.1 % of
    the pixels left out: files do not say how many of 16 bits a scanner has filled. Values below 256
    stay as they are, and a picture of all 16 bits keeps its upper byte, as browsers show it. The
    numbers of 32-bit and floating-point pictures have no agreed white: such a picture is read if
    they are whole numbers from 0 to 65535, and refused otherwise.

    An image of more than MAX_PIXELS is refused by its header, before a pixel is decoded, and all
    threads of a process together decode at most MAX_PIXELS at a time: a thread waits for its turn.
    Only regular files are opened.
    """
    try:
        return _in_turn(path, lambda rgb: rgb)
    except Exception as error:  # broken bytes may make a decoder raise anything
        raise _unreadable(path, error) from error


def size_of(path: Path) -> tuple[int, int]:
    """Return width and height of an image file as its header says, before any turning; raises
    KepoDataError, which names the file, if it cannot be read."""
    try:
        with _opened(path) as image:
            return image.size
    except Exception as error:  # broken bytes may make a decoder raise anything
        raise _unreadable(path, error) from error


def _in_turn(path: Path, work: Callable[[Image.Image], Any]) -> Any:
    """Wait for this thread's turn, decode the image as RGB, and return ``work(image)``."""
    with _opened(path) as image:
        pixels = pixels_of(image)
    with _turns.of(pixels):
        try:
            return _worked(path, work)
        finally:
            if pixels > LARGE:
                give_back_memory()


def _worked(path: Path, work: Callable[[Image.Image], Any]) -> Any:
    # A function of its own, so that what it held is free before the turn ends.
    with _opened(path) as image:
        return work(as_rgb(image))


def _opened(path: Path) -> Image.Image:
    """Return the image with only its header read.

    Raises ValueError or OSError if it must not be decoded.
    """
    size = require_regular(path)
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"it has {size} bytes; expected at most {MAX_IMAGE_BYTES}")
    image = Image.open(path, formats=FORMATS)
    if (pixels := pixels_of(image)) > MAX_PIXELS:
        image.close()
        raise ValueError(
            f"{image.width} x {image.height} pixels are too many (a tile or frame may add to them: "
            f"{pixels}); expected at most {MAX_PIXELS}, so make it smaller"
        )
    return image


def _unreadable(path: Path, error: Exception) -> KepoDataError:
    return KepoDataError(f"{printable(path)}: {error}; expected a readable PNG or JPEG")


def locate(sources: Sources, root: Path) -> tuple[Path, ...]:
    """Return the absolute path of each image, a file inside root; images that come as bytes are
    first written to the cache.

    Links are followed, and must not lead out of root, so that no record can. There is one
    exception: a folder directly in root may itself be a link, such as ``Images`` on another disk,
    if its target does not contain root; nothing may lead out of that target in turn.

    Raises BadRecord for a path that leads out of root or to no file.
    """
    found = sources() if callable(sources) else sources
    return tuple(_locate(source, root) for source in found)


def _locate(source: str | bytes, root: Path) -> Path:
    if isinstance(source, bytes):
        return _cached(source)
    if not source:
        raise BadRecord("image missing", "has neither the image nor its path")
    if _ADDRESS.match(source):
        raise BadRecord(
            "image missing", f"image {shown(source)} is an address; expected a file: fetch it first"
        )
    try:
        image = (root / source).resolve()
        inside, exists = _inside(image, source, root), image.exists()
        if inside and exists:
            require_regular(image)
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, a name too long, links in a ring
        raise BadRecord("image missing", f"image {shown(source)} is no image: {error}") from error
    if not inside:
        raise BadRecord(
            "image outside",
            f"image {shown(source)} leads to {image}, outside {root}; images must stay inside it, "
            "but a folder directly in it may be a link to another place",
        )
    if not exists:
        raise BadRecord("image missing", f"image not found at {image}")
    return image


def _inside(image: Path, source: str, root: Path) -> bool:
    if image.is_relative_to(root):
        return True
    first = Path(source).parts[0]
    if first == ".." or Path(source).is_absolute() or not (root / first).is_symlink():
        return False
    folder = (root / first).resolve()
    return folder.is_dir() and image.is_relative_to(folder) and not root.is_relative_to(folder)


def _cached(content: bytes) -> Path:
    """Return a file of this content under $KEPO_CACHE or ~/.cache/kepo, named by the content."""
    home = expanded(os.environ.get("KEPO_CACHE") or Path.home() / ".cache" / "kepo")
    name = hashlib.sha256(content).hexdigest()
    file = (home / "images" / name[:2] / name).absolute()
    try:
        # A power loss may have left a file of this name without its content.
        if not file.is_file() or file.read_bytes() != content:
            make_folder(file.parent)
            write_durably(file, content)
    except OSError as error:
        raise KepoDataError(
            f"{file}: an image of the dataset cannot be kept there: {error}; set KEPO_CACHE to a "
            "folder that can be written"
        ) from error
    return file.resolve()


@dataclass(frozen=True)
class Look:
    """What decoding an image showed: a digest of its pixels, and whether anything can be seen."""

    digest: str
    """The SHA-256 of size and pixels as ``open_rgb`` gives them, however the picture is stored."""
    faint: str
    """"nearly black" or "flat" if little or nothing can be seen, otherwise ""."""


def looks_of(images: Iterable[Path], *, progress: bool = False) -> dict[Path, Look | KepoDataError]:
    """Decode every image once; return a `Look` at each, or the error of one that fails.

    progress: show a bar.
    """
    distinct = list(dict.fromkeys(images))
    with ThreadPoolExecutor(min(_DECODERS, os.cpu_count() or 1)) as pool:
        found = pool.map(_look, distinct)
        bar = tqdm(found, total=len(distinct), desc="images", disable=not progress, delay=1)
        try:
            return dict(zip(distinct, bar, strict=True))
        except BaseException:  # a signal: do not decode the others first
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def digests_of(
    images: Iterable[Path], *, progress: bool = False
) -> dict[Path, str | KepoDataError]:
    """Return the SHA-256 of size and pixels of each image, equal however the picture is stored.

    Every image is decoded once; an error stands in for one that cannot be decoded.
    progress: show a bar.
    """
    return digests_in(looks_of(images, progress=progress))


def digests_in(looks: dict[Path, Look | KepoDataError]) -> dict[Path, str | KepoDataError]:
    """Return each look's digest; where an error stands in place of a look, return the error."""
    return {path: seen.digest if isinstance(seen, Look) else seen for path, seen in looks.items()}


def _look(path: Path) -> Look | KepoDataError:
    try:
        return _in_turn(path, lambda rgb: Look(_digest(rgb), _faint(rgb)))
    except Exception as error:
        return _unreadable(path, error)


def _digest(rgb: Image.Image) -> str:
    digest = hashlib.sha256(repr(rgb.size).encode())
    for _, rows in bands(rgb):
        digest.update(rows.tobytes())
    return digest.hexdigest()


def _faint(rgb: Image.Image) -> str:
    counts = np.asarray(rgb.convert("L").histogram()).cumsum()
    low, high = np.searchsorted(counts, [0.001 * counts[-1], 0.999 * counts[-1]])
    if high < NEARLY_BLACK:
        return "nearly black"
    return "flat" if high - low < FLAT else ""
