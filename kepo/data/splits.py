"""Split training and test by image, so that they share none, and find images that two sets share.
Questions without images are split by their text.

The published 80/20 split of OmniMedVQA is by question: at least 1,836 of its images are on both
sides.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from kepo.data.example import Example
from kepo.errors import KepoConfigError, KepoDataError

Digests = Mapping[Path, str | KepoDataError]
Key = Path | str | KepoDataError
"""What images are told apart by: the path, or what ``images.digests_of`` says of the contents."""


def shared_images(
    left: Sequence[Example], right: Sequence[Example], digests: Digests | None = None
) -> tuple[int, int]:
    """Count ``(images, questions)``: the images of ``right`` that also occur in ``left``, and the
    questions of ``right`` that show one.

    digests: contents of the images, from ``images.digests_of``; files of equal content are then one
    image. None = compare paths.
    """
    seen = {key for example in left for key in _keys(example, digests)}
    leaked = [found for example in right if (found := seen.intersection(_keys(example, digests)))]
    return len(set().union(*leaked)), len(leaked)


def split_by_image(
    examples: Sequence[Example],
    *,
    test_share: float,
    seed: int = 0,
    digests: Digests | None = None,
) -> tuple[list[Example], list[Example]]:
    """Return ``(train, test)``, each in the order given, such that no image is on both sides.

    ``test_share`` in (0, 1) is the share of images that go to the test. Images that are shown
    together, in one question or by way of others, stay on one side, and a question without images
    counts as one. The same examples in the same order with the same seed are split alike on every
    machine, wherever the images lie.
    digests: as for ``shared_images``.
    """
    if not 0 < test_share < 1:
        raise KepoConfigError(
            f"split_by_image: test_share is {test_share}; expected a number between 0 and 1"
        )
    families = _families([_subjects(example, digests) for example in examples])
    images = sum(map(len, families))
    if len(families) < 2:
        raise KepoDataError(
            f"split_by_image: {len(examples)} examples have {images} images; expected at least 2 "
            "that no question links, or other questions without any: one for each side"
        )
    random.Random(seed).shuffle(families)
    wanted = max(1, round(test_share * images))
    held_out: set[Key] = set()
    for family in families[:-1]:
        if len(held_out) >= wanted:
            break
        held_out.update(family)
    train = [e for e in examples if held_out.isdisjoint(_subjects(e, digests))]
    test = [e for e in examples if not held_out.isdisjoint(_subjects(e, digests))]
    return train, test


def without_images_of(
    left: Sequence[Example], right: Sequence[Example], digests: Digests | None = None
) -> list[Example]:
    """Return the examples of ``right`` none of whose images occurs in ``left``; of those without
    images the ones whose text does not."""
    seen = {key for example in left for key in _subjects(example, digests)}
    return [example for example in right if seen.isdisjoint(_subjects(example, digests))]


def _keys(example: Example, digests: Digests | None) -> list[Key]:
    return [path if digests is None else digests[path] for path in example.images]


def _subjects(example: Example, digests: Digests | None) -> list[Key]:
    """Return what an example is split by: its images, or its text if it has none."""
    return _keys(example, digests) or [f"question: {example.question}"]


def _families(shown: Sequence[Sequence[Key]]) -> list[list[Key]]:
    """Return sets of images that are linked by being shown together, in order of first sight."""
    parent: dict[Key, Key] = {}

    def first(image: Key) -> Key:
        while parent[image] != image:
            image = parent[image]
        return image

    order: dict[Key, int] = {}
    for images in shown:
        for image in images:
            parent.setdefault(image, image)
            order.setdefault(image, len(order))
        ends = sorted({first(image) for image in images}, key=order.__getitem__)
        for end in ends[1:]:
            parent[end] = ends[0]
    families: dict[Key, list[Key]] = {}
    for image in order:
        families.setdefault(first(image), []).append(image)
    return list(families.values())
