"""Forty records with every quirk: named, counted, checked by the command, trained on."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import quirks
from PIL import Image

from kepo.__main__ import main
from kepo.check import check
from kepo.config import Config
from kepo.data.load import load_examples
from kepo.data.run_data import load_data
from kepo.digits.tiny import build_tiny
from kepo.errors import KepoConfigError, KepoDataError
from kepo.evaluation.answers import by_question_type
from kepo.loop import train
from kepo.run.metrics import read_metrics

UNDECODED = {k: n for k, n in quirks.PROBLEMS.items() if k != "image unreadable"}
"""What is found without decoding an image."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return quirks.write_quirks(tmp_path_factory.mktemp("made") / "data")


@pytest.fixture
def clean(root, tmp_path) -> Path:
    return quirks.write_good(root, tmp_path / "clean")


# ---- the loader


def test_every_problem_is_counted_and_named_and_every_quirk_understood(root):
    examples, report = load_examples(root)
    assert report.counts() == UNDECODED and report.quirks == quirks.QUIRKS
    assert report.records == 40 and report.questions == len(examples) == quirks.GOOD + 2
    assert len(report.problems) == sum(UNDECODED.values())
    for problem in report.problems:
        assert ".json[" in problem.where and problem.message
    text = report.summary()
    assert "8 bad records left out: field 1, options 1, answer 1, duplicate id 2" in text
    assert str(report.problems[0]) in text
    spelt = {e.id: e.answer for e in examples}
    assert [spelt[f"quirks_{n}"] for n in (11, 12, 13)] == ["B", "A", "B"]


def test_asked_to_fail_it_fails_at_the_first(root):
    with pytest.raises(KepoDataError, match=r"MIAS.json\[5\]: question_type=None"):
        load_examples(root, bad_records="fail")
    with pytest.raises(KepoConfigError, match="bad_records is 'maybe'"):
        load_examples(root, bad_records="maybe")


def test_a_limit_counts_good_questions(root):
    examples, report = load_examples(root, limit=31)
    assert len(examples) == 31
    assert report.counts()["image outside"] == 2  # passed on the way to the 31st
    assert load_examples(root, limit=3)[1].counts().get("image outside") is None


def test_nothing_left_is_fatal_and_says_why(clean):
    shutil.rmtree(clean / "Images")
    (clean / "Images").mkdir()
    with pytest.raises(KepoDataError, match=r"29 bad.*image missing 29(?s:.*)no question is left"):
        load_examples(clean)


def test_a_file_that_is_no_json_is_one_bad_record(clean):
    quirks.first_file(clean).write_text('[{"question_id": ')
    _, report = load_examples(clean)
    assert report.counts() == {"file": 1} and "Chest CT Scan.json" in report.problems[0].where


@pytest.mark.parametrize("image", ["x" * 5000, "file:///etc/hostname", "Images"])
def test_a_path_that_is_none_is_a_missing_image(clean, image):
    quirks.plant(clean, 2, image_path=image)
    assert load_examples(clean)[1].counts() == {"image missing": 1}


# ---- kepo data check


def checked(capsys, *words: object) -> tuple[int, str]:
    try:
        code = main(["data", "check", *map(str, words)])
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().out


def test_check_lists_everything(root, capsys):
    code, out = checked(capsys, root)
    assert code == 1
    assert "40 records, 30 good questions about 20 images" in out
    assert "wrong: 10 records" in out
    for kind, count in quirks.PROBLEMS.items():
        assert f"{count:6}  {kind}\n" in out, kind
    for quirk, count in quirks.QUIRKS.items():
        assert f"{count:6}  {quirk}\n" in out, quirk
    for name in ("broken.png", "half.png", "nowhere.png", "outside.png", "/etc/hostname", "MIAS"):
        assert name in out, name
    table = [line.split() for line in out.splitlines()]
    assert ["all", "10", "20", "30"] in table and ["X-Ray", "3", "6", "9"] in table


def test_check_of_good_data_exits_with_zero(clean, capsys):
    code, out = checked(capsys, clean)
    assert code == 0 and "nothing is wrong" in out


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"option_A": "heart "}, "answer"),
        ({"image_path": "Images/../../x.png"}, "image outside"),
        ({"image_path": "Images/half.png"}, "image unreadable"),
        ({"option_B": ""}, "options"),
    ],
)
def test_check_finds_one_planted_mistake(clean, capsys, changes, kind):
    quirks.plant(clean, 0, **changes)
    code, out = checked(capsys, clean)
    assert code == 1 and "wrong: 1 records" in out and f"     1  {kind}\n" in out


def test_check_names_both_of_two_records_with_one_id(clean, capsys):
    quirks.plant(clean, 0, question_id="quirks_05")
    code, out = checked(capsys, clean)
    assert code == 1 and "wrong: 2 records" in out and "     2  duplicate id\n" in out
    assert "Scan.json[0]: the id 'quirks_05'" in out and "Scan.json[4]: the id" in out


def test_check_names_the_first_few_or_all(clean, capsys):
    for place in range(7):
        quirks.plant(clean, place, image_path="Images/nowhere.png")
    out = checked(capsys, clean)[1]
    assert out.count("nowhere.png") == 5 and "and 2 more" in out
    assert checked(capsys, clean, "--all")[1].count("nowhere.png") == 7


def test_check_counts_shared_images(clean, root, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(clean, other)
    for number, image in enumerate(sorted((other / "Images").glob("*.png"))):
        if image.stem.isdigit() and image.stem != "1":
            Image.new("L", (9, number + 1), 3 * number).save(image)
    code, out = checked(capsys, clean, "--against", other)
    assert code == 1 and "1 images are in both by content, 0 by path; 2 of its questions" in out
    Image.new("L", (3, 3)).save(other / "Images" / "1.png")
    assert checked(capsys, clean, "--against", other)[0] == 0


# ---- a run


def settings(root: Path, tmp_path: Path, **more: object) -> Config:
    base = dict(student="s", train_data=str(root), run_dir=str(tmp_path / "run"))
    return Config(**(base | more))


def test_a_run_counts_bad_records_and_shared_images(root, tmp_path):
    data = load_data(settings(root, tmp_path, eval_data=str(root), eval_limit=3))
    assert len(data.train) == 30 and len(data.eval) == 9
    assert data.record["train"]["bad_records"] == quirks.PROBLEMS
    assert data.record["shared"]["compared"] == "contents"
    assert data.record["shared"]["eval_questions"] == 9
    assert "9 of them are about" in data.summary and "half.png" not in data.summary
    unverified = load_data(settings(root, tmp_path, eval_data=str(root), verify_images=False))
    assert len(unverified.train) == 32 and unverified.record["shared"]["compared"] == "paths"
    assert unverified.record["shared"]["images"] == 22
    with pytest.raises(KepoDataError, match=r"MIAS.json\[5\]"):
        load_data(settings(root, tmp_path, bad_records="fail"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_share": 0.1, "eval_data": "."}, "are two evaluations"),
        ({"eval_share": 1.0}, "eval_share=1.0; expected"),
        ({"bad_records": "some"}, "bad_records='some'; expected one of skip, fail"),
        ({"train_data": "/nowhere"}, "train_data='/nowhere': /nowhere is not there"),
    ],
)
def test_settings_that_cannot_work_are_refused(root, tmp_path, changes, message):
    off = dict(hint_trigger="never", gate_reward=None, distill_coef=0.0)
    check(settings(root, tmp_path, **off))
    changes = {k: str(root) if v == "." else v for k, v in changes.items()}
    with pytest.raises(KepoConfigError, match=message):
        check(settings(root, tmp_path, **(off | changes)))


def test_an_unreadable_image_is_fatal_when_asked(clean, tmp_path):
    quirks.plant(clean, 0, image_path="Images/half.png")
    with pytest.raises(KepoDataError, match=r"half.png"):
        load_data(settings(clean, tmp_path, bad_records="fail"))
    assert len(load_data(settings(clean, tmp_path)).train) == 28


def test_a_run_on_one_source_with_held_out_images(root, tmp_path):
    source = dict(train_modalities=("X-Ray",), train_question_types=("Disease Diagnosis",))
    data = load_data(settings(root, tmp_path, eval_share=0.3, **source))
    assert {(e.modality, e.question_type) for e in data.train} == {("X-Ray", "Disease Diagnosis")}
    assert len({e.modality for e in data.eval}) == 3 and len({e.images for e in data.eval}) == 6
    assert data.record["shared"]["images"] == 0
    assert 0 < len(data.train) < 6 and data.record["train"]["questions"] == len(data.train)


def test_training_and_evaluation_by_modality_and_question_type(root, tmp_path, capsys):
    build_tiny(tmp_path / "student", size="student", seed=1)
    config = settings(
        root,
        tmp_path,
        student=str(tmp_path / "student"),
        eval_data=str(root),
        eval_limit=3,
        train_modalities=("X-Ray",),
        hint_trigger="never",
        gate_reward=None,
        distill_coef=0.0,
        steps=1,
        prompts_per_step=2,
        num_generations=2,
        max_completion_length=4,
    )
    assert train(config).exit_code == 0
    out = capsys.readouterr().out
    assert "7 bad records left out" in out and "that are trained on too" in out
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    # Images are looked at where they are used: of X-rays one is outside, one unreadable.
    seen = {"image outside": 1, "image unreadable": 1}
    anyway = {k: n for k, n in quirks.PROBLEMS.items() if not k.startswith("image")}
    assert record["train"]["bad_records"] == anyway | seen
    assert record["eval"]["bad_records"] == UNDECODED and record["eval"]["questions"] == 9

    # An image that is gone would make the rest of the run meet other questions: not silently.
    (lost,) = next(e for e in load_data(config).train).images
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(KepoDataError, match="train_data has 8 usable questions where"):
        train(dataclasses.replace(config, steps=2))
    lost.write_bytes(content)
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert set(last["eval"]) == set(quirks.MODALITIES)
    assert set(last["eval_types"]) == set(quirks.TYPES)


def test_scores_are_grouped_by_question_type(root):
    examples, _ = load_examples(root)
    scores: dict[str, list[float]] = {}
    for place, example in enumerate(examples):
        scores.setdefault(example.modality, []).append(float(place))
    types = by_question_type(examples, scores)
    assert types == {
        kind: [float(n) for n, e in enumerate(examples) if e.question_type == kind]
        for kind in quirks.TYPES
    }
    with pytest.raises(AssertionError, match="other examples"):
        by_question_type(examples[:-1], scores)
