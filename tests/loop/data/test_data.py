"""The OmniMedVQA loader and the digits writer, which must speak the same layout."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from datasets_on_disk import dataset, record
from PIL import Image

from kepo.data.load import load_image, load_omnimedvqa
from kepo.digits import dataset as of_digits
from kepo.digits.dataset import MODALITIES, TILE, render, write_digits
from kepo.errors import KepoConfigError, KepoDataError

pytest.importorskip("sklearn")


def test_load_reads_every_field(tmp_path):
    (example,) = load_omnimedvqa(dataset(tmp_path, record()))
    assert example.id == "q0"
    assert example.question == "What is {this}?"
    assert example.options == ("Nothing", "a  CYST", "A tumour")
    assert example.answer == "B"  # despite case, spaces and the period
    assert example.images == (tmp_path.resolve() / "Images" / "x.png",)
    assert (example.modality, example.question_type, example.rationale) == ("CT", "Diagnosis", "")
    image = load_image(example)
    assert image.mode == "RGB" and image.getpixel((0, 0)) == (77, 77, 77)


def test_load_takes_the_other_name_of_modality(tmp_path):
    root = dataset(tmp_path, record(modality_type=None, modality="MRI"))
    assert load_omnimedvqa(root)[0].modality == "MRI"


def test_load_orders_filters_and_limits(tmp_path):
    dataset(tmp_path, record(question_id="z", modality_type="MRI"), name="b.json")
    dataset(
        tmp_path,
        record(question_id="y"),
        record(question_id="x", question_type="Anatomy", modality_type="MRI"),
        name="a.json",
    )

    def ids(**filters):
        return [example.id for example in load_omnimedvqa(tmp_path, **filters)]

    assert ids() == ["y", "x", "z"]
    assert ids(modalities=["MRI"]) == ["x", "z"]
    assert ids(modalities=["MRI"], limit=1) == ["x"]
    assert ids(question_types=["Diagnosis"]) == ["y", "z"]
    with pytest.raises(KepoDataError, match=r"\['PET'\].*\['CT', 'MRI'\]"):
        ids(modalities=["CT", "PET"])
    with pytest.raises(KepoConfigError, match="sequence of names"):
        ids(modalities="CT")
    with pytest.raises(KepoConfigError, match="limit is 0"):
        ids(limit=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gt_answer": "A polyp"}, "equals 0 of the options"),
        ({"option_A": "A cyst"}, "equals 2 of the options"),
        ({"option_B": None}, "without gaps"),
        ({"option_B": None, "option_C": None}, "without gaps"),
        ({"question": "  "}, "question='  '"),
        ({"question_id": 7}, "question_id=7"),
        ({"modality_type": None}, "modality=None"),
        ({"image_path": "Images/y.png"}, "not found"),
        ({"image_path": "../x.png"}, "outside"),
        ({"image_path": "/etc/hostname"}, "outside"),
    ],
)
def test_load_refuses_a_broken_record_and_names_it(tmp_path, changes, message):
    root = dataset(tmp_path, record(question_id="fine"), record(**changes))
    with pytest.raises(KepoDataError, match=message) as caught:
        load_omnimedvqa(root)
    assert "a.json[1]" in str(caught.value)


def test_load_refuses_a_link_that_leads_out(tmp_path):
    root = dataset(tmp_path / "root", record(image_path="Images/link.png"))
    Image.new("L", (4, 4)).save(tmp_path / "secret.png")
    (root / "Images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(KepoDataError, match="outside"):
        load_omnimedvqa(root)


def test_load_refuses_an_id_used_twice_across_files(tmp_path):
    dataset(tmp_path, record(), name="a.json")
    dataset(tmp_path, record(question="Other?"), name="b.json")
    with pytest.raises(KepoDataError, match=r"a.json\[0\]: .*'q0' has other .* at .*b.json\[0\]"):
        load_omnimedvqa(tmp_path)


def test_load_refuses_a_wrong_layout(tmp_path):
    with pytest.raises(KepoDataError, match="no folder QA_information"):
        load_omnimedvqa(tmp_path)
    (tmp_path / "QA_information").mkdir()
    with pytest.raises(KepoDataError, match=r"no \*.json"):
        load_omnimedvqa(tmp_path)
    file = tmp_path / "QA_information" / "a.json"
    for text, message in (("{", "not readable JSON"), ("{}", "a dict"), ("[3]", "a int")):
        file.write_text(text)
        with pytest.raises(KepoDataError, match=message):
            load_omnimedvqa(tmp_path)


def test_load_image_names_a_file_that_is_no_image(tmp_path):
    (example,) = load_omnimedvqa(dataset(tmp_path, record()))
    example.images[0].write_text("no pixels")
    with pytest.raises(KepoDataError, match=r"x\.png"):
        load_image(example)


# ---- digits ----


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    write_digits(root, train=40, test=12, seed=3)
    return root


def test_digits_read_back_with_the_right_answers(digits):
    for split, count in (("train", 40), ("test", 12)):
        examples = load_omnimedvqa(digits / split)
        assert len(examples) == count * len(MODALITIES)
        assert {e.modality for e in examples} == set(MODALITIES)
        for example in examples:
            a, plus, b, equals, total = example.rationale.split()
            assert (plus, equals) == ("+", "=") and int(a) + int(b) == int(total)
            assert len(set(example.options)) == 4
            assert all(0 <= int(option) <= 18 for option in example.options)
            assert example.options["ABCD".index(example.answer)] == total
            assert load_image(example).size == (2 * TILE, TILE)


def test_digits_letters_are_about_equally_frequent(digits):
    answers = [example.answer for example in load_omnimedvqa(digits / "train")]
    for letter in "ABCD":
        assert 0.17 < answers.count(letter) / len(answers) < 0.33


def test_digits_are_the_same_files_for_the_same_seed(digits, tmp_path):
    def content(root):
        return {
            file.relative_to(root): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(root.rglob("*"))
            if file.is_file()
        }

    write_digits(tmp_path / "again", train=40, test=12, seed=3)
    assert content(tmp_path / "again") == content(digits)
    write_digits(tmp_path / "other", train=40, test=12, seed=4)
    assert content(tmp_path / "other").keys() == content(digits).keys()
    assert content(tmp_path / "other") != content(digits)


def tiles(folder: Path) -> set[bytes]:
    """The scans that a split shows: the modality without chance shows each in one way only."""
    found = set()
    for example in load_omnimedvqa(folder, modalities=["scanned"]):
        pixels = np.asarray(load_image(example))
        found |= {pixels[:, :TILE].tobytes(), pixels[:, TILE:].tobytes()}
    return found


def test_digits_train_and_test_share_no_scan(digits):
    assert len(tiles(digits / "train")) > 60 and len(tiles(digits / "test")) > 15
    assert not tiles(digits / "train") & tiles(digits / "test")
    assert not (digits / "validation").exists()


def test_digits_for_validation_come_out_of_training_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(of_digits, "MODALITIES", {"scanned": MODALITIES["scanned"]})  # for speed
    write_digits(tmp_path / "with", train=300, test=300, validation=300)
    write_digits(tmp_path / "without", train=1, test=300)
    shown = {split: tiles(tmp_path / "with" / split) for split in ("train", "test", "validation")}
    assert shown["test"] == tiles(tmp_path / "without" / "test")
    assert not shown["validation"] & (shown["train"] | shown["test"])
    assert not shown["train"] & shown["test"]
    assert min(map(len, shown.values())) > 200


def test_renderings_differ_and_do_what_they_say():
    scan = np.zeros((8, 8))
    scan[1:7, 3:5] = 1.0  # an upright bar
    shown = {
        name: render(scan, name, np.random.default_rng(0)).astype(float) for name in MODALITIES
    }
    plain = shown["scanned"]
    assert all(image.shape == (TILE, TILE) for image in shown.values())
    for name, image in shown.items():
        assert name == "scanned" or abs(image - plain).mean() > 5, name
    assert plain[0, 0] == 255 and plain.min() < 20
    assert np.array_equal(shown["inverted"], 255 - plain)
    assert set(np.unique(shown["thresholded"])) == {0, 255}
    assert np.ptp(shown["low contrast"]) < 60
    assert abs(np.diff(shown["blurred"])).max() < abs(np.diff(plain)).max() / 2
    assert (shown["thick"] < 128).sum() > 1.5 * (plain < 128).sum()
    assert shown["noisy"][:4].std() > 20 and plain[:4].std() == 0
    rows, columns = np.nonzero(shown["rotated"] < 128)
    angle = np.degrees(np.arctan(np.polyfit(rows, columns, 1)[0]))
    assert 8 < abs(angle) < 22


@pytest.mark.parametrize(
    "counts",
    [{"train": 0, "test": 1}, {"train": 1, "test": 0}, {"train": 1, "test": 1, "validation": -1}],
)
def test_digits_refuse_empty_splits(tmp_path, counts):
    with pytest.raises(KepoConfigError, match=r"is (0|-1)"):
        write_digits(tmp_path, **counts)
