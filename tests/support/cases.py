"""The table of calls that every back-end must get right.

A `KernelCase` is a call written down: which loss, which of its optional tensors, settings of loss
and engine, sizes, and an edit for what is unusual. `CASES` are picked by hand; `case_product.py`
draws thousands more, `case_errors.py` turns any of them into a call that must be refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from checks import make_problem
from loss_calls import Arguments, arguments, assert_right, each_tensor, flat
from torch import Tensor

from kepo_kernels import Head, LoRA, TopK, reference

Edit = Callable[[Arguments], Arguments]


def unchanged(call: Arguments) -> Arguments:
    return call


@dataclass(frozen=True)
class KernelCase:
    loss: str
    options: str = ""  # tensors of checks.Problem that the loss does not require
    settings: dict[str, object] = field(default_factory=dict)  # of the loss and of the engine
    problem: dict[str, object] = field(default_factory=dict)  # of checks.make_problem
    edit: Edit = unchanged
    dtype: torch.dtype = torch.float32
    frozen: tuple[str, ...] = ()  # of what could have a gradient

    def call(self) -> Arguments:
        temperature = self.settings.get("temperature", 1.0)
        problem = make_problem(**{"temperature": temperature, "dtype": self.dtype} | self.problem)
        return self.edit(arguments(self.loss, problem, self.options, **self.settings))

    def judge(self, impl: str) -> None:
        """Value and gradients against the oracle."""
        call = self.call()
        assert_right(self.loss, call, impl, oracle_call=full_teacher(call), frozen=self.frozen)


def full_teacher(call: Arguments) -> Arguments:
    """The oracle wants the teacher's states of closed sequences, too, and does not look at them."""
    hidden, teacher = call["hidden"], call.get("teacher_hidden")

    def full(x: Tensor) -> Tensor:
        if x.shape[:-1] == hidden.shape[:-1]:
            return x
        found = x.new_zeros(*hidden.shape[:-1], x.shape[-1])
        found[open_sequences(call)] = x
        return found

    return call if teacher is None else call | {"teacher_hidden": each_tensor(teacher, full)}


def open_sequences(call: Arguments) -> Tensor | None:
    """(B,) bool by the gate or, without one, by the weights of the divergence; None: all."""
    weights = call.get("distill_weights", call.get("weights"))
    if call.get("gate") is not None:
        return call["gate"] != 0
    if weights is None:
        return None
    if call.get("completion_mask") is not None:
        weights = weights * call["completion_mask"]
    return weights.ne(0).reshape(len(weights), -1).any(-1)


HUGE = 10**9
INF = float("inf")
ALL_POLICY = "completion_mask old_logprobs ref_logprobs"
ALL = ALL_POLICY + " bias teacher_bias"


# --------------------------------------------------------- how a call may differ from the plain one


def soft_gate(call: Arguments) -> Arguments:
    return call | {"gate": torch.tensor([0.4, 0.0, 1.7], dtype=call["hidden"].dtype)}


def token_weights(call: Arguments) -> Arguments:
    """Zero, negative and large weights; they multiply mask and gate."""
    weights = torch.randn(call["hidden"].shape[:2], dtype=torch.float64)
    weights[1, 2:4] = 0.0
    return call | {"weights": weights * 3.0}


def bonus_weights(call: Arguments) -> Arguments:
    """The bonus on other tokens than the policy term: some have one of them, some both. Of one
    sign, so that the bonus does not cancel within itself."""
    weights = torch.rand(2, *call["hidden"].shape[:2], dtype=torch.float64) + 0.5
    weights[0, :, 1::3] = 0.0
    weights[1, :, ::3] = 0.0
    name = "weights" if "gate" not in call else "policy_weights"
    return call | {name: weights[0], "entropy_weights": weights[1]}


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


def heads(call: Arguments) -> Arguments:
    """Everything a head can have, on either side."""
    student, teacher = call["lm_head"], call.get("teacher_lm_head")
    call = call | {"lm_head": Head(student, 4.0, 0.5, low_rank(student))}
    if teacher is None:  # or of K tokens
        return call
    return call | {"teacher_lm_head": Head(teacher, 6.0, 1.5, low_rank(teacher))}


def low_rank(weight: Tensor, rank: int = 2) -> LoRA:
    a, b = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank)
    return LoRA(a.to(weight.dtype), b.to(weight.dtype), 0.3)


def sampled_elsewhere(call: Arguments) -> Arguments:
    """Corrections of the sampler, one of which is 0."""
    return call | {"sampler_weights": torch.tensor([0.7, 0.0, 1.6])}


def compact_teacher(call: Arguments) -> Arguments:
    opened = call["gate"] != 0
    return call | {"teacher_hidden": each_tensor(call["teacher_hidden"], lambda x: x[opened])}


def listed(count: int) -> Edit:
    """The teacher's `count` most likely tokens in place of its states; some rows have fewer, one
    has none, and in one of them the student's own are not among them."""

    def edit(call: Arguments) -> Arguments:
        names = ("teacher_hidden", "teacher_lm_head", "teacher_bias")
        given = {name: each_tensor(call.get(name), Tensor.double) for name in names}
        logits = reference.project(*given.values())
        logits = logits / (call.get("teacher_temperature") or call.get("temperature", 1.0))
        shared = min(logits.shape[-1], len(Head.of(call["lm_head"]).weight))
        found = logits.log_softmax(-1)[..., :shared].topk(min(count, shared))
        ids, logprobs = found.indices, found.values.clone()
        rows, places = ids.flatten(0, -2), logprobs.flatten(0, -2)
        rows[1::3, -1] = -1
        places[1::3, -1] = torch.nan  # of padding: not read
        rows[-1] = -1
        rest = {n: x for n, x in call.items() if n not in (*names, "teacher_temperature")}
        return rest | {"teacher_hidden": TopK(ids, logprobs.to(call["hidden"].dtype))}

    return edit


def own_policy_loss(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    return -advantages * torch.tanh(log_ratio) - 0.1 * logprobs


def chain(*changes: Edit) -> Edit:
    def all_of_them(call: Arguments) -> Arguments:
        for change in changes:
            call = change(call)
        return call

    return all_of_them


KD = "gate completion_mask"
PEAKED = {"std": 12.0}
# Chosen so that every argument, every branch of a kernel and every way through the chunk loop is in
# some case, next to different others; the comment says what a case is there for.
CASES = {
    # Each kind of divergence, through bias, mask and gate, in one chunk.
    "kd forward": KernelCase("gated_kd", KD + " bias teacher_bias", {"beta": 0.0}),
    "kd reverse": KernelCase("gated_kd", KD + " bias teacher_bias", {"beta": 1.0}),
    "kd mixture": KernelCase("gated_kd", KD + " bias teacher_bias", {"beta": 0.5}),
    # An uneven mixture tells beta from 1 - beta, which 0.5 cannot.
    "kd uneven mixture": KernelCase("gated_kd", KD, {"beta": 0.1, "reduction": "sum"}),
    # Nothing optional: the defaults, every token of every sequence.
    "kd defaults": KernelCase("gated_kd"),
    # Teacher vocabulary wider and narrower, temperature, one row and three rows a chunk.
    "kd wider teacher": KernelCase(
        "gated_kd",
        KD + " bias teacher_bias",
        {"beta": 1.0, "temperature": 0.7, "reduction": "sequence_mean", "chunk_rows": 1},
        {"teacher_vocab": 45},
    ),
    "kd narrower teacher": KernelCase(
        "gated_kd",
        KD + " teacher_bias",
        {"beta": 0.5, "temperature": 0.7, "chunk_rows": 3},
        {"teacher_vocab": 29},
    ),
    # Gates multiply; one of them is above 1.
    "kd soft gate": KernelCase("gated_kd", "completion_mask", {"beta": 0.0}, {}, soft_gate),
    "kd weights": KernelCase("gated_kd", KD, {"beta": 0.5, "chunk_rows": 3}, {}, token_weights),
    "kd flat": KernelCase("gated_kd", KD, {"beta": 0.0, "reduction": "sequence_mean"}, {}, flat),
    # Peaked rows: a phantom column of logit 0 would carry mass here, and most q are nearly 0.
    "kd peaked forward": KernelCase("gated_kd", KD, {"beta": 0.0}, PEAKED, exact_logits),
    "kd peaked reverse": KernelCase(
        "gated_kd", KD, {"beta": 1.0, "temperature": 0.7}, PEAKED, exact_logits
    ),
    # Where both are certain and differ, the mixture's gradient vanishes: half as peaked.
    "kd peaked mixture": KernelCase("gated_kd", KD, {"beta": 0.5}, {"std": 5.0}, exact_logits),
    "kd ruled-out tokens": KernelCase(
        "gated_kd", KD + " bias teacher_bias", {"beta": 0.5}, {}, ruled_out
    ),
    # The smallest and the oddest sizes.
    "kd one of each": KernelCase(
        "gated_kd",
        "",
        {"beta": 0.5},
        {"batch": 1, "length": 1, "hidden": 1, "vocab": 2, "teacher_hidden": 1, "seed": 2},
    ),
    "kd one-token vocabulary": KernelCase("gated_kd", "", {"beta": 0.5}, {"vocab": 1}),
    # More than one block of columns of any back-end, and no multiple of anything.
    "kd wide": KernelCase(
        "gated_kd",
        KD + " bias",
        {"beta": 0.5, "chunk_rows": HUGE},
        {"batch": 2, "length": 3, "vocab": 2311, "teacher_vocab": 2203, "hidden": 33},
    ),
    # What a head can have, and two temperatures.
    "kd heads": KernelCase(
        "gated_kd",
        KD + " bias teacher_bias",
        {"beta": 0.5, "temperature": 0.7, "teacher_temperature": 2.0, "chunk_rows": 3},
        {"teacher_vocab": 45},
        heads,
    ),
    "kd heads, reverse": KernelCase("gated_kd", KD, {"beta": 1.0}, {"std": 6.0}, heads),
    "kd heads, ruled-out tokens": KernelCase(
        "gated_kd", KD + " bias teacher_bias", {"beta": 0.5}, {}, chain(ruled_out, heads)
    ),
    # K tokens in place of states: few, one, as many as there are, and what a head can have.
    "kd top k": KernelCase("gated_kd", KD + " bias", {"beta": 0.3, "chunk_rows": 3}, {}, listed(5)),
    "kd top k forward": KernelCase(
        "gated_kd", KD, {"beta": 0.0, "temperature": 0.7}, {}, listed(8)
    ),
    "kd top k reverse": KernelCase(
        "gated_kd",
        "completion_mask",
        {"beta": 1.0, "chunk_rows": 1},
        {},
        chain(soft_gate, listed(1)),
    ),
    "kd top k of all": KernelCase("gated_kd", KD, {"beta": 0.5}, {}, listed(37)),
    "kd top k of a wider teacher": KernelCase(
        "gated_kd", KD + " bias teacher_bias", {"beta": 0.0}, {"teacher_vocab": 45}, listed(30)
    ),
    "kd top k compact, flat": KernelCase(
        "gated_kd", KD, {"beta": 0.5}, {}, chain(listed(3), flat, compact_teacher)
    ),
    "kd top k heads": KernelCase(
        "gated_kd", KD + " bias", {"beta": 1.0, "temperature": 0.7}, {}, chain(listed(4), heads)
    ),
    "kd top k peaked": KernelCase(
        "gated_kd", KD, {"beta": 0.0}, PEAKED, chain(exact_logits, listed(3))
    ),
    # Where the student is sure of one of the K the gradient vanishes: half as peaked.
    "kd top k peaked reverse": KernelCase(
        "gated_kd",
        KD,
        {"beta": 1.0, "temperature": 0.7},
        {"std": 6.0},
        chain(exact_logits, listed(3)),
    ),
    "kd top k one-token vocabulary": KernelCase(
        "gated_kd", "", {"beta": 0.5}, {"vocab": 1, "batch": 1}, listed(1)
    ),
    "kd top k wide": KernelCase(
        "gated_kd",
        KD + " bias",
        {"beta": 0.5, "chunk_rows": HUGE},
        {"batch": 2, "length": 3, "vocab": 2311, "teacher_vocab": 2203, "hidden": 33},
        listed(128),
    ),
    "kepo top k": KernelCase(
        "kepo",
        ALL,
        {
            "beta": 0.3,
            "distill_coef": 3.0,  # with 0.3 the terms would cancel, and leave what rounding leaves
            "temperature": 0.7,
            "kl_coef": 0.1,
            "entropy_coef": 0.05,
            "chunk_rows": 3,
        },
        {},
        chain(soft_gate, listed(12)),
    ),
    "kepo top k peaked": KernelCase(
        "kepo",
        "completion_mask",
        {"beta": 1.0, "entropy_coef": 0.1},
        PEAKED,
        chain(exact_logits, listed(6)),
    ),
    "kepo top k, heads, sequences": KernelCase(
        "kepo",
        ALL,
        {"importance_level": "sequence", "entropy_coef": 0.1, "beta": 0.0},
        {},
        chain(listed(12), heads, compact_teacher),
    ),
    "kepo top k, frozen head": KernelCase(
        "kepo", ALL, {"distill_coef": 3.0}, {}, listed(6), frozen=("lm_head", "bias")
    ),
    "grpo head": KernelCase("grpo", ALL_POLICY, {"entropy_coef": 0.1, "kl_coef": 0.1}, {}, heads),
    "kd compact teacher": KernelCase("gated_kd", KD, {"beta": 0.0}, {}, compact_teacher),
    # The relatives of GRPO, next to each of them an estimator, a level or sampler weights.
    "grpo delta": KernelCase("grpo", "old_logprobs", {"delta": 1.5}, {}, far_ratios),
    "grpo cispo": KernelCase(
        "grpo",
        ALL_POLICY,
        {"policy_loss": "cispo", "kl_coef": 0.2, "kl_estimator": "k1"},
        {},
        chain(far_ratios, sampled_elsewhere),
    ),
    "grpo sapo": KernelCase(
        "grpo",
        ALL_POLICY,
        {"policy_loss": "sapo", "kl_coef": 0.2, "kl_estimator": "k2", "chunk_rows": 3},
        {},
        far_ratios,
    ),
    "grpo sapo overflow": KernelCase(
        "grpo", "old_logprobs", {"policy_loss": "sapo"}, {}, ratio_overflow
    ),
    "grpo reinforce": KernelCase(
        "grpo", "completion_mask", {"policy_loss": "reinforce"}, {}, sampled_elsewhere
    ),
    "grpo own loss": KernelCase("grpo", "old_logprobs", {"policy_loss": own_policy_loss}),
    "grpo sequence": KernelCase(
        "grpo",
        "completion_mask old_logprobs",
        {"importance_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.1},
    ),
    "grpo sequence, cut by chunks": KernelCase(
        "grpo",
        ALL_POLICY + " bias",
        {"importance_level": "sequence", "policy_loss": "sapo", "chunk_rows": 2, "kl_coef": 0.1},
        {},
        sampled_elsewhere,
    ),
    # On policy: ratio 1 in value, gradient kept.
    "grpo on policy": KernelCase("grpo", "completion_mask bias", {"temperature": 0.7}),
    "grpo defaults": KernelCase("grpo"),
    "grpo clipped": KernelCase(
        "grpo",
        "completion_mask old_logprobs",
        {"epsilon_low": 0.2, "epsilon_high": 0.28, "reduction": "token_mean", "chunk_rows": 3},
    ),
    "grpo far ratios": KernelCase(
        "grpo",
        "completion_mask old_logprobs",
        {"epsilon_high": 0.4, "reduction": "sum"},
        {},
        far_ratios,
    ),
    "grpo ratio overflow": KernelCase("grpo", "old_logprobs", {}, {}, ratio_overflow),
    # Penalty and bonus: the coefficients of logprob and entropy, each of its own sign and size.
    "grpo penalty": KernelCase(
        "grpo",
        "completion_mask old_logprobs ref_logprobs",
        {"kl_coef": 0.3, "reduction": "sum", "chunk_rows": 1},
    ),
    "grpo entropy": KernelCase(
        "grpo",
        "completion_mask old_logprobs ref_logprobs bias",
        {"kl_coef": 0.04, "entropy_coef": 0.2, "temperature": 0.7, "chunk_rows": HUGE},
    ),
    # Reference log-probabilities that no coefficient asks for; an entropy that is lowered.
    "grpo unused reference": KernelCase(
        "grpo", "old_logprobs ref_logprobs", {"kl_coef": 0.0, "entropy_coef": -0.1}
    ),
    # The penalty times the ratio, also where it is clipped or flat; the bonus on tokens of its own.
    "grpo corrected penalty": KernelCase(
        "grpo",
        ALL_POLICY,
        {"kl_coef": 0.3, "kl_bias_correction": True, "chunk_rows": 3},
        {},
        far_ratios,
    ),
    "grpo corrected penalty, on policy": KernelCase(
        "grpo", "ref_logprobs", {"kl_coef": 0.3, "kl_bias_correction": True, "kl_estimator": "k1"}
    ),
    "grpo corrected penalty of sequences": KernelCase(
        "grpo",
        ALL_POLICY,
        {
            "kl_coef": 0.3,
            "kl_bias_correction": True,
            "importance_level": "sequence",
            "policy_loss": "reinforce",  # the ratio is that of the penalty alone
        },
    ),
    "grpo bonus of its own weights": KernelCase(
        "grpo", "completion_mask old_logprobs", {"entropy_coef": 0.2}, {}, bonus_weights
    ),
    "grpo unused bonus weights": KernelCase(
        "grpo", "completion_mask old_logprobs", {"entropy_coef": 0.0}, {}, bonus_weights
    ),
    "kepo bonus of its own weights": KernelCase(
        "kepo",
        ALL,
        {"entropy_coef": 0.2, "importance_level": "sequence", "chunk_rows": 2},
        {},
        bonus_weights,
    ),
    "grpo weights": KernelCase("grpo", "completion_mask old_logprobs", {}, {}, token_weights),
    "grpo flat": KernelCase(
        "grpo",
        "completion_mask old_logprobs",
        {"reduction": "token_mean"},
        {},
        chain(int32_targets, flat),
    ),
    "grpo peaked": KernelCase(
        "grpo", "completion_mask", {"entropy_coef": 0.2}, PEAKED, exact_logits
    ),
    # Everything at once, in chunks, some of whose rows meet the teacher and some do not.
    "kepo everything": KernelCase(
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
    "kepo other reductions": KernelCase(
        "kepo",
        "completion_mask old_logprobs",
        {"beta": 0.0, "policy_reduction": "sum", "distill_reduction": "sequence_mean"},
        {"teacher_vocab": 29, "seed": 1},
    ),
    "kepo reverse": KernelCase(
        "kepo", ALL, {"beta": 1.0, "policy_reduction": "token_mean", "chunk_rows": 1}
    ),
    "kepo without distillation": KernelCase("kepo", "completion_mask", {"distill_coef": 0.0}),
    "kepo flat": KernelCase("kepo", ALL, {"beta": 0.0, "distill_reduction": "sum"}, {}, flat),
    "kepo peaked": KernelCase(
        "kepo", "completion_mask", {"beta": 0.5, "temperature": 0.7}, PEAKED, exact_logits
    ),
    "kepo ruled-out tokens": KernelCase("kepo", ALL, {"beta": 0.5}, {}, ruled_out),
    "kepo heads": KernelCase(
        "kepo",
        ALL,
        {
            "importance_level": "sequence",
            "policy_loss": "cispo",
            "entropy_coef": 0.1,
            "teacher_temperature": 0.5,
            "chunk_rows": 8,
        },
        {"teacher_vocab": 29},
        chain(heads, sampled_elsewhere, soft_gate),
    ),
    # Nothing but one side has a gradient.
    "kepo frozen head": KernelCase(
        "kepo", ALL, {"chunk_rows": 4}, {}, heads, frozen=("lm_head", "lora_a", "bias")
    ),
    "kepo frozen states": KernelCase("kepo", ALL, {"beta": 0.1}, {}, heads, frozen=("hidden",)),
}
