"""Decoding images, telling them apart, and splitting questions by them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import quirks
from PIL import Image
from toy import example

from kepo.data import images
from kepo.data.images import digests_of, open_rgb
from kepo.data.load import DataReport, load_examples
from kepo.data.run_data import readable
from kepo.data.splits import shared_images, split_by_image, without_images_of
from kepo.errors import KepoConfigError, KepoDataError


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


def test_what_a_decoder_may_see_is_limited(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.ppm")
    with pytest.raises(KepoDataError, match="cannot identify"):
        open_rgb(tmp_path / "x.ppm")


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


# ---- questions about several images


def about(name: str, *images: str):
    return example(name, images=tuple(Path(image) for image in images))


def test_images_that_questions_link_stay_on_one_side():
    """a-b, b-c and c-d hang together though no question shows a and d; e and f are alone."""
    linked = [about("1", "a", "b"), about("2", "c", "d"), about("3", "b", "c")]
    examples = [*linked, about("4", "e"), about("5", "f"), about("6", "e")]
    sizes = set()
    for seed in range(20):
        parts = split_by_image(examples, test_share=0.3, seed=seed)
        assert shared_images(*parts) == (0, 0) == shared_images(*reversed(parts))
        assert sorted(e.id for part in parts for e in part) == list("123456")
        assert [sum(e in part for e in linked) for part in parts] in ([3, 0], [0, 3])
        sizes.add(len(parts[1]))
    assert len(sizes) > 1 and 0 not in sizes
    with pytest.raises(KepoDataError, match="4 images; expected at least 2 that no question links"):
        split_by_image(linked, test_share=0.5)


def test_questions_without_images_are_split_by_their_text():
    """Two ask the same, 1 and 2, and stay together; a picture's name is no text."""
    texts = ["3 + 4?", "3 + 4?", "5 + 6?", "7 + 8?"]
    plain = [example(str(n), question=text, images=()) for n, text in enumerate(texts, 1)]
    examples = [*plain, about("5", "3 + 4?"), about("6", "b")]
    for seed in range(20):
        train, test = split_by_image(examples, test_share=0.4, seed=seed)
        assert train and test and sorted(e.id for e in [*train, *test]) == list("123456")
        assert (plain[0] in test) == (plain[1] in test)
        assert without_images_of(test, examples) == train
    assert shared_images(plain, plain) == (0, 0)  # of which there are none


def test_one_image_in_common_is_enough():
    left, right = [about("1", "a", "b")], [about("2", "b", "c"), about("3", "c"), about("4", "b")]
    assert shared_images(left, right) == (1, 2)
    assert [e.id for e in without_images_of(left, right)] == ["3"]


def test_one_image_that_is_broken_is_enough(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("L", (4, 4)).save(good)
    bad.write_text("no pixels")
    examples = [about("1", good, bad), about("2", good, good)]
    report = DataReport(tmp_path, "x", 2, 2, (), {})
    digests = digests_of(path for e in examples for path in e.images)
    kept, report = readable(examples, report, digests)
    assert [e.id for e in kept] == ["2"] and report.counts() == {"image unreadable": 1}


def test_a_torn_image_in_the_cache_is_written_again(tmp_path, monkeypatch):
    """As a loss of power left it under an earlier version."""
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path))
    file = images._cached(b"content")
    assert file.read_bytes() == b"content" and images._cached(b"content") == file
    file.write_bytes(b"")
    assert images._cached(b"content").read_bytes() == b"content"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
