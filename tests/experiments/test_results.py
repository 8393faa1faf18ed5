"""A comparison's files: strict, never without a run's other lines, and damaged ones named."""

import errno
import json

import pytest
from faulty_disk import failing, watched

from experiments.results import FILES, Results
from kepo.errors import KepoDataError

FACTS = {"fingerprint": "f", "warmup": "w", "teacher": "t", "machine": "m, 2 cores"}


def add(results, folder, seed, name="grpo"):
    run_dir = folder / f"{seed}-{name}"
    run_dir.mkdir(exist_ok=True)
    records = [
        {"step": 0, "eval": {"CT": 0.5}, "eval_items": {"CT": "01"}},
        {
            "step": 1,
            "step_time": 2.0,
            "kepo/teacher_tokens": None,
            "grad_norm": None,
            "reward": 1.5,
        },
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    results.add((seed, name), run_dir, FACTS)


@pytest.fixture
def written(tmp_path):
    results = Results(tmp_path / "out")
    for seed in (1, 2):
        add(results, tmp_path, seed)
    results.write()
    return tmp_path / "out"


def test_numbers_that_were_not_finite_are_empty(written):
    results = Results(written)
    steps, norms = results.curve("grpo", "grad_norm")
    assert steps == [1] and norms.shape == (2, 1) and (norms != norms).all()
    assert results.curve("grpo", "reward")[1].tolist() == [[1.5], [1.5]]
    assert results.cost("grpo", "teacher_tokens") == 0 and results.cost("grpo", "seconds") == 2.0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: content.rindex(b",")],
        lambda content: content.replace(b"seed", b"reed"),
        lambda content: content.replace(b"\n1,", b"\nx,"),
        lambda content: content.replace(b"\n1,", b"\n\xff1,"),
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


def test_a_run_is_known_only_with_all_its_lines(written, tmp_path):
    """Wherever writing ends, a run that runs.csv has is whole; what else there is of one is not
    counted."""
    calls = []
    with watched(written, lambda call, path: calls.append(call)):
        Results(written).write()
    for number in range(1, len(calls) + 1):
        results = Results(written)
        results.drop([(3, "grpo")])
        results.write()
        add(results, tmp_path, 3)
        with watched(written, failing(number, errno.EIO, for_ever=True)), pytest.raises(OSError):
            results.write()
        again = Results(written)
        for table in ("evals", "steps"):
            assert {(int(r["seed"]), r["method"]) for r in again.tables[table]} == set(again.runs)
