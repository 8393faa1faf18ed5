"""The embedded dataset: two scanned digits side by side, "what is their sum?", eight renderings.

The scans are scikit-learn's (1797 of 8x8 pixels, shipped with the package, nothing is fetched). The
files follow OmniMedVQA's layout, so the loader that reads them is the one that reads the real data;
a rendering plays the part of an imaging modality.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from kepo.errors import KepoConfigError, packages_named

QUESTION = "What is the sum of the two digits?"
SMALL_DIGITS, LARGE_DIGITS = "Small digits", "Large digits"
"""The question types: both digits are at most LARGEST_SMALL, or at least one is above it."""
LARGEST_SMALL = 5
TILE = 32
"""The pixels on each side of one digit; an image is TILE x 2 TILE."""
LETTERS = "ABCD"
"""The letters of a question's options: there are four."""
TEST_SCANS = 0.2
"""The share of the scans that only test questions may show; as many are for validation alone."""

_MARGIN = 4  # white border of a tile, so that turning or thickening a digit does not cut it


def write_digits(
    root: str | Path, *, train: int, test: int, validation: int = 0, seed: int = 0
) -> None:
    """Write ``root/train``, ``root/test`` and, if it has questions, ``root/validation``, each a
    dataset for ``load_omnimedvqa``.

    train, test, validation: questions **per modality**; train and test >= 1. No scan occurs in two
    of the folders; those of validation are taken from what train would show without it, and test
    stays as it is. The same arguments give the same files. Each record also holds ``rationale``,
    such as "3 + 5 = 8". Raises KepoConfigError for other counts, KepoPackageError if scikit-learn
    is missing.
    """
    for name, count, least in (
        ("train", train, 1),
        ("test", test, 1),
        ("validation", validation, 0),
    ):
        if count < least:
            raise KepoConfigError(f"write_digits: {name} is {count}; expected a number >= {least}")
    with packages_named("write_digits"):
        from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    scans = scans.reshape(-1, 8, 8) / 16.0
    order = np.random.default_rng((seed, 0)).permutation(len(scans))
    share = round(TEST_SCANS * len(scans))
    first = 2 * share if validation else share
    splits = {  # a split's number is part of its seed
        "test": (0, test, order[:share]),
        "train": (1, train, order[first:]),
        "validation": (2, validation, order[share:first]),
    }
    for split, (number, count, members) in splits.items():
        for index, modality in enumerate(MODALITIES if count else ()):
            # One generator per file: more questions in one file do not change another.
            rng = np.random.default_rng((seed, 1 + index, number))
            _write_modality(
                Path(root) / split, modality, count, scans[members], labels[members], rng
            )


def _write_modality(
    root: Path,
    modality: str,
    count: int,
    scans: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
) -> None:
    images = Path("Images") / "digits" / modality
    (root / images).mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        pair = rng.choice(len(scans), size=2)
        a, b = (int(labels[i]) for i in pair)
        canvas = np.concatenate([render(scans[i], modality, rng) for i in pair], axis=1)
        name = f"{number:05d}.png"
        Image.fromarray(canvas).save(root / images / name)
        options, right = _options(a + b, rng)
        records.append(
            {
                "dataset": "digits",
                "question_id": f"digits_{modality}_{number:05d}",
                "question_type": SMALL_DIGITS if max(a, b) <= LARGEST_SMALL else LARGE_DIGITS,
                "question": QUESTION,
                "gt_answer": options[right],
                "image_path": (images / name).as_posix(),
                **{f"option_{letter}": o for letter, o in zip(LETTERS, options, strict=True)},
                "modality_type": modality,
                "rationale": f"{a} + {b} = {a + b}",
            }
        )
    target = root / "QA_information" / "digits" / f"{modality}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(records, indent=1), encoding="utf-8")


def _options(total: int, rng: np.random.Generator) -> tuple[list[str], int]:
    """Return four different sums, and the place of the right one.

    The option in place k leaves the remainder k when divided by four, so the right letter follows
    from the sum. A model this small learns last to search a list for its own result, which would
    take more steps than all the rest. Here the letter costs it nothing, and a misread digit still
    costs it the answer. The wrong options are sums of random digits, spread like the right one.
    """
    right = total % len(LETTERS)
    options = []
    for place in range(len(LETTERS)):
        value = total
        while value % len(LETTERS) != place:
            value = int(rng.integers(10) + rng.integers(10))
        options.append(str(value))
    return options, right


# ---- renderings: ink (TILE, TILE) in [0, 1] -> grey image (TILE, TILE) in [0, 1], 1 is white ----


def render(scan: np.ndarray, modality: str, rng: np.random.Generator) -> np.ndarray:
    """Render a scan ``(8, 8)`` in [0, 1], ink 1, as a ``(TILE, TILE)`` uint8 image of a
    modality."""
    grey = MODALITIES[modality](_ink(scan), rng)
    return np.round(255 * grey.clip(0, 1)).astype(np.uint8)


def _ink(scan: np.ndarray) -> np.ndarray:
    side = TILE - 2 * _MARGIN
    small = Image.fromarray(scan.astype(np.float32))
    large = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR))
    return np.pad(large, _MARGIN)


def _filtered(ink: np.ndarray, kernel: ImageFilter.Filter) -> np.ndarray:
    image = Image.fromarray(np.round(255 * ink).astype(np.uint8))
    return np.asarray(image.filter(kernel), dtype=np.float32) / 255


def _scanned(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 1 - ink


def _inverted(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return ink


def _noisy(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 1 - ink + rng.normal(0, 0.3, ink.shape)


def _blurred(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 1 - _filtered(ink, ImageFilter.GaussianBlur(3))


def _low_contrast(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.6 - 0.2 * ink


def _thresholded(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (ink < 0.5).astype(np.float32)


def _rotated(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    degrees = rng.choice([-1, 1]) * rng.uniform(12, 18)
    return 1 - np.asarray(Image.fromarray(ink).rotate(degrees, Image.Resampling.BILINEAR))


def _thick(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 1 - _filtered(ink, ImageFilter.MaxFilter(5))


MODALITIES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "scanned": _scanned,
    "inverted": _inverted,
    "noisy": _noisy,
    "blurred": _blurred,
    "low contrast": _low_contrast,
    "thresholded": _thresholded,
    "rotated": _rotated,
    "thick": _thick,
}
"""The renderings by name. The student trains on the first alone and is tested on all."""
