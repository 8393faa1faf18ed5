"""Several teachers: each is asked about its own examples alone, and a micro-batch has one."""

from dataclasses import replace

import pytest
import torch
from served_model import serving
from small import config_of, rigged
from toy import ENV, RIGHT, WRONG, TableVLM, example, group_of, models_of, pieces

from kepo.config import Config
from kepo.data.load import DataReport
from kepo.errors import KepoConfigError, KepoDataError
from kepo.loop import train
from kepo.models.vlm import VLM
from kepo.objective.batch import collate
from kepo.objective.micros import plan_micros
from kepo.objective.score import score
from kepo.objective.step import kepo_step
from kepo.objective.totals import StepTotals
from kepo.rollout.encodable import left_out, untaught
from kepo.rollout.hints import rescue
from kepo.run import milestones
from kepo.run.metrics import read_metrics
from kepo.teachers.several import Several, place_of

CONFIG = Config(
    teachers={"CT": "a", "MR": "b"},
    teacher_column="modality",
    gate_reward=None,
    num_generations=2,
    max_completion_length=64,
    impl="torch",
)


def of(modality, group):
    return [replace(r, example=replace(r.example, modality=modality)) for r in group]


GROUPS = [
    of("CT", group_of([RIGHT, WRONG], "a")),
    of("MR", group_of([WRONG, RIGHT], "b")),
    of("CT", group_of([WRONG, WRONG], "c")),
]


def loss(policy, teachers, micros, config):
    totals = StepTotals()
    scores = score(teachers, None, micros, config, totals)
    parts = [
        kepo_step(policy, teachers, micro, known, config, totals)[0]
        for micro, known in zip(micros, scores, strict=True)
    ]
    return torch.stack(parts), totals


def test_each_is_asked_about_its_own_and_the_loss_is_of_its_law():
    policy, one, other = TableVLM(1), TableVLM(5, hidden=5), TableVLM(6, hidden=4)
    micros = pieces(collate(GROUPS, CONFIG), 2)
    assert [micro.teacher.tolist() for micro in micros] == [[0, 0], [1, 1], [0, 0]]
    found, totals = loss(policy, Several((one, other)), micros, CONFIG)
    assert {text[9] for text, _ in one.read} == {"a", "c"}
    assert {text[9] for text, _ in other.read} == {"b"}
    alone = replace(CONFIG, teachers=(), teacher="t")
    same = [replace(micro, teacher=torch.zeros_like(micro.teacher)) for micro in micros]
    for place, teacher in enumerate((one, other, one)):
        expected, _ = loss(policy, teacher, same[place : place + 1], alone)
        torch.testing.assert_close(found[place : place + 1], expected)
    assert totals.teacher_tokens == int(sum(m.completion_mask.sum() for m in micros))


def test_a_micro_batch_has_one_teacher():
    batch = collate(GROUPS, CONFIG)
    for shared in (True, False):
        [plan] = plan_micros(batch, [10] * 6, replace(CONFIG, micro_batch=6), shared)
        assert len(plan) == 2  # and not one, into which all would fit
        for micro in plan:
            places = [p for row in micro for p in row.places]
            assert len(batch.teacher[places].unique()) == 1
        assert sorted(p for m in plan for row in m for p in row.places) == list(range(6))


def test_hints_are_the_own_teachers():
    def says(word):
        return TableVLM(1, answer=lambda prompt, nth: f"<hint>{word}</hint>")

    student = TableVLM(1, answer=lambda prompt, nth: WRONG)
    models = models_of(student, Several((says("left"), says("right"))))
    hints = {}
    config = replace(CONFIG, max_attempts=1, num_hinted=1)
    rescue([of(m, group_of([WRONG] * 2, m)) for m in ("CT", "MR")], models, ENV, config, hints)
    assert hints == {"CT": "left", "MR": "right"}


def test_examples_without_a_teacher_are_left_out_and_counted():
    examples = [example(f"q{n}", modality=m) for n, m in enumerate(["CT", "US", "MR", "US"])]
    faults = untaught(examples, CONFIG)
    assert set(faults) == {"q1", "q3"}
    report = DataReport("d", "l", 4, 4, (), {})
    kept, report = left_out(examples, report, faults)
    assert [one.id for one in kept] == ["q0", "q2"]
    assert report.counts() == {"no teacher": 2}
    with pytest.raises(KepoDataError, match="its modality is 'US'; teachers has CT, MR"):
        left_out(examples, report, faults, "fail")
    with pytest.raises(KepoConfigError, match="teachers: none for the modality of example 'q1'"):
        place_of(examples[1], CONFIG)
    own = replace(CONFIG, teachers={"7": "a"}, teacher_column="ward")
    assert place_of(example("q", columns={"ward": 7}), own) == 0
    assert set(untaught([example("q")], own)) == {"q"}
    assert untaught(examples, replace(CONFIG, teachers=())) == {}


def test_a_run_with_a_local_and_a_served_teacher(made, tmp_path, monkeypatch):
    monkeypatch.setattr(milestones, "plot_curves", lambda *_, **__: None)
    with serving(VLM.load(made / "teacher")) as server, rigged():
        teachers = {"scanned": server.url, "inverted": str(made / "teacher")}
        config = config_of(
            made,
            tmp_path / "run",
            teacher=None,
            teachers=teachers,
            train_modalities=("scanned", "inverted", "noisy"),
            gate_reward=None,
            hint_trigger="never",
            prompts_per_step=4,
            steps=2,
            log_completions_every=1,
        )
        assert train(config).exit_code == 0
        scored = [body for path, body in server.asked if path == "/inference/v1/generate"]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [r for r in records if "reward" in r]
    assert sum(r["kepo/teacher_requests"] for r in steps) == len(scored) - 2
    assert 0 < len(scored) - 2 < 2 * 4 * 4  # and the others by the local one
    assert all(r["kepo/teacher_tokens"] == r["kepo/completion_tokens"] for r in steps)
