"""A row of weight zero does not exist: closing a gate is leaving the sequence out, bit for bit."""

from dataclasses import replace

import pytest
import torch
from checks import Problem, device_of, make_problem
from loss_calls import Arguments, arguments, assert_same_bits, fused
from torch import Tensor

import kepo_kernels
from kepo_kernels.compute import gemm

BATCH, LENGTH = 4, 5
OPEN = torch.tensor([False, True, False, True])
# Chunks of three do not line up with sequences: a plan made of all rows would show.
COMMON = {"chunk_rows": 3, "temperature": 0.7}


def gated_problem(**settings: object) -> Problem:
    return replace(make_problem(BATCH, LENGTH, **settings), gate=OPEN)


def weighted(reduction: str) -> dict[str, object]:
    """How the tokens are weighed, as arguments of fused_gated_kd_loss.

    Not by sequence_mean: that is a mean over all sequences, closed ones included, by definition.
    """
    if reduction != "weights":
        return {"reduction": reduction}
    return {"weights": torch.randn(BATCH, LENGTH, dtype=torch.float64)}


def only(call: Arguments, rows: Tensor) -> Arguments:
    """The call with those sequences (or flat rows) only."""
    return {
        name: x[rows]
        if isinstance(x, Tensor)
        and len(x) == len(rows)
        and "head" not in name
        and "bias" not in name
        else x
        for name, x in call.items()
    }


def poisoned(x: Tensor, where: Tensor, *poison: float) -> Tensor:
    """A copy that holds each kind of poison in turn at `where`."""
    x = x.clone()
    width = x[where].numel()
    values = torch.tensor(poison).to(x.dtype).repeat(width // len(poison) + 1)[:width]
    x[where] = values.reshape(x[where].shape)
    return x


def spoil(call: Arguments, dead: Tensor, untaught: Tensor) -> Arguments:
    """NaN, Inf and impossible ids at dead tokens, and in the teacher at `untaught` ones."""
    spoilt = dict(call)
    for name in ("hidden", "advantages", "old_logprobs", "ref_logprobs"):
        if name in call:
            spoilt[name] = poisoned(call[name], dead, torch.nan, torch.inf, -torch.inf)
    if "targets" in call:
        spoilt["targets"] = poisoned(call["targets"], dead, -100, 10**6, -1)
    if "teacher_hidden" in call:
        spoilt["teacher_hidden"] = poisoned(call["teacher_hidden"], untaught, torch.nan, torch.inf)
    return spoilt


# ----------------------------------------------------------------------------------- gate = removal


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reduction", ["token_mean", "sum", "weights"])
def test_closing_a_gate_is_removal(impl, reduction, beta):
    problem = gated_problem()
    how = weighted(reduction) | COMMON | {"beta": beta}
    call = arguments("gated_kd", problem, "gate completion_mask bias", **how)
    closed = fused("gated_kd", call, impl)
    removed = fused("gated_kd", only(call, OPEN), impl)
    assert closed["loss"] != 0
    assert not closed["hidden"][~OPEN].any()
    closed["hidden"] = closed["hidden"][OPEN]
    assert_same_bits(closed, removed)


def test_closing_a_gate_is_removal_in_bf16(impl):
    problem = gated_problem(dtype=torch.bfloat16)
    call = arguments(
        "gated_kd", problem, "gate completion_mask", **COMMON, logits_dtype=torch.float32
    )
    closed, removed = fused("gated_kd", call, impl), fused("gated_kd", only(call, OPEN), impl)
    closed["hidden"] = closed["hidden"][OPEN]
    assert_same_bits(closed, removed)


def test_masking_tokens_is_removal(impl):
    """Flat rows: with every weight in place, what is masked might as well not have been passed."""
    problem = make_problem(BATCH, LENGTH)
    mask = problem.completion_mask.flatten()
    assert 0 < mask.sum() < mask.numel()
    names = ("hidden", "targets", "old_logprobs", "teacher_hidden")
    flat = {name: getattr(problem, name).flatten(0, 1) for name in names}
    flat |= {"advantages": torch.randn(len(mask)), "gate": torch.rand(len(mask)).round()}
    flat |= {"lm_head": problem.lm_head, "teacher_lm_head": problem.teacher_lm_head}
    flat |= {"completion_mask": mask, "policy_reduction": "token_mean"} | COMMON
    masked, removed = fused("kepo", flat, impl), fused("kepo", only(flat, mask), impl)
    assert not masked["hidden"][~mask].any()
    masked["hidden"] = masked["hidden"][mask]
    assert_same_bits(masked, removed)


def test_zero_weights_are_removal(impl):
    problem = make_problem(BATCH, LENGTH)
    weights = OPEN[:, None] * torch.rand(BATCH, LENGTH)
    call = arguments("grpo", problem, "old_logprobs", weights=weights, **COMMON)
    zero, removed = fused("grpo", call, impl), fused("grpo", only(call, OPEN), impl)
    zero["hidden"] = zero["hidden"][OPEN]
    assert_same_bits(zero, removed)


@pytest.mark.parametrize("loss", ["gated_kd", "kepo"])
def test_compact_teacher_is_the_full_one(impl, loss):
    problem = gated_problem()
    call = arguments(loss, problem, "gate completion_mask bias", **COMMON)
    compact = call | {"teacher_hidden": problem.teacher_hidden[OPEN]}
    assert_same_bits(fused(loss, compact, impl), fused(loss, call, impl))


@pytest.mark.parametrize("settings", [COMMON, {"workspace_bytes": 12_000}], ids=str)
def test_joint_loss_with_closed_gates_is_grpo(impl, settings):
    """Also where the workspace sets the chunks: with no teacher to hold they are GRPO's."""
    problem = replace(gated_problem(), gate=torch.zeros(BATCH))
    names = "completion_mask old_logprobs ref_logprobs bias"
    how = settings | {"kl_coef": 0.1, "entropy_coef": 0.05}
    joint = fused("kepo", arguments("kepo", problem, names, **how), impl)
    assert_same_bits(joint, fused("grpo", arguments("grpo", problem, names, **how), impl))


# ----------------------------------------------------------------- what stands in rows of no weight


def test_poison_in_closed_and_masked_rows_of_kd(impl):
    problem = gated_problem()
    call = arguments("gated_kd", problem, "gate completion_mask bias", **COMMON)
    dead = ~(OPEN[:, None] & problem.completion_mask)
    spoilt = spoil(call, dead, dead)
    assert spoilt["hidden"].isnan().any() and spoilt["teacher_hidden"].isinf().any()
    assert_same_bits(fused("gated_kd", spoilt, impl), fused("gated_kd", call, impl))


def test_poison_in_masked_rows_of_grpo(impl):
    problem = make_problem(BATCH, LENGTH)
    how = COMMON | {"kl_coef": 0.1, "entropy_coef": 0.05}
    call = arguments("grpo", problem, "completion_mask old_logprobs ref_logprobs", **how)
    call["advantages"] = torch.randn(BATCH, LENGTH)
    dead = ~problem.completion_mask
    spoilt = spoil(call, dead, dead)
    assert_same_bits(fused("grpo", spoilt, impl), fused("grpo", call, impl))


def test_advantage_of_a_wholly_masked_sequence_is_not_read(impl):
    problem = make_problem(BATCH, LENGTH)
    problem.completion_mask[1] = False
    call = arguments("grpo", problem, "completion_mask", **COMMON)
    spoilt = call | {"advantages": problem.advantages.clone()}
    spoilt["advantages"][1] = torch.nan
    assert_same_bits(fused("grpo", spoilt, impl), fused("grpo", call, impl))


def test_poison_in_the_joint_loss(impl):
    """A closed sequence has a policy term, so only its teacher is out of reach."""
    problem = gated_problem()
    how = COMMON | {"kl_coef": 0.1, "entropy_coef": 0.05}
    call = arguments("kepo", problem, "completion_mask old_logprobs ref_logprobs", **how)
    call["advantages"] = torch.randn(BATCH, LENGTH)
    masked = ~problem.completion_mask
    spoilt = spoil(call, masked, masked | ~OPEN[:, None])
    assert_same_bits(fused("kepo", spoilt, impl), fused("kepo", call, impl))


def test_poison_in_a_term_of_no_weight(impl):
    """Distilled but not rewarded tokens: advantages and log-probabilities are not read."""
    problem = replace(make_problem(BATCH, LENGTH), gate=torch.ones(BATCH))
    policy_weights = torch.rand(BATCH, LENGTH, dtype=torch.float64)
    policy_weights[1:3, ::2] = 0.0
    how = COMMON | {"kl_coef": 0.1, "entropy_coef": 0.05, "policy_weights": policy_weights}
    call = arguments("kepo", problem, "old_logprobs ref_logprobs", **how)
    call["advantages"] = torch.randn(BATCH, LENGTH)
    spoilt = dict(call)
    for name in ("advantages", "old_logprobs", "ref_logprobs"):
        spoilt[name] = poisoned(call[name], policy_weights == 0, torch.nan, torch.inf)
    actual = fused("kepo", spoilt, impl)
    assert all(x.isfinite().all() for x in actual.values())
    assert_same_bits(actual, fused("kepo", call, impl))


def test_poison_in_masked_rows_of_logprobs(impl):
    problem = make_problem(BATCH, LENGTH)
    call = {name: getattr(problem, name) for name in ("hidden", "lm_head", "targets")}
    dead = ~problem.completion_mask
    results = []
    for each in (call, spoil(call, dead, dead)):
        each = {name: x.to(device_of(impl)) for name, x in each.items()}
        each["hidden"].requires_grad_()
        each["lm_head"] = each["lm_head"].detach().requires_grad_()
        logprobs, entropy = kepo_kernels.fused_linear_logprobs(
            **each,
            completion_mask=problem.completion_mask.to(device_of(impl)),
            return_entropy=True,
            impl=impl,
            chunk_rows=3,
        )
        (logprobs * 2 - entropy).sum().backward()
        gradients = (each["hidden"].grad, each["lm_head"].grad)
        results.append(dict(enumerate((logprobs.detach(), entropy.detach(), *gradients))))
    assert not results[0][0][dead].any() and not results[0][2][dead].any()
    assert_same_bits(*results)


# ------------------------------------------------------------------------------------- nothing left


def nothing_left(how: str) -> Problem:
    problem = gated_problem()
    if how == "all gates closed":
        return replace(problem, gate=torch.zeros(BATCH, dtype=torch.bool))
    if how == "all tokens masked":
        return replace(problem, completion_mask=torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    names = vars(problem)
    if how == "no sequences":
        cut = {n: x[:0] for n, x in names.items() if len(x) == BATCH}
        return replace(problem, **cut)
    cut = {n: x[:, :0] for n, x in names.items() if x.shape[:2] == (BATCH, LENGTH)}
    return replace(problem, **cut)


WAYS = ("all gates closed", "all tokens masked", "no sequences", "no tokens")


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("how", WAYS)
def test_nothing_left(impl, how, reduction, monkeypatch):
    """Exactly 0, with gradients that are exactly 0 and there, and without a matrix product."""
    monkeypatch.setattr(gemm, "project_", None)
    problem = nothing_left(how)
    for loss in ("gated_kd", "grpo", "kepo"):
        if loss != "gated_kd" and how == "all gates closed":
            continue  # the policy term has no gate
        options = "completion_mask bias" + (" gate" if loss == "gated_kd" else "")
        settings = {"reduction": reduction}
        if loss == "kepo":
            settings = {"policy_reduction": reduction, "distill_reduction": reduction}
        result = fused(loss, arguments(loss, problem, options, **settings), impl)
        assert result["loss"].item() == 0.0 and result["loss"].shape == ()
        for name in ("hidden", "lm_head", "bias"):
            assert result[name].shape == getattr(problem, name).shape
            assert torch.equal(result[name], torch.zeros_like(result[name])), name


@pytest.mark.parametrize("how", WAYS[1:])
def test_no_rows_to_score(impl, how):
    problem = nothing_left(how)
    hidden = problem.hidden.to(device_of(impl)).requires_grad_()
    lm_head, targets, mask = (
        x.to(device_of(impl)) for x in (problem.lm_head, problem.targets, problem.completion_mask)
    )
    logprobs = kepo_kernels.fused_linear_logprobs(
        hidden, lm_head, targets, completion_mask=mask, impl=impl
    )
    assert torch.equal(logprobs, torch.zeros_like(logprobs)) and logprobs.shape == targets.shape
    logprobs.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_compact_teacher_of_nothing(impl):
    """All gates closed, and a teacher that was therefore never run."""
    problem = nothing_left("all gates closed")
    problem = replace(problem, teacher_hidden=problem.teacher_hidden[:0])
    result = fused("gated_kd", arguments("gated_kd", problem, "gate"), impl)
    assert result["loss"].item() == 0.0 and not result["hidden"].any()


# --------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("loss", ["gated_kd", "kepo"])
def test_only_open_rows_meet_a_head(loss, monkeypatch):
    """Rows of each projection, counted: the teacher's are the open ones, whatever the chunks."""
    problem = gated_problem()
    rows = {"student": 0, "teacher": 0}
    project = gemm.project_

    def counting(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, **how: int) -> None:
        rows["student" if w.shape[1] == problem.lm_head.shape[1] else "teacher"] += len(x)
        project(out, x, w, bias, **how)

    monkeypatch.setattr(gemm, "project_", counting)
    fused(loss, arguments(loss, problem, "gate completion_mask", **COMMON))
    opened = (OPEN[:, None] & problem.completion_mask).sum()
    assert 0 < opened < problem.completion_mask.sum()
    student = opened if loss == "gated_kd" else problem.completion_mask.sum()
    assert rows == {"student": student, "teacher": opened}


def test_no_distillation_no_teacher(monkeypatch):
    """distill_coef = 0: the teacher's head is not even looked at."""
    problem = gated_problem()
    project = gemm.project_

    def student_only(out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, **how: int) -> None:
        assert w.shape[1] == problem.lm_head.shape[1]
        project(out, x, w, bias, **how)

    monkeypatch.setattr(gemm, "project_", student_only)
    call = arguments("kepo", problem, "completion_mask", distill_coef=0.0)
    assert fused("kepo", call)["loss"] != 0


def test_loss_weights_values():
    """By hand: two sequences of 3 and 1 tokens, gates 0.5 and 2."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    gate = torch.tensor([0.5, 2.0, 1.0])
    for reduction, expected in (
        ("sum", [[0.5, 0.5, 0.5], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        ("token_mean", [[0.125, 0.125, 0.125], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        ("sequence_mean", [[1 / 18, 1 / 18, 1 / 18], [2 / 3, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    ):
        weights = kepo_kernels.loss_weights(mask, gate, reduction)
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(weights, expected, rtol=1e-15, atol=0)
    # A closed sequence is not counted by token_mean.
    weights = kepo_kernels.loss_weights(mask, torch.tensor([True, False, True]))
    assert weights.sum() == 1 and weights.count_nonzero() == 3
    flat = kepo_kernels.loss_weights(mask.flatten(), None, "sequence_mean")
    assert torch.equal(flat, mask.flatten().double() / 9)
