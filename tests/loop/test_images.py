"""Decoding images, telling them apart, and splitting questions by them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import quirks
from PIL import Image

from kepo.data import load_examples
from kepo.errors import KepoConfigError, KepoDataError
from kepo.images import digests_of, open_rgb
from kepo.splits import shared_images, split_by_image


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return quirks.write_quirks(tmp_path_factory.mktemp("made") / "data")


def test_sixteen_bits_of_grey_are_not_all_white(tmp_path):
    grey = (np.arange(16, dtype=np.uint16) * 4096).reshape(4, 4)
    Image.fromarray(grey).save(tmp_path / "x.png")
    shown = np.asarray(open_rgb(tmp_path / "x.png"))
    assert (shown[..., 0].ravel() == np.arange(16) * 16).all()


def test_a_picture_has_one_digest_however_it_is_stored(tmp_path):
    image = Image.radial_gradient("L").resize((20, 10))
    names = ("a.png", "b.bmp", "c.png", "d.png")
    a, b, c, d = (tmp_path / name for name in names)
    image.save(a)
    image.convert("RGB").save(b)
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(90, expand=True).save(c)
    d.write_text("no pixels")
    digests = digests_of([a, b, c, d, a])
    assert digests[a] == digests[b] != digests[c] and len(digests) == 4
    assert isinstance(digests[d], KepoDataError) and "d.png" in str(digests[d])


def test_what_a_decoder_may_see_is_limited(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.ppm")
    with pytest.raises(KepoDataError, match="cannot identify"):
        open_rgb(tmp_path / "x.ppm")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(KepoDataError, match="4 x 4"):
        open_rgb(tmp_path / "x.png")


# ---- split by image


def test_a_split_by_image_shares_none_and_repeats_itself(root, tmp_path):
    examples, _ = load_examples(root, limit=30)
    train_part, test_part = split_by_image(examples, test_share=0.25, seed=3)
    assert shared_images(train_part, test_part) == (0, 0)
    assert len({e.images for e in test_part}) == 5  # of 20
    assert sorted(train_part + test_part, key=examples.index) == examples
    shutil.copytree(root, tmp_path / "moved")
    moved, _ = load_examples(tmp_path / "moved", limit=30)
    again = split_by_image(moved, test_share=0.25, seed=3)
    assert [[e.id for e in part] for part in again] == [
        [e.id for e in part] for part in (train_part, test_part)
    ]
    assert split_by_image(examples, test_share=0.25, seed=4)[1] != test_part


def test_copies_of_an_image_are_split_together_by_content_alone(root, tmp_path):
    clean = quirks.write_good(root, tmp_path / "clean")
    shutil.copy(clean / "Images" / "1.png", clean / "Images" / "copy.png")
    quirks.plant(clean, 2, image_path="Images/copy.png")  # its other question keeps the first file
    examples, _ = load_examples(clean)
    digests = digests_of(e.images[0] for e in examples)
    by_path, by_content = [], []
    for seed in range(20):
        by_path.append(shared_images(*split_by_image(examples, test_share=0.5, seed=seed), digests))
        parts = split_by_image(examples, test_share=0.5, seed=seed, digests=digests)
        by_content.append(shared_images(*parts, digests))
    assert (1, 1) in by_path or (1, 2) in by_path
    assert set(by_content) == {(0, 0)}


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_a_share_that_leaves_a_side_empty_is_refused(root, share):
    examples, _ = load_examples(root)
    with pytest.raises(KepoConfigError, match="test_share"):
        split_by_image(examples, test_share=share)
    with pytest.raises(KepoDataError, match="1 images; expected at least 2"):
        split_by_image(examples[:2], test_share=0.5)
