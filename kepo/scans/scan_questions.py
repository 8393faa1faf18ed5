"""Questions about pieces of the brain, whose answers follow from where a piece was cut."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kepo.scans.brain import MIDDLE, SHAPE, TISSUES, Brain
from kepo.scans.crops import BANDS, PLANES, Place, cut, is_whole

SOURCE = "T1 axial"
"""The only modality that the student is trained on."""
MODALITIES = {
    SOURCE: ("T1", "axial"),
    "T1 coronal": ("T1", "coronal"),
    "T1 sagittal": ("T1", "sagittal"),
    "PD axial (simulated)": ("PD", "axial"),
    "T2 axial (simulated)": ("T2", "axial"),
    "FLAIR axial (simulated)": ("FLAIR", "axial"),
}
"""Contrast and plane of each modality."""
VENTRICLES = (66, 100)
"""The heights between which the bodies of the lateral ventricles lie, in voxels."""
STEEP = 2.0
"""How often as far the brain's centre lies along one axis of a piece as along the other, where the
outline is upright or level."""
CLEAR = 6
"""The voxels by which a piece is to one side, or above or below, so that the answer is no matter
of taste."""
PURE = 205
"""The least share of its tissue, of 255, that a marked voxel has."""
SEEN = 0.5
"""The least part of a piece that shows brain."""
WITH_EDGE = 0.85
"""The most of a piece that shows brain where its place is asked about: the outline is in sight."""


class Asked(NamedTuple):
    """A question about one piece, before it is drawn."""

    kind: str
    text: str
    options: tuple[str, ...]
    right: int
    """The place of the right option."""
    because: str
    """What speaks for it, without naming any option."""
    middle: Place
    marked: bool


TISSUE_NAMES = ("grey matter", "white matter", "cerebrospinal fluid")
BRIGHTNESS = {
    "T1": ("middle", "bright", "dark"),
    "PD": ("bright", "middle", "dark"),
    "T2": ("middle", "dark", "bright"),
    "FLAIR": ("bright", "middle", "dark"),
}
"""How bright each tissue is beside the other two, in the order of TISSUE_NAMES."""
CUTS = {"axial": "a flat cut", "coronal": "an upright cut", "sagittal": "a long cut"}


class Places:
    """Where pieces of one split may be cut from a brain: arrays ``(N, 3)`` of voxels."""

    def __init__(self, brain: Brain, split: str):
        self.inside = brain.inside
        band = np.concatenate([*BANDS[split]])
        self.all = self._in(band, self.inside)
        self.of_tissue = [self._in(band, brain.share(t) >= PURE) for t in TISSUES]
        x, _, z = self.all.T
        self.of_side = [self.all[x <= MIDDLE - CLEAR], self.all[x >= MIDDLE + CLEAR]]
        low, high = VENTRICLES
        self.of_level = [self.all[z > high + CLEAR], self.all[z < low - CLEAR]]

    @staticmethod
    def _in(band: np.ndarray, there: np.ndarray) -> np.ndarray:
        """Return the voxels that are True and lie at one of the places from back to front."""
        found = np.argwhere(there[:, band])
        found[:, 1] = band[found[:, 1]]
        return found

    def draw(
        self, among: np.ndarray, plane: str, rng: np.random.Generator, most: float = WITH_EDGE
    ) -> Place:
        """Return a random one of the places whose piece lies inside the volume and shows between
        SEEN and ``most`` of it brain."""
        while True:
            x, y, z = among[rng.integers(len(among))].tolist()
            middle = (x, y, z)
            if not is_whole(SHAPE, plane, middle):
                continue
            if SEEN <= cut(self.inside, plane, middle).mean() <= most:
                return middle


def tissue(places: Places, contrast: str, plane: str, rng: np.random.Generator) -> Asked:
    """Ask which tissue is at a mark; the truth is from the measured maps, each tissue as often."""
    right = int(rng.integers(len(TISSUE_NAMES)))
    middle = places.draw(places.of_tissue[right], plane, rng, most=1.0)
    because = f"{contrast}, {BRIGHTNESS[contrast][right]} mark"
    text = "Which tissue is inside the white frame?"
    return Asked("Tissue", text, TISSUE_NAMES, right, because, middle, True)


def plane_of(places: Places, contrast: str, plane: str, rng: np.random.Generator) -> Asked:
    """Ask in which plane the slice lies, at a place where the outline tells: it runs upright in
    axial pieces, level in sagittal ones, and slants in coronal ones."""
    while True:
        middle = places.draw(places.all, plane, rng)
        if runs(cut(places.inside, plane, middle)) == plane:
            break
    text = "In which plane was the brain cut?"
    return Asked("Plane", text, PLANES, PLANES.index(plane), CUTS[plane], middle, False)


def runs(inside: np.ndarray) -> str:
    """Return the plane whose outline runs as that of a piece; inside: (n, n), where brain is."""
    ends = len(inside) - 1
    down, across = np.abs(2 * np.argwhere(inside).mean(axis=0) - ends)
    # The brain lies to one side of an upright outline, and below or above a level one.
    if across > STEEP * down:
        return "axial"
    return "sagittal" if down > STEEP * across else "coronal"


def side(places: Places, contrast: str, plane: str, rng: np.random.Generator) -> Asked:
    """Ask from which side of the slice the piece is."""
    right = int(rng.integers(2))
    middle = places.draw(places.of_side[right], plane, rng)
    because = f"outer edge at {(9, 3)[right]} o'clock"
    text = "From which half of the slice is this piece?"
    return Asked("Side", text, ("the left half", "the right half"), right, because, middle, False)


def level(places: Places, contrast: str, plane: str, rng: np.random.Generator) -> Asked:
    """Ask how high the middle of the piece is, against the ventricles."""
    right = int(rng.integers(2))
    middle = places.draw(places.of_level[right], plane, rng)
    because = f"height {middle[2] // 40} of 4"
    options = ("above the ventricles", "below the ventricles")
    return Asked("Level", "At which height is this piece?", options, right, because, middle, False)


KINDS = {"Tissue": tissue, "Plane": plane_of, "Side": side, "Level": level}


def kinds_in(plane: str) -> tuple[str, ...]:
    """Return the types of questions about a plane; a sagittal slice has one side only."""
    return tuple(kind for kind in KINDS if (kind, plane) != ("Side", "sagittal"))
