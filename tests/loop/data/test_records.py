"""The common schema of JSON Lines, Parquet and datasets: answers, turns, pictures, fields."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets_on_disk import png
from every_layout import offline, plain, write
from PIL import Image

from kepo.check import check
from kepo.config import Config
from kepo.data.example import UNKNOWN
from kepo.data.layouts import arrow, from_python, schema
from kepo.data.load import LAYOUTS, layout_of, load_examples, load_image
from kepo.data.records import BadRecord
from kepo.data.solutions import final_answer
from kepo.errors import KepoConfigError, KepoDataError


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    offline(monkeypatch, tmp_path / "caches")


def parsed(**fields):
    return schema.parse({"id": "q"} | fields, "here")[0]


def bad(kind: str, match: str, **fields) -> None:
    with pytest.raises(BadRecord, match=match) as caught:
        schema.parse({"id": "q"} | fields, "here")
    assert caught.value.kind == kind


def lines(root: Path, *records: object) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    file = root / "data.jsonl"
    words = (r if isinstance(r, str) else json.dumps(r) for r in records)
    file.write_text("\n".join(words) + "\n")
    return file


# ---- answers


@pytest.mark.parametrize(
    ("solution", "answer", "reasoning"),
    [
        ("42", "42", ""),
        ("<answer> B </answer>", "B", ""),
        ("<think>It is 3.</think>\n<answer>B</answer>", "B", "It is 3."),
        ("<think>a</think><answer>\\boxed{7}</answer>", "7", "a"),
        ("So $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}", "So $x = \\boxed{\\frac{1}{2}}$."),
        ("\\boxed{1} no, \\boxed{2}", "2", "\\boxed{1} no, \\boxed{2}"),
        ("$\\boxed{2}$", "2", ""),
        ("\\boxed{\\text{ Paris }}", "Paris", ""),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", ""),
        ("He has 48/2 = 24.\nIn all 72.\n#### 72", "72", "He has 48/2 = 24.\nIn all 72."),
        ("#### 1,000\n", "1,000", ""),
        ("#### Title\nIt is 5", "#### Title\nIt is 5", ""),  # a heading, not the last line
    ],
)
def test_the_final_answer_of_a_solution(solution, answer, reasoning):
    assert final_answer(solution) == (answer, reasoning)
    for key in ("answer", "solution"):
        example = parsed(question="?", **{key: solution})
        assert (example.answer, example.rationale) == (answer, reasoning)
        assert example.columns == {key: solution}


def test_solutions_that_leave_the_answer_open_are_bad():
    bad("answer", "2 answers", question="?", solution="<answer>1</answer><answer>2</answer>")
    bad("answer", "not closed", question="?", solution="\\boxed{1")
    bad("answer", "no character that can be seen", question="?", answer="\\boxed{ }")
    bad("answer", "has neither answer nor solution", question="?")
    for value in (float("nan"), ["a"], {"a": 1}, ""):
        bad("answer", "answer=.*expected a non-empty", question="?", answer=value)


@pytest.mark.parametrize("value", [7, 0.5, -3])
def test_an_answer_may_be_a_number(value):
    assert parsed(question="?", answer=value).answer == str(value)
    example = parsed(question="?", answer=value, options=[value, 9, 10])
    assert (example.answer, example.options) == ("A", (str(value), "9", "10"))


@pytest.mark.parametrize("key", ["answer", "solution"])
def test_true_and_false_are_yes_and_no_or_the_options_of_that_name(key):
    for value, letter in ((True, "A"), (False, "B")):
        assert parsed(question="?", **{key: value}).answer == ("yes" if value else "no")
        for options in (["Yes", "No."], ["True", "false"], {"A": "yes", "B": "no"}):
            assert parsed(question="?", options=options, **{key: value}).answer == letter
    bad("answer", "'yes' equals 0 of the options", question="?", options=["a", "b"], answer=True)


@pytest.mark.parametrize(
    ("options", "place", "letter"),
    [
        (["CT", "X-ray", "MR"], 0, "A"),
        (["CT", "X-ray", "MR"], 2, "C"),
        ({"A": "CT", "B": "X-ray"}, 1, "B"),
        (["B", "A", "AB"], 0, "A"),  # a place is no letter
        (["7", "1", "0"], 0, "C"),  # an option's text comes before a place
        (["7", "1", "0"], 7, "A"),
        (["7", "1", "0"], 2, "C"),
    ],
)
def test_a_whole_number_is_an_options_text_or_its_place_from_0_on(options, place, letter):
    found = parsed(question="?", options=options, answer=place)
    assert found.answer == letter
    texts = found.options
    counted = schema.quirks({"answer": place}, found)
    assert ("by its place" in "".join(counted)) == (str(place) not in texts)


@pytest.mark.parametrize("place", [-1, 3])
def test_a_place_that_is_none_is_said(place):
    bad(
        "answer",
        f"^the answer {place} is the text of none of the 3 options, .* out of range; expected 0 to "
        "2, or a letter$",
        question="?",
        options=["CT", "X-ray", "MR"],
        answer=place,
    )
    bad("answer", "equals 2 of the options", question="?", options=["a", "b", "a"], answer=0)


def test_the_worked_solution_is_the_rationale():
    worked = "Half of 48 is 24.\n#### 24"
    assert parsed(question="?", answer="24", solution=worked).rationale == "Half of 48 is 24."
    assert parsed(question="?", answer="24", solution="Half of 48.").rationale == "Half of 48."
    assert parsed(question="?", answer=worked, rationale="So.").rationale == "So."
    for solution in ("24", "<answer>24</answer>", "B", "Heart."):
        options = dict(options=["24", "Heart"], answer="A")
        assert parsed(question="?", solution=solution, **options).rationale == ""


@pytest.mark.parametrize("answer", ["B", "(b)", "X-ray", "<answer> B </answer>", "\\boxed{x-ray.}"])
@pytest.mark.parametrize(
    "options", [["CT", "X-ray"], {"B": "X-ray", "A": "CT"}, {"A": "CT", "B": "X-ray", "C": None}]
)
def test_options_as_list_or_by_letter(answer, options):
    example = parsed(question="?", options=options, answer=answer)
    assert (example.options, example.answer) == (("CT", "X-ray"), "B")


@pytest.mark.parametrize(
    "options", [{"A": "x", "C": "y"}, {"a": "x", "b": "y"}, "x", ["x"], ["x", None], ["x", " "], 3]
)
def test_options_that_are_none_are_bad(options):
    with pytest.raises(BadRecord, match="option") as caught:
        parsed(question="?", options=options, answer="x")
    assert caught.value.kind == "options"
    assert parsed(question="?", options=[], answer="x").options == ()
    assert parsed(question="?", options=None, answer="x").options == ()


# ---- what is asked

SYSTEM = {"role": "system", "content": "Be brief."}
ASKS = {"role": "user", "content": "How many?"}
SAYS = {"role": "assistant", "content": "Six.\n#### 6"}


@pytest.mark.parametrize("key", ["prompt", "messages"])
def test_a_conversation_ends_with_the_question(key):
    turns = [SYSTEM, ASKS, {"role": "assistant", "content": "Of what?"}, ASKS]
    example = parsed(**{key: turns}, answer="6")
    assert example.question == "How many?"
    assert example.earlier == (
        ("system", "Be brief."),
        ("user", "How many?"),
        ("assistant", "Of what?"),
    )
    assert example.columns == {key: turns, "answer": "6"}


def test_the_assistants_last_turn_is_the_answer_if_there_is_no_other():
    example = parsed(messages=[SYSTEM, ASKS, SAYS])
    assert (example.answer, example.rationale) == ("6", "Six.")
    assert example.earlier == (("system", "Be brief."),)
    assert parsed(messages=[ASKS, SAYS], answer="7").answer == "7"


def test_prompt_comes_before_messages_before_question():
    fields = dict(prompt="p", messages=[ASKS], question="q", answer="1")
    assert parsed(**fields).question == "p"
    assert parsed(**fields | {"prompt": None}).question == "How many?"
    assert parsed(question="q", answer="1").question == "q"
    bad("field", r"fields \['answer', 'id'\]; expected question, prompt or messages", answer="1")


@pytest.mark.parametrize(
    ("turns", "match"),
    [
        ([], "expected a list of turns"),
        ("How?", "expected a list of turns"),
        ([SAYS], "expected the last to be user"),
        ([SYSTEM], "expected the last to be user"),
        ([ASKS, SYSTEM, ASKS], "expected system first"),
        ([{"role": "tool", "content": "x"}, ASKS], "expected role .system, user, assistant."),
        ([{"role": "user"}], "content=None"),
        ([{"role": "user", "content": " "}], r"messages\[0\]=' '"),
        ([{"role": "user", "content": "a\ud800"}], "UTF-8"),
        ([{"role": "system", "content": "\u200b"}, ASKS], "can be seen"),
        ([{"role": "user", "content": [{"type": "video", "video": "x"}]}], "of type text or image"),
        ([{"role": "user", "content": ["x"]}], "of type text or image"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\]=''"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, ASKS],
         "a picture in another turn"),
    ],
)  # fmt: skip
def test_turns_that_are_no_conversation_are_bad(turns, match):
    bad("field", match, messages=turns, answer="1")


# ---- pictures


def sources(**fields):
    found = schema.parse({"id": "q", "answer": "1"} | fields, "here")[1]
    return found() if callable(found) else found


def shown(*pictures):
    parts = [{"type": "image"} | picture for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "How?"}]}]


def test_pictures_by_path_bytes_both_or_none():
    assert sources(question="?") == sources(question="?", image=None, images=[]) == ()
    assert sources(question="?", image="a.png") == ("a.png",)
    both = {"bytes": b"x", "path": "a.png"}
    images = ["a.png", both, {"bytes": None, "path": "b.png"}, b"y"]
    assert sources(question="?", images=images) == ("a.png", b"x", "b.png", b"y")
    assert sources(question="?", image={"bytes": None, "path": None}) == ("",)  # which is missing


def test_pictures_in_the_turn():
    for picture in ({"image": "a.png"}, {"path": "a.png"}, {"url": "a.png"}):
        assert sources(prompt=shown(picture)) == ("a.png",)
    by_url = {"type": "image_url", "image_url": {"url": "a.png"}}
    assert sources(prompt=shown(by_url, {"image": {"bytes": b"x", "path": None}})) == (
        "a.png",
        b"x",
    )
    assert sources(prompt=shown({}, {}), images=["a", "b"]) == ("a", "b")
    assert sources(prompt=shown({}), images=lambda: [b"x"]) == [b"x"]
    bad("field", "0 images, and places for 1", prompt=shown({}), answer="1")
    bad("field", "1 images, and places for 2", prompt=shown({}, {}), image="a", answer="1")
    bad("field", "places for others", prompt=shown({"path": "a"}), image="a", answer="1")
    bad("field", "places for others", prompt=shown({"path": "a"}, {}), answer="1")
    with pytest.raises(BadRecord, match="2 images, and places for 1"):
        sources(prompt=shown({}), images=lambda: ["a", "b"])


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "a", "images": ["b"]},
        {"images": "a"},
        {"images": {"path": "a"}},
        {"image": ["a"]},
        {"image": 3},
        {"images": ["a", 3]},
        {"image": {"file": "a"}},
        {"image": "a\0"},
    ],
)
def test_fields_that_are_no_pictures_are_bad(fields):
    bad("field", "image", question="?", answer="1", **fields)


def test_one_field_of_pictures_is_enough():
    bad("field", "both image and images", question="?", answer="1", image="a", images=["b"])


# ---- JSON Lines


def test_a_file_of_lines_needs_no_pictures_and_no_options(tmp_path):
    file = lines(tmp_path, {"question": "6 * 7?", "answer": 42}, "", {"prompt": "?", "answer": "x"})
    first, second = load_examples(file)[0]
    assert (first.question, first.answer, first.options, first.images) == ("6 * 7?", "42", (), ())
    assert (first.modality, first.question_type) == (UNKNOWN, UNKNOWN)
    assert [first.id, second.id] == ["data.jsonl:1", "data.jsonl:3"]
    assert [e.id for e in load_examples(tmp_path)[0]] == [first.id, second.id]


def test_lines_that_are_no_records_are_bad(tmp_path):
    twice = '{"question": "a", "question": "b", "answer": "c"}'
    within = '{"question": "a", "answer": "c", "facts": [[{"x": 1, "x": 2}]]}'
    turns = '{"answer": "1", "messages": [{"role": "user", "role": "user", "content": "a"}]}'
    good = {"question": "?", "answer": "1"}
    odd = ("{", "[1]", "null", "\0\0", '"x"', twice, within, turns, "{'a': 1}", '{"a": 1')
    _, report = load_examples(lines(tmp_path, good, *odd))
    assert report.records == 11 and report.counts() == {"line": 4, "field": 6}
    assert [p.where.rpartition(":")[2] for p in report.problems] == [str(n) for n in range(2, 12)]
    with pytest.raises(KepoDataError, match=r"data.jsonl:2: not readable JSON"):
        load_examples(tmp_path / "data.jsonl", bad_records="fail")


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet"])
def test_a_file_that_holds_nothing_is_no_record(tmp_path, name):
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(KepoDataError) as caught:
        load_examples(tmp_path / name)
    said = str(caught.value)
    assert ": 0 of 0 questions" in said and "\n  1 bad files left out: file 1; first: " in said
    (tmp_path / name).rename(tmp_path / f"empty{Path(name).suffix}")
    if name == "data.parquet":
        return  # beside others it would be another layout
    _, report = load_examples(lines(tmp_path, {"question": "?", "answer": "1"}, "{").parent)
    assert report.records == 2 and report.questions == 1
    assert "\n  1 bad records and 1 bad files left out: file 1, line 1; first" in report.summary()


def test_files_of_other_encodings(tmp_path):
    record = '{"question": "Größe?", "answer": "1"}\r\n'
    (tmp_path / "a.jsonl").write_text(record * 2, encoding="utf-8-sig", newline="")
    (tmp_path / "b.jsonl").write_text(record, encoding="utf-16")
    (tmp_path / "c.JSONL").write_text(record, encoding="latin-1")
    examples, report = load_examples(tmp_path)
    assert [e.question for e in examples] == ["Größe?"] * 2
    assert report.counts()["line"] >= 2
    assert {Path(p.where.rpartition(":")[0]).name for p in report.problems} == {
        "b.jsonl",
        "c.JSONL",
    }


def test_a_line_is_not_longer_than_may_be_held(tmp_path, monkeypatch):
    from kepo.data.layouts import json_records

    good = {"question": "?", "answer": "1"}
    file = lines(tmp_path, good, good | {"note": "x" * 100}, good)
    monkeypatch.setattr(json_records, "MAX_JSON_BYTES", 100)
    _, report = load_examples(file)
    assert report.questions == 1 and "line 2 has over 100 bytes" in report.problems[0].message


def test_images_lie_beside_the_file_or_its_link(tmp_path):
    """In the Hub's cache a file is a link to one that has another name."""
    root = tmp_path / "snapshot"
    write("JSON lines", root, [plain(0)])
    (root / "set" / "part.jsonl").rename(tmp_path / "0123abcd")
    (root / "train.jsonl").symlink_to(tmp_path / "0123abcd")
    (example,), _ = load_examples(root / "train.jsonl")
    assert example.images == ((root / "Images" / "x.png").resolve(),)


# ---- one layout from another


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    lines(tmp_path, {"question": "?", "answer": "1"})
    (tmp_path / "facts.json").write_text('{"about": "this set"}')
    assert layout_of(tmp_path).name == "JSON records"
    assert load_examples(tmp_path)[1].counts() == {"file": 1}  # which is said, not passed over
    (tmp_path / "x.parquet").touch()
    with pytest.raises(KepoDataError, match="holds files of JSON records and Parquet; give"):
        layout_of(tmp_path)
    (tmp_path / "x.parquet").unlink()
    (tmp_path / "facts.json").write_text('[{"image": "a", "problem": "b", "solution": "c"}]')
    with pytest.raises(KepoDataError, match="JSON records and Med-R1 split"):
        layout_of(tmp_path)
    assert layout_of(tmp_path / "facts.json").name == "Med-R1 split"
    (tmp_path / "data.jsonl").unlink()
    assert layout_of(tmp_path).name == "Med-R1 split"


def test_every_layout_has_a_name_of_its_own():
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) == 6


# ---- tables


@pytest.mark.parametrize("how", ["parquet", "saved"])
def test_pictures_inside_a_table(tmp_path, how):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("L", (6, 4), grey) for grey in (10, 20, 30)]
    table = {
        "images": [[pictures[0]], [pictures[1], pictures[2]], []],
        "question": ["one", "two", "none"],
        "answer": [1, 2, 0],
        "mask": [pictures[0]] * 3,
    }
    features = datasets.Features(
        images=datasets.List(datasets.Image()),
        question=datasets.Value("string"),
        answer=datasets.Value("int64"),
        mask=datasets.Image(),
    )
    made = datasets.Dataset.from_dict(table, features=features)
    path = tmp_path / "set"
    if how == "saved":
        made.select([2, 0, 1]).select([1, 2, 0]).save_to_disk(path)
    else:
        path.mkdir()
        made.to_parquet(str(path / "a.parquet"))
    examples, report = load_examples(path)
    assert not report.problems and [len(e.images) for e in examples] == [1, 2, 0]
    assert load_image(examples[1], 1).getpixel((0, 0)) == (30, 30, 30)
    assert all(path.is_relative_to(tmp_path / "caches" / "kepo") for path in examples[1].images)
    assert examples[0].columns == {"answer": 1}  # a mask is held by no run


def test_only_pictures_of_kept_records_are_fetched(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"question": "?", "answer": "1", "image": {"bytes": png(g), "path": None}} for g in (1, 2)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    assert len(load_examples(tmp_path / "set", limit=1)[0]) == 1
    assert len([p for p in (tmp_path / "caches" / "kepo").rglob("*") if p.is_file()]) == 1


def test_pictures_of_several_pieces_are_each_its_own(tmp_path, monkeypatch):
    """Of Parquet a piece is a group of rows, of datasets so many rows."""
    datasets = pytest.importorskip("datasets")
    from pyarrow import parquet

    monkeypatch.setattr(arrow, "_ROWS", 2)
    rows = [
        {"question": f"{grey}?", "answer": "1", "image": {"bytes": png(grey), "path": None}}
        for grey in (10, 20, 30, 40, 50)
    ]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(tmp_path / "set")
    parquet.write_table(made.data.table, tmp_path / "a.parquet", row_group_size=2)
    for path, name in ((tmp_path / "set", "set"), (tmp_path / "a.parquet", "a.parquet")):
        examples, _ = load_examples(path)
        assert [load_image(e).getpixel((0, 0))[0] for e in examples] == [10, 20, 30, 40, 50]
        assert [e.id for e in examples] == [f"{name}[{place}]" for place in range(5)]


def test_a_table_in_med_r1s_shape(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {"problem": "Eh? A)CT, B)MRI", "solution": "<answer>B</answer>", "image": "x.png"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (tmp_path / "x.png").write_bytes(png(9))
    (example,), _ = load_examples(tmp_path)
    assert (example.options, example.answer, example.columns) == (("CT", "MRI"), "B", {})


def test_tables_with_columns_that_are_none_of_ours(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def written(names, *columns):
        arrays = [pyarrow.array(values) for values in columns]
        parquet.write_table(pyarrow.Table.from_arrays(arrays, names), tmp_path / "a.parquet")

    written(["text"], ["a"])
    with pytest.raises(KepoDataError, match=r"a.parquet has the columns \['text'\]; expected ques"):
        load_examples(tmp_path)
    written(["question", "question", "answer"], ["a"], ["b"], ["c"])
    with pytest.raises(KepoDataError, match="expected each once"):
        load_examples(tmp_path)
    written(["question", "image", "images", "answer"], ["a"], ["b"], [["c"]], ["d"])
    with pytest.raises(KepoDataError, match="image and images; expected one"):
        load_examples(tmp_path)


def test_columns_of_bytes_are_told_from_others():
    pa = pytest.importorskip("pyarrow")
    sounds = pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])
    for kind in (pa.binary(), pa.binary(4), sounds, pa.list_(sounds), pa.map_(pa.string(), sounds)):
        assert arrow._has_bytes(kind), kind
    flags = pa.struct([("binary", pa.bool_())])
    for kind in (
        pa.string(),
        flags,
        pa.list_(flags),
        pa.int8(),
        pa.dictionary(pa.int8(), pa.string()),
    ):
        assert not arrow._has_bytes(kind), kind


def test_text_of_a_table_that_is_no_text_is_one_bad_record(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    question = pyarrow.array([b"good", b"\xff\xfe", b"good"]).view(pyarrow.string())
    answer = pyarrow.array(["1", "2", "3"])
    made = pyarrow.Table.from_arrays([question, answer], ["question", "answer"])
    parquet.write_table(made, tmp_path / "a.parquet")
    examples, report = load_examples(tmp_path)
    assert [e.id for e in examples] == ["a.parquet[0]", "a.parquet[2]"]
    assert report.counts() == {"field": 1} and "a.parquet[1]" in str(report.problems[0])


def test_rows_that_a_torn_file_has_lost_are_one_bad_record(tmp_path):
    pytest.importorskip("pyarrow")
    records = [plain(number, image=None, note="x" * 500) for number in range(6)]
    path = write("Parquet", tmp_path, records) / "part.parquet"
    content = bytearray(path.read_bytes())
    content[10:60] = bytes(50)  # in the first group of rows; what names the columns is at the end
    path.write_bytes(content)
    examples, report = load_examples(path)
    assert [e.id for e in examples] == ["q2", "q3", "q4", "q5"]
    assert report.counts() == {"file": 1} and "cannot be read by pyarrow from row 0" in str(
        report.problems[0]
    )


@pytest.mark.parametrize(
    ("package", "layout"), [("pyarrow.parquet", "Parquet"), ("datasets", "datasets folder")]
)
def test_without_the_library_the_remedy_is_named(tmp_path, monkeypatch, package, layout):
    (tmp_path / "a.parquet").touch()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / "saved" if package == "datasets" else tmp_path / "a.parquet"
    assert layout_of(path).name == layout
    with pytest.raises(KepoDataError, match=rf"library {package}.* pip install 'kepo\[hf\]'"):
        load_examples(path)


# ---- names on the Hub; the network is only pretended, the cache is real


def test_a_name_of_the_hub_gives_splits_and_pictures(tmp_path):
    datasets = pytest.importorskip("datasets")
    write("Hub dataset", tmp_path, [plain(0, image={"bytes": png(9), "path": None})])
    for name in ("toy/set", "toy/set:train"):
        (example,), report = load_examples(name)
        assert report.layout == "Hub dataset" and str(report.path) == name
        assert load_image(example).getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(KepoDataError, match="toy/set:test is not there, and cannot be read as"):
        load_examples("toy/set:test")
    with pytest.raises(KepoDataError, match=r"toy/none is not there, and cannot.*owner/name:split"):
        load_examples("toy/none")
    assert datasets.config.HF_HUB_OFFLINE


def test_of_several_splits_one_is_asked_for(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        made = datasets.Dataset.from_list([{"question": "?", "answer": "#### 4"}])
        return {"train": made, "test": made} if split is None else made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(KepoDataError, match=r"\['train', 'test'\]; .* in openai/gsm8k/main:train"):
        load_examples("openai/gsm8k/main")
    (example,), _ = load_examples("openai/gsm8k/main:test")
    assert (example.id, example.answer) == ("test[0]", "4")
    load_examples("openai/gsm8k:train[:10%]")
    assert asked[1:] == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", None, "train[:10%]")]


def test_what_is_there_is_no_name_of_the_hub(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    assert layout_of("toy/set").name == "Hub dataset"
    lines(tmp_path / "toy" / "set", {"question": "?", "answer": "1"})
    assert layout_of("toy/set").name == "JSON records"
    for path in ("/toy/none", "toy/none.jsonl", "none", "toy/a/b/c", "../toy"):
        with pytest.raises(KepoDataError, match=r"is not there|is not a dataset"):
            layout_of(path)


def test_without_datasets_a_path_that_is_not_there_is_said_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    plain_run = dict(hint_trigger="never", gate_reward=None, distill_coef=0.0)
    with pytest.raises(KepoConfigError, match=r"'toy/set': toy/set is not there; .*kepo\[hf\]"):
        check(Config(student="s", train_data="toy/set", **plain_run))


def test_what_is_odd_is_counted(tmp_path):
    odd = {"question": "<image>What?", "answer": "It is\nlong"}
    _, report = load_examples(lines(tmp_path, odd, odd, {"question": "?", "answer": "1"}))
    assert set(report.quirks.values()) == {2} and len(report.quirks) == 2
    assert arrow.quirks({"problem": "p"}, load_examples(tmp_path)[0][0]) == []


def test_columns_whose_names_rewards_take_otherwise_are_counted_as_odd(tmp_path):
    record = {"question": "q?", "answer": "1", "prompts": "p", "completion_ids": [1], "fine": 2}
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    _, report = load_examples(tmp_path / "data.jsonl")
    assert [words.split(",")[0] for words in report.quirks] == [
        "a column called completion_ids",
        "a column called prompts",
    ]


def test_records_from_python_may_hold_numpy_numbers_arrays_and_tuples():
    records = [
        {"question": "q?", "answer": np.int64(4), "id": np.int64(3), "level": np.float32(2)},
        {"question": "q?", "answer": "b", "options": np.array(["a", "b"])},
        {"question": "q?", "answer": "b", "options": ("a", "b")},
    ]
    examples, report = load_examples(records)
    assert [(one.answer, one.options) for one in examples] == [
        ("4", ()),
        ("B", ("a", "b")),
        ("B", ("a", "b")),
    ]
    assert examples[0].id == "3" and isinstance(examples[0].columns["level"], np.float32)
    assert not report.problems


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"question": "q?", "answer": "1", "image": np.zeros((4, 4, 3))}], "image=array"),
        ([{"question": "q?", "answer": "1", 7: 1}], "has the key 7; expected texts"),
    ],
)
def test_odd_records_from_python_are_bad_records(data, words):
    with pytest.raises(KepoDataError, match=words):
        load_examples(data)


def test_a_table_of_pandas_is_refused_with_the_remedy():
    class Table:
        columns = ("question", "answer")

        def to_dict(self):
            pytest.fail("it was read")

        def __iter__(self):
            return iter(self.columns)

    with pytest.raises(KepoDataError, match=r"data is a Table, .* give data.to_dict\('records'\)"):
        from_python.listed(Table())
