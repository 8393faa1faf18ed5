"""Micro-batches: whole groups, no more than may be held, equal work for all, nothing lost."""

import random
from dataclasses import replace

import pytest
from toy import RIGHT, WRONG, group_of, rollout

from kepo.config import Config
from kepo.objective import micros
from kepo.objective.batch import collate
from kepo.objective.micros import own_micros, padding, plan_micros

CONFIG = Config(teacher="t", num_generations=4, hint_trigger="never", micro_batch=8)
TEXTS = [RIGHT, WRONG, "<answer>A</answer>", "x" * 20]


def batch_of(groups: int, data: int = 0, seed: int = 0):
    draw = random.Random(seed)
    made = [group_of(draw.choices(TEXTS, k=4), f"q{n}") for n in range(groups)]
    return collate(made, CONFIG, [rollout(RIGHT, f"d{n}") for n in range(data)])


def lengths_of(batch) -> list[int]:
    return [30 + 7 * (len(prompt.text) % 5) for prompt in batch.prompts]


def plan_of(batch, *, share_prompts=True, world=1, **settings):
    config = replace(CONFIG, **settings)
    return plan_micros(batch, lengths_of(batch), config, share_prompts, world)


def places(plan) -> list[int]:
    return [p for share in plan for micro in share for row in micro for p in row.places]


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_tokens", [None, 60, 200, 1000])
@pytest.mark.parametrize("micro_batch", [1, 3, 8, 100])
def test_every_completion_is_computed_once_and_limits_hold(
    share_prompts, world, micro_tokens, micro_batch
):
    batch = batch_of(7, data=2)
    settings = dict(micro_tokens=micro_tokens, micro_batch=micro_batch)
    plan = plan_of(batch, share_prompts=share_prompts, world=world, **settings)
    assert sorted(places(plan)) == list(range(len(batch))) and len(plan) == world
    for micro in (micro for share in plan for micro in share):
        count = sum(len(row.places) for row in micro)
        tokens = len(micro) * max(row.tokens for row in micro)
        assert count <= micro_batch
        # One completion alone may be too long for any limit.
        assert count == 1 or micro_tokens is None or tokens <= micro_tokens


def test_groups_stay_whole_unless_one_alone_is_too_much():
    batch = batch_of(6)
    for settings in ({}, {"micro_batch": 4}, {"micro_tokens": 400}):
        plan = plan_of(batch, **settings)
        rows = [row.places for share in plan for micro in share for row in micro]
        assert sorted(rows) == [tuple(range(first, first + 4)) for first in range(0, 24, 4)]
    halves = plan_of(batch, micro_batch=3)
    assert {len(row.places) for micro in halves[0] for row in micro} == {2}


def test_tokens_are_those_of_the_rows_that_are_computed():
    batch = batch_of(2)
    own, prompts = batch.completion_mask.sum(-1).tolist(), lengths_of(batch)
    for row in (row for micro in plan_of(batch)[0] for row in micro):
        shown = prompts[row.places[0]]
        assert row.tokens == shown + sum(own[place] - 1 for place in row.places)
    for row in (row for micro in plan_of(batch, share_prompts=False)[0] for row in micro):
        assert row.tokens == prompts[row.places[0]] + own[row.places[0]]


def test_ranks_get_equal_tokens_and_equally_many_micro_batches():
    batch = batch_of(32, seed=1)
    plan = plan_of(batch, world=4)
    tokens = [sum(row.tokens for micro in share for row in micro) for share in plan]
    assert max(tokens) - min(tokens) <= max(row.tokens for row in plan[0][0])
    assert max(tokens) <= 1.05 * min(tokens)


@pytest.mark.parametrize("groups, world", [(1, 2), (1, 4), (3, 2), (9, 8), (5, 4)])
def test_no_rank_waits_for_one_that_has_a_group_more(groups, world):
    """A group is cut where ranks would have a whole one less to do, and into no more than it
    takes."""
    batch = batch_of(groups)
    plan = plan_of(batch, world=world)
    alone = plan_of(batch)
    tokens = [sum(row.tokens for micro in share for row in micro) for share in plan]
    rows = [row for share in plan for micro in share for row in micro]
    longest = max(row.tokens for micro in alone[0] for row in micro)
    assert sorted(places(plan)) == list(range(len(batch))) and min(tokens) > 0
    assert max(tokens) < 0.95 * -(-groups // world) * longest
    assert sum(len(row.places) == 4 for row in rows) == groups // world * world
    for rank in range(world):  # the same on every rank
        assert plan_of(batch, world=world)[rank] == plan[rank]


def test_a_cut_that_gains_nothing_is_not_made(monkeypatch):
    """Of long prompts each part costs almost what the whole does."""
    batch = batch_of(3)
    monkeypatch.setattr(micros, "world_size", lambda: 2)
    plan = plan_micros(batch, [10_000] * len(batch), CONFIG, share_prompts=True)
    assert {len(row.places) for share in plan for micro in share for row in micro} == {4}


def test_a_rank_without_work_left_gets_completions_without_loss(monkeypatch):
    batch = batch_of(1)
    plan = plan_of(batch, world=5)
    assert sorted(map(len, plan)) == [0, 1, 1, 1, 1]
    parts = []
    for rank in range(5):
        monkeypatch.setattr(micros, "rank", lambda rank=rank: rank)
        parts.append(own_micros(batch, plan))
    assert [len(part) for part in parts] == [1] * 5
    empty = next(p for part in parts for p in part if not p.completion_mask.any())
    assert len(empty) == 1 and not empty.policy_weights.any() and not empty.opened.any()
    total = sum(float(micro.policy_weights.sum()) for part in parts for micro in part)
    assert total == pytest.approx(float(batch.policy_weights.sum()))


def test_rows_of_similar_length_share_a_micro_batch():
    batch = batch_of(32, seed=2)
    assert padding(plan_of(batch)) < 0.05
    unsorted = plan_of(batch, micro_batch=len(batch))  # all of them in one
    assert padding(unsorted) > 0.05
    assert padding(plan_of(batch, micro_batch=4)) == 0.0
