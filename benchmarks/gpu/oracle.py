"""The problems of checks.py, every loss on them and on the oracle, and the tolerance rule.

The oracle is `kepo_kernels.reference` in fp64. fp32 is held to the bound of the tests. In 16 bits
each gradient is held to what is left when dlogits are rounded once on their way into its product,
as they are on a GPU, and the product is rounded once: nothing else may add an error of that size.
Rounding to fp16 is that of a number within its range: one that vanishes below it is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import frexp

import torch
from torch import Tensor

import kepo_kernels
from kepo_kernels import Head, reference
from kepo_kernels.compute import gemm

RELATIVE_ERROR = 5e-6  # fp32, relative L2
OF_ROUNDING = 1.1  # 16 bits: of the error that rounding dlogits and results alone makes
GRID = 1 / 8


@dataclass(frozen=True)
class Problem:
    """B sequences of T tokens; hidden, lm_head and bias require gradient."""

    hidden: Tensor
    lm_head: Tensor
    bias: Tensor | None
    targets: Tensor
    advantages: Tensor
    teacher_hidden: Tensor
    teacher_lm_head: Tensor
    gate: Tensor
    mask: Tensor
    old_logprobs: Tensor
    softcap: float | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.lm_head, self.bias) if x is not None]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype; leaves anew."""
        names = ("hidden", "lm_head", "bias", "teacher_hidden", "teacher_lm_head")
        cast = {n: getattr(self, n) for n in names}
        cast = {n: x if x is None else x.detach().to(dtype) for n, x in cast.items()}
        for name in names[:3]:
            if cast[name] is not None:
                cast[name].requires_grad_()
        return replace(self, **cast)


def make(
    device: torch.device,
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    std: float = 2.0,
    bias: bool = False,
    softcap: float | None = None,
    exact: bool = False,
) -> Problem:
    """Sizes B, T, H, Ht, V. Logits of standard deviation `std`; 12 makes them peaked.

    `exact`: states and heads are multiples of GRID, so that fp32 holds each logit exactly. Without
    that, logits of 12 in fp32 miss the fp64 gradient by 6.4e-6 in the product already, whatever the
    row kernels do (with it they are 7e-7 off).
    """
    batch, tokens, width, teacher_width, vocab = sizes
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden, lm_head = normal(batch, tokens, width), normal(vocab, width) * std * width**-0.5
    # The teacher's logits are the student's and noise: of two unrelated peaked rows the gradient
    # is a difference of nearly equal numbers, and says nothing about the code.
    more = max(1, teacher_width - width)
    teacher_hidden = torch.cat((hidden, normal(batch, tokens, more)), -1)
    teacher_lm_head = torch.cat((lm_head, normal(vocab, more) * more**-0.5), -1)
    if exact:
        tensors = (hidden, lm_head, teacher_hidden, teacher_lm_head)
        hidden, lm_head, teacher_hidden, teacher_lm_head = (
            (x / GRID).round() * GRID for x in tensors
        )
    problem = Problem(
        hidden=hidden,
        lm_head=lm_head,
        bias=normal(vocab) if bias else None,
        targets=torch.randint(vocab, (batch, tokens), generator=generator, device=device),
        advantages=normal(batch),
        teacher_hidden=teacher_hidden[..., :teacher_width],
        teacher_lm_head=teacher_lm_head[:, :teacher_width].contiguous(),
        gate=torch.arange(batch, device=device) % 2 == 0,
        mask=torch.ones(batch, tokens, dtype=torch.bool, device=device),
        old_logprobs=torch.zeros(batch, tokens, device=device),
        softcap=softcap,
    ).to(dtype)
    problem.mask[-1, tokens // 2 :] = False
    with torch.no_grad():
        # Some ratios are clipped, most are not; none is so near a bound that rounding decides.
        logits = project(problem.to(torch.float32)).flatten(0, 1)
        found = reference.token_logprob(logits, problem.targets.flatten()).view(batch, tokens)
        ratio = torch.tensor([-0.5, 0.1, 0.0, 0.5], device=device)
        place = torch.arange(batch * tokens, device=device) % 4
    return replace(problem, old_logprobs=found + ratio[place].view(batch, tokens))


def head(p: Problem) -> Tensor | Head:
    return p.lm_head if p.softcap is None else Head(p.lm_head, softcap=p.softcap)


def project(p: Problem) -> Tensor:
    return reference.project(p.hidden, head(p), p.bias)


def kd(p: Problem, fused: bool, beta: float = 0.5, **engine: object) -> Tensor:
    loss = kepo_kernels.fused_gated_kd_loss if fused else reference.gated_kd_loss
    side = (p.hidden, head(p), p.teacher_hidden, p.teacher_lm_head)
    return loss(*side, gate=p.gate, completion_mask=p.mask, beta=beta, bias=p.bias, **engine)


def top_k(p: Problem, fused: bool, beta: float, **engine: object) -> Tensor:
    """A teacher of its eight likeliest tokens: with less of its mass the divergence of peaked rows
    would be a difference of numbers that are nearly equal."""
    loss = kepo_kernels.fused_gated_kd_loss if fused else reference.gated_kd_loss
    logits = p.teacher_hidden.float() @ p.teacher_lm_head.float().T
    likeliest = logits.log_softmax(-1).topk(8)
    teacher = kepo_kernels.TopK(likeliest.indices, likeliest.values)
    options = {"gate": p.gate, "completion_mask": p.mask, "beta": beta, "bias": p.bias}
    return loss(p.hidden, head(p), teacher, **options, **engine)


def grpo(p: Problem, fused: bool, **engine: object) -> Tensor:
    loss = kepo_kernels.fused_grpo_loss if fused else reference.grpo_loss
    side = (p.hidden, head(p), p.targets, p.advantages)
    also = {"completion_mask": p.mask, "old_logprobs": p.old_logprobs, "bias": p.bias}
    return loss(*side, **also, **engine)


def kepo(p: Problem, fused: bool, **engine: object) -> Tensor:
    loss = kepo_kernels.fused_kepo_loss if fused else reference.kepo_loss
    side = (p.hidden, head(p), p.targets, p.advantages, p.teacher_hidden, p.teacher_lm_head)
    also = {"completion_mask": p.mask, "old_logprobs": p.old_logprobs, "bias": p.bias}
    return loss(*side, gate=p.gate, **also, **engine)


def logprobs(p: Problem, fused: bool, **engine: object) -> Tensor:
    if fused:
        side = (p.hidden, head(p), p.targets)
        found = kepo_kernels.fused_linear_logprobs(
            *side, bias=p.bias, completion_mask=p.mask, **engine
        )
    else:
        logits = project(p).flatten(0, 1)
        found = reference.token_logprob(logits, p.targets.flatten()).view(p.mask.shape)
        found = found * p.mask
    return (found * p.advantages[:, None].to(found.dtype)).sum()


def cross_entropy(p: Problem, fused: bool, **engine: object) -> Tensor:
    if not fused:
        logits = project(p)[p.mask]
        return -reference.token_logprob(logits, p.targets[p.mask]).mean()
    return kepo_kernels.fused_linear_loss(
        p.hidden,
        head(p),
        p.targets,
        lambda stats, rows: -stats.logprobs,
        completion_mask=p.mask,
        bias=p.bias,
        reduction="token_mean",
        **engine,
    )


LOSSES = {
    "kd": kd,
    "kd beta 0": lambda p, fused, **e: kd(p, fused, 0.0, **e),
    "kd beta 1": lambda p, fused, **e: kd(p, fused, 1.0, **e),
    "top k beta 0": lambda p, fused, **e: top_k(p, fused, 0.0, **e),
    "top k beta 1": lambda p, fused, **e: top_k(p, fused, 1.0, **e),
    "grpo": grpo,
    "kepo": kepo,
    "logprobs": logprobs,
    "linear_loss": cross_entropy,
}


def oracle_of(loss: Callable[..., Tensor], p: Problem) -> tuple[tuple[Tensor, ...], ...]:
    """(loss, gradients) in fp64, and the same with dlogits rounded as on this device."""
    wide = p.to(torch.float64)
    x, w = wide.hidden.detach().flatten(0, 1), wide.lm_head.detach()
    bias = None if wide.bias is None else wide.bias.detach()
    logits = reference.project(x, w, bias).view(*p.mask.shape, -1).requires_grad_()
    with logits_for_states(wide.lm_head):
        value = loss(replace(wide, hidden=logits, bias=None), False)
    dlogits = torch.autograd.grad(value, logits)[0].flatten(0, 1)

    def gradients(g: Tensor) -> tuple[Tensor, ...]:
        products = (g @ w).view_as(wide.hidden), g.T @ x
        return products if bias is None else (*products, g.sum(0))

    value, rounded = value.detach(), round_dlogits(dlogits, p.hidden)
    return (value, *gradients(dlogits)), (value, *gradients(rounded))


def round_dlogits(dlogits: Tensor, hidden: Tensor) -> Tensor:
    """To the dtype in which they meet operands like `hidden`, beside fp32 logits, in any range."""
    dtype = gemm.dlogits_dtype(hidden.dtype, torch.float32, hidden.device)
    mantissa, exponent = torch.frexp(dlogits)
    return torch.ldexp(mantissa.to(dtype).to(dlogits.dtype), exponent)


@contextmanager
def logits_for_states(lm_head: Tensor) -> Iterator[None]:
    """The oracle takes products with this head for states; a softcap is still its own."""
    project = reference.project

    def given(states: Tensor, head: Tensor | Head, bias: Tensor | None = None) -> Tensor:
        head = Head.of(head)
        if head.weight is not lm_head:
            return project(states, head, bias)
        return states if head.softcap is None else head.softcap * (states / head.softcap).tanh()

    reference.project = given
    try:
        yield
    finally:
        reference.project = project


def evaluate(
    loss: Callable[..., Tensor], p: Problem, fused: bool, upstream: float = 1.0, **engine: object
) -> tuple[Tensor, ...]:
    """(loss, upstream x gradients of the leaves), from memory that held NaN."""
    if fused:
        poison(p.hidden.device)
    value = loss(p, fused, **engine)
    factor = None if upstream == 1.0 else torch.full_like(value, upstream)
    return value.detach(), *torch.autograd.grad(value, p.leaves, factor)


def upstream_of(gradients: Iterable[Tensor], dtype: torch.dtype) -> float:
    """What a user of fp16 scales the loss with, so that gradients are within its range; else 1.

    A power of two that puts the largest element between 512 and 1024.
    """
    if dtype != torch.float16:
        return 1.0
    largest = max(float(g.abs().max()) for g in gradients)
    return 2.0 ** (10 - frexp(largest)[1])


def poison(device: torch.device) -> None:
    """What the allocator hands out next held NaN: a kernel that forgets to write shows."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        blocks = [min(free // 4, 4 << 30), *[64 << 20] * 8, *[1 << 20] * 64]
        held = [torch.full((size // 4,), torch.nan, device=device) for size in blocks]
        del held


def require(holds: object, why: str) -> None:
    if not holds:
        raise AssertionError(why)


def judge(name: str, actual: Tensor, oracle: Tensor, rounded: Tensor | None = None) -> float:
    """Raises unless the error is within the bound; returns error / bound.

    `rounded`: the oracle with rounded dlogits; None = no gradient.
    """
    dtype, actual, oracle = actual.dtype, actual.double(), oracle.double()
    error, size = (actual - oracle).norm(), oracle.norm()
    require(size >= 1e-6, f"{name}: the oracle is nearly 0 ({size:.1e})")
    if dtype == torch.float32:
        bound = RELATIVE_ERROR * size
    else:
        rounded = (oracle if rounded is None else rounded).to(dtype)
        bound = OF_ROUNDING * (rounded.double() - oracle).norm()
    require(error <= bound, f"{name}: {dtype} error {error:.2e} exceeds {bound:.2e}")  # or NaN
    return float(error / bound)


def make_large(device: torch.device, sizes: tuple[int, ...]) -> Problem:
    """As `make`, without the whole matrices of its old_logprobs."""
    batch, tokens, *rest = sizes
    few = make(device, (batch, 2, *rest), torch.bfloat16)
    generator = torch.Generator(device).manual_seed(1)

    def normal(width: int) -> Tensor:
        shape = (batch, tokens, width)
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    shape = (batch, tokens)
    return replace(
        few,
        hidden=normal(rest[0]).requires_grad_(),
        teacher_hidden=normal(rest[1]),
        targets=torch.randint(rest[2], shape, generator=generator, device=device),
        mask=torch.ones(shape, dtype=torch.bool, device=device),
        old_logprobs=torch.zeros(shape, device=device),
    )


def medium(device: torch.device) -> Problem:
    cuda = device.type == "cuda"
    return make(device, (8, 64, 256, 384, 8191) if cuda else (4, 8, 16, 24, 203), torch.bfloat16)
