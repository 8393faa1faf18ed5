"""Med-R1's split files and the folders of datasets, and how a layout is told from another."""

import os
import sys

import pytest
from datasets_on_disk import ROW, png, split_file

from kepo.data.layouts import medr1
from kepo.data.load import UNKNOWN, layout_of, load_examples, load_image
from kepo.data.records import BadRecord
from kepo.errors import KepoDataError

# ---- the text of a problem


@pytest.mark.parametrize(
    ("problem", "question", "options"),
    [
        ("Which? A)CT, B)X-ray", "Which?", ("CT", "X-ray")),
        (
            # Commas inside options, as in the lung cancer stages.
            "Stage? A)Tumor of the left lobe, T3 N0, Stage III, B)Lobe, T2, C)None",
            "Stage?",
            ("Tumor of the left lobe, T3 N0, Stage III", "Lobe, T2", "None"),
        ),
        ("(Vitamin A) low? A)yes, B)no, C)so, D)a, b,", "(Vitamin A) low?", None),
        (
            "Which? A)CT (or B) x, B)y (e.g. C) z, C)w",
            "Which?",
            ("CT (or B) x", "y (e.g. C) z", "w"),
        ),
        # As the data has it, a bracket is left open.
        ("Which? A)OCT (Optical, B)CT (a), C)c", "Which?", ("OCT (Optical", "CT (a)", "c")),
        ("Which?\nA: one\nB: two B)\nC: three", "Which?", ("one", "two B)", "three")),
        ("Which?\nA. one\nB. two", "Which?", ("one", "two")),
    ],
)
def test_options_are_told_apart(problem, question, options):
    assert medr1.split_problem(problem) == (question, options or ("yes", "no", "so", "a, b,"))


@pytest.mark.parametrize(
    "problem",
    [
        "What is it?",
        "What is it? A)CT",
        "What is it? A)CT, C)X-ray",
        "What is it? A)CT, B)X-ray, B)MRI",
        "What is it? A)CT, B)hepatitis (or A) of old, B)MRI",
        "What is it? A), B)X-ray",
        "A)CT, B)X-ray",
        "What is vitamin A) of? A)CT, B)X-ray",
    ],
)
def test_options_that_cannot_be_told_apart_are_bad(problem):
    with pytest.raises(BadRecord, match="can be told apart") as caught:
        medr1.split_problem(problem)
    assert caught.value.kind == "options"


# ---- split files


def test_a_split_file_gives_modality_question_and_answer(tmp_path):
    text = ROW | {"solution": "<answer>x-ray.</answer>", "problem": "Eh? A)CT, B)X-ray, C)MRI"}
    file = split_file(tmp_path, "modality/test/OCT (Optical Coherence Tomography_test.json", ROW, text)  # fmt: skip  # noqa: E501
    for path in (file, file.parent):
        first, second = load_examples(path)[0]
        assert first.question == "What is it?" and first.options == ("CT", "X-ray")
        assert (first.answer, second.answer) == ("B", "B")
        assert first.modality == "OCT (Optical Coherence Tomography"
        assert first.question_type == UNKNOWN
        assert first.images == (tmp_path.resolve() / "Images" / "x.png",)
        assert first.id != second.id
    assert load_examples(file)[1].layout == "Med-R1 split"


def test_files_by_question_type_are_selected_by_it(tmp_path):
    for name in ("Lesion Grading", "Modality Recognition"):
        split_file(tmp_path, f"question_type/train/{name}_train.json", ROW)
    path = tmp_path / "Splits" / "question_type" / "train"
    (only,), report = load_examples(path, question_types=["Lesion Grading"])
    assert (only.question_type, only.modality) == ("Lesion Grading", UNKNOWN)
    assert (report.records, report.questions) == (2, 1)
    with pytest.raises(KepoDataError, match=r"modalities names \['CT'\].*\['unknown'\]"):
        load_examples(path, modalities=["CT"])


def test_groups_that_repeat_each_other_are_not_mixed(tmp_path):
    split_file(tmp_path, "modality/train/CT_train.json", ROW)
    split_file(tmp_path, "modality/test/CT_test.json", ROW)
    with pytest.raises(KepoDataError, match=r"modality/test.*modality/train.*give the folder"):
        load_examples(tmp_path / "Splits" / "modality")


def test_bad_rows_are_counted(tmp_path):
    outside = ROW | {"image": "../x.png"}
    letter = ROW | {"solution": "<answer> C </answer>"}
    twice = ROW | {"solution": "<answer>A</answer><answer>B</answer>"}
    file = split_file(tmp_path, "CT_train.json", ROW, outside, letter, twice, [], {"image": "x"})
    examples, report = load_examples(file)
    assert len(examples) == 1
    assert report.counts() == {"field": 2, "answer": 2, "image outside": 1}
    with pytest.raises(KepoDataError, match=r"CT_train.json\[2\]"):
        load_examples(file, bad_records="fail")


def test_where_the_images_of_split_files_are(tmp_path):
    file = split_file(tmp_path / "a", "CT_train.json", ROW)
    (tmp_path / "b").mkdir()
    moved = file.rename(tmp_path / "b" / file.name)
    with pytest.raises(KepoDataError, match="set image_root"):
        load_examples(moved)
    assert len(load_examples(moved, image_root=tmp_path / "a")[0]) == 1
    with pytest.raises(KepoDataError, match=r"image_root=.* is not a folder"):
        load_examples(moved, image_root=tmp_path / "c")


# ---- folders of datasets


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A DatasetDict with one split of three rows, the images inside."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    table = {
        "image": [{"bytes": png(grey), "path": None} for grey in (10, 20, 10)],
        "problem": [ROW["problem"]] * 3,
        "solution": [ROW["solution"], "<answer> A </answer>", "<answer> E </answer>"],
    }
    features = datasets.Features(
        image=datasets.Image(), problem=datasets.Value("string"), solution=datasets.Value("string")
    )
    dataset = datasets.Dataset.from_dict(table, features=features)
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_datasets_folder_with_images_inside(saved):
    for path in (saved, saved / "train"):
        examples, report = load_examples(path)
        assert [e.answer for e in examples] == ["B", "A"]
        assert [load_image(e).getpixel((0, 0))[0] for e in examples] == [10, 20]
        assert report.layout == "datasets folder" and report.counts() == {"answer": 1}
        assert len({e.images for e in examples}) == 2
    # Only kept rows are written to the cache, and once.
    assert len([f for f in (saved.parent / "cache").rglob("*") if f.is_file()]) == 2


def test_two_splits_and_other_columns_are_refused(saved):
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(KepoDataError, match=r"splits \['train', 'test'\]; give .*train"):
        load_examples(saved)
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(saved / "other")
    with pytest.raises(
        KepoDataError, match=r"columns \['text'\]; expected question, prompt or mess"
    ):
        load_examples(saved / "other")
    datasets.Dataset.from_dict({"problem": ["a"]}).save_to_disk(saved / "half")
    with pytest.raises(KepoDataError, match=r"lacks \['solution', 'image'\]"):
        load_examples(saved / "half")


@pytest.mark.parametrize("splits", ["[]", "7", '[["a"]]', "}"])
def test_a_folder_whose_splits_cannot_be_told_is_refused(saved, splits):
    (saved / "dataset_dict.json").write_text(f'{{"splits": {splits}}}')
    with pytest.raises(KepoDataError, match=r"dataset_dict.json (has splits|cannot be read)"):
        load_examples(saved)


@pytest.mark.parametrize("name", ["state.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("harm", ["empty", "torn", "FIFO", "another"])
def test_a_folder_with_a_broken_file_ends_in_a_sentence(saved, name, harm):
    (file,) = saved.rglob(name)
    content = file.read_bytes()
    file.unlink()
    if harm == "FIFO":  # which would be waited for without end
        os.mkfifo(file)
    else:
        file.write_bytes({"empty": b"", "torn": content[: len(content) // 2]}.get(harm, b"[1]"))
    with pytest.raises(KepoDataError, match="cannot be read by datasets"):
        load_examples(saved)


def test_without_datasets_the_remedy_is_named(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(KepoDataError, match=r"library datasets.*pip install .kepo\[hf\]"):
        load_examples(tmp_path)


def test_no_layout(tmp_path):
    with pytest.raises(KepoDataError, match="is not a dataset in a layout that kepo reads"):
        layout_of(tmp_path)
    with pytest.raises(KepoDataError, match="is not there"):
        layout_of(tmp_path / "none")


@pytest.mark.parametrize("content", ['{"question": "q?", "answer": "1"}', "[]", "[1]", "{", ""])
def test_a_json_file_without_records_is_not_taken_for_a_split_file(tmp_path, content):
    file = tmp_path / "data.json"
    file.write_text(content)
    with pytest.raises(KepoDataError) as caught:
        load_examples(file)
    assert "Images" not in str(caught.value) and "no question is left" in str(caught.value)


# ---- several images a question


def test_a_split_file_may_list_several_images(tmp_path):
    listed = {"images": ["Images/x.png", "Images/y.png", "Images/x.png"]}
    plain = {name: ROW[name] for name in ("problem", "solution")}
    bad = [ROW | listed, plain | {"images": []}, plain | {"images": ["Images/x.png", 3]}]
    gone = plain | {"images": ["Images/x.png", "Images/z.png"]}
    file = split_file(tmp_path, "CT_train.json", plain | listed, *bad, gone)
    (tmp_path / "Images" / "y.png").write_bytes(png(88))
    (example,), report = load_examples(file)
    assert [path.name for path in example.images] == ["x.png", "y.png", "x.png"]
    assert load_image(example, 1).getpixel((0, 0)) == (88, 88, 88)
    assert report.counts() == {"field": 3, "image missing": 1}


@pytest.mark.parametrize("inside", [True, False], ids=["bytes", "paths"])
def test_a_datasets_folder_may_have_a_column_of_lists(tmp_path, monkeypatch, inside):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "saved"
    lists = [[10, 20], [], [30, 10, 30]]
    stored = [
        [{"bytes": png(g), "path": None} if inside else f"{g}.png" for g in row] for row in lists
    ]
    feature = datasets.Image() if inside else datasets.Value("string")
    features = datasets.Features(
        images=datasets.List(feature),
        problem=datasets.Value("string"),
        solution=datasets.Value("string"),
    )
    table = {"images": stored, "problem": [ROW["problem"]] * 3, "solution": [ROW["solution"]] * 3}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(root)
    for grey in (10, 20, 30):
        (root / f"{grey}.png").write_bytes(png(grey))
    examples, report = load_examples(root)
    greys = [[load_image(e, n).getpixel((0, 0))[0] for n in range(len(e.images))] for e in examples]
    assert greys == [[10, 20], [30, 10, 30]]
    assert examples[1].images[0] == examples[1].images[2]
    assert report.counts() == {"image missing": 1}


def test_a_datasets_folder_with_both_columns_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    both = {"image": ["a"], "images": [["a"]], "problem": ["p"], "solution": ["s"]}
    datasets.Dataset.from_dict(both).save_to_disk(tmp_path / "both")
    with pytest.raises(KepoDataError, match="image and images; expected one"):
        load_examples(tmp_path / "both")
