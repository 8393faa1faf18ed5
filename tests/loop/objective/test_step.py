"""One micro-step against the whole-matrix oracle: what it adds up, and what the teacher reads."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from toy import (
    BARE,
    ENV,
    MALFORMED,
    RIGHT,
    WRONG,
    TableVLM,
    drawn_logprob,
    group_of,
    hinted_prompt,
    models_of,
    pieces,
    question_prompt,
    rollout,
)

from kepo.config import Config, load
from kepo.objective import score as score_module
from kepo.objective import step as step_module
from kepo.objective.batch import collate
from kepo.objective.credit import correction_weights, hinted_weights
from kepo.objective.score import FrozenScores, score
from kepo.objective.sod import drift_weights
from kepo.objective.step import kepo_step
from kepo.objective.totals import StepTotals
from kepo.rollout import hints as hints_module
from kepo.rollout.hints import rescue
from kepo.rollout.prompts import prompt_of
from kepo.rollout.rollouts import demonstrations
from kepo_kernels import fused_grpo_loss, fused_kepo_loss, reference
from kepo_kernels.validate import ENGINE_SETTINGS

CONFIG = Config(teacher="t", num_generations=2, max_completion_length=64, impl="torch")
CLOSE = dict(rtol=1e-5, atol=1e-7)


def drawn(text, name="q", hint=None, **facts):
    """A rollout with the log-probabilities that a scripted model would have drawn it with."""
    r = rollout(text, name, hint=hint, **facts)
    shown = "Hint: " + hint if hint else ""
    return replace(
        r,
        sampler_logprobs=torch.tensor(
            [drawn_logprob(shown, t) for t in range(len(r.completion_ids))]
        ),
    )


GROUPS = [
    [drawn(RIGHT, "a"), drawn(WRONG, "a")],
    [drawn(MALFORMED, "b"), drawn(RIGHT, "b", hint="look left")],
]


@pytest.fixture
def models():
    return TableVLM(1), TableVLM(5, hidden=5)


def step(models, groups, config, *, size=100, ref=None, data=(), old=None):
    """Loss, gradients by name and totals of a whole step, in micro-batches of ``size``."""
    policy, teacher = models
    for weight in policy.weights.values():
        weight.grad = None
    totals, losses = StepTotals(), []
    micros = pieces(collate(groups, config, data), size)
    scores = score(teacher, ref, micros, config, totals)
    for place, micro in enumerate(micros):
        if old is not None:
            micro = replace(micro, old_logprobs=old[place])
        loss, _ = kepo_step(policy, teacher, micro, scores[place], config, totals)
        loss.backward()
        losses.append(loss.detach())
    grads = {name: weight.grad for name, weight in policy.weights.items()}
    return torch.stack(losses).sum(), grads, totals.of_all_ranks()


def oracle(models, groups, config, *, data=(), shown=None, **settings):
    """The same by `reference.kepo_loss`, which holds every logit of every sequence. shown: what the
    teacher reads before each completion; None = what the policy does."""
    policy, teacher = models
    batch = collate(groups, config, data)
    texts = [prompt.text for prompt in batch.prompts]
    ids, mask = batch.completion_ids, batch.completion_mask
    read = (texts, texts if shown is None else shown)
    states = [model.completion_hidden(t, ids, mask) for t, model in zip(read, models, strict=True)]
    loss = reference.kepo_loss(
        states[0],
        policy.head,
        ids,
        batch.advantages,
        states[1].detach(),
        teacher.head,
        completion_mask=mask,
        **{
            "policy_weights": batch.policy_weights,
            "distill_weights": batch.distill_weights,
            "distill_coef": config.distill_coef,
            "beta": config.beta,
            **settings,
        },
    )
    grads = torch.autograd.grad(loss, list(policy.weights.values()))
    return loss.detach(), dict(zip(policy.weights, grads, strict=True))


def same(mine, theirs):
    torch.testing.assert_close(mine[0].double(), theirs[0].double(), **CLOSE)
    for name, grad in theirs[1].items():
        assert grad.abs().max() > 1e-4  # else nothing is compared
        torch.testing.assert_close(mine[1][name], grad, **CLOSE)


# ---- against the oracle ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gate_reward": None, "beta": 0.0, "distill_coef": 3.0},
        {"gate_reward": "total", "gate_threshold": None},  # soft: gates 2, 1, 0, 2
        {"distill_reduction": "sequence_mean", "policy_reduction": "dr_grpo"},
        {"policy_coef": 0.5, "policy_reduction": "token_mean"},
    ],
)
def test_the_step_is_the_reference_objective(models, settings):
    config = replace(CONFIG, **settings)
    same(step(models, GROUPS, config), oracle(models, GROUPS, config))


def test_opd_is_the_whole_matrix_kl_of_student_from_teacher(models):
    config = replace(load("opd"), teacher="t", num_generations=2, impl="torch")
    policy, teacher = models
    batch = collate(GROUPS, config)
    mask = batch.completion_mask
    q, p = (m.logits(batch)[mask].log_softmax(-1) for m in models)
    truth = reference.token_divergence(
        policy.logits(batch)[mask], teacher.logits(batch)[mask].detach(), 1.0
    )
    torch.testing.assert_close(truth, (q.exp() * (q - p.detach())).sum(-1))
    kl = truth.mean()  # KL(student | teacher), over all tokens, whatever they earned
    grads = torch.autograd.grad(kl, list(policy.weights.values()))
    loss, mine, totals = step(models, GROUPS, config)
    same((loss, mine), (kl.detach(), dict(zip(policy.weights, grads, strict=True))))
    assert totals.policy_loss == pytest.approx(0.0, abs=1e-6)
    assert totals.distill_loss == pytest.approx(kl.item(), rel=1e-5)


def test_sft_has_the_gradient_of_cross_entropy_on_the_worked_answers(models):
    config = replace(load("sft"), impl="torch", max_completion_length=64)
    policy, _ = models
    examples = [r.example for r in (rollout(RIGHT, "a"), rollout(RIGHT, "b"), rollout(RIGHT, "c"))]
    examples[1] = replace(examples[1], rationale="because it is so", answer="B")
    data = demonstrations(policy, examples, ENV, config)
    batch = collate([], config, data)
    mask = batch.completion_mask
    loss = torch.nn.functional.cross_entropy(policy.logits(batch)[mask], batch.completion_ids[mask])
    grads = torch.autograd.grad(loss, list(policy.weights.values()))
    # reinforce with advantage 1 is the cross-entropy in value, too
    mine = step((policy, None), [], config, data=data, size=2)
    same(mine, (loss.detach(), dict(zip(policy.weights, grads, strict=True))))
    assert mine[2].teacher_tokens == 0 and policy.seen == []


def test_micro_batches_add_up_to_the_step(models):
    for config in (CONFIG, replace(CONFIG, policy_reduction="token_mean", gate_reward="format")):
        whole = step(models, GROUPS, config)
        for size in (1, 3):
            parts = step(models, GROUPS, config, size=size)
            same(parts, whole)
            assert parts[2].tokens == whole[2].tokens
            assert parts[2].teacher_tokens == whole[2].teacher_tokens


# ---- what the models read ----


def test_the_teacher_reads_open_sequences_and_no_others(models):
    policy, teacher = models
    batch = collate(GROUPS, CONFIG)
    _, _, totals = step(models, GROUPS, CONFIG, size=3)
    opened = [r for group in GROUPS for r in group if r.rewards["accuracy"] == 1.0]
    assert teacher.read == [
        (question_prompt(r.example), tuple(r.completion_ids.tolist())) for r in opened
    ]
    assert len(policy.read) == 4
    assert totals.teacher_tokens == int(batch.completion_mask[[0, 3]].sum()) == 70
    assert not any("look left" in text for text, _ in policy.read + teacher.read)


def test_closed_gates_are_a_case_and_the_teacher_does_not_run(models):
    policy, teacher = models
    groups = [group_of([WRONG, MALFORMED])]
    loss, grads, totals = step(models, groups, CONFIG)
    assert teacher.read == [] and totals.teacher_tokens == 0 and totals.distill_loss == 0.0
    alone, expected, _ = step((policy, None), groups, replace(CONFIG, teacher=None))
    assert torch.isfinite(loss) and torch.equal(loss, alone)
    assert all(torch.equal(grads[name], expected[name]) for name in grads)
    assert grads["head"].abs().max() > 1e-3  # the policy term is there


def test_no_signal_at_all_is_zero_and_finite(models):
    loss, grads, _ = step(models, [group_of([WRONG, WRONG])], CONFIG)
    assert loss == 0 and all(not grad.any() for grad in grads.values())


# ---- every option of the losses ----

OPTIONS = {
    "bounds": {"epsilon_low": 0.05, "epsilon_high": 0.1},
    "delta": {"delta": 1.3},
    "sapo": {"policy_loss": "sapo", "sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0},
    "sequence": {"importance_level": "sequence"},
    "k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.3, "kl_estimator": "k3"},
    "kl_bias_correction": {"kl_coef": 0.3, "kl_bias_correction": True},
    "entropy": {"entropy_coef": 0.2},
    "temperature": {"temperature": 1.5},
    "teacher_temperature": {"teacher_temperature": 2.0},
}


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
def test_an_option_does_what_the_reference_says(models, settings):
    policy, _ = models
    ref = TableVLM(3) if "kl_coef" in settings else None
    batch = collate(GROUPS, CONFIG)
    old = policy.logprobs(batch).detach()
    old += 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(0))
    config = replace(CONFIG, **settings)
    mine = step(models, GROUPS, config, ref=ref, old=[old])
    truth = settings | ({} if ref is None else dict(ref_logprobs=ref.logprobs(batch).detach()))
    same(mine, oracle(models, GROUPS, config, old_logprobs=old, **truth))
    plain = step(models, GROUPS, CONFIG, old=[old])
    assert not torch.allclose(mine[1]["head"], plain[1]["head"], rtol=1e-3)


def test_the_teacher_of_step_weights_has_its_own_temperature(models):
    config = replace(CONFIG, step_weights=True, teacher_temperature=2.0)
    batch = collate(GROUPS, config)
    [known] = score(models[1], None, [batch], config, StepTotals())
    chosen = (models[1].logits(batch) / 2.0).log_softmax(-1)
    chosen = chosen.gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    mask = batch.completion_mask[batch.opened]
    torch.testing.assert_close(known.teacher_logprobs[mask], chosen[batch.opened][mask].detach())


NOT_SET = {
    **dict.fromkeys(("hidden", "lm_head", "targets", "advantages"), "a step's tensors"),
    **dict.fromkeys(("teacher_hidden", "teacher_lm_head", "completion_mask"), "a step's tensors"),
    **dict.fromkeys(("old_logprobs", "ref_logprobs", "sampler_weights"), "a step's tensors"),
    **dict.fromkeys(("bias", "teacher_bias"), "belong to the heads of the models"),
    "gate": "a factor of distill_weights, by gate_reward and gate_threshold",
    "weights": "policy_weights, in fused_grpo_loss",
    "reduction": "policy_reduction, in fused_grpo_loss",
    **dict.fromkeys(("policy_weights", "policy_reduction"), "collate, by policy_reduction"),
    **dict.fromkeys(("distill_weights", "distill_reduction"), "collate, by distill_reduction"),
    "chunk_rows": "workspace_bytes says it in bytes",
    "entropy_weights": "the policy's, as the loop weighs the bonus with its term",
    "return_stats": "metrics need them",
}
"""Arguments of the losses that no setting of the same name is passed to, and why."""


def test_every_other_argument_of_the_losses_is_a_setting_that_arrives(models, monkeypatch):
    functions = (fused_kepo_loss, fused_grpo_loss)
    names = {name for f in functions for name in inspect.signature(f).parameters} - {"engine"}
    names = (names | {*ENGINE_SETTINGS}) - NOT_SET.keys()
    settings = dict(
        distill_coef=0.7,
        beta=0.3,
        epsilon_low=0.11,
        epsilon_high=0.12,
        delta=3.5,
        kl_coef=0.13,
        kl_estimator="k2",
        kl_bias_correction=True,
        entropy_coef=0.14,
        policy_loss="clip",
        importance_level="sequence",
        sapo_temperature_pos=1.5,
        sapo_temperature_neg=1.6,
        temperature=1.7,
        teacher_temperature=1.8,
        impl="cpu",
        workspace_bytes=2**25,
        logits_dtype="float32",
        grad_tol=0.01,
    )
    assert names == settings.keys()  # a new argument needs a setting, or its reason above
    config = replace(CONFIG, **settings)
    defaults = Config()
    same_as_default = {n for n, value in settings.items() if getattr(defaults, n) == value}
    assert same_as_default == {"policy_loss"}
    given = {}

    def recorded(*arguments, **named):
        given.update(named)
        return fused_kepo_loss(*arguments, **named)

    monkeypatch.setattr(step_module, "fused_kepo_loss", recorded)
    step(models, GROUPS, config, ref=TableVLM(3))
    expected = settings | {"logits_dtype": torch.float32}
    assert {name: given[name] for name in names} == expected
    step(models, GROUPS, replace(config, policy_loss="cispo", delta=None), ref=TableVLM(3))
    assert given["policy_loss"] == "cispo"


# ---- ratios ----


def test_the_first_pass_has_ratio_one_and_the_second_the_old_logprobs(models):
    policy, _ = models
    config = replace(CONFIG, teacher=None, gate_reward=None, epsilon_low=0.05, epsilon_high=0.05)
    groups = [[drawn(RIGHT, "a"), drawn(WRONG, "a")], [drawn(BARE, "b"), drawn(MALFORMED, "b")]]
    batch = collate(groups, config)
    totals = StepTotals()
    first, logprobs = kepo_step(policy, None, batch, FrozenScores(), config, totals)
    mask = batch.completion_mask
    torch.testing.assert_close(logprobs[mask], policy.logprobs(batch).detach()[mask])
    assert not logprobs.requires_grad
    # Ratio 1: the value is minus the weighted advantages, whatever was drawn with what.
    expected = -(batch.policy_weights * batch.advantages[:, None]).sum()
    torch.testing.assert_close(first.detach().double(), expected, **CLOSE)
    assert totals.of_all_ranks().clipped_high == totals.of_all_ranks().clipped_low == 0

    with torch.no_grad():  # an update in between
        policy.weights["head"] += 0.1 * torch.randn_like(policy.weights["head"])
    again = replace(batch, old_logprobs=logprobs)
    second, _ = kepo_step(policy, None, again, FrozenScores(), config, totals)
    ratio = (policy.logprobs(batch) - logprobs).exp()
    gain = batch.advantages[:, None]
    clipped = torch.minimum(ratio * gain, ratio.clamp(0.95, 1.05) * gain)
    truth = -(batch.policy_weights * clipped).sum().detach()
    torch.testing.assert_close(second.detach().double(), truth, **CLOSE)
    up, down, totals = mask & (gain > 0), mask & (gain < 0), totals.of_all_ranks()
    assert totals.clipped_high == int((up & (ratio > 1.05)).sum()) > 0
    assert totals.clipped_low == int((down & (ratio < 0.95)).sum()) > 0


def test_the_gap_to_the_sampler_is_measured_where_it_sampled_these_tokens(models):
    policy, _ = models
    data = [rollout(RIGHT, "c")]  # nobody sampled it
    batch = collate(GROUPS, CONFIG, data)
    _, _, totals = step(models, GROUPS, CONFIG, data=data, size=2)
    own = batch.completion_mask.clone()
    own[3:] = False  # neither the hinted completion nor the dataset's
    gap = (policy.logprobs(batch) - batch.sampler_logprobs)[own].abs()
    assert totals.sampled_tokens == int(own.sum())
    assert totals.sampler_gap == pytest.approx(gap.sum().item(), rel=1e-5)
    assert totals.sampler_gap_max == pytest.approx(gap.max().item(), rel=1e-5)


def test_the_reference_penalty_is_k3_of_the_plain_question(models):
    ref = TableVLM(3)
    config = replace(CONFIG, kl_coef=0.3)
    batch = collate(GROUPS, config)
    mine = step(models, GROUPS, config, ref=ref)
    truth = ref.logprobs(batch).detach()
    same(mine, oracle(models, GROUPS, config, kl_coef=0.3, ref_logprobs=truth))
    assert {text for text, _ in ref.read} == {p.text for p in batch.prompts}
    assert mine[2].kl > 0


# ---- corrections for another law that sampled, step weights ----


@pytest.mark.parametrize("correction", ["truncate", "shape"])
@pytest.mark.parametrize("second_pass", [False, True])
def test_hinted_completions_are_weighted_as_the_correction_says(models, correction, second_pass):
    policy, _ = models
    config = replace(CONFIG, hinted_correction=correction, hinted_cap=1.5, hinted_gamma=0.2)
    batch = collate(GROUPS, config)
    before = policy.logprobs(batch).detach()
    old = before + 0.3 if second_pass else None  # of the policy before the first update
    hinted = batch.completion_mask & batch.hinted[:, None]
    weights = hinted_weights(
        old if second_pass else before, batch.sampler_logprobs, hinted, correction, 1.5, 0.2
    )
    assert weights[3][hinted[3]].ne(1).all() and weights[:3].eq(1).all()
    mine = step(models, GROUPS, config, old=[old] if second_pass else None)
    same(mine, oracle(models, GROUPS, config, sampler_weights=weights, old_logprobs=old))
    plain = step(models, GROUPS, CONFIG, old=[old] if second_pass else None)
    assert not torch.allclose(mine[0], plain[0], rtol=1e-3)


def ratio_of_hinted_tokens_inside_the_clip(models, *, later=False):
    """To what they were drawn with, with the hint; that of all others as ever."""
    policy, _ = models
    config = replace(CONFIG, hinted_correction="clip", epsilon_low=0.3, epsilon_high=0.4)
    plain = collate(GROUPS, config)
    before = policy.logprobs(plain).detach() + (0.1 if later else 0.0)
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    rows = iter(policy.logprobs(plain).detach() + noise)
    groups = [
        [replace(r, sampler_logprobs=next(rows)[: len(r.completion_ids)]) for r in group]
        for group in GROUPS
    ]
    ratio = (
        policy.logprobs(plain)
        - torch.where(plain.hinted[:, None], policy.logprobs(plain).detach() + noise, before)
    ).exp()
    gain = plain.advantages[:, None]
    surrogate = torch.minimum(ratio * gain, ratio.clamp(0.7, 1.4) * gain)
    loss = -(plain.policy_weights * surrogate).sum()
    grads = torch.autograd.grad(loss, list(policy.weights.values()))
    alone = replace(config, teacher=None, gate_reward=None, distill_coef=0.0)
    mine = step((policy, None), groups, alone, size=3, old=list(before.split(3)) if later else None)
    same(mine, (loss.detach(), dict(zip(policy.weights, grads, strict=True))))
    hinted = plain.completion_mask & plain.hinted[:, None]
    clipped = hinted & (ratio > 1.4) & (gain > 0)
    assert mine[2].clipped_high == int(clipped.sum()) > 0
    assert (mine[2].sampled_tokens == 0) == later  # the gap to the sampler is of the first pass


@pytest.mark.parametrize("later", [False, True])
def test_the_ratio_of_hinted_tokens_is_inside_the_clip(models, later):
    ratio_of_hinted_tokens_inside_the_clip(models, later=later)


def test_a_ratio_to_the_plain_question_is_seen(models, monkeypatch):
    monkeypatch.setattr(step_module, "_old_logprobs", lambda before, micro, there, config: before)
    with pytest.raises(AssertionError):
        ratio_of_hinted_tokens_inside_the_clip(models)


def weighted_by_the_ratio_of_trainer_to_sampler(models, hinted_correction="none", *, later=False):
    """Tokens without a hint by exp(trainer - sampler), at most 1.25; the dataset's own by 1; those
    with a hint as their own correction says."""
    policy, _ = models
    config = replace(
        CONFIG, sampler_correction="truncate", sampler_cap=1.25, hinted_correction=hinted_correction
    )
    data = [rollout(RIGHT, "c")]
    plain = collate(GROUPS, config, data)
    before = policy.logprobs(plain).detach() + (0.3 if later else 0.0)
    noise = 0.4 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
    rows = iter(before + noise)
    groups = [
        [replace(r, sampler_logprobs=next(rows)[: len(r.completion_ids)]) for r in group]
        for group in GROUPS
    ]
    mask, ratio = plain.completion_mask, (-noise).exp()
    own = mask & torch.tensor([True, True, True, False, False])[:, None]
    weights = torch.where(own, ratio.clamp(max=1.25), 1.0).double()
    assert (ratio[own] > 1.25).any() and (ratio[own] < 0.8).any()
    if hinted_correction == "truncate":
        weights[3] = torch.where(mask[3], ratio[3].double().clamp(max=config.hinted_cap), 1.0)
    elif hinted_correction == "shape":
        q, g = before[3].double().exp(), config.hinted_gamma
        weights[3] = g * q / (q + g).square()
    old = before if later else None
    mine = step(models, groups, config, data=data, old=[old] if later else None)
    truth = dict(sampler_weights=weights, old_logprobs=old)
    same(mine, oracle(models, groups, config, data=data, **truth))
    assert mine[2].ratio_tokens == int(own.sum()) and mine[2].ratio_max == 1.25
    assert mine[2].ratio == pytest.approx(weights[own].sum().item(), rel=1e-5)


@pytest.mark.parametrize("hinted_correction", ["none", "truncate", "shape"])
@pytest.mark.parametrize("later", [False, True])
def test_sampled_tokens_are_weighted_by_the_ratio(models, hinted_correction, later):
    weighted_by_the_ratio_of_trainer_to_sampler(models, hinted_correction, later=later)


@pytest.mark.parametrize(
    "fault",
    {
        "upside down": lambda law, drawn, own, cap: correction_weights(drawn, law, own, cap),
        "no cap": lambda law, drawn, own, cap: correction_weights(law, drawn, own, 1e9),
        "hinted ones too": lambda law, drawn, own, cap: correction_weights(
            law, drawn, own | True, cap
        ),
    }.items(),
    ids=lambda fault: fault[0],
)
def test_a_wrong_ratio_is_seen(models, fault, monkeypatch):
    monkeypatch.setattr(step_module, "correction_weights", fault[1])
    with pytest.raises(AssertionError):
        weighted_by_the_ratio_of_trainer_to_sampler(models)


def test_the_policy_is_scored_once_for_both_corrections(models, monkeypatch):
    calls, whole = [], score_module.fused_linear_logprobs

    def counted(*arguments, **settings):
        calls.append(settings["completion_mask"])
        return whole(*arguments, **settings)

    monkeypatch.setattr(score_module, "fused_linear_logprobs", counted)
    both = replace(CONFIG, sampler_correction="truncate", hinted_correction="truncate")
    step(models, GROUPS, both)
    assert len(calls) == 1 and torch.equal(calls[0], collate(GROUPS, both).completion_mask)


def test_step_weights_multiply_the_divergence_of_open_sequences(models):
    policy, teacher = models
    config = replace(CONFIG, step_weights=True, beta=1.0)
    lines = "<think>x\ny\nz</think><answer>A</answer>"
    groups = [[drawn(lines, "a"), drawn(WRONG, "a")]]
    batch = collate(groups, config)
    q, p = (model.logprobs(batch).detach() for model in models)
    factors = drift_weights(policy.tokenizer, batch.completion_ids, q, p, batch.completion_mask)
    assert len(factors[0].unique()) > 2 and factors[0].min() < 0.9
    mine = step(models, groups, config)
    assert [text for text, _ in teacher.read] == [batch.prompts[0].text]
    truth = oracle(models, groups, config, distill_weights=batch.distill_weights * factors)
    same(mine, truth)
    assert not torch.allclose(mine[0], step(models, groups, replace(config, step_weights=False))[0])


# ---- a teacher that sees the hint ----


def distilled_from_the_teacher_that_sees_the_hint(models):
    """The failures of a failed group, and no others, in the teacher's law under the hinted prompt;
    the policy reads the plain question throughout."""
    policy, teacher = models
    config = replace(CONFIG, hint_for="teacher", num_generations=3)
    teacher.answer = lambda prompt, nth: "<hint>look left</hint>"
    groups = [[drawn(t, "a") for t in (WRONG, MALFORMED, WRONG)]]
    groups += [[drawn(t, "b") for t in (WRONG, RIGHT, WRONG)]]
    groups, report = rescue(groups, models_of(policy, teacher), ENV, config, {})
    assert (report.groups, report.written, report.sampled, report.accepted) == (1, 1, 0, 0)
    batch = collate(groups, config)
    told = hinted_prompt(groups[0][0].example, "look left")
    plain = [question_prompt(r.example) for group in groups for r in group]
    shown = [told] * 3 + plain[3:]
    opened = torch.tensor([True, True, True, False, True, False])
    assert torch.equal(batch.opened, opened)
    mine = step(models, groups, config, size=4)
    assert [text for text, _ in teacher.read] == [
        s for s, o in zip(shown, opened, strict=True) if o
    ]
    assert [text for text, _ in policy.read] == plain
    same(mine, oracle(models, groups, config, shown=shown))


def test_a_teacher_that_sees_the_hint_teaches_the_failures(models):
    distilled_from_the_teacher_that_sees_the_hint(models)


def test_a_teacher_without_the_hint_is_seen(models, monkeypatch):
    monkeypatch.setattr(hints_module, "prompt_of", lambda task, e, hint, **_: prompt_of(task, e))
    with pytest.raises(AssertionError):
        distilled_from_the_teacher_that_sees_the_hint(models)


# ---- up to the first error ----

SPANS = replace(CONFIG, gate_reward=None, error_threshold=0.001)


def spans(models, config, groups=GROUPS):
    """(B, T) bool of the tokens that are distilled on, by walking through each completion."""
    batch = collate(groups, config)
    p = models[1].logprobs(batch).detach().exp()
    kept = torch.zeros_like(batch.completion_mask)
    for row, length in enumerate(batch.completion_mask.sum(-1).tolist()):
        met = False
        for place in range(length):
            kept[row, place] = met == (config.distill_tokens == "after_error")
            met = met or bool(p[row, place] < config.error_threshold)
    return kept


def distilled_to_the_first_error(models, which):
    config = replace(SPANS, distill_tokens=which)
    kept, batch = spans(models, config), collate(GROUPS, config)
    if which == "first_error":  # some end early, one has no error, and is distilled on throughout
        assert set(kept.sum(-1).tolist()) == {4, 2}
    else:  # of that one nothing is left
        assert set(kept.sum(-1).tolist()) == {31, 0}
    mine = step(models, GROUPS, config, size=3)
    same(mine, oracle(models, GROUPS, config, distill_weights=batch.distill_weights * kept))
    assert mine[2].distilled_tokens == int(kept.sum())
    assert mine[2].teacher_tokens == int(batch.completion_mask.sum())


@pytest.mark.parametrize("which", ["first_error", "after_error"])
def test_a_completion_is_distilled_on_up_to_its_first_error_or_after_it(models, which):
    distilled_to_the_first_error(models, which)


@pytest.mark.parametrize(
    "fault",
    {
        "the error itself left out": lambda p, mask, config: (
            mask & ((mask & (p < math.log(config.error_threshold))).cumsum(-1) == 0)
        ),
        "all": lambda p, mask, config: mask,
        "errors alone": lambda p, mask, config: mask & (p < math.log(config.error_threshold)),
    }.items(),
    ids=lambda fault: fault[0],
)
def test_a_wrong_span_is_seen(models, fault, monkeypatch):
    monkeypatch.setattr(score_module, "distilled_tokens", fault[1])
    with pytest.raises(AssertionError):
        distilled_to_the_first_error(models, "first_error")


def test_the_two_spans_add_up_and_what_is_left_out_is_not_read(models):
    config = replace(SPANS, policy_coef=0.0)
    parts = {}
    for which in ("all", "first_error", "after_error"):
        one = replace(config, distill_tokens=which)
        kept, batch = spans(models, one), collate(GROUPS, one)
        [known] = score(models[1], None, [batch], one, StepTotals())
        parts[which], _ = kepo_step(*models, batch, known, one, StepTotals())
        if which == "all":
            assert known.distilled is None
            continue
        left = kept.any(-1)
        assert torch.equal(known.distilled, kept) and len(known.teacher_hidden) == left.sum()
        odd = torch.where(kept[left][..., None], known.teacher_hidden, torch.nan)
        again, _ = kepo_step(*models, batch, replace(known, teacher_hidden=odd), one, StepTotals())
        assert torch.equal(again, parts[which])
    torch.testing.assert_close(parts["first_error"] + parts["after_error"], parts["all"])
    assert parts["first_error"] > 0.01 and parts["after_error"] > 0.01


def test_step_weights_and_spans_multiply(models):
    config = replace(SPANS, step_weights=True, distill_tokens="after_error", beta=1.0)
    batch = collate(GROUPS, config)
    q, p = (model.logprobs(batch).detach() for model in models)
    policy = models[0]
    factors = drift_weights(policy.tokenizer, batch.completion_ids, q, p, batch.completion_mask)
    weights = batch.distill_weights * factors * spans(models, config)
    same(step(models, GROUPS, config), oracle(models, GROUPS, config, distill_weights=weights))


@pytest.mark.parametrize("whose", ["student", "teacher", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_make_a_loss_that_is_not(capsys, models, whose, value):
    """On a CPU the losses refuse them; the loop promises to skip the step, in every gradient."""
    policy, teacher = models
    ref = TableVLM(1) if whose == "reference" else None
    config = replace(CONFIG, kl_coef=0.1 if ref else 0.0, gate_reward=None, impl="auto")
    wrong = {"student": policy, "teacher": teacher, "reference": ref}[whose]
    real = wrong.completion_hidden

    def one_wrong(inputs, ids, mask):
        states = real(inputs, ids, mask)
        at = torch.zeros_like(states, dtype=torch.bool)
        at[0, 0, 1] = True
        return torch.where(at, value, states)

    wrong.completion_hidden = one_wrong
    loss, grads, totals = step((policy, teacher), GROUPS, config, ref=ref)
    assert loss.isnan() and math.isnan(totals.policy_loss)
    assert all(grad.isnan().any() for grad in grads.values())
    assert capsys.readouterr().out.count(f"states of the {whose} are not finite") == 1


def test_states_of_places_that_are_no_tokens_may_be_anything(models):
    policy = models[0]
    before, _, _ = step(models, GROUPS, CONFIG)
    real = policy.completion_hidden
    policy.completion_hidden = lambda inputs, ids, mask: torch.where(
        mask[..., None], real(inputs, ids, mask), torch.nan
    )
    after, _, _ = step(models, GROUPS, CONFIG)
    assert after.isfinite() and torch.equal(before, after)
