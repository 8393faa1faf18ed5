"""Training and test by image: which images two sets share, and a split in which they share none.

The published 80/20 split of OmniMedVQA is by question: at least 1,836 of its images are on both
sides.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from kepo.errors import KepoConfigError, KepoDataError
from kepo.example import Example


def shared_images(
    left: Sequence[Example], right: Sequence[Example], digests: Mapping[Path, str] | None = None
) -> tuple[int, int]:
    """``(images, questions)`` of ``right`` whose image also occurs in ``left``.

    digests: contents of the images, from ``images.digests_of``; then files of equal content are one
    image. None = compare paths.
    """
    seen = {_key(example, digests) for example in left}
    leaked = [key for example in right if (key := _key(example, digests)) in seen]
    return len(set(leaked)), len(leaked)


def split_by_image(
    examples: Sequence[Example],
    *,
    test_share: float,
    seed: int = 0,
    digests: Mapping[Path, str] | None = None,
) -> tuple[list[Example], list[Example]]:
    """``(train, test)``, each in the order given, such that no image is on both sides.

    ``test_share`` in (0, 1) is the share of images that go to the test. The same examples in the
    same order with the same seed are split alike on every machine, wherever the images lie.
    digests: as for ``shared_images``.
    """
    if not 0 < test_share < 1:
        raise KepoConfigError(
            f"split_by_image: test_share is {test_share}; expected a number between 0 and 1"
        )
    images = list(dict.fromkeys(_key(example, digests) for example in examples))
    if len(images) < 2:
        raise KepoDataError(
            f"split_by_image: {len(examples)} examples have {len(images)} images; expected at "
            "least 2, one for each side"
        )
    random.Random(seed).shuffle(images)
    cut = min(max(1, round(test_share * len(images))), len(images) - 1)
    held_out = set(images[:cut])
    train = [e for e in examples if _key(e, digests) not in held_out]
    test = [e for e in examples if _key(e, digests) in held_out]
    return train, test


def without_images_of(
    left: Sequence[Example], right: Sequence[Example], digests: Mapping[Path, str] | None = None
) -> list[Example]:
    """The examples of ``right`` whose image does not occur in ``left``."""
    seen = {_key(example, digests) for example in left}
    return [example for example in right if _key(example, digests) not in seen]


def _key(example: Example, digests: Mapping[Path, str] | None) -> Path | str:
    return example.image if digests is None else digests[example.image]
