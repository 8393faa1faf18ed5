"""The ICBM-152 average brain, read out of the installed nilearn package, in four contrasts.

T1 and the maps of grey and white matter were measured: the average of 152 people, at 1 mm. PD, T2
and FLAIR are simulated here, from the maps and the spin-echo equation. It is one average brain:
there are no patients in it and no findings.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kepo.errors import KepoDataError, packages_named

FOLDER = "datasets/data"
"""Where nilearn keeps the volumes, inside the package."""
FILES = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
SHAPE = (197, 233, 189)
"""Voxels of 1 mm: from left to right, from back to front, from below to above."""
MIDDLE = 98
"""The plane in which the two sides mirror each other: this template is symmetric."""


class Tissue(NamedTuple):
    """What the spin-echo equation asks of a tissue, at 1.5 T."""

    density: float
    t1: float
    """Longitudinal relaxation time, ms."""
    t2: float
    """Transverse relaxation time, ms."""


TISSUES = {
    "grey matter": Tissue(0.86, 950.0, 100.0),
    "white matter": Tissue(0.77, 600.0, 80.0),
    "fluid": Tissue(1.0, 4500.0, 2200.0),
}


class Sequence(NamedTuple):
    """The times of a spin-echo sequence, in ms. inversion: 0 means that nothing is inverted."""

    repetition: float
    echo: float
    inversion: float = 0.0


SIMULATED = {
    "PD": Sequence(3000.0, 20.0),
    "T2": Sequence(4000.0, 100.0),
    "FLAIR": Sequence(9000.0, 120.0, 2500.0),
}


T1_LEVELS = (165.0, 222.0, 69.0)
"""The median of T1 where a voxel is all grey matter, all white matter, all fluid."""
DARKEST, BRIGHTEST = 40, 230
"""The grey of the darkest and of the brightest tissue in every contrast."""


@dataclass(frozen=True)
class Brain:
    """Volumes ``SHAPE``: how bright in T1, and the share of each tissue, all uint8."""

    t1: np.ndarray
    grey: np.ndarray
    white: np.ndarray

    @property
    def inside(self) -> np.ndarray:
        """True where the brain is; the skull was taken off before the average was published."""
        return self.t1 > 0

    def share(self, tissue: str) -> np.ndarray:
        """Return the share of a tissue in every voxel, 0 to 255. What is inside the brain and
        neither grey nor white matter is fluid."""
        if tissue == "grey matter":
            return self.grey
        if tissue == "white matter":
            return self.white
        rest = 255 - self.grey.astype(np.int16) - self.white
        return np.where(self.inside, rest.clip(0, 255), 0).astype(np.uint8)

    def shown(self, contrast: str) -> np.ndarray:
        """Return the volume in a contrast as uint8; every contrast but T1 is simulated.

        signal = sum over tissues of share * spin_echo(tissue), or T1 as it was measured; the window
        takes the darkest tissue to DARKEST and the brightest to BRIGHTEST.
        """
        inside = self.inside
        if contrast == "T1":
            levels: tuple[float, ...] = T1_LEVELS
            signal = self.t1[inside].astype(np.float32)
        else:
            levels = tuple(spin_echo(tissue, SIMULATED[contrast]) for tissue in TISSUES.values())
            signal = np.zeros(np.count_nonzero(inside), np.float32)
            for name, level in zip(TISSUES, levels, strict=True):
                signal += np.float32(level / 255) * self.share(name)[inside]
        low, high = min(levels), max(levels)
        grey = np.zeros(SHAPE, np.uint8)
        scale = np.float32((BRIGHTEST - DARKEST) / (high - low))
        grey[inside] = (DARKEST + (signal - np.float32(low)) * scale).round().clip(0, 255)
        return grey


def spin_echo(tissue: Tissue, times: Sequence) -> float:
    """Return the signal of a tissue as a share of that of fluid at full magnetisation.

    M0 |1 - 2 exp(-TI / T1) [if inverted] + exp(-TR / T1)| exp(-TE / T2)     inverted
    M0 (1 - exp(-TR / T1)) exp(-TE / T2)                                     otherwise
    """
    recovered = math.exp(-times.repetition / tissue.t1)
    if times.inversion:
        along = abs(1 - 2 * math.exp(-times.inversion / tissue.t1) + recovered)
    else:
        along = 1 - recovered
    return tissue.density * along * math.exp(-times.echo / tissue.t2)


def read_brain() -> Brain:
    """Read the volumes. nilearn itself is not imported, so what it needs need not be there.

    Raises KepoPackageError if nilearn is not installed, KepoDataError if its volumes are others.
    """
    with packages_named("kepo demo --scans"):
        found = importlib.util.find_spec("nilearn")
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError("No module named 'nilearn'", name="nilearn")
    folder = Path(found.submodule_search_locations[0]) / FOLDER
    return Brain(*(_volume(folder / FILES.format(name)) for name in ("t1", "gm", "wm")))


def _volume(path: Path) -> np.ndarray:
    """Return the voxels of a NIfTI-1 file of bytes, gzipped: a header, then the first axis
    fastest."""
    wanted = "; expected the volumes of nilearn 0.9 to 0.14: pip install 'kepo[scans]'"
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise KepoDataError(f"{path} cannot be read ({error}){wanted}") from error
    shape = tuple(np.frombuffer(content, "<i2", 3, 42).tolist()) if len(content) > 352 else ()
    kind = np.frombuffer(content, "<i2", 1, 70)[0] if shape else 0
    if shape != SHAPE or kind != _UINT8:
        raise KepoDataError(f"{path} has voxels {shape} of type {kind}{wanted}")
    start = int(np.frombuffer(content, "<f4", 1, 108)[0])
    return np.frombuffer(content, np.uint8, math.prod(SHAPE), start).reshape(SHAPE, order="F")


_UINT8 = 2  # the code of the type in NIfTI-1
