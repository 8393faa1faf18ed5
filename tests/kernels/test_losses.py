"""Every public function against fp64 autograd through the oracle, in value and in gradient."""

from dataclasses import replace

import pytest
import torch
from cases import CASES, listed
from checks import assert_close_to_oracle, make_problem
from loss_calls import LOSSES, arguments, assert_right, flat, fused, plain
from torch import Tensor

import kepo_kernels


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_match_oracle(impl, case):
    case.judge(impl)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_match_oracle_in_float64(case):
    replace(case, dtype=torch.float64).judge("torch")


# ------------------------------------------------------------- arguments the oracle has no name for


def test_compact_teacher(impl):
    """`teacher_hidden` of the open sequences alone, in order."""
    problem = make_problem(batch=4, length=5)
    problem = replace(problem, gate=torch.tensor([True, False, False, True]))
    for loss in ("gated_kd", "kepo"):
        call = arguments(loss, problem, "gate completion_mask", chunk_rows=3)
        compact = call | {"teacher_hidden": problem.teacher_hidden[problem.gate]}
        assert_right(loss, compact, impl, oracle_call=call)


def test_compact_teacher_of_flat_rows(impl):
    problem = make_problem(batch=2, length=4)
    call = flat(arguments("gated_kd", problem, "completion_mask"))
    gate = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    compact = call | {"teacher_hidden": call["teacher_hidden"][gate], "gate": gate}
    assert_right("gated_kd", compact, impl, oracle_call=call | {"gate": gate})


def test_joint_loss_with_weights_per_term(impl):
    """Tokens with one term only, with both, with none."""
    problem = make_problem(length=5)
    policy = torch.randn(3, 5).double() * torch.randint(2, (3, 5))
    distill = torch.rand(3, 5).double() * torch.randint(2, (3, 5))
    common = {"temperature": 0.7, "chunk_rows": 4}
    call = arguments("kepo", problem, "completion_mask old_logprobs bias", distill_coef=0.3)
    actual = fused(
        "kepo", call | common | {"policy_weights": policy, "distill_weights": distill}, impl
    )
    common |= {"bias": problem.bias, "completion_mask": problem.completion_mask}
    grpo = arguments("grpo", problem, "old_logprobs", weights=policy)
    kd = arguments("gated_kd", problem, "gate", weights=0.3 * distill)
    expected = plain("grpo", grpo | common), plain("gated_kd", kd | common)
    for name, x in actual.items():
        assert_close_to_oracle(x, sum(part[name] for part in expected), name=name)


def test_micro_batches_add_up(impl):
    """Slices of the whole batch's weights: the losses of the parts sum to the loss of the whole."""
    problem = make_problem(batch=4, length=5)
    call = arguments("kepo", problem, "completion_mask old_logprobs bias")
    oracle = plain("kepo", call)
    weights = {
        "policy_weights": kepo_kernels.loss_weights(problem.completion_mask, None, "sequence_mean"),
        "distill_weights": kepo_kernels.loss_weights(
            problem.completion_mask, problem.gate, "token_mean"
        ),
    }
    # The gate is already in the weights, and multiplies again; a bool does not mind.
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        sliced = {
            name: x[part] if isinstance(x, Tensor) and len(x) == 4 else x
            for name, x in (call | weights).items()
        }
        parts.append(fused("kepo", sliced, impl))
    assert_close_to_oracle(parts[0]["loss"] + parts[1]["loss"], oracle["loss"], name="loss")
    assert_close_to_oracle(
        torch.cat([parts[0]["hidden"], parts[1]["hidden"]]), oracle["hidden"], name="hidden"
    )
    for name in ("lm_head", "bias"):
        assert_close_to_oracle(parts[0][name] + parts[1][name], oracle[name], name=name)


# ------------------------------------------------------------------------------------ 16-bit inputs

SIXTEEN = {
    "gated_kd": ("gate completion_mask bias teacher_bias", {"beta": 0.5, "chunk_rows": 5}),
    "grpo": ("completion_mask old_logprobs", {"entropy_coef": 0.1}),
    "kepo": ("completion_mask old_logprobs ref_logprobs", {"beta": 1.0, "kl_coef": 0.1}),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_inputs(impl, loss, dtype):
    """With fp32 logits each gradient is rounded once: eager torch loses many times that.

    Logits of std 6, as a trained model's: on flat ones eager rounds little but the result, too.
    """
    options, settings = SIXTEEN[loss]
    problem = make_problem(length=5, dtype=dtype, hidden=32, vocab=67, teacher_vocab=71, std=6.0)
    settings = settings | {"logits_dtype": torch.float32}
    call = arguments(loss, problem, options, **settings)
    assert_right(loss, call, impl, against_eager=True)
    error, of_eager = (
        abs(x["loss"].double() - plain(loss, call)["loss"])
        for x in (fused(loss, call, impl), plain(loss, call, dtype))
    )
    if dtype == torch.bfloat16:
        assert error <= 0.01 * of_eager


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_teacher_of_tokens_in_sixteen_bits(impl, dtype, beta):
    problem = make_problem(length=5, dtype=dtype, hidden=32, vocab=67, teacher_vocab=71, std=6.0)
    call = arguments("kepo", problem, "completion_mask old_logprobs", beta=beta, entropy_coef=0.1)
    call = listed(6)(call | {"logits_dtype": torch.float32})
    assert_right("kepo", call, impl, against_eager=True)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_logits_are_no_worse_than_eager(loss, impl):
    """The fast mode of processors with bf16 instructions rounds logits and their gradient."""
    options, settings = SIXTEEN[loss]
    problem = make_problem(length=5, dtype=torch.bfloat16, hidden=32, vocab=67)
    call = arguments(loss, problem, options, **settings, logits_dtype=torch.bfloat16)
    actual, oracle = fused(loss, call, impl), plain(loss, call)
    eager = plain(loss, call, torch.bfloat16)
    for name in ("hidden", "lm_head"):
        size = oracle[name].norm()
        error, of_eager = (x[name].double() - oracle[name] for x in (actual, eager))
        assert error.norm() <= 0.9 * of_eager.norm(), name
        assert 1e-4 * size < error.norm() < 0.05 * size, name


def test_fp16_logits_beyond_fp16(impl):
    """Logits of 1e5 have no fp16; they are never rounded to it."""
    problem = make_problem(length=3, dtype=torch.float16)
    problem = replace(problem, hidden=problem.hidden * 64, lm_head=problem.lm_head * 512)
    logits = problem.hidden.double() @ problem.lm_head.double().T
    assert logits.abs().max() > 65504
    call = arguments("grpo", problem, "completion_mask", temperature=3e4)
    assert_right("grpo", call, impl)
