"""Our losses in verl's registries, by its own engine step, loss function and configuration."""

import pytest

pytest.importorskip("verl")

import torch
import verl.utils.experimental.torch_functional as functional
from verl.trainer.distillation.losses import get_distillation_loss_settings
from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn
from verl_engine import (
    PROMPTS,
    RESPONSES,
    VOCAB,
    actor,
    distilled_gradients,
    distilling,
    in_one_of_two,
    micro_batch,
    own_head,
    patched,
    rewarded,
    step,
    tiny,
)

from kepo_kernels import KepoInputError, TopK, reference
from kepo_kernels.integrations.verl import use_kepo
from kepo_kernels.integrations.verl.distilled import BETAS

use_kepo()

TEMPERATURE = 0.8


def gradients(model, loss):
    loss.backward()
    found = [x.grad.clone() for x in model.parameters()]
    model.zero_grad()
    return found


def assert_same(found, wanted, at_most=2e-5):
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= at_most * theirs.norm().clamp(min=1e-6)


def packed(data, name):
    return data[name].values().unsqueeze(0)


def predicting(data):
    """The packed positions that predict a response token of the mask, counted by hand."""
    found, start = [], 0
    masks = data["response_mask"].unbind()
    for p, r, mask in zip(PROMPTS, RESPONSES, masks, strict=True):
        found += [start + p - 1 + t for t in range(r) if mask[t]]
        start += p + r
    return torch.tensor(found)


def by_hand(model, data, beta, closed_rows=()):
    """The mean divergence over response tokens from whole logits, in fp64, by the oracle."""
    tokens = {x: packed(data, x) for x in ("input_ids", "position_ids")}
    states = model.model(**tokens, use_cache=False)[0]
    rows = torch.tensor([x for x in predicting(data).tolist() if x not in closed_rows])
    listed = TopK(
        data["teacher_ids"].values()[rows].long(), data["teacher_logprobs"].values()[rows]
    )
    total = reference.linear_divergence(
        states[0, rows].double(),
        model.lm_head.weight.double(),
        TopK(listed.ids, listed.logprobs.double()),
        beta=beta,
        temperature=TEMPERATURE,
    ).sum()
    return total / len(predicting(data))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mode", BETAS)
def test_a_divergence_is_that_of_whole_logits(mode, tied):
    model = patched(tiny(tied=tied))
    assert get_distillation_loss_settings(mode).use_topk
    data = micro_batch(k=4, distillation_only=True, calculate_entropy=False)
    loss, output = step(model, data, distilling(mode, use_task_rewards=False, topk=4))
    wanted = by_hand(model, data, BETAS[mode])
    assert float(loss) == pytest.approx(float(wanted), rel=5e-6)
    assert_same(gradients(model, loss), gradients(model, wanted))
    assert "log_probs" not in output["model_output"]
    assert output["metrics"]["distillation/open_tokens"].values == [1.0]


def test_with_all_tokens_listed_it_is_verls_own():
    """verl's own sum has no tail: without one, and without clamps, the two are one."""
    own, model = tiny(), patched(tiny())
    data = micro_batch(k=VOCAB, use_fused_kernels=False)
    theirs, _ = step(own, data, distilling("forward_kl_topk", topk=VOCAB))
    ours, _ = step(model, micro_batch(k=VOCAB), distilling("kepo_forward_kl", topk=VOCAB))
    assert float(ours) == pytest.approx(float(theirs), rel=5e-6)
    assert_same(gradients(model, ours), gradients(own, theirs))


def test_policy_loss_entropy_and_divergence_come_from_one_pass():
    """With rewards: verl's PPO loss from our log-probs, and the divergence at its coefficient."""
    model, settings = patched(tiny()), dict(topk=4, distillation_loss_coef=0.3)
    loss, output = step(model, micro_batch(k=4), distilling("kepo_jsd", **settings))
    plain = micro_batch(k=4, use_fused_kernels=False, distillation_use_topk=False)
    policy, theirs = step(tiny(), plain, rewarded())
    divergence = by_hand(model, plain, 0.5)
    assert float(loss) == pytest.approx(float(policy + 0.3 * divergence), rel=1e-5)
    for name in ("log_probs", "entropy"):
        ours, wanted = (x["model_output"][name].values() for x in (output, theirs))
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_closed_rollouts_have_no_divergence():
    model = patched(tiny())
    data = micro_batch(k=4, closed=(1,), distillation_only=True, calculate_entropy=False)
    function = distilling("kepo_reverse_kl", use_task_rewards=False, topk=4)
    loss, output = step(model, data, function)
    start = PROMPTS[0] + RESPONSES[0]
    closed = range(start, start + PROMPTS[1] + RESPONSES[1])
    wanted = by_hand(model, data, 1.0, closed)
    assert float(loss) == pytest.approx(float(wanted), rel=5e-6)
    assert_same(gradients(model, loss), gradients(model, wanted))
    share = float(output["metrics"]["distillation/open_tokens"].values[0])
    assert share == pytest.approx(7 / 15)  # 6 + 1 of 6 + 8 + 1 tokens


def test_a_batch_of_closed_rollouts_only():
    model = patched(tiny())
    data = micro_batch(k=4, closed=(0, 1, 2), distillation_only=True, calculate_entropy=False)
    loss, output = step(model, data, distilling("kepo_jsd", use_task_rewards=False, topk=4))
    assert float(loss) == 0.0 and "distillation/teacher_mass" not in output["metrics"]
    assert all(not x.any() for x in gradients(model, loss))


@pytest.mark.parametrize("mode", ["k1", "k2", "k3"])
@pytest.mark.parametrize("closed", [(), (1,)])
def test_an_estimator_is_verls_own_where_the_gate_is_open(mode, closed):
    by_reward = dict(use_policy_gradient=mode == "k1", use_task_rewards=False)
    found = []
    for name in (f"kepo_{mode}", mode):
        data = micro_batch(k=1, closed=closed, distillation_use_topk=False)
        if closed and name == mode:  # a teacher that agrees: estimates of 0
            _, output = step(patched(tiny()), data, distilling(name, **by_reward))
            start = PROMPTS[0] + RESPONSES[0]
            rows = slice(start, start + PROMPTS[1] + RESPONSES[1])
            agreeing = output["model_output"]["log_probs"].values()[rows]
            data["teacher_logprobs"].values()[rows, 0] = agreeing
        found.append(step(patched(tiny()), data, distilling(name, **by_reward))[0])
    assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-6)


@pytest.mark.parametrize(
    "flags, backend",
    [
        (dict(use_fused_kernels=False), "torch"),
        (dict(use_remove_padding=False), "torch"),
        ({}, "theirs"),
    ],
)
def test_where_the_head_was_not_asked_it_is_refused(flags, backend, monkeypatch):
    if backend == "theirs":
        monkeypatch.setattr(functional, "FusedLinearForPPO", own_head())
    model = tiny() if flags.get("use_fused_kernels") is False else patched(tiny())
    with pytest.raises(KepoInputError, match="loss_mode=kepo_jsd is computed in the LM head"):
        step(model, micro_batch(k=4, **flags), distilling("kepo_jsd", topk=4))


def test_settings_without_a_meaning_are_refused():
    clamped = distilling("kepo_jsd", topk=4, log_prob_min_clamp=-10.0)
    with pytest.raises(KepoInputError, match=r"log_prob_min_clamp=-10.0 .* expected null"):
        step(patched(tiny()), micro_batch(k=4), clamped)
    data = micro_batch(k=1, distillation_use_topk=False)
    with pytest.raises(KepoInputError, match="kepo_k1 has a gradient that does not depend"):
        step(patched(tiny()), data, distilling("kepo_k1"))


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("tied", [False, True])
def test_fsdp_averages_the_divergences_gradients(tied, tmp_path):
    torch.multiprocessing.spawn(in_one_of_two, (tmp_path, tied), nprocs=2)
    found, model = torch.load(tmp_path / "gradients.pt"), patched(tiny(tied=tied))
    for seed in (0, 1):
        wanted = distilled_gradients(model, seed)  # they add up
    assert_same(found.values(), [x / 2 for x in wanted.values()])
    assert found.keys() == wanted.keys()


# ---- policy losses ----


def tokens(rows=4, length=7):
    """Log-probs near and far from those that sampled, advantages of both signs, ragged lengths."""
    torch.manual_seed(2)
    old = -torch.rand(rows, length) * 3 - 0.1
    log_prob = (old + 0.5 * torch.randn(rows, length)).clamp(max=0).requires_grad_()
    log_prob.data[1] = old[1] + 0.6  # a ratio of 1.8, which has a bound of its own where A < 0
    mask = torch.arange(length) < torch.tensor([length, 3, 1, 5])[:rows, None]
    advantages = torch.tensor([0.7, -1.1, 0.4, -0.6])[:, None] * mask
    weights = 0.5 + torch.rand(rows, 1).expand(-1, length)
    return dict(
        old_log_prob=old,
        log_prob=log_prob,
        advantages=advantages,
        response_mask=mask,
        rollout_is_weights=weights,
    )


def policy(name, given, mode="seq-mean-token-mean", **settings):
    """A policy loss of verl's registry: (loss, gradient)."""
    settings = dict(clip_ratio_low=0.2, clip_ratio_high=0.28) | settings
    config = actor(loss_agg_mode=mode, **settings)
    function = get_policy_loss_fn(name)
    loss, _ = function(loss_agg_mode=mode, config=config, **given)
    return loss, torch.autograd.grad(loss, given["log_prob"])[0]


def oracle(objective, given, level, **settings):
    """The same from the oracle, by logits of two tokens whose softmax has these log-probs."""
    log_prob, mask = given["log_prob"].double(), given["response_mask"]
    log_ratio = log_prob - given["old_log_prob"]
    if level == "sequence":
        length = mask.sum(-1, keepdim=True)
        log_ratio = ((log_ratio * mask).sum(-1, keepdim=True) / length).expand_as(log_prob)
    values = reference.policy_term(
        objective, log_prob, log_ratio, given["advantages"].double(), **settings
    )
    values = values * given["rollout_is_weights"]
    loss = agg_loss(values, mask, "seq-mean-token-mean", dp_size=1)
    return loss, torch.autograd.grad(loss, given["log_prob"])[0]


@pytest.mark.parametrize("objective", ["clip", "cispo", "sapo"])
def test_a_sequence_loss_is_the_oracles(objective):
    given, how = tokens(), dict(epsilon_low=0.2, epsilon_high=0.28)
    if objective == "clip":
        how["delta"] = 1.5
    ours = policy(f"kepo_sequence_{objective}", given, clip_ratio_c=1.5, tau_pos=1.0, tau_neg=1.05)
    wanted = oracle(objective, given, "sequence", **how)
    for x, y in zip(ours, wanted, strict=True):
        assert (x - y).norm() <= 5e-6 * y.norm()


@pytest.mark.parametrize(
    "objective, theirs, level, settings",
    [
        ("clip", "vanilla", "token", dict(clip_ratio_c=1.5)),
        ("clip", "gspo", "sequence", {}),
        ("sapo", "sapo", "token", dict(tau_pos=1.0, tau_neg=1.05)),
        ("cispo", "cispo", "token", dict(clip_ratio_low=1.0)),  # verl clamps below, too
        ("reinforce", "gpg", "token", {}),
    ],
)
def test_what_is_not_registered_verl_has(objective, theirs, level, settings):
    given, how = tokens(), dict(epsilon_low=0.2, epsilon_high=0.28)
    if theirs == "vanilla":
        how["delta"] = 1.5
    wanted = oracle(objective, given, level, **how)
    for x, y in zip(policy(theirs, given, **settings), wanted, strict=True):
        assert (x - y).norm() <= 5e-6 * y.norm()


def test_a_sequence_loss_runs_in_verls_step():
    loss = {"loss_mode": "kepo_sequence_clip"}
    from verl.workers.config import PolicyLossConfig

    function = rewarded(policy_loss=PolicyLossConfig(**loss))
    found, output = step(patched(tiny()), micro_batch(k=1), function)
    assert found.isfinite() and "actor/ppo_kl" in output["metrics"]
