"""Statistics of a comparison, against a few evaluations that are counted by hand."""

import json

import numpy as np
import pytest

from experiments.analysis import OOD, UNLEARNED, Scores
from experiments.results import SAMPLES_FILE, Results, Run, as_csv
from experiments.starts import QUESTIONS
from kepo.digits.dataset import MODALITIES
from kepo.digits.demo import SOURCE

CURVES = {  # right answers of four questions, the last two with unseen digits, by step
    "ours": {0: "1100", 10: "1000", 20: "1111"},
    "theirs": {0: "1100", 10: "1110", 20: "1110"},
}
SPENT = {"ours": (300, 600), "theirs": (200, 400)}
"""Completions sampled up to each evaluation."""


@pytest.fixture
def scores(tmp_path):
    results = Results(tmp_path / "out" / "cliff")
    for seed in (1, 2):
        for method, curve in CURVES.items():
            run_dir = tmp_path / f"{method}-{seed}"
            run_dir.mkdir()
            records: list[dict] = []
            for step, items in curve.items():
                if step:
                    each = SPENT[method][0]
                    spent = {"kepo/sampled_completions": each, "kepo/teacher_tokens": 0}
                    records.append({"step": step, "step_time": 1.0, **spent})
                shown = {name: items if name != UNLEARNED else "0000" for name in MODALITIES}
                shown[SOURCE] = items[::-1] if seed == 2 else items
                means = {name: text.count("1") / 4 for name, text in shown.items()}
                records.append({"step": step, "eval": means, "eval_items": shown})
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (run_dir / "metrics.jsonl").write_text(lines)
            right = {name: "0104" for name in MODALITIES}
            (run_dir / SAMPLES_FILE).write_text(json.dumps(right))
            results.add(Run("test", seed, method), run_dir, {})
    results.write()
    rows = [{"split": "test", "modality": name, "large": "0011"} for name in MODALITIES]
    (tmp_path / "out" / "questions.csv").write_text(as_csv(QUESTIONS, rows))
    return Scores(tmp_path / "out" / "cliff", "test")


def test_the_renderings_are_divided():
    assert set(MODALITIES) == {SOURCE, UNLEARNED, *OOD} and len(OOD) == 6


def test_accuracy_by_kind_of_question(scores):
    assert scores.methods() == ["ours", "theirs"] and scores.seeds("ours", "theirs") == [1, 2]
    assert scores.steps("ours") == [0, 10, 20]
    assert scores.accuracy("ours", [1, 2], step=10).tolist() == [0.25, 0.25]
    assert scores.accuracy("ours", [1, 2], kind="seen", step=10).tolist() == [0.5, 0.5]
    assert scores.accuracy("ours", [1, 2], kind="unseen").tolist() == [1.0, 1.0]
    assert scores.accuracy("theirs", [1, 2], [SOURCE], kind="seen").tolist() == [1.0, 0.5]
    assert scores.accuracy("ours", [1], [UNLEARNED]).tolist() == [0.0]
    assert scores.right("ours", [1, 2]).shape == (2, 6, 4)


def test_a_fall_counts_from_any_evaluation_the_start_included(scores):
    """The last step is the best there is, and before it a quarter was lost."""
    assert scores.drawdown("ours", [1, 2]).tolist() == [0.25, 0.25]
    assert scores.drawdown("theirs", [1, 2]).tolist() == [0.0, 0.0]
    assert scores.drawdown("ours", [1, 2], [SOURCE], kind="seen").tolist() == [0.5, 0.0]


def test_area_and_samples(scores):
    assert scores.area("ours", [1]) == pytest.approx([(0.375 + 0.625) / 2])
    assert scores.passes("ours", [1, 2]).tolist() == [0.5, 0.5]
    assert scores.cost("ours", "sampled_completions") == 600


def test_at_equal_cost_both_are_read_where_the_cheaper_one_ends(scores):
    """Of ours that is a third of the way from its first evaluation to its second."""
    found = scores.at_equal(("sampled_completions",), "ours", "theirs", [1, 2])
    ours = 0.25 + (400 - 300) / 300 * 0.75
    assert found == pytest.approx([ours - 0.75] * 2)
    back = scores.at_equal(("sampled_completions",), "theirs", "ours", [1])
    assert back == pytest.approx([0.75 - ours])
    both = scores.at_equal(("sampled_completions", "seconds"), "ours", "theirs", [1])
    budget = 402.0
    assert both == pytest.approx([0.25 + (budget - 301) / 301 * 0.75 - 0.75])
    assert np.isnan(scores.at_equal(("teacher_tokens",), "ours", "theirs", [1])).all()
