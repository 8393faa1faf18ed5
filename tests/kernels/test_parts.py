"""The joint loss with one of its parts alone, and open sequences that only the weights tell of.

Each against the fp64 oracle in value and gradient, at odd sizes and on peaked rows; the same bits
as the losses of one part; and what these comparisons would say of mistakes.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import exact_logits
from checks import Problem, make_problem
from loss_calls import Arguments, arguments, assert_right, assert_same_bits, flat, fused
from torch import Tensor

import kepo_kernels
from kepo_kernels import KepoInputError, losses
from kepo_kernels.compute import call

SIZES = dict(batch=5, length=11, hidden=33, vocab=67, teacher_hidden=29, teacher_vocab=71)
ONE_TOKEN, SOME, MASKED, NONE, WHOLE = range(5)  # by what a sequence's weights are not 0 on
OPEN = [ONE_TOKEN, SOME, WHOLE]
POLICY = ("targets", "advantages", "old_logprobs", "ref_logprobs")
TEACHER = ("teacher_hidden", "teacher_lm_head", "teacher_bias", "gate")


def problem_of(dtype: torch.dtype = torch.float32, std: float = 5.0) -> Problem:
    """Five sequences, padded but for the last; the gate is soft and closes what weights close."""
    lengths = torch.tensor([7, 9, 5, 8, 11])
    return replace(
        make_problem(**SIZES, dtype=dtype, std=std),
        completion_mask=torch.arange(11) < lengths[:, None],
        gate=torch.tensor([0.5, 1.0, 0.0, 0.0, 1.5], dtype=dtype),
    )


def some_weights(mask: Tensor) -> Tensor:
    """Of either sign, without a gate; where the mask is 0 they are not, and do not count."""
    weights = torch.randn(mask.shape, dtype=torch.float64)
    weights[ONE_TOKEN] = weights[ONE_TOKEN] * (torch.arange(11) == 6)
    weights[SOME, ::3] = 0.0
    weights[MASKED] = weights[MASKED] * ~mask[MASKED]
    weights[NONE] = 0.0
    return weights


def whole_call(problem: Problem, **settings: object) -> Arguments:
    options = "completion_mask old_logprobs ref_logprobs bias teacher_bias"
    terms = {"kl_coef": 0.1, "entropy_coef": 0.05, "distill_coef": 0.7}
    policy_weights = torch.rand(5, 11, dtype=torch.float64) * (torch.rand(5, 11) > 0.4)
    return arguments(
        "kepo", problem, options, **terms, policy_weights=policy_weights, chunk_rows=4, **settings
    )


def without(call: Arguments, *names: str) -> Arguments:
    return {name: x for name, x in call.items() if name not in names}


def grpo(call: Arguments) -> Arguments:
    return without(call, *TEACHER)


def kd(call: Arguments) -> Arguments:
    return without(call, *POLICY, "policy_weights", "kl_coef", "entropy_coef")


def weighed(call: Arguments) -> Arguments:
    """`distill_weights` in place of the gate."""
    return without(call, "gate") | {"distill_weights": some_weights(call["completion_mask"])}


def both_by_reductions(call: Arguments) -> Arguments:
    return without(call, "policy_weights")


# The edit of a whole call; whether the teacher's states may also be those of the open ones only.
COMBINATIONS: dict[str, tuple[Callable[[Arguments], Arguments], bool]] = {
    "policy": (grpo, False),
    "policy by reduction": (lambda call: grpo(both_by_reductions(call)), False),
    "policy of whole sequences": (
        lambda call: grpo(call) | {"importance_level": "sequence"},
        False,
    ),
    "teacher": (kd, True),
    "teacher, all open": (lambda call: without(kd(call), "gate"), False),
    "teacher, weights": (lambda call: kd(weighed(call)), True),
    "teacher, weights and gate": (lambda call: kd(call | weighed(call)), True),
    "both, all open": (lambda call: without(call, "gate"), False),
    "both, weights": (weighed, True),
    "both, weights and reduction": (lambda call: weighed(both_by_reductions(call)), True),
    "both, weights, whole sequences": (
        lambda call: weighed(call) | {"importance_level": "sequence"},
        True,
    ),
}


def compact(call: Arguments) -> Arguments:
    return call | {"teacher_hidden": call["teacher_hidden"][OPEN]}


def states_of(call: Arguments, may_be_compact: bool) -> list[Arguments]:
    """The call with the teacher's states of all sequences and, where it may, of the open ones."""
    return [call, compact(call)] if may_be_compact else [call]


def judge(name: str, impl: str, dtype: torch.dtype = torch.float32, **settings: object) -> None:
    """By the rule of the dtype."""
    edit, may_be_compact = COMBINATIONS[name]
    if dtype in (torch.bfloat16, torch.float16):
        settings["logits_dtype"] = torch.float32
    right = edit(whole_call(problem_of(dtype), **settings))
    eager = dtype == torch.bfloat16
    for given in states_of(right, may_be_compact):
        assert_right("kepo", given, impl, oracle_call=right, against_eager=eager)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_value_and_gradient(impl, name):
    judge(name, impl, beta=0.3)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_value_and_gradient_in_other_dtypes(name, dtype):
    judge(name, "torch", dtype, beta=1.0)


@pytest.mark.parametrize("beta", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_peaked_rows(impl, name, beta):
    """Most probabilities are nearly 0: a phantom column, or another's teacher, would show."""
    edit, may_be_compact = COMBINATIONS[name]
    right = edit(exact_logits(whole_call(problem_of(std=12.0), beta=beta, temperature=0.7)))
    for given in states_of(right, may_be_compact):
        assert_right("kepo", given, impl, oracle_call=right)


def test_weights_alone_in_flat_rows(impl):
    """Every row is a sequence of its own, and open by its own weight."""
    right = flat(weighed(whole_call(problem_of())))
    right["distill_weights"] = right["distill_weights"].abs()  # no small difference of large sums
    opened = right["completion_mask"] & (right["distill_weights"] != 0)
    assert 0 < opened.sum() < right["completion_mask"].sum()
    given = right | {"teacher_hidden": right["teacher_hidden"][opened]}
    assert_right("kepo", given, impl, oracle_call=right)


def test_gated_kd_by_its_weights_alone(impl):
    problem = problem_of()
    right = arguments("gated_kd", problem, "completion_mask bias", chunk_rows=3)
    right["weights"] = some_weights(problem.completion_mask)
    for given in (right, compact(right)):
        assert_right("gated_kd", given, impl, oracle_call=right)


# -------------------------------------------------------------------------- one body: the same bits


def test_without_a_teacher_it_is_grpo(impl):
    for level in ("token", "sequence"):
        given = grpo(whole_call(problem_of(), importance_level=level))
        alone = without(given, "policy_weights", "distill_coef")
        alone["weights"] = given["policy_weights"]
        assert_same_bits(fused("kepo", given, impl), fused("grpo", alone, impl))
        nothing = dict.fromkeys((*TEACHER, "distill_weights"))
        assert_same_bits(fused("kepo", given | nothing, impl), fused("grpo", alone, impl))


def test_without_a_policy_it_is_gated_kd(impl):
    given = kd(whole_call(problem_of())) | {"distill_coef": 1.0}
    alone = without(given, "distill_coef")
    assert_same_bits(fused("kepo", given, impl), fused("gated_kd", alone, impl))
    nothing = dict.fromkeys((*POLICY, "policy_weights", "sampler_weights"))
    assert_same_bits(fused("kepo", given | nothing, impl), fused("gated_kd", alone, impl))


def test_weights_alone_are_weights_and_their_gate(impl):
    given = weighed(whole_call(problem_of()))
    gate = torch.zeros(5, dtype=torch.bool).index_fill(0, torch.tensor(OPEN), True)
    expected = fused("kepo", given | {"gate": gate}, impl)
    assert_same_bits(fused("kepo", given, impl), expected)
    assert_same_bits(fused("kepo", compact(given), impl), expected)


def test_weights_outside_the_mask_are_not_read(impl):
    """Neither by the loss nor by what is open."""
    given = compact(weighed(whole_call(problem_of())))
    dead = ~given["completion_mask"]
    spoilt = given | {"distill_weights": given["distill_weights"].masked_fill(dead, torch.nan)}
    assert_same_bits(fused("kepo", spoilt, impl), fused("kepo", given, impl))


def test_open_sequences_do_not_depend_on_the_coefficient(impl):
    """distill_coef = 0 switches the term off, and the states are still those of the open ones."""
    given = compact(weighed(whole_call(problem_of()))) | {"distill_coef": 0.0}
    assert_same_bits(fused("kepo", given, impl), fused("kepo", grpo_of(given), impl))


def grpo_of(call: Arguments) -> Arguments:
    return without(call, *TEACHER, "distill_weights", "distill_coef")


def test_statistics_of_one_part():
    """Numbers that nothing is known of are 0, and the others those of the joint loss."""
    whole = weighed(whole_call(problem_of())) | {"return_stats": True}
    both, reward, divergence = (
        kepo_kernels.fused_kepo_loss(**call)[1] for call in (whole, grpo_of(whole), kd(whole))
    )
    assert not reward.divergence.any() and not divergence.logprobs.any()
    rewarded = whole["completion_mask"] & (whole["policy_weights"] != 0)
    distilled = whole["completion_mask"] & (whole["distill_weights"] != 0)
    for mine, theirs, rows in (
        (reward.logprobs, both.logprobs, rewarded),
        (reward.entropy, both.entropy, rewarded),
        (divergence.divergence, both.divergence, distilled),
    ):
        torch.testing.assert_close(mine, torch.where(rows, theirs, 0))


def test_no_policy_costs_what_weights_leave(monkeypatch):
    """Rows of each product, counted."""
    given = compact(kd(weighed(whole_call(problem_of()))))
    rows = []
    project = losses.Call.problem

    def counting(self, *args: object, **kwargs: object):
        student, problem = project(self, *args, **kwargs)
        rows.append((len(problem.active_rows.rows), len(problem.active_rows.teacher_rows)))
        return student, problem

    monkeypatch.setattr(losses.Call, "problem", counting)
    fused("kepo", given)
    opened = int((given["completion_mask"] & (given["distill_weights"] != 0)).sum())
    assert rows == [(opened, opened)] and 0 < opened < int(given["completion_mask"].sum())


# --------------------------------------------------------------------------------- planted mistakes

Plant = Callable[[pytest.MonkeyPatch], None]


def other_opened(bad: Callable[[losses.DistillationPart, Tensor], Tensor | None]) -> Plant:
    return lambda patch: patch.setattr(losses.DistillationPart, "opened", bad)


def by_weights_alone(part: losses.DistillationPart, present: Tensor) -> Tensor:
    """As they came, masked tokens included."""
    return part.weights.to(present.device).any(-1)


def other_either(bad: Callable[[Tensor, Tensor], Tensor]) -> Plant:
    good = losses._either

    def either(a: Tensor | None, b: Tensor | None) -> Tensor:
        return good(a, b) if a is None or b is None else bad(a, b)

    return lambda patch: patch.setattr(losses, "_either", either)


def unmasked_weights(patch: pytest.MonkeyPatch) -> None:
    good = call.Call.weights

    def bad(self: call.Call, *args: object, **given: object) -> tuple[Tensor, Tensor]:
        return good(replace(self, completion_mask=None), *args, **given)

    patch.setattr(call.Call, "weights", bad)


def no_coefficient(patch: pytest.MonkeyPatch) -> None:
    good = losses.DistillationPart
    patch.setattr(
        losses,
        "DistillationPart",
        lambda *args, coefficient=1.0, **given: good(*args, **given),
    )


def one_weight_for_both(patch: pytest.MonkeyPatch) -> None:
    """The first that are asked for."""
    good = call.Call.weights

    seen = []

    def bad(
        self: call.Call, gate: Tensor | None, weights: Tensor, *rest: object
    ) -> tuple[Tensor, Tensor]:
        seen.append(weights)
        return good(self, gate, seen[0], *rest)

    patch.setattr(call.Call, "weights", bad)


FAULTS = {
    "open by weights that the mask hides": other_opened(by_weights_alone),
    "open where all tokens weigh": other_opened(lambda part, present: present.all(-1)),
    "open where the first token weighs": other_opened(lambda part, present: present[:, 0]),
    "nobody is closed": other_opened(lambda part, present: None),
    "closed ones in their place": other_opened(lambda part, present: present.any(-1).roll(-1)),
    "mask ignored by the weights": unmasked_weights,
    "tokens of both parts only": other_either(lambda a, b: a & b),
    "tokens of the policy only": other_either(lambda a, b: a),
    "coefficient left out": no_coefficient,
    "one weight for both parts": one_weight_for_both,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, monkeypatch):
    """By the comparison with the oracle, or because states no longer fit the open sequences."""
    judge("both, weights", "torch")
    FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, KepoInputError)) as caught:
        judge("both, weights", "torch")
    assert re.search("exceeds|is exactly|^fused_kepo_loss: teacher_hidden", str(caught.value))
