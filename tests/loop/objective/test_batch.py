"""Rollouts to tensors: weights that add up, gates on the right reward, padding that carries
nothing; completions of the dataset among those of the policy.
"""

from dataclasses import replace

import pytest
import torch
from toy import BARE, MALFORMED, RIGHT, WRONG, example, group_of, pieces, question_prompt, rollout

from kepo.config import Config
from kepo.objective import batch as batch_module
from kepo.objective.batch import collate, gates
from kepo_kernels import loss_weights

CONFIG = Config(teacher="t", num_generations=2, hint_trigger="never")
GROUPS = [
    [rollout(RIGHT, "a"), rollout(WRONG, "a")],
    [rollout(MALFORMED, "b"), rollout(RIGHT, "b")],
]


def test_ids_mask_and_padding():
    batch = collate(GROUPS, CONFIG)
    lengths = [len(r.completion_ids) for group in GROUPS for r in group]
    assert batch.completion_mask.sum(-1).tolist() == lengths
    for row, r in enumerate(r for group in GROUPS for r in group):
        assert batch.completion_ids[row][batch.completion_mask[row]].tolist() == (
            r.completion_ids.tolist()
        )
    assert batch.completion_ids[~batch.completion_mask].eq(0).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 0, 0, 1]),
        ({"gate_reward": "format"}, [1, 1, 0, 1]),
        ({"gate_reward": "total", "gate_threshold": 1.0}, [1, 1, 0, 1]),
        ({"gate_reward": "total", "gate_threshold": 2.0}, [1, 0, 0, 1]),
        ({"gate_reward": None}, [1, 1, 1, 1]),
        ({"gate_reward": None, "gate_threshold": None}, [1, 1, 1, 1]),
        ({"gate_reward": "total", "gate_threshold": None}, [2, 1, 0, 2]),  # soft: the reward itself
        (
            {
                "gate_reward": "total",
                "gate_threshold": None,
                "reward_weights": (0.5, -1.0),
            },
            [0, 0, 0, 0],  # never below 0
        ),
        ({"gate_side": "wrong"}, [0, 1, 1, 0]),
        ({"gate_side": "wrong", "gate_reward": "total", "gate_threshold": 2.0}, [0, 1, 1, 0]),
        ({"gate_side": "wrong", "gate_reward": "format"}, [0, 0, 1, 0]),
        ({"gate_side": "wrong", "gate_reward": None}, [1, 1, 1, 1]),
        ({"distill_coef": 0.0}, [0, 0, 0, 0]),
        ({"teacher": None}, [0, 0, 0, 0]),
    ],
)
def test_gate_reads_the_reward_it_is_told_to(settings, expected):
    config = replace(CONFIG, **settings)
    gate = gates([r for group in GROUPS for r in group], config)
    assert gate.dtype == torch.float32 and gate.tolist() == expected
    batch = collate(GROUPS, config)
    assert batch.opened.tolist() == [x > 0 for x in expected]
    weighted = loss_weights(batch.completion_mask, gate, config.distill_reduction)
    assert torch.equal(batch.distill_weights, weighted)


def test_a_soft_gate_multiplies_and_a_hard_one_only_opens():
    soft = replace(CONFIG, gate_reward="total", gate_threshold=None)
    hard = collate(GROUPS, replace(soft, gate_threshold=1.0)).distill_weights
    open_tokens = sum(len(r.completion_ids) for r in [*GROUPS[0], GROUPS[1][1]])
    assert set(hard.unique().tolist()) == {0.0, 1 / open_tokens}
    # The same tokens are open, and the mean is over them: gate 2 weighs twice what gate 1 does.
    expected = hard * torch.tensor([2.0, 1.0, 0.0, 2.0])[:, None]
    torch.testing.assert_close(collate(GROUPS, soft).distill_weights, expected)


def test_weights_are_normalised_over_the_whole_step():
    batch = collate(GROUPS, CONFIG)
    opened = batch.completion_mask & batch.opened[:, None]
    # sequence mean: every completion weighs 1/4, shared by its tokens
    torch.testing.assert_close(batch.policy_weights.sum(-1), torch.full((4,), 0.25).double())
    # token mean over the open completions only
    expected = opened.double() / opened.sum()
    torch.testing.assert_close(batch.distill_weights, expected)


def test_micro_batches_are_the_batch_in_pieces():
    batch = collate(GROUPS, CONFIG)
    parts = pieces(batch, 3)
    assert [len(part) for part in parts] == [3, 1]
    assert parts[0].prompts + parts[1].prompts == batch.prompts
    assert sum(float(part.policy_weights.sum()) for part in parts) == pytest.approx(1.0)
    assert sum(float(part.distill_weights.sum()) for part in parts) == pytest.approx(1.0)
    short = batch.select([2])  # the malformed one, four times shorter than the rest
    assert short.completion_ids.shape == (1, len(MALFORMED) + 1)
    assert short.completion_mask.all()


def test_truncated_completions_count_in_the_group_but_carry_no_loss():
    groups = [[rollout(RIGHT), rollout(WRONG, truncated=True)]]
    kept, masked = collate(groups, CONFIG), collate(groups, replace(CONFIG, mask_truncated=True))
    assert torch.equal(kept.advantages, masked.advantages) and kept.advantages[1] < 0
    assert kept.policy_weights[1].any() and not masked.policy_weights[1].any()
    assert not masked.completion_mask[1].any()


def test_the_teacher_need_not_read_what_carries_no_loss():
    groups = [[rollout(WRONG), rollout(RIGHT, truncated=True)]]
    kept, masked = collate(groups, CONFIG), collate(groups, replace(CONFIG, mask_truncated=True))
    assert kept.opened.tolist() == [False, True] and not masked.opened.any()


def test_dr_grpo_divides_by_what_could_have_been_written():
    config = replace(CONFIG, policy_reduction="dr_grpo", max_completion_length=50, policy_coef=3.0)
    batch = collate(GROUPS, config)
    expected = 3.0 * batch.completion_mask.double() / (4 * 50)
    torch.testing.assert_close(batch.policy_weights, expected)
    # Whoever else is in the batch, and however long: truncation of one leaves the others alone.
    cut = [[*GROUPS[0]], [GROUPS[1][0], replace(GROUPS[1][1], truncated=True)]]
    masked = collate(cut, replace(config, mask_truncated=True))
    assert torch.equal(masked.policy_weights[:3], batch.policy_weights[:3])
    assert not masked.policy_weights[3].any()


def test_scale_rewards_none_leaves_the_deviation_out():
    # totals 2, 1 and 0, 2
    batch = collate(GROUPS, replace(CONFIG, scale_rewards="none"))
    assert batch.advantages.tolist() == [0.5, -0.5, -1.0, 1.0]


# ---- the dataset's own solutions ----


def test_data_has_advantage_one_outside_the_groups_and_no_sampler():
    data = [rollout(RIGHT, "c"), rollout(RIGHT, "d")]
    batch, alone = collate(GROUPS, CONFIG, data), collate(GROUPS, CONFIG)
    assert batch.advantages[4:].tolist() == [1.0, 1.0]
    assert torch.equal(batch.advantages[:4], alone.advantages)  # groups do not see it
    assert [p.text for p in batch.prompts[4:]] == [question_prompt(example(n)) for n in "cd"]
    assert batch.sampler_logprobs[4:].isnan().all() and not batch.hinted.any()
    assert batch.opened[4:].all()  # a worked solution is right
    assert collate([], CONFIG, data).advantages.tolist() == [1.0, 1.0]


def test_sampler_logprobs_sit_under_their_tokens():
    told = [torch.arange(3.0), torch.arange(36.0)]
    group = group_of([MALFORMED, RIGHT])
    group = [
        replace(r, sampler_logprobs=t[: len(r.completion_ids)])
        for r, t in zip(group, told, strict=True)
    ]
    batch = collate([group], CONFIG)
    mask = batch.completion_mask
    assert batch.sampler_logprobs[0][mask[0]].tolist() == [0.0, 1.0]
    assert batch.sampler_logprobs[1][mask[1]].tolist() == list(range(int(mask[1].sum())))
    assert batch.sampler_logprobs[~mask].isnan().all()


def shared_out(settings):
    """Half of the weight of the divergence is the dataset's, and within each half all is as it was;
    the policy term's weights stay."""
    data = [rollout(BARE, "c"), rollout(RIGHT, "d")]
    config = replace(CONFIG, gate_reward=None, **settings)
    half = replace(config, data_weight=0.5)
    before, batch = (collate(GROUPS, one, data) for one in (config, half))
    a, b = before.distill_weights, batch.distill_weights
    own = torch.tensor([True] * 4 + [False] * 2)
    for mini in range(config.mini_batches):
        mine, theirs = (batch.mini == mini) & own, (batch.mini == mini) & ~own
        whole = a[batch.mini == mini].sum()
        assert abs(a[theirs].sum() - whole / 2) > 0.01  # it is not half by itself
        torch.testing.assert_close(b[mine], a[mine] * (whole / 2 / a[mine].sum()))
        torch.testing.assert_close(b[theirs], a[theirs] * (whole / 2 / a[theirs].sum()))
    assert torch.equal(before.policy_weights, batch.policy_weights)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("mini_batches", [1, 2])
def test_the_datasets_share_of_the_divergence_is_a_share_of_its_weight(reduction, mini_batches):
    shared_out(dict(distill_reduction=reduction, mini_batches=mini_batches))


def test_a_share_by_count_is_seen(monkeypatch):
    monkeypatch.setattr(batch_module, "_shared_out", lambda weights, *rest: weights)
    with pytest.raises(AssertionError):
        shared_out({})


def test_a_mini_batch_of_one_kind_keeps_its_weights():
    config = replace(CONFIG, gate_reward=None)
    half = replace(config, data_weight=0.5)
    data = [rollout(RIGHT, "c")]
    for groups, given in ((GROUPS, ()), ([], data)):
        alike = [collate(groups, one, given).distill_weights for one in (config, half)]
        assert torch.equal(*alike)
    closed = replace(half, gate_reward="accuracy")
    wrong = [group_of([WRONG, WRONG])]
    assert collate(wrong, closed, data).distill_weights.sum() == pytest.approx(1.0)
