"""The numbers of a step from rollouts made by hand, and logs that a kill cannot spoil."""

import json
from dataclasses import replace

import pytest
import torch
from toy import BARE, MALFORMED, RIGHT, WRONG, group_of, question_prompt, rollout

from kepo.config import Config
from kepo.objective.batch import collate
from kepo.objective.totals import StepTotals
from kepo.rollout.explore import Exploration
from kepo.rollout.hints import RescueReport
from kepo.run.curves import plot_curves, points_of
from kepo.run.metrics import (
    StepLog,
    completion_records,
    peak_gb,
    read_metrics,
    step_metrics,
    step_times,
)

CONFIG = Config(teacher="t", num_generations=2, num_iterations=2)
GROUPS = [
    [rollout(RIGHT, "a"), rollout(MALFORMED, "a", truncated=True)],
    group_of([WRONG, WRONG], "b", teacher_hint="look right"),
    [rollout(WRONG, "c"), rollout(BARE, "c", hint="look left")],
]


def metrics(groups, data=(), **totals):
    report = RescueReport(
        groups=2,
        written=1,
        hint_tokens=30,
        unhinted=1,
        rescued=1,
        attempts=3,
        sampled=6,
        successes=2,
        accepted=1,
    )
    found = Exploration(groups=groups, report=report, asked=4, resampled=1, sampled=12)
    batch = collate(groups, CONFIG, data)
    return step_metrics(found, data, batch, StepTotals(**totals), CONFIG)


def test_the_mean_of_a_reward_leaves_out_what_it_does_not_apply_to():
    group = group_of([RIGHT, WRONG])
    group[0].rewards["format"], group[1].rewards["format"] = None, 0.25
    values = metrics([group], [])
    assert values["rewards/format/mean"] == 0.25 and "rewards/format/std" not in values
    assert values["rewards/accuracy/mean"] == 0.5 and values["reward"] == (1.0 + 0.25) / 2
    group[1].rewards["format"] = None
    assert "rewards/format/mean" not in metrics([group], [])


def test_metrics_by_hand():
    data = [rollout(RIGHT, "d")]
    lengths = [len(r.completion_ids) for group in GROUPS for r in group] + [35]
    # Sums over two iterations; clipping can be told in the second alone.
    values = metrics(
        GROUPS,
        data,
        tokens=400,
        teacher_tokens=50,  # asked once for both
        distilled_tokens=80,
        teacher_requests=9,
        teacher_retries=2,
        policy_loss=3.0,
        distill_loss=1.0,
        divergence=50.0,
        entropy=800.0,
        kl=4.0,
        clipped_low=20,
        clipped_high=10,
        sampler_gap=5.0,
        sampler_gap_max=0.5,
        sampled_tokens=100,
    )
    expected = {
        # totals 2, 0 | 1, 1 | 1, 1
        "reward": 1.0,
        "reward_std": 0.4**0.5,
        "frac_reward_zero_std": 2 / 3,
        "rewards/accuracy/mean": 2 / 6,
        "rewards/accuracy/std": torch.tensor([1.0, 0, 0, 0, 0, 1]).std().item(),
        "rewards/format/mean": 4 / 6,
        "completions/mean_length": sum(lengths) / 7,
        "completions/min_length": 2,
        "completions/max_length": 35,
        "completions/clipped_ratio": 1 / 7,
        "entropy": 2.0,
        "kl": 0.01,
        "clip_ratio/low_mean": 0.05,
        "clip_ratio/high_mean": 0.025,
        "sampling/sampling_logp_difference/mean": 0.05,
        "sampling/sampling_logp_difference/max": 0.5,
        "kepo/completion_tokens": 200,
        "kepo/policy_loss": 1.5,
        "kepo/distill_loss": 0.5,
        "kepo/divergence": 50 / 80,
        "kepo/distilled_tokens": 40,
        "kepo/gate_rate": 5 / 7,  # two right ones, the dataset's, two with a hint for the teacher
        "kepo/teacher_tokens": 50,
        "kepo/teacher_requests": 9,
        "kepo/teacher_retries": 2,
        "kepo/teacher_skipped_frac": 0.75,
        "kepo/sampled_completions": 12,
        "kepo/data_completions": 1,
        "kepo/resampled_groups": 1,
        "kepo/hint_groups": 2,
        "kepo/hint_rate": 2 / 4,  # three groups, and one that was exchanged
        "kepo/hints_written": 1,
        "kepo/hint_retries": 0,
        "kepo/hint_tokens": 30,
        "kepo/hints_unusable": 1,
        "kepo/hint_attempts": 3,
        "kepo/hint_accept_rate": 1 / 3,
        "kepo/hint_accepted": 1,
        "kepo/rescue_rate": 1 / 4,
        "kepo/hinted_rate": 1 / 7,
        "kepo/teacher_hinted_rate": 2 / 7,
    }
    assert set(values) == {*expected, "rewards/format/std"}
    assert {key: values[key] for key in expected} == pytest.approx(expected)


def test_a_step_of_the_dataset_alone_has_no_rewards_and_is_finite():
    values = metrics([], [rollout(RIGHT, "d")])
    assert not any(key.startswith("reward") for key in values)
    assert values["kepo/data_completions"] == 1 and values["kepo/gate_rate"] == 1.0
    json.dumps(values, allow_nan=False)


def test_times_shares_and_rates_by_hand():
    found = Exploration(rollout_seconds=2.0, hint_seconds=1.0, sampled_tokens=600)
    totals = StepTotals(tokens=900, teacher_tokens=100, teacher_seconds=0.5)
    assert step_times(found, totals, after_sampling=5.0, whole=10.0) == pytest.approx(
        {
            "time/rollout": 2.0,
            "time/hint": 1.0,
            "time/teacher": 0.5,
            "time/update": 4.5,
            "time/share/rollout": 0.2,
            "time/share/hint": 0.1,
            "time/share/teacher": 0.05,
            "time/share/update": 0.45,
            "time/share/other": 0.2,
            "time/tokens_per_second/sampled": 200.0,
            "time/tokens_per_second/trained": 200.0,
            "time/tokens_per_second/teacher": 200.0,
            "step_time": 10.0,
        }
    )


def test_a_phase_that_did_not_happen_has_no_rate_and_no_share():
    values = step_times(Exploration(), StepTotals(tokens=8), after_sampling=1.0, whole=2.0)
    rates = {key: x for key, x in values.items() if "per_second" in key}
    assert rates == {"time/tokens_per_second/trained": 8.0}
    assert values["time/share/teacher"] == values["time/share/rollout"] == 0.0
    assert values["time/share/other"] == 0.5


def test_completions_are_recorded_as_they_were_judged():
    data = [rollout(RIGHT, "d")]
    batch = collate(GROUPS, CONFIG, data)
    rollouts = [r for group in GROUPS for r in group] + data
    records = completion_records(rollouts, batch, CONFIG)
    assert [r["completion"] for r in records] == [
        RIGHT,
        MALFORMED,
        WRONG,
        WRONG,
        WRONG,
        BARE,
        RIGHT,
    ]
    assert [r["gate"] for r in records] == [1, 0, 1, 1, 0, 1, 1]
    assert [r["hint"] for r in records] == [None] * 5 + ["look left", None]
    assert [r["teacher_hint"] for r in records] == [None] * 2 + ["look right"] * 2 + [None] * 3
    assert [r["truncated"] for r in records] == [False, True] + [False] * 5
    assert [r["advantage"] for r in records] == batch.advantages.tolist()
    first = records[0]
    assert first["prompt"] == question_prompt(rollouts[0].example)
    assert (first["images"], first["answer"]) == (["/a.png"], "A")
    assert first["rewards"] == {"accuracy": 1.0, "format": 1.0}
    json.dumps(records, allow_nan=False)


def test_a_soft_gate_is_recorded_by_its_value_and_closed_without_loss():
    config = replace(CONFIG, gate_reward="total", gate_threshold=None, mask_truncated=True)
    rollouts = [rollout(RIGHT), rollout(RIGHT, truncated=True), rollout(WRONG), rollout(MALFORMED)]
    records = completion_records(rollouts, collate([rollouts], config), config)
    assert [r["gate"] for r in records] == [2.0, 0.0, 1.0, 0.0]


def test_peak_memory_is_at_least_what_is_held():
    assert 0.05 < peak_gb(torch.device("cpu")) < 1000


# ---- the log ----


def test_metrics_of_steps_to_be_repeated_are_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    log = StepLog(path, resume_step=-1)
    for step in (0, 1, 2, 3):
        log.write(step, {"x": step})
    with path.open("a") as file:
        file.write('{"step": 4, "x"')  # cut short by a kill
    StepLog(path, resume_step=2).write(3, {"x": 30})
    assert read_metrics(path) == [{"step": s, "x": x} for s, x in ((0, 0), (1, 1), (2, 2), (3, 30))]


def test_a_step_may_write_many_records_or_none(tmp_path):
    path = tmp_path / "new" / "m.jsonl"
    log = StepLog(path, resume_step=-1)
    log.write(1, {"x": 1}, {"x": "a\nb"})
    log.write(2)
    log.write(3, {"x": 3})
    assert read_metrics(path) == [{"step": s, "x": x} for s, x in ((1, 1), (1, "a\nb"), (3, 3))]
    StepLog(path, resume_step=-1)  # a fresh run keeps nothing
    assert read_metrics(path) == []


def test_a_damaged_line_costs_that_line_and_is_said(tmp_path, capsys):
    path = tmp_path / "m.jsonl"
    lines = [b'{"step": 1}', b'{"step": 2, ', b'{"step": 3}', b"\0\0\0", b"\xff", b"7", b'{"x": 1}']
    path.write_bytes(b"\n".join([*lines, b'{"step": "4"}', b'{"step": 4}', b'{"step": 5, "x']))
    assert read_metrics(path) == [{"step": 1}, {"step": 3}, {"step": 4}]
    assert capsys.readouterr().out == ""  # it is read while a run writes it
    StepLog(path, resume_step=4)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n{"step": 4}\n'
    said = capsys.readouterr().out
    assert "damaged lines are dropped: 7 of them, number 2, 4, 5, 6, 7, ..." in said
    StepLog(path, resume_step=3)
    assert capsys.readouterr().out == ""


def test_lines_that_changed_since_the_checkpoint_are_said(tmp_path, capsys):
    path = tmp_path / "m.jsonl"
    log = StepLog(path, resume_step=-1)
    log.write(1, {"x": 1.5})
    mark = log.mark
    log.write(2, {"x": 2})
    again = StepLog(path, 1, mark)
    assert capsys.readouterr().out == "" and again.mark == mark
    for content in (path.read_text().replace("1.5", "1.7"), "", '{"step": 1}\n'):
        path.write_text(content)
        StepLog(path, 1, mark)
        assert "has lost or changed lines since step 1" in capsys.readouterr().out
    path.unlink()
    StepLog(path, 1, mark)
    assert "has lost or changed lines" in capsys.readouterr().out


def test_the_log_is_strict_json_and_so_becomes_an_older_one(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "grad_norm": NaN, "x": -Infinity}\n')
    assert read_metrics(path) == [{"step": 1, "grad_norm": None, "x": None}]
    log = StepLog(path, resume_step=1)
    log.write(2, {"reward": float("inf"), "nested": {"x": [float("nan")]}})

    def refuse(name):
        raise AssertionError(name)

    lines = path.read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in lines] == [
        {"step": 1, "grad_norm": None, "x": None},
        {"step": 2, "reward": None, "nested": {"x": [None]}},
    ]
    pytest.importorskip("matplotlib")
    plot_curves(path, tmp_path / "curves.png")  # of which nothing but gaps can be drawn
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_curves_go_on_through_the_former_name_of_a_key():
    records = [
        {"step": 1, "kepo/kd_loss": 0.5},
        {"step": 2, "kepo/distill_loss": None, "kepo/kd_loss": 9.0},
        {"step": 3, "kepo/distill_loss": 0.25},
        {"step": 3, "eval": {}},
    ]
    assert points_of(records, "kepo/distill_loss") == [(1, 0.5), (3, 0.25)]
