"""Pieces of slices: where they are cut, so that no two splits share a voxel, and how they are
drawn."""

from __future__ import annotations

import numpy as np
from PIL import Image

CROP = 24
"""The voxels, and mm, on each side of a piece."""
ENLARGED = 4
"""The pixels of the picture per voxel: a token of the tiny models sees 32 pixels."""
ROW, COLUMN = 10, 14
"""Where in a piece the place lies that is asked about: in the middle of one of the tiny models'
patches of 16 pixels."""
FRAME = 5
"""The pixels between that place and the frame that marks it."""
PLANES = ("axial", "coronal", "sagittal")
ACROSS = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
"""The axes of the brain that run to the right and upwards in a picture of each plane."""

Place = tuple[int, int, int]

BANDS = {
    "train": (range(40, 54), range(116, 130), range(192, 206)),
    "validation": (range(78, 92),),
    "test": (range(154, 168),),
}
"""The places, from the back to the front, at which the middle of a piece may lie; from one band to
the next it is CROP. A band goes through both sides, which mirror each other."""


def spans(plane: str, middle: Place) -> dict[int, slice]:
    """Return the voxels of a piece along each of the two axes that its picture shows."""
    right, up = ACROSS[plane]
    first = middle[right] - COLUMN, middle[up] - (CROP - 1 - ROW)
    return {right: slice(first[0], first[0] + CROP), up: slice(first[1], first[1] + CROP)}


def is_whole(shape: tuple[int, ...], plane: str, middle: Place) -> bool:
    """Return whether the piece around ``middle`` lies inside a volume of this shape."""
    found = spans(plane, middle).items()
    return all(span.start >= 0 and span.stop <= shape[axis] for axis, span in found)


def cut(volume: np.ndarray, plane: str, middle: Place) -> np.ndarray:
    """Return the piece ``(CROP, CROP)`` of the slice through ``middle``, which must be whole; up is
    up, and ``middle`` is at ROW and COLUMN."""
    across = spans(plane, middle)
    return volume[tuple(across.get(axis, middle[axis]) for axis in range(3))].T[::-1]


def drawn(piece: np.ndarray, marked: bool) -> Image.Image:
    """Return the picture of a piece, enlarged; the voxel at ROW and COLUMN stands in a white frame
    if it is marked."""
    side = CROP * ENLARGED
    image = Image.fromarray(np.ascontiguousarray(piece))
    pixels = np.array(image.resize((side, side), Image.Resampling.BILINEAR))
    if marked:
        row, column = ROW * ENLARGED, COLUMN * ENLARGED
        rows, columns = (slice(at - FRAME, at + FRAME + ENLARGED) for at in (row, column))
        framed = pixels[rows, columns]
        framed[[0, -1]] = framed[:, [0, -1]] = 255
    return Image.fromarray(pixels)
