"""Several samples of a question: pass@k, votes, rewards; and `kepo.evaluate` from Python."""

import itertools
import json
import math
import random
import statistics

import pytest
import torch
from toy import ScriptedVLM, example

import kepo
from kepo.__main__ import main
from kepo.data.example import Example
from kepo.errors import KepoConfigError, KepoDataError, KepoRewardError
from kepo.evaluation import report
from kepo.evaluation.answers import Said
from kepo.evaluation.scores import judged, majority, sizes, tabulated
from kepo.evaluation.statistics import pass_at_k, wilson
from kepo.models.vlm import VLM
from kepo.tasks.multiple_choice import MultipleChoice
from kepo.tasks.open_answer import OpenAnswer


def says(answer):
    return f"<think>x</think><answer>{answer}</answer>"


def said(*answers):
    return [Said("mumbles" if a is None else says(a), [1, 2]) for a in answers]


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_mean_over_all_choices_of_k(samples):
    for right in range(samples + 1):
        row = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            chosen = [any(some) for some in itertools.combinations(row, k)]
            assert pass_at_k(samples, right, k) == pytest.approx(statistics.mean(chosen))
    for wrong in ((samples, samples + 1, 1), (samples, -1, 1), (samples, 0, 0), (samples, 0, 9)):
        with pytest.raises(ValueError, match=f"right={wrong[1]}, k={wrong[2]}"):
            pass_at_k(*wrong)


def test_pass_at_k_is_unbiased():
    """Where a sample is right with probability 0.3, one of 3 is with 1 - 0.7^3; the plug-in
    estimate 1 - (1 - c / n)^k would be 0.02 off."""
    draw = random.Random(0)
    rights = [sum(draw.random() < 0.3 for _ in range(6)) for _ in range(20_000)]
    assert statistics.mean(pass_at_k(6, c, 3) for c in rights) == pytest.approx(0.657, abs=0.006)


def vote(task, answers, right, k=None):
    return majority(task, answers, right, k or len(answers))


def test_most_votes_win():
    task = MultipleChoice()
    assert vote(task, ["A", "B", "A"], [True, False, True]) == 1.0
    assert vote(task, ["B", "A", "B"], [False, True, False]) == 0.0
    assert vote(task, ["A", "B"], [True, False]) == 0.5  # either may win
    assert vote(task, ["A", "B", "C"], [True, False, False]) == pytest.approx(1 / 3)
    # What cannot be read has no vote, however often it comes.
    assert vote(task, [None, "A", None], [False, True, False]) == 1.0
    assert vote(task, [None, None], [False, False]) == 0.0
    # Two at a time: (A, A), (B, A), and the last is left over.
    rights = [True, True, False, True, False]
    assert vote(task, ["A", "A", "B", "A", "B"], rights, 2) == 0.75
    # The task knows which answers are the same.
    answers, rights = ["42", "7", "42.0", "7", "forty"], [True, False, True, False, False]
    assert vote(OpenAnswer(), answers, rights) == 0.5
    assert vote(OpenAnswer(), [*answers, "4.2e1"], [*rights, True]) == 1.0


def test_the_table_is_of_questions():
    assert [sizes(n) for n in (1, 2, 3, 8, 9)] == [[], [2], [2, 3], [2, 4, 8], [2, 4, 8, 9]]
    task = MultipleChoice()
    asked = [example(name, modality=m) for name, m in (("a", "CT"), ("b", "CT"), ("c", "MR"))]
    texts = [said("A", "A", "B", None), said("B", "B", "B", "A"), said("A", "A", "A", "A")]
    rewards = [
        [{"accuracy": 9.0, "brief": x} for x in row]
        for row in ((1, 3, None, None), (None,) * 4, (0, 0, 0, 2))
    ]
    parts = tabulated([judged(task, *one) for one in zip(asked, texts, rewards, strict=True)])
    whole, ct = parts["overall"], parts["modalities"]["CT"]
    assert (whole["questions"], whole["samples"], whole["right"], whole["unparsed"]) == (3, 4, 7, 1)
    assert whole["accuracy"] == pytest.approx(7 / 12) and ct["accuracy"] == pytest.approx(3 / 8)
    # 1 - C(n - c, 2) / C(n, 2) of 2 and 1 right of 4; both of the second pair of "a" mumble or err
    assert ct["pass@2"]["mean"] == pytest.approx((1 - 1 / 6 + 1 - 3 / 6) / 2)
    assert ct["pass@4"]["mean"] == 1.0
    assert ct["maj@2"]["mean"] == pytest.approx(((1 + 0) / 2 + (0 + 0.5) / 2) / 2)
    assert ct["maj@4"]["mean"] == 0.5
    low, high = wilson(1, 2)[1:]
    assert (ct["maj@4"]["low"], ct["maj@4"]["high"]) == (low, high)
    assert ct["rewards"] == {
        "brief": {"questions": 1, "mean": 2.0, "low": -math.inf, "high": math.inf}
    }
    assert whole["rewards"]["brief"]["mean"] == pytest.approx((2 + 0.5) / 2)
    assert parts["macro_mean"]["accuracy"] == pytest.approx((3 / 8 + 1) / 2)


# ---- the command and the function ----


@pytest.fixture
def sampled(monkeypatch, tmp_path):
    """A model that says A, B, A, ... when asked again; and a file of six questions."""
    vlm = ScriptedVLM(lambda prompt, nth: says("AB"[nth % 2]))
    monkeypatch.setattr(report.VLM, "load", lambda path, **how: vlm)
    monkeypatch.setattr(report, "reader_of", lambda settings, task: None)
    records = [
        dict(question=f"Which is {n}?", options=["x", "y"], answer="AB"[n % 2], level=n, id=f"q{n}")
        for n in range(6)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "mine.py").write_text(
        "import kepo\n"
        "def level(completions, level, **columns):\n    return level\n"
        "class Always(kepo.Task):\n"
        "    def is_right(self, text, example):\n        return True\n"
    )
    return tmp_path


def test_the_command_and_the_function_say_the_same(sampled, capsys):
    mine = str(sampled / "mine.py")
    words = ["--samples", "4", "--rewards", "accuracy", f"{mine}:level", "format"]
    words += ["--temperature", "0.7", "--max-completion-length", "99"]
    data = str(sampled / "data.jsonl")
    main(["evaluate", "m", data, *words, "--json", str(sampled / "out.json")])
    told = json.loads((sampled / "out.json").read_text())
    header = capsys.readouterr().out.splitlines()[0]
    assert header.split()[-4:] == ["pass@4", "maj@4", "level", "format"]
    whole = told["overall"]
    assert whole["accuracy"] == 0.5 and whole["pass@4"]["mean"] == 1.0
    assert whole["maj@4"]["mean"] == 0.5 and whole["samples"] == 4
    assert whole["rewards"]["level"]["mean"] == 2.5 and whole["rewards"]["format"]["mean"] == 1.0
    assert whole["rewards"]["level"]["low"] < 2.5 < whole["rewards"]["level"]["high"]

    def level(completions, level, **columns):
        return level

    found = kepo.evaluate(
        "m",
        data,
        rewards=("accuracy", level, "format"),
        samples=4,
        temperature=0.7,
        max_completion_length=99,
    )
    mean = json.loads(json.dumps(found.record())) | {"settings": None}
    assert mean == told | {"settings": None}
    assert found.accuracy == 0.5 and len(found.answers) == 6
    assert found.answers[1].texts == tuple(map(says, "ABAB")) and found.answers[1].right[1]


def test_a_task_of_ones_own(sampled):
    data = sampled / "data.jsonl"
    assert kepo.evaluate("m", data, task=f"{sampled / 'mine.py'}:Always").accuracy == 1.0

    class Never(kepo.Task):
        def is_right(self, text, example):
            return False

    found = kepo.evaluate("m", data, task=Never())
    assert found.accuracy == 0.0 and found.settings["task"] == "Never"
    assert found.overall["chance"] == 0.0


def test_other_settings_are_refused(sampled):
    data = sampled / "data.jsonl"
    with pytest.raises(KepoConfigError, match=r"evaluate: \['json', 'limits'\] are no settings"):
        kepo.evaluate("m", data, limits=3, json="out.json")
    with pytest.raises(KepoDataError, match="data is 7; expected a list"):
        kepo.evaluate("m", 7)
    with pytest.raises(KepoRewardError, match="'bad' returned 2 numbers; expected 6"):
        kepo.evaluate("m", data, rewards=[named("bad", lambda completions: [1, 2])])


def named(name, function):
    function.__name__ = name
    return function


# ---- a real model ----


def test_a_loaded_model_and_a_list(made, tmp_path):
    vlm = VLM.load(made / "student")
    examples = kepo.data.load.load_examples(made / "data" / "test")[0][:4]
    settings = dict(max_completion_length=6, samples=3, seed=1)
    torch.manual_seed(5)
    first = kepo.evaluate(vlm, examples, **settings)
    torch.manual_seed(6)  # nor do other questions at once matter
    again = kepo.evaluate(str(made / "student"), examples, batch=3, **settings)
    assert [a.texts for a in first.answers] == [a.texts for a in again.answers]
    assert len({text for a in first.answers for text in a.texts}) > 6
    other = kepo.evaluate(vlm, examples, **settings | {"seed": 2})
    assert [a.texts for a in first.answers] != [a.texts for a in other.answers]
    greedy = kepo.evaluate(vlm, examples, max_completion_length=6)
    assert greedy.overall["questions"] == 4 and "samples" not in greedy.overall
    assert greedy.settings["model"] == "<model>" and greedy.settings["data"] == "<data>"
    odd = [Example("odd", "What is <|im_end|>?", "A", ("x", "y"), examples[0].images), *examples]
    assert kepo.evaluate(vlm, odd, max_completion_length=6).data["bad_records"] == {
        "text refused": 1
    }
