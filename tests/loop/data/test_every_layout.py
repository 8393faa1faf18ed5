"""What must hold in every layout: the same records, the same faults found, the same command."""

import shutil
from dataclasses import replace

import pytest
from every_layout import NEW, TABLES, WRITERS, offline, plain, write
from PIL import Image

from kepo.__main__ import main
from kepo.data.load import load_examples, load_image
from kepo.data.run_data import load_data
from kepo.errors import KepoDataError
from kepo.sections import DataConfig

GOOD = [plain(0), plain(1, answer="lung."), plain(2, answer="C"), plain(3, modality="MRI")]


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    offline(monkeypatch, tmp_path / "caches")


@pytest.fixture(params=WRITERS)
def layout(request) -> str:
    return request.param


def loaded(layout, root, records, **more):
    return load_examples(write(layout, root, records), image_root=root, **more)


def checked(capsys, *words) -> tuple[int, str]:
    try:
        code = main(["data", "check", *map(str, words)])
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().out


def test_good_records_are_read_alike(layout, tmp_path):
    examples, report = loaded(layout, tmp_path, GOOD)
    assert report.layout == {"JSON lines": "JSON records", "JSON list": "JSON records"}.get(
        layout, layout
    )
    assert [e.id for e in examples] == ["q0", "q1", "q2", "q3"] and not report.problems
    assert [e.answer for e in examples] == ["B", "A", "C", "B"]
    assert {e.options for e in examples} == {("Lung", "Heart", "Liver")}
    assert [e.modality for e in examples] == ["CT", "CT", "CT", "MRI"]
    assert {e.question_type for e in examples} == {"Anatomy"}
    assert {e.images for e in examples} == {(tmp_path.resolve() / "Images" / "x.png",)}
    assert load_image(examples[0]).size == (40, 30)
    assert [e.id for e in loaded_again(layout, tmp_path, modalities=["MRI"])] == ["q3"]
    assert [e.id for e in loaded_again(layout, tmp_path, limit=2)] == ["q0", "q1"]


def loaded_again(layout, root, **more):
    path = {"OmniMedVQA": root, "Hub dataset": "toy/set"}.get(layout, root / "set")
    return load_examples(path, image_root=root, **more)[0]


FAULTS = {
    "blank question": ({"question": "  "}, "field"),
    "question that shows nothing": ({"question": "\u200b\u2800"}, "field"),
    "NUL in the question": ({"question": "a\0b"}, "field"),
    "half a character": ({"question": "a \ud800"}, "field"),
    "half a character in an option": ({"options": ["Heart", "\udc00"]}, "options"),
    "id of two lines": ({"question_id": "a\nb"}, "field"),
    "control character in the modality": ({"modality": "C\x1bT"}, "field"),
    "control character in the type": ({"question_type": "A\x07"}, "field"),
    "question that states the answer": ({"question": "What? Answer: B"}, "field"),
    "one option": ({"options": ["Heart"]}, "options"),
    "option that shows nothing": ({"options": ["Heart", " "]}, "options"),
    "option that is marked": ({"options": ["Heart (correct)", "Lung"]}, "options"),
    "answer that is no option": ({"answer": "Brain"}, "answer"),
    "letter beyond the options": ({"answer": "D"}, "answer"),
    "answer that is two options": ({"options": ["Heart", "heart."]}, "answer"),
    "no answer": ({"answer": None}, "answer"),
    "image above the folder": ({"image": "Images/../../x.png"}, "image outside"),
    "image elsewhere": ({"image": "/etc/hostname"}, "image outside"),
    "image behind a link": ({"image": "Images/link.png"}, "image outside"),
    "no such image": ({"image": "Images/none.png"}, "image missing"),
    "folder for an image": ({"image": "Images"}, "image missing"),
    "address for an image": ({"image": "https://a.b/c.png"}, "image missing"),
    "image cut short": ({"image": "Images/half.png"}, "image unreadable"),
    "no image at all": ({"image": "Images/text.png"}, "image unreadable"),
}


def plant_files(root) -> None:
    write("OmniMedVQA", root, [])
    shutil.rmtree(root / "QA_information")
    content = (root / "Images" / "x.png").read_bytes()
    (root / "Images" / "half.png").write_bytes(content[: len(content) // 2])
    (root / "Images" / "text.png").write_text("no pixels")
    Image.new("L", (4, 4)).save(root.parent / "x.png")
    (root / "Images" / "link.png").symlink_to(root.parent / "x.png")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named_by_its_kind(layout, fault, tmp_path, capsys):
    changes, kind = FAULTS[fault]
    if layout in TABLES and "half a character" in fault:
        pytest.skip("Arrow's texts are UTF-8")
    root = tmp_path / "data"
    plant_files(root)
    path = write(layout, root, [*GOOD, plain(4, **changes), plain(5)])
    code, out = checked(capsys, path, "--image-root", root)
    assert code == 1 and "wrong: 1 records" in out and f"     1  {kind}\n" in out
    settings = DataConfig(train_data=str(path), image_root=str(root))
    data = load_data(settings)
    assert [e.id for e in data.train] == ["q0", "q1", "q2", "q3", "q5"]
    assert data.record["train"]["bad_records"] == {kind: 1}
    with pytest.raises(KepoDataError):
        load_data(replace(settings, bad_records="fail"))


def test_ids_that_two_records_share_are_both_left_out(layout, tmp_path):
    records = [*GOOD, plain(4, question_id="q1"), plain(2, answer="C")]
    examples, report = loaded(layout, tmp_path, records)
    assert [e.id for e in examples] == ["q0", "q3"] if layout in TABLES else ["q0", "q2", "q3"]
    assert report.counts()["duplicate id"] >= 2


def test_hidden_copies_are_passed_over(layout, tmp_path):
    if layout in ("datasets folder", "Hub dataset"):
        pytest.skip("datasets lists its own files")
    path = write(layout, tmp_path, GOOD)
    folder = path / "QA_information" if layout == "OmniMedVQA" else path
    (file,) = (f for f in folder.rglob("part.*"))
    for copy in (f".ipynb_checkpoints/{file.name}", f"._{file.name}", f"__MACOSX/{file.name}"):
        (folder / copy).parent.mkdir(exist_ok=True)
        (folder / copy).write_bytes(b"stale")
    examples, report = load_examples(path, image_root=tmp_path)
    assert len(examples) == 4 and report.records == 4 and not report.problems


@pytest.mark.parametrize("harm", ["empty", "torn", "FIFO", "folder"])
def test_a_broken_file_beside_a_good_one_is_one_bad_record(layout, harm, tmp_path):
    import os

    if layout in ("datasets folder", "Hub dataset"):
        pytest.skip("datasets reads all or nothing")
    path = write(layout, tmp_path, GOOD)
    (file,) = tmp_path.rglob("part.*")
    other = file.with_stem("zother")
    if harm == "FIFO":
        os.mkfifo(other)
    elif harm == "folder":
        other.mkdir()
    else:
        other.write_bytes({"empty": b"", "torn": file.read_bytes()[:70]}[harm])
    examples, report = load_examples(path, image_root=tmp_path)
    assert len(examples) == 4 and len(report.problems) == 1
    line = (layout, harm) == ("JSON lines", "torn")
    assert report.counts() == {"line" if line else "file": 1} and report.records == 4 + line
    assert "zother" in report.problems[0].where


def test_a_folder_linked_elsewhere_may_hold_the_images(layout, tmp_path):
    root = tmp_path / "data"
    path = write(layout, root, GOOD)
    (root / "Images").rename(tmp_path / "disk")
    (root / "Images").symlink_to(tmp_path / "disk")
    (example, *_), _ = load_examples(path, image_root=root)
    assert example.images == ((tmp_path / "disk" / "x.png").resolve(),)


@pytest.mark.parametrize("count", [2, 10, 26])
def test_options_up_to_z(layout, count, tmp_path):
    options = [f"choice {number:02}" for number in range(count)]
    records = [plain(0, options=options, answer=options[-1])]
    (example,), _ = loaded(layout, tmp_path, records)
    assert example.options == tuple(options)
    assert example.answer == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[count - 1]


@pytest.mark.parametrize("layout", NEW)
def test_more_options_than_letters_are_refused(layout, tmp_path):
    records = [plain(0), plain(1, options=[str(n) for n in range(27)], answer="3")]
    assert loaded(layout, tmp_path, records)[1].counts() == {"options": 1}


@pytest.mark.parametrize("layout", NEW)
def test_other_columns_are_kept_as_they_are(layout, tmp_path):
    more = {"level": 3, "tags": ["a", "b"], "facts": {"x": 1.5}, "solution": "Heart"}
    records = [plain(0, **more), plain(1, level=None)]
    first, second = loaded(layout, tmp_path, records)[0]
    assert dict(first.columns) == {"answer": "Heart", **more}
    assert second.columns.get("level") is None and first.rationale == ""
    assert first.fields()["answer"] == "B" and first.fields()["level"] == 3


@pytest.mark.parametrize("layout", NEW)
def test_a_record_without_an_id_is_called_by_its_place(layout, tmp_path):
    records = [plain(0, question_id=None), plain(1, question_id=None, id=17), plain(2)]
    ids = [e.id for e in loaded(layout, tmp_path, records)[0]]
    made = {
        "JSON lines": "part.jsonl:1",
        "JSON list": "part.json[0]",
        "Parquet": "part.parquet[0]",
        "datasets folder": "set[0]",
        "Hub dataset": "train[0]",
    }
    assert ids == [made[layout], "17", "q2"]
