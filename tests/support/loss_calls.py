"""Calls of the public losses and of their oracles with the same arguments."""

from collections.abc import Callable
from dataclasses import replace

import torch
from checks import Problem, assert_close_to_oracle, device_of, make_problem
from torch import Tensor

import kepo_kernels
from kepo_kernels import Head, LoRA, TopK, reference

# The required tensors of each loss; they are passed by name, as everything is.
TENSORS = {
    "gated_kd": ("hidden", "lm_head", "teacher_hidden", "teacher_lm_head"),
    "grpo": ("hidden", "lm_head", "targets", "advantages"),
    "kepo": (
        "hidden",
        "lm_head",
        "targets",
        "advantages",
        "teacher_hidden",
        "teacher_lm_head",
        "gate",
    ),
}
LOSSES = tuple(TENSORS)
# What else tests/support/checks.py has for each of them, where a test wants an ordinary call.
OPTIONS = {
    "gated_kd": "gate completion_mask bias teacher_bias",
    "grpo": "completion_mask old_logprobs bias",
    "kepo": "completion_mask old_logprobs bias teacher_bias",
}
DIFFERENTIABLE = ("hidden", "lm_head", "bias")
PER_TOKEN = (
    "hidden",
    "teacher_hidden",
    "targets",
    "completion_mask",
    "weights",
    "policy_weights",
    "distill_weights",
    "entropy_weights",
    "old_logprobs",
    "ref_logprobs",
)
PER_SEQUENCE = ("gate", "advantages", "sampler_weights")  # the last two also per token
ENGINE = ("impl", "workspace_bytes", "chunk_rows", "logits_dtype", "grad_tol", "return_stats")
# Not 1, so that a backward that ignores what comes from upstream is wrong everywhere.
UPSTREAM = -2.5

Arguments = dict[str, object]


def arguments(loss: str, problem: Problem, options: str = "", **settings: object) -> Arguments:
    """A call: the tensors the loss requires, those of `problem` named in `options`, settings.

    A reference without a coefficient is refused; here it has one of 0.
    """
    names = (*TENSORS[loss], *options.split())
    unread = {"kl_coef": 0.0} if "ref_logprobs" in names else {}
    return {name: getattr(problem, name) for name in names} | unread | settings


def flat(call: Arguments) -> Arguments:
    """The same tokens as (N, ...): every token is its own sequence."""
    length = call["hidden"].shape[1]

    def flatten(name: str, x: object) -> object:
        if x is None or name not in PER_TOKEN + PER_SEQUENCE:
            return x
        if isinstance(x, Tensor) and x.dim() == 1:
            return x.repeat_interleave(length, 0)
        return each_tensor(x, lambda t: t.flatten(0, 1))

    return {name: flatten(name, x) for name, x in call.items()}


def function_of(loss: str) -> Callable[..., Tensor]:
    """The public function."""
    return getattr(kepo_kernels, f"fused_{loss}_loss")


def each_tensor(x: object, change: Callable[[Tensor], Tensor]) -> object:
    """`change` of a tensor, of all the tensors of a head or a teacher, and of nothing else."""
    if isinstance(x, TopK):
        return TopK(*map(change, x))
    if isinstance(x, Head):
        lora = x.lora and LoRA(change(x.lora.a), change(x.lora.b), x.lora.scale)
        return replace(x, weight=change(x.weight), lora=lora)
    return change(x) if isinstance(x, Tensor) else x


def trainable(call: Arguments) -> dict[str, Tensor]:
    """What may have a gradient; "lm_head" is the weight of a `Head`, too."""
    head = Head.of(call["lm_head"])
    named = {"hidden": call["hidden"], "lm_head": head.weight, "bias": call.get("bias")}
    if head.lora is not None:
        named |= {"lora_a": head.lora.a, "lora_b": head.lora.b}
    return {name: x for name, x in named.items() if x is not None}


def evaluate(
    function: Callable[..., Tensor],
    call: Arguments,
    frozen: tuple[str, ...] = (),
    upstream: float = UPSTREAM,
    unused: bool = False,
) -> dict[str, Tensor]:
    """The loss, and the gradient of `upstream * loss` for each tensor that is not frozen.

    `unused`: it need not depend on all of them, as the oracle does not when no token takes part.
    """
    call = {name: each_tensor(x, Tensor.detach) for name, x in call.items()}
    wanted = {name: x for name, x in trainable(call).items() if name not in frozen}
    for x in wanted.values():
        x.requires_grad_()
    loss = function(**call)
    if unused and not loss.requires_grad:
        gradients = [torch.zeros_like(x) for x in wanted.values()]
    else:
        assert loss.requires_grad == bool(wanted)
        gradients = ()
        if wanted:
            inputs = list(wanted.values())
            gradients = torch.autograd.grad(upstream * loss, inputs, materialize_grads=unused)
    return {"loss": loss.detach()} | dict(zip(wanted, gradients, strict=True))


def fused(
    loss: str, call: Arguments, impl: str = "torch", frozen: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """What the package computes."""
    moved = {name: each_tensor(x, lambda t: t.to(device_of(impl))) for name, x in call.items()}
    return evaluate(function_of(loss), moved | {"impl": impl}, frozen)


def plain(
    loss: str,
    call: Arguments,
    dtype: torch.dtype = torch.float64,
    frozen: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The same by whole-matrix autograd: in fp64 the oracle, in 16 bits eager torch."""

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    call = {name: each_tensor(x, cast) for name, x in call.items() if name not in ENGINE}
    return evaluate(getattr(reference, f"{loss}_loss"), call, frozen, unused=True)


def assert_right(
    loss: str,
    call: Arguments,
    impl: str = "torch",
    oracle_call: Arguments | None = None,
    against_eager: bool = False,
    frozen: tuple[str, ...] = (),
) -> None:
    """Loss and gradients against the oracle, which may need other arguments for the same thing."""
    oracle_call = call if oracle_call is None else oracle_call
    actual, oracle = fused(loss, call, impl, frozen), plain(loss, oracle_call, frozen=frozen)
    eager = plain(loss, oracle_call, call["hidden"].dtype) if against_eager else {}
    assert actual.keys() == oracle.keys()
    for name, x in actual.items():
        assert x.dtype == (
            call["hidden"].dtype if name != "loss" else number_dtype(call["hidden"].dtype)
        )
        assert_close_to_oracle(x, oracle[name], eager=eager.get(name), name=name)


def number_dtype(inputs: torch.dtype) -> torch.dtype:
    """The dtype of losses and per-token numbers."""
    return torch.float64 if inputs == torch.float64 else torch.float32


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal element by element, without tolerance; NaN is equal to nothing."""
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert x.shape == expected[name].shape and x.dtype == expected[name].dtype, name
        assert torch.equal(x, expected[name]), f"{name}: not the same bits"


def call_of(loss: str, *, dtype: torch.dtype = torch.float32, **settings: object) -> Arguments:
    """An ordinary call."""
    return arguments(loss, make_problem(length=5, dtype=dtype), OPTIONS[loss], **settings)


def leaves(call: Arguments, wanted: tuple[str, ...] = DIFFERENTIABLE) -> Arguments:
    """A call whose differentiable tensors are fresh leaves."""
    return {
        name: x.detach().clone().requires_grad_(name in wanted) if name in DIFFERENTIABLE else x
        for name, x in call.items()
    }


def logprobs_sum(**call: object) -> Tensor:
    """Log-probabilities and entropies as one differentiable number."""
    logprobs, entropy = kepo_kernels.fused_linear_logprobs(**call, return_entropy=True)
    return (logprobs * torch.arange(5.0) + entropy).sum()


def logprobs_call(**settings: object) -> Arguments:
    """The arguments of the former."""
    problem = make_problem(length=5)
    names = ("hidden", "lm_head", "targets", "completion_mask", "bias")
    return {name: getattr(problem, name) for name in names} | settings
