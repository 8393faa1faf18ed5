"""Every public function against fp64 autograd through the oracle, in value and in gradient."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from checks import assert_close_to_oracle, make_problem
from loss_calls import LOSSES, Arguments, arguments, assert_right, flat, fused, plain
from torch import Tensor

import kepo_kernels

HUGE = 10**9
INF = float("inf")
ALL = "completion_mask old_logprobs ref_logprobs bias teacher_bias"


# --------------------------------------------------------- how a call may differ from the plain one


def soft_gate(call: Arguments) -> Arguments:
    return call | {"gate": torch.tensor([0.4, 0.0, 1.7], dtype=call["hidden"].dtype)}


def token_weights(call: Arguments) -> Arguments:
    """Zero, negative and large weights; they multiply mask and gate."""
    weights = torch.randn(call["hidden"].shape[:2], dtype=torch.float64)
    weights[1, 2:4] = 0.0
    return call | {"weights": weights * 3.0}


def token_advantages(call: Arguments) -> Arguments:
    lead = call["hidden"].shape[:2]
    return call | {"advantages": torch.randn(lead).to(call["hidden"].dtype)}


def far_ratios(call: Arguments) -> Arguments:
    """Ratios of e^4 and e^-4, far outside of the clip, at advantages of either sign."""
    far = 4.0 * torch.randint(-1, 2, call["old_logprobs"].shape)
    return token_advantages(call) | {"old_logprobs": call["old_logprobs"] + far}


def ratio_overflow(call: Arguments) -> Arguments:
    """e^200 has no float32; at a positive advantage it is clipped, and all is finite."""
    old = call["old_logprobs"].clone()
    old[-1, :2] -= 200.0
    return call | {"old_logprobs": old}


def int32_targets(call: Arguments) -> Arguments:
    return call | {"targets": call["targets"].int()}


def ruled_out(call: Arguments) -> Arguments:
    """-inf biases: tokens that student, teacher or both cannot produce. p x = 0 where p = 0."""
    bias, teacher_bias = call["bias"].clone(), call["teacher_bias"].clone()
    bias[3:9] = -INF
    teacher_bias[6:12] = -INF
    call = call | {"bias": bias, "teacher_bias": teacher_bias}
    return call | {"targets": call["targets"] % 3} if "targets" in call else call


def exact_logits(call: Arguments) -> Arguments:
    """Multiples of 1/8, whose products fp32 adds up exactly.

    With logits of 40, what any fp32 matrix product rounds off is 1e-5 of the gradient, eager
    torch's as much as ours, and would hide the row kernels' own error.
    """
    names = ("hidden", "lm_head", "teacher_hidden", "teacher_lm_head", "bias", "teacher_bias")
    return call | {name: (call[name] * 8).round() / 8 for name in names if name in call}


def chain(*changes: Callable[[Arguments], Arguments]) -> Callable[[Arguments], Arguments]:
    def all_of_them(call: Arguments) -> Arguments:
        for change in changes:
            call = change(call)
        return call

    return all_of_them


@dataclass(frozen=True)
class Case:
    loss: str
    options: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    problem: dict[str, object] = field(default_factory=dict)
    change: Callable[[Arguments], Arguments] = lambda call: call

    def call(self, dtype: torch.dtype) -> Arguments:
        temperature = self.settings.get("temperature", 1.0)
        problem = make_problem(**{"temperature": temperature, "dtype": dtype} | self.problem)
        return self.change(arguments(self.loss, problem, self.options, **self.settings))


KD = "gate completion_mask"
PEAKED = {"std": 12.0}
# Chosen so that every argument, every branch of a kernel and every way through the chunk loop is in
# some case, next to different others; the comment says what a case is there for.
CASES = {
    # Each kind of divergence, through bias, mask and gate, in one chunk.
    "kd forward": Case("gated_kd", KD + " bias teacher_bias", {"beta": 0.0}),
    "kd reverse": Case("gated_kd", KD + " bias teacher_bias", {"beta": 1.0}),
    "kd mixture": Case("gated_kd", KD + " bias teacher_bias", {"beta": 0.5}),
    # An uneven mixture tells beta from 1 - beta, which 0.5 cannot.
    "kd uneven mixture": Case("gated_kd", KD, {"beta": 0.1, "reduction": "sum"}),
    # Nothing optional: the defaults, every token of every sequence.
    "kd defaults": Case("gated_kd"),
    # Teacher vocabulary wider and narrower, temperature, one row and three rows a chunk.
    "kd wider teacher": Case(
        "gated_kd",
        KD + " bias teacher_bias",
        {"beta": 1.0, "temperature": 0.7, "reduction": "sequence_mean", "chunk_rows": 1},
        {"teacher_vocab": 45},
    ),
    "kd narrower teacher": Case(
        "gated_kd",
        KD + " teacher_bias",
        {"beta": 0.5, "temperature": 0.7, "chunk_rows": 3},
        {"teacher_vocab": 29},
    ),
    # Gates multiply; one of them is above 1.
    "kd soft gate": Case("gated_kd", "completion_mask", {"beta": 0.0}, {}, soft_gate),
    "kd weights": Case("gated_kd", KD, {"beta": 0.5, "chunk_rows": 3}, {}, token_weights),
    "kd flat": Case("gated_kd", KD, {"beta": 0.0, "reduction": "sequence_mean"}, {}, flat),
    # Peaked rows: a phantom column of logit 0 would carry mass here, and most q are nearly 0.
    "kd peaked forward": Case("gated_kd", KD, {"beta": 0.0}, PEAKED, exact_logits),
    "kd peaked reverse": Case(
        "gated_kd", KD, {"beta": 1.0, "temperature": 0.7}, PEAKED, exact_logits
    ),
    # Where both are certain and differ, the mixture's gradient vanishes: half as peaked.
    "kd peaked mixture": Case("gated_kd", KD, {"beta": 0.5}, {"std": 5.0}, exact_logits),
    "kd ruled-out tokens": Case(
        "gated_kd", KD + " bias teacher_bias", {"beta": 0.5}, {}, ruled_out
    ),
    # The smallest and the oddest sizes.
    "kd one of each": Case(
        "gated_kd",
        "",
        {"beta": 0.5},
        {"batch": 1, "length": 1, "hidden": 1, "vocab": 2, "teacher_hidden": 1, "seed": 2},
    ),
    "kd one-token vocabulary": Case("gated_kd", "", {"beta": 0.5}, {"vocab": 1}),
    # More than one block of columns of any back-end, and no multiple of anything.
    "kd wide": Case(
        "gated_kd",
        KD + " bias",
        {"beta": 0.5, "chunk_rows": HUGE},
        {"batch": 2, "length": 3, "vocab": 2311, "teacher_vocab": 2203, "hidden": 33},
    ),
    # On policy: ratio 1 in value, gradient kept.
    "grpo on policy": Case("grpo", "completion_mask bias", {"temperature": 0.7}),
    "grpo defaults": Case("grpo"),
    "grpo clipped": Case(
        "grpo",
        "completion_mask old_logprobs",
        {"epsilon_low": 0.2, "epsilon_high": 0.28, "reduction": "token_mean", "chunk_rows": 3},
    ),
    "grpo far ratios": Case(
        "grpo",
        "completion_mask old_logprobs",
        {"epsilon_high": 0.4, "reduction": "sum"},
        {},
        far_ratios,
    ),
    "grpo ratio overflow": Case("grpo", "old_logprobs", {}, {}, ratio_overflow),
    # Penalty and bonus: the coefficients of logprob and entropy, each of its own sign and size.
    "grpo penalty": Case(
        "grpo",
        "completion_mask old_logprobs ref_logprobs",
        {"kl_coef": 0.3, "reduction": "sum", "chunk_rows": 1},
    ),
    "grpo entropy": Case(
        "grpo",
        "completion_mask old_logprobs ref_logprobs bias",
        {"kl_coef": 0.04, "entropy_coef": 0.2, "temperature": 0.7, "chunk_rows": HUGE},
    ),
    # Reference log-probabilities that no coefficient asks for; an entropy that is lowered.
    "grpo unused reference": Case(
        "grpo", "old_logprobs ref_logprobs", {"kl_coef": 0.0, "entropy_coef": -0.1}
    ),
    "grpo weights": Case("grpo", "completion_mask old_logprobs", {}, {}, token_weights),
    "grpo flat": Case(
        "grpo",
        "completion_mask old_logprobs",
        {"reduction": "token_mean"},
        {},
        chain(int32_targets, flat),
    ),
    "grpo peaked": Case("grpo", "completion_mask", {"entropy_coef": 0.2}, PEAKED, exact_logits),
    # Everything at once, in chunks, some of whose rows meet the teacher and some do not.
    "kepo everything": Case(
        "kepo",
        ALL,
        {
            "beta": 0.5,
            "distill_coef": 0.3,
            "temperature": 0.7,
            "kl_coef": 0.1,
            "entropy_coef": 0.05,
            "epsilon_high": 0.28,
            "chunk_rows": 3,
        },
        {"teacher_vocab": 45},
        chain(far_ratios, soft_gate),
    ),
    "kepo other reductions": Case(
        "kepo",
        "completion_mask old_logprobs",
        {"beta": 0.0, "policy_reduction": "sum", "distill_reduction": "sequence_mean"},
        {"teacher_vocab": 29, "seed": 1},
    ),
    "kepo reverse": Case(
        "kepo", ALL, {"beta": 1.0, "policy_reduction": "token_mean", "chunk_rows": 1}
    ),
    "kepo without distillation": Case("kepo", "completion_mask", {"distill_coef": 0.0}),
    "kepo flat": Case("kepo", ALL, {"beta": 0.0, "distill_reduction": "sum"}, {}, flat),
    "kepo peaked": Case(
        "kepo", "completion_mask", {"beta": 0.5, "temperature": 0.7}, PEAKED, exact_logits
    ),
    "kepo ruled-out tokens": Case("kepo", ALL, {"beta": 0.5}, {}, ruled_out),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_match_oracle(impl, case):
    assert_right(case.loss, case.call(torch.float32), impl)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_match_oracle_in_float64(case):
    assert_right(case.loss, case.call(torch.float64), "torch")


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
    assert_right(loss, arguments(loss, problem, options, **settings), impl, against_eager=True)


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
