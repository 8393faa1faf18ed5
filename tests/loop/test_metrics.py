"""The numbers of a step from rollouts made by hand, and logs that a kill cannot spoil."""

import json

import pytest
import torch
from toy import BARE, MALFORMED, RIGHT, WRONG, group_of, rollout

from kepo.batch import collate
from kepo.config import Config
from kepo.explore import Exploration
from kepo.hints import RescueReport
from kepo.metrics import StepLog, completion_records, peak_gb, read_metrics, step_metrics
from kepo.prompts import question_prompt
from kepo.step import StepTotals

CONFIG = Config(teacher="t", num_generations=2, num_iterations=2)
GROUPS = [
    [rollout(RIGHT, "a"), rollout(MALFORMED, "a", truncated=True)],
    group_of([WRONG, WRONG], "b"),
    [rollout(WRONG, "c"), rollout(BARE, "c", hint="look left")],
]


def metrics(groups, data=(), **totals):
    report = RescueReport(
        groups=2, written=1, unhinted=1, rescued=1, attempts=3, sampled=6, successes=2, accepted=1
    )
    found = Exploration(groups=groups, report=report, asked=4, resampled=1, sampled=12)
    batch = collate(groups, CONFIG, data)
    return step_metrics(found, data, batch, StepTotals(**totals), CONFIG)


def test_metrics_by_hand():
    data = [rollout(RIGHT, "d")]
    lengths = [len(r.completion_ids) for group in GROUPS for r in group] + [35]
    # Sums over two iterations; clipping can be told in the second alone.
    values = metrics(
        GROUPS,
        data,
        tokens=400,
        teacher_tokens=100,
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
        "kepo/kd_loss": 0.5,
        "kepo/divergence": 0.5,
        "kepo/gate_rate": 3 / 7,  # two right ones and the dataset's
        "kepo/teacher_tokens": 50,
        "kepo/teacher_skipped_frac": 0.75,
        "kepo/sampled_completions": 12,
        "kepo/data_completions": 1,
        "kepo/resampled_groups": 1,
        "kepo/hint_groups": 2,
        "kepo/hint_rate": 2 / 4,  # three groups, and one that was exchanged
        "kepo/hints_written": 1,
        "kepo/hints_unusable": 1,
        "kepo/hint_attempts": 3,
        "kepo/hint_accept_rate": 1 / 3,
        "kepo/hint_accepted": 1,
        "kepo/rescue_rate": 1 / 4,
        "kepo/hinted_rate": 1 / 7,
    }
    assert set(values) == {*expected, "rewards/format/std"}
    assert {key: values[key] for key in expected} == pytest.approx(expected)


def test_a_step_of_the_dataset_alone_has_no_rewards_and_is_finite():
    values = metrics([], [rollout(RIGHT, "d")])
    assert not any(key.startswith("reward") for key in values)
    assert values["kepo/data_completions"] == 1 and values["kepo/gate_rate"] == 1.0
    json.dumps(values, allow_nan=False)


def test_completions_are_recorded_as_they_were_judged():
    data = [rollout(RIGHT, "d")]
    batch = collate(GROUPS, CONFIG, data)
    rollouts = [r for group in GROUPS for r in group] + data
    records = completion_records(rollouts, batch)
    assert [r["completion"] for r in records] == [
        RIGHT,
        MALFORMED,
        WRONG,
        WRONG,
        WRONG,
        BARE,
        RIGHT,
    ]
    assert [r["gate"] for r in records] == [1, 0, 0, 0, 0, 1, 1]
    assert [r["hint"] for r in records] == [None] * 5 + ["look left", None]
    assert [r["truncated"] for r in records] == [False, True] + [False] * 5
    assert [r["advantage"] for r in records] == batch.advantages.tolist()
    first = records[0]
    assert first["prompt"] == question_prompt(rollouts[0].example)
    assert (first["images"], first["answer"]) == (["/a.png"], "A")
    assert first["rewards"] == {"accuracy": 1.0, "format": 1.0}
    json.dumps(records, allow_nan=False)


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
