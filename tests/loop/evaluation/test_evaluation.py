"""The evaluation of a saved model: its table, intervals and chance against a scripted model."""

import json
import math
import re
from collections import Counter

import pytest
import quirks
from toy import TASK, ScriptedVLM

from kepo.__main__ import main
from kepo.evaluation import report as command
from kepo.evaluation.answers import answers_of, by_question_type, greedy_scores, means
from kepo.evaluation.report import Evaluation, evaluation, questions
from kepo.evaluation.scores import judged, tabulated
from kepo.evaluation.statistics import wilson
from kepo.models.sampling import SamplingParams


def says(letter):
    return f"<think>x</think><answer>{letter}</answer>"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Thirty good questions of forty, right letters A and B, with two, three and four options."""
    return quirks.write_quirks(tmp_path_factory.mktemp("made") / "data")


@pytest.fixture
def scripted(monkeypatch):
    """Loads, whatever the folder, a model that always says A but mumbles every fifth time."""
    asked = []

    def answer(prompt, nth):
        asked.append(prompt)
        return "the lung" if len(asked) % 5 == 0 else says("A")

    vlm = ScriptedVLM(answer)
    monkeypatch.setattr(command.VLM, "load", lambda path, **how: vlm)
    monkeypatch.setattr(command, "reader_of", lambda settings, task: None)
    return vlm


def run(root, tmp_path, *words):
    main(["evaluate", "a-model", str(root), "--json", str(tmp_path / "out.json"), *words])
    return json.loads((tmp_path / "out.json").read_text())


def test_the_numbers_are_those_of_the_answers(root, scripted, tmp_path, capsys):
    found = run(root, tmp_path, "--batch", "7", "--max-completion-length", "99")
    asked, _ = questions(Evaluation("", str(root)), TASK)
    assert len(asked) == quirks.GOOD == found["overall"]["questions"] == len(scripted.seen)
    # The same bookkeeping by hand, in the order of the questions.
    parsed = [number % 5 != 4 for number in range(len(asked))]
    right = [good and e.answer == "A" for good, e in zip(parsed, asked, strict=True)]
    cells = {}
    for e, good, hit in zip(asked, parsed, right, strict=True):
        cell = cells.setdefault((e.modality, e.question_type), Counter())
        cell.update(questions=1, right=hit, unparsed=not good, chance=1 / len(e.options))
    assert found["overall"]["unparsed"] == 6 and found["overall"]["right"] == sum(right) > 5
    assert len(found["cells"]) == len(cells) == 6
    for cell in found["cells"]:
        expected = cells[cell["modality"], cell["question_type"]]
        for name in ("questions", "right", "unparsed"):
            assert cell[name] == expected[name]
        assert cell["accuracy"] == expected["right"] / expected["questions"]
        assert math.isclose(cell["chance"], expected["chance"] / expected["questions"])
    for side, name in (("modalities", "modality"), ("question_types", "question_type")):
        for key, whole in found[side].items():
            parts = [cell for cell in found["cells"] if cell[name] == key]
            assert whole["right"] == sum(cell["right"] for cell in parts)
            assert whole["questions"] == sum(cell["questions"] for cell in parts)
    by_modality = [part["accuracy"] for part in found["modalities"].values()]
    assert math.isclose(found["macro_mean"]["accuracy"], sum(by_modality) / 3)
    # Guessing is above 1/4: four of the good questions have two options, six have three.
    assert found["overall"]["chance"] == pytest.approx((4 / 2 + 6 / 3 + 20 / 4) / 30)
    assert found["data"]["bad_records"] == quirks.PROBLEMS

    out = capsys.readouterr().out
    assert "left out: 10 bad records (field 1, options 1, answer 1" in out
    overall = found["overall"]
    row = rf"^all +all +30 +{overall['accuracy']:.3f} +{overall['low']:.3f}-{overall['high']:.3f}"
    assert re.search(row + r" +0\.300 +6$", out, re.M)
    assert f"the same: {found['macro_mean']['accuracy']:.3f}, chance " in out
    for name in (*quirks.MODALITIES, *quirks.TYPES):
        assert name in out


def test_filters_and_limit(root, scripted, tmp_path):
    chosen = quirks.MODALITIES[:2], quirks.TYPES[1:]
    found = run(
        root, tmp_path, "--modalities", *chosen[0], "--question-types", *chosen[1], "--limit", "2"
    )
    assert tuple(found["modalities"]) == chosen[0] and tuple(found["question_types"]) == chosen[1]
    assert all(part["questions"] == 2 for part in found["modalities"].values())
    assert found["data"]["questions"] == found["overall"]["questions"] == 4


def test_a_limit_is_made_up_of_questions_whose_image_can_be_read(root, tmp_path):
    """As a run's eval_limit is; and no more images are decoded than that takes."""
    data = quirks.write_good(root, tmp_path / "data")
    (data / "Images" / "1.png").write_bytes(b"cut short")  # of quirks_02 and quirks_03
    chosen, report = questions(Evaluation("", str(data), limit=2), TASK)
    names = sorted(e.id.removeprefix("quirks_") for e in chosen)
    assert names == ["01", "04", "05", "06", "08", "09"]
    assert report.counts() == {"image unreadable": 2} and report.questions == 6
    (data / "Images" / "9.png").write_bytes(b"cut short")
    assert questions(Evaluation("", str(data), limit=2), TASK)[1] == report
    assert questions(Evaluation("", str(data)), TASK)[1].counts() == {"image unreadable": 4}


def test_the_scores_of_a_run_are_the_same(root):
    examples, _ = questions(Evaluation("", str(root)), TASK)
    scores = greedy_scores(ScriptedVLM(lambda *_: says("A")), examples, TASK, max_tokens=99)
    params = SamplingParams(max_tokens=99, temperature=0.0)
    said = answers_of(ScriptedVLM(lambda *_: says("A")), examples, TASK, params)
    table = tabulated([judged(TASK, *pair) for pair in zip(examples, said, strict=True)])
    for name, mine in (
        ("modalities", scores),
        ("question_types", by_question_type(examples, scores)),
    ):
        assert {key: part["accuracy"] for key, part in table[name].items()} == means(mine)


def test_one_modality_and_type_make_one_line(root, scripted):
    settings = Evaluation(
        "m", str(root), modalities=quirks.MODALITIES[:1], question_types=quirks.TYPES[:1]
    )
    shown = [line for line in str(evaluation(settings)).splitlines() if line]
    assert len(shown) == 3 and shown[1].startswith(quirks.MODALITIES[0])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--limit", "0"], "limit=0; expected a number >= 1"),
        (["--batch", "0"], "batch=0"),
        (["--max-completion-length", "-1"], "max_completion_length=-1"),
        (["--modalities", "PET"], r"modalities names \['PET'\]"),
        (["--samples", "0"], "samples=0; expected a number >= 1"),
        (["--samples", "2", "--temperature", "0"], "temperature=0.0 with samples=2: greedy"),
        (["--temperature", "-1"], "temperature=-1.0 and top_p=1.0; expected"),
        (["--rewards", "nice"], "rewards has 'nice'; expected one of accuracy"),
        (["--rewards", "overlong"], "rewards has overlong, which fines"),
        (["--task", "essay"], "task='essay'; expected one of multiple_choice, open_answer"),
        (["--json", "/nowhere/out.json"], "json='/nowhere/out.json': its folder is not there"),
        (["--image-root", "/nowhere"], "image_root='/nowhere' is not a folder"),
    ],
)
def test_what_cannot_be_done_is_refused(root, scripted, words, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["evaluate", "a-model", str(root), *words])
    assert not scripted.seen


def test_a_model_that_is_not_there_is_named(root, tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit, match=r"error: .*/no-model: cannot load a model"):
        main(["evaluate", str(tmp_path / "no-model"), str(root)])
    with pytest.raises(SystemExit, match=r"/no-model: .*: there is no such folder"):
        main(["evaluate", str(tmp_path / "no-model"), str(root)])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"/file: .*: it is no folder"):
        main(["evaluate", str(tmp_path / "file"), str(root)])


@pytest.mark.parametrize(
    "words", [("--device", x) for x in ("banana", "mps", "meta")] + [("--dtype", "int8")]
)
def test_where_and_in_what_it_computes_is_checked_before_the_data(root, monkeypatch, words):
    monkeypatch.setattr(command, "questions", None)  # calling it would be a TypeError
    with pytest.raises(SystemExit, match=rf"error: {words[0][2:]}='{words[1]}'; expected "):
        main(["evaluate", "a-model", str(root), *words])


def test_wilson_intervals():
    """Against published values (Newcombe 1998, table I) and the equation they solve."""
    for right, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        share, *bounds = wilson(right, count)
        assert share == right / count and bounds == pytest.approx([low, high], abs=1e-4)
    assert wilson(0, 20)[1:] == pytest.approx((0.0, 0.1611), abs=1e-4) and wilson(0, 20).low == 0
    assert wilson(29, 29)[1:] == pytest.approx((0.8830, 1.0), abs=1e-4) and wilson(29, 29).high == 1
    for bound in wilson(3, 11)[1:]:  # |p - bound| is 1.96 standard errors at the bound
        assert abs(3 / 11 - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 11) ** 0.5)
    for right, count in ((-1, 3), (4, 3), (0, 0)):
        with pytest.raises(ValueError, match=f"right={right} of count={count}"):
            wilson(right, count)
