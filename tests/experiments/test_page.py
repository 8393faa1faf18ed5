"""The page: every number out of the results, and what was not run is said."""

import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from places import ROOT
from pretend_runs import write_results

from experiments.analysis import OOD
from experiments.methods import FACTORIAL, MAIN
from experiments.page import MARK, PARTS, PICTURE, filled
from experiments.page import main as page_main
from experiments.plan import TUNING_SEEDS
from experiments.report import tables
from experiments.report.picture import draw
from experiments.report.tables import Book, NotRunError, gap, points
from experiments.results import Run
from kepo.digits.dataset import MODALITIES
from kepo.digits.demo import SOURCE
from kepo.errors import KepoConfigError, KepoDataError
from kepo.evaluation.statistics import Interval, students_t

HOME = ROOT / "experiments"
PAGE = (HOME / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Main methods and factorial with three seeds; nothing of the validation split."""
    folder = tmp_path_factory.mktemp("page") / "results"
    names = dict.fromkeys([*MAIN, *FACTORIAL.values()])
    write_results(
        folder, "cliff", [Run("test", seed, name) for seed in (1, 2, 3) for name in names]
    )
    return Book(folder, folder / "chosen.json")


def test_the_published_page_is_that_of_the_published_results():
    assert filled(PAGE, Book(HOME / "results", HOME / "chosen.json")) == PAGE


def test_the_page_without_results_says_so_and_with_them_has_their_numbers(book, tmp_path):
    empty = filled(PAGE, Book(tmp_path / "results", tmp_path / "chosen.json"))
    assert "| KEPO less GRPO, OOD | <!-- gap kepo grpo -->*not run yet*<!-- / --> |" in empty
    page = filled(PAGE, book)
    scores = book.scores()
    less = scores.accuracy("kepo", [1, 2, 3]) - scores.accuracy("grpo", [1, 2, 3])
    found = points(students_t(less), signed=True)
    assert f"<!-- gap kepo grpo -->{found}<!-- / -->" in page and found.startswith("+")
    assert "| better OOD accuracy | OOD accuracy | `grpo` | " + found + " | holds |" in page
    assert "| `main` | KEPO against" in page and "| 21 of 56 |" in page
    assert filled(page, book) == page and filled(empty, book) == page


def test_results_without_their_questions_and_a_folder_that_is_none_are_refused(
    book, tmp_path, monkeypatch
):
    copy = tmp_path / "results"
    shutil.copytree(book.results, copy)
    (copy / "questions.csv").unlink()
    with pytest.raises(KepoDataError, match=r"questions\.csv is missing; restore it"):
        Book(copy, tmp_path / "none").scores()
    page = tmp_path / "page.md"
    page.write_text(PAGE, encoding="utf-8")
    nowhere = str(tmp_path / "resluts")
    monkeypatch.setattr(sys, "argv", ["page", "--page", str(page), "--results", nowhere])
    with pytest.raises(KepoConfigError, match="resluts is no folder"):
        page_main()
    assert page.read_text(encoding="utf-8") == PAGE


def test_whether_a_block_was_run_is_said(book):
    assert tables.again(book, "weak_50") == "planned, not run"
    assert tables.again(book, "main") == "21 of 56 runs made"
    with pytest.raises(NotRunError):
        tables.block(book, "weak_50")


def test_every_mark_of_the_page_is_known_and_every_part_is_used():
    used = {match["words"].split()[0] for match in MARK.finditer(PAGE)}
    assert used <= PARTS.keys() and set(PARTS) - used <= {"level"}
    assert PAGE.count("<!-- / -->") == len(MARK.findall(PAGE))
    with pytest.raises(KepoConfigError, match="page has the mark 'gop', which is none of"):
        filled("<!-- gop kepo -->1<!-- / -->", Book(Path("none"), Path("none")))


def test_effects_of_the_factorial_are_contrasts_of_its_cells(book):
    scores, seeds = book.scores(), [1, 2, 3]
    of = {cell: scores.accuracy(name, seeds) for cell, name in FACTORIAL.items()}
    hints = sum(x if cell[2] else -x for cell, x in of.items()) / 6
    right = sum(x if cell[2] else -x for cell, x in of.items() if cell[1] == "right") / 2
    lines = tables.factorial(book).splitlines()
    assert f"| hints | {points(students_t(hints), True)} |" in lines
    assert f"| hints, with distillation where right | {points(students_t(right), True)} |" in lines


def test_numbers_are_written_with_a_real_minus_and_their_interval():
    assert points(Interval(-0.0123, -0.05, 0.02)) == "−1.2 [−5.0, 2.0]"
    assert points(Interval(0.0123, -0.05, 0.02), signed=True) == "+1.2 [−5.0, +2.0]"
    assert points(Interval(float("nan"), 0, 0)) == "–"


def test_a_number_needs_two_seeds(book, tmp_path):
    with pytest.raises(NotRunError, match="not run yet"):
        gap(book, "kepo", "retry")
    lone = tmp_path / "results"
    write_results(lone, "cliff", [Run("test", 1, name) for name in ("kepo", "grpo")])
    with pytest.raises(NotRunError, match="one seed yet"):
        gap(Book(lone, lone / "chosen.json"), "kepo", "grpo")
    assert tables.WORDS[gap(book, "kepo", "grpo").sign] == "holds"


def test_answers_that_two_methods_differ_in_are_counted(book):
    scores = book.scores()
    steps = scores.steps("kepo")
    assert len(steps) > 1
    answers = {
        name: [scores.right(name, [1, 2, 3], MODALITIES, step) for step in steps]
        for name in ("kepo", "grpo")
    }
    differ = sum((x != y).sum() for x, y in zip(*answers.values(), strict=True))
    asked = sum(x.size for x in answers["kepo"])
    assert 0 < differ < asked
    assert tables.same(book, "kepo", "grpo") == f"{differ:,} of {asked:,} answers are otherwise"
    assert tables.same(book, "kepo", "kepo") == f"0 of {asked:,} answers are otherwise"


def test_runs_that_end_below_their_start_are_counted(book, monkeypatch):
    scores = book.scores()
    assert scores is book.scores("cliff", "test")  # what is read is read once
    seeds = {name: len(scores.seeds(name)) for name in scores.methods()}
    falls = {"grpo": [0.5, 0.9, 0.4], "kepo": [0.5, 0.4, 0.5]}  # a fall that is made up is none

    def curve(name, some, modalities):
        if modalities != [SOURCE]:
            assert modalities == OOD
            return np.array([[0.5, 0.4] if name == "kepo" else [0.1, 0.2]] * len(some))
        return np.array([falls.get(name, [0.1, 0.1, 0.2])] * len(some))

    monkeypatch.setattr(scores, "curve", curve)
    runs = sum(seeds.values())
    assert tables.below(book) == f"3 of {runs} runs (3 of `grpo`)"
    assert tables.below(book, "cliff", "ood") == f"3 of {runs} runs (3 of `kepo`)"
    falls["grpo"] = [0.5, 0.5]
    assert tables.below(book) == f"0 of {runs} runs"
    with pytest.raises(NotRunError):
        tables.below(book, "mild")


def test_the_validation_split_is_counted_apart(tmp_path):
    name = "kepo@lr=8e-4,distill_coef=30"
    runs = [Run("validation", seed, name) for seed in TUNING_SEEDS]
    write_results(tmp_path / "results", "cliff", [*runs, Run("test", 1, "grpo")])
    book = Book(tmp_path / "results", tmp_path / "chosen.json")
    assert " of 1 runs" in tables.below(book, "cliff", "ood")
    assert f" of {len(TUNING_SEEDS)} runs" in tables.below(book, "cliff", "ood", "validation")
    of_one = [book.scores(split="validation").accuracy(name, [seed]) for seed in TUNING_SEEDS]
    expected = f"{100 * np.mean(of_one):.1f}"
    mark = f"<!-- tuned {name} -->?<!-- / -->"
    assert filled(mark, book) == mark.replace("?", expected)
    assert tables.tuned(book, "grpo") == "not run"


def test_seeds_in_common_are_counted(book, tmp_path):
    assert tables.common_seeds(book, "kepo", "grpo") == "3"
    shutil.copytree(book.results, tmp_path / "results")
    write_results(tmp_path / "results", "cliff", [Run("test", 4, "kepo")])
    more = Book(tmp_path / "results", tmp_path / "chosen.json")
    assert tables.common_seeds(more, "kepo", "grpo") == "3"
    assert tables.common_seeds(more, "kepo", "kepo") == "4"


def test_the_picture_is_drawn_of_what_is_there(book, tmp_path):
    path = tmp_path / PICTURE
    assert not draw(Book(tmp_path / "results", tmp_path / "none"), path) and not path.exists()
    assert draw(book, path) and path.stat().st_size > 20_000


def test_labels_of_near_curves_stand_apart_in_their_order():
    from experiments.report.picture import apart

    heights = {"a": 70.0, "b": 70.2, "c": 72.0, "d": 40.0, "e": 73.5}
    placed = apart(heights, 1.5)
    in_order = sorted(heights, key=heights.__getitem__)
    assert sorted(placed, key=placed.__getitem__) == in_order
    gaps = [placed[y] - placed[x] for x, y in itertools.pairwise(in_order)]
    assert min(gaps) == pytest.approx(1.5) and placed["d"] == 40.0
    assert max(abs(placed[name] - heights[name]) for name in heights) < 1.5
