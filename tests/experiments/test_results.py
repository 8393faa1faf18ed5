"""A comparison's files: strict, never without a run's other lines, and damaged ones named."""

import errno
import json

import pytest
from faulty_disk import failing, watched

from experiments.results import FILES, SAMPLES_FILE, Results, Run
from kepo.errors import KepoDataError

FACTS = {"fingerprint": "f", "student": "s", "teacher": "t", "machine": "m, 2 cores"}


def add(results, folder, seed, name="grpo"):
    run_dir = folder / f"{seed}-{name}"
    run_dir.mkdir(exist_ok=True)
    evaluated = {"eval": {"CT": 0.5}, "eval_items": {"CT": "01"}}
    step = {"step_time": 2.0, "kepo/teacher_tokens": 7, "kepo/hint_tokens": None, "entropy": 1.0}
    records = [
        {"step": 0, **evaluated},
        {"step": 1, **step, "grad_norm": None},
        {"step": 2, **step, "grad_norm": None, "entropy": 2.0},
        {"step": 2, **evaluated},
        {"step": 3, **step, "grad_norm": 4.0, "entropy": 0.5},
        {"step": 3, **evaluated},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run_dir / SAMPLES_FILE).write_text('{"CT": "04"}')
    results.add(Run("test", seed, name), run_dir, FACTS)


@pytest.fixture
def written(tmp_path):
    results = Results(tmp_path / "out")
    for seed in (1, 2):
        add(results, tmp_path, seed)
    results.write()
    return tmp_path / "out"


def test_curves_are_means_since_the_last_evaluation_and_sums_so_far(written):
    rows = [row for row in Results(written).tables["curves"] if row["seed"] == "1"]
    columns = ("step", "entropy", "grad_norm", "teacher_tokens", "hint_tokens", "seconds")
    assert [[row[name] for name in columns] for row in rows] == [
        ["2", "1.5", "", "14", "0", "4"],
        ["3", "0.5", "4", "21", "0", "6"],
    ]
    run = Results(written).runs[Run("test", 1, "grpo")]
    assert {name: run[name] for name in columns if name in run} == {
        name: rows[-1][name] for name in columns if name in run
    }
    assert [row["right"] for row in Results(written).tables["samples"]] == ["04", "04"]
    assert [row["step"] for row in Results(written).tables["evals"]] == ["0", "2", "3"] * 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: content.rindex(b",")],
        lambda content: content.replace(b"seed", b"reed"),
        lambda content: content.replace(b"\ntest,1,", b"\ntest,x,"),
        lambda content: content.replace(b"\ntest,1,", b"\ntest,\xff1,"),
        lambda content: content + b"1,2\n",
        lambda content: content.replace(b",", b",,", 3),
        lambda content: bytes(len(content)),
    ],
)
def test_a_damaged_file_is_named(written, name, damage):
    path = written / f"{name}.csv"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(KepoDataError, match=rf"{name}\.csv is damaged; restore it, or remove"):
        Results(written)


def test_items_are_digits_that_can_be(written):
    for name, old, new in (("evals", b",01\n", b",02\n"), ("samples", b",04\n", b",05\n")):
        path = written / f"{name}.csv"
        whole = path.read_bytes()
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(KepoDataError, match=rf"{name}\.csv is damaged"):
            Results(written)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("evals", b"test,1,grpo,3,CT,0.5,01\n"),
        ("evals", b"test,1,grpo,0,CT,0.5,01\n"),
        ("curves", b"test,1,grpo,3,"),
        ("samples", b"test,1,grpo,CT,04\n"),
        ("samples", b"4\n"),
    ],
)
def test_a_run_that_lacks_a_line_or_an_answer_is_named(written, name, gone):
    path = written / f"{name}.csv"
    whole = path.read_bytes()
    start = whole.index(gone)
    end = start + len(gone) if name != "curves" else whole.index(b"\n", start) + 1
    rest = b"\n" if gone == b"4\n" else b""
    path.write_bytes(whole[:start] + rest + whole[end:])
    with pytest.raises(KepoDataError, match=r"damaged: .* evaluations of 'grpo' with the seed 1"):
        Results(written)


def test_a_run_is_known_only_with_all_its_lines(written, tmp_path):
    """Wherever writing ends, a run that runs.csv has is whole; what else there is of one is not
    counted."""
    calls = []
    with watched(written, lambda call, path: calls.append(call)):
        Results(written).write()
    for number in range(1, len(calls) + 1):
        results = Results(written)
        results.drop([Run("test", 3, "grpo")])
        results.write()
        add(results, tmp_path, 3)
        with watched(written, failing(number, errno.EIO, for_ever=True)), pytest.raises(OSError):
            results.write()
        again = Results(written)
        for table in ("evals", "curves", "samples"):
            seeds = {row["seed"] for row in again.tables[table]}
            assert seeds == {str(run.seed) for run in again.runs}
