"""The autograd functions around the chunk loop (`kepo_kernels.compute.sweep`).

A loss forms its gradients during forward, so the logits of a chunk are never needed again, and
backward only scales the gradients (`FusedLoss`). Per-row numbers with an unknown upstream gradient
recompute the logits in backward (`RowNumbers`).
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from kepo_kernels.compute import pages
from kepo_kernels.compute.graph_breaks import breaks_graph
from kepo_kernels.compute.problem import restricted
from kepo_kernels.compute.sparsity import BLOCK_ELEMENTS
from kepo_kernels.compute.sweep import Gradients, LinearProblem, Student, sweep
from kepo_kernels.rows.dispatch import pick_rows


class TokenStats(NamedTuple):
    """The three numbers of each token, fp32 (fp64 for fp64 inputs); 0 for tokens left out."""

    logprobs: Tensor
    divergence: Tensor
    entropy: Tensor
    dropped_gradient: Tensor | None = None
    """A 0-d tensor, in the stats of a loss with grad_tol > 0: the share of sum |dlogits| that was
    left out of the gradients of hidden and lm_head, at most grad_tol."""


TokenLoss = Callable[[TokenStats, Tensor], Tensor]


def fused_loss(
    student: Student, problem: LinearProblem, loss: TokenLoss
) -> tuple[Tensor, TokenStats]:
    """Return the differentiable sum of `loss` over the active rows, and the detached numbers of
    all N."""
    wanted = torch.is_grad_enabled()
    total, numbers, dropped = FusedLoss.apply(*student, problem, loss, wanted)
    logprobs, divergence, entropy = numbers.unbind(0)
    share = dropped if problem.grad_tol > 0.0 else None
    return total, TokenStats(logprobs, divergence, entropy, share)


def row_numbers(student: Student, problem: LinearProblem) -> TokenStats:
    """Return the numbers of all N rows, each differentiable."""
    return TokenStats(*RowNumbers.apply(*student, problem).unbind(0))


def differentiable_once(backward: Callable) -> Callable:
    """Make a backward raise for create_graph=True and for a batch of upstream gradients.

    torch's `once_differentiable` accepts the former if the upstream gradient is a constant, and
    returns constants: a gradient penalty would silently have no effect.
    """

    @wraps(backward)
    def checked(ctx, *upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the losses of kepo_kernels are differentiable once: backward cannot run with "
                "create_graph=True; kepo_kernels.reference has the same losses in plain PyTorch"
            )
        batched = torch._C._functorch.is_legacy_batchedtensor  # of torch.autograd's own vmap
        if torch._C._are_functorch_transforms_active() or any(
            isinstance(x, Tensor) and batched(x) for x in upstream
        ):
            raise RuntimeError(
                "the losses of kepo_kernels take one upstream gradient at a time: backward cannot "
                "run under vmap (is_grads_batched=True, vectorize=True); call torch.autograd.grad "
                "once for each of them"
            )
        return backward(ctx, *upstream)

    return checked


class Formed(NamedTuple):
    """A loss and its gradients, formed together."""

    total: Tensor  # 0-d
    numbers: Tensor  # (3, N)
    dropped: Tensor  # 0-d, the share of gradient left out
    gradients: Gradients  # wide, not yet multiplied by the upstream gradient
    head_rows: Tensor | None  # rows of the head's gradient that may be non-zero; None = any


def loss_and_gradients(
    student: Student, problem: LinearProblem, loss: TokenLoss, needs: tuple[bool, ...]
) -> Formed:
    """Compute the sum of `loss` over the active rows, and the gradients that are needed."""
    total = torch.zeros((), dtype=torch.float64, device=student.hidden.device)

    def coefficients(rows: Tensor, numbers: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = numbers.detach().requires_grad_()
            subtotal = loss(TokenStats(*leaves.unbind(0)), rows).sum(dtype=torch.float64)
            total.add_(subtotal.detach())
            if not subtotal.requires_grad:
                return torch.zeros_like(numbers)
            return torch.autograd.grad(subtotal, leaves)[0]

    gradients = None
    if any(needs):
        gradients = Gradients.empty(student, needs, problem)
    numbers, share, head_rows = sweep(student, problem, coefficients, gradients)
    gradients = gradients or Gradients(*[None] * len(student))
    total = total.to(numbers.dtype)
    # new_tensor would copy the number from the host and wait for the device.
    dropped = total.new_full((), share)
    return Formed(total, numbers, dropped, gradients, head_rows)


def scaled(
    gradient: Tensor | None, factor: Tensor, dtype: torch.dtype, rows: Tensor | None = None
) -> Tensor | None:
    """Return gradient * factor in a new tensor of `dtype`, rounded once, with no intermediate copy.

    `rows` are the rows that may be non-zero; all others are 0.
    """
    if gradient is None:
        return None
    if gradient.is_cuda:  # one launch, which multiplies in the wide dtype and casts
        return _scaled_on_gpu(gradient, factor.to(gradient.dtype), dtype)
    # On a CPU reading the factor does not wait, and a factor of 1 saves a pass over the head.
    plain = type(factor) is Tensor and factor.device.type == "cpu" and factor.item() == 1.0
    step = max(1, BLOCK_ELEMENTS // max(1, gradient[:1].numel()))
    if rows is not None and factor.isfinite():
        out = pages.untouched_zeros(gradient.shape, dtype, gradient.device)
        for part in rows.split(step):
            block = gradient.index_select(0, part)
            out[part] = (block if plain else block * factor.to(gradient.dtype)).to(dtype)
        return out
    out = pages.empty(gradient.shape, dtype, gradient.device)
    for to, block in zip(out.split(step), gradient.split(step), strict=True):
        to.copy_(block if plain else block * factor.to(gradient.dtype))
    return out


def _scaled_on_gpu(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    rows = pick_rows("auto", gradient.device, gradient.dtype)
    if hasattr(rows, "scaled"):
        return rows.scaled(gradient, factor, dtype)
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, factor, out=out)


class FusedLoss(torch.autograd.Function):
    """Autograd function: the student's tensors -> (sum of per-row losses, (3, N) numbers, share of
    gradient dropped).

    Gradients are formed in forward.
    """

    @staticmethod
    def forward(ctx, hidden, lm_head, bias, lora_a, lora_b, problem, loss, wanted):
        student = Student(hidden, lm_head, bias, lora_a, lora_b)
        needs = tuple(wanted and need for need in ctx.needs_input_grad[:5])
        formed = loss_and_gradients(student, problem, loss, needs)
        ctx.save_for_backward(*formed.gradients, formed.head_rows)
        ctx.dtypes = [None if x is None else x.dtype for x in student]
        ctx.mark_non_differentiable(formed.numbers, formed.dropped)
        return formed.total, formed.numbers, formed.dropped

    @staticmethod
    @breaks_graph("the backward of a loss")  # compiled code that calls backward() looks in here
    @differentiable_once
    def backward(ctx, grad_total, _grad_numbers, _grad_dropped):
        # New tensors: saved ones stay unchanged, so backward may run again on a retained graph.
        *gradients, head_rows = ctx.saved_tensors
        results = [
            scaled(x, grad_total, dtype, head_rows if name in ("lm_head", "lora_b") else None)
            for name, x, dtype in zip(Student._fields, gradients, ctx.dtypes, strict=True)
        ]
        return *results, None, None, None


class RowNumbers(torch.autograd.Function):
    """Autograd function: the student's tensors -> (3, N) numbers.

    Backward recomputes the logits: nothing of size N x V is kept. On a CPU it does so for the rows
    alone that have an upstream gradient.
    """

    @staticmethod
    def forward(ctx, hidden, lm_head, bias, lora_a, lora_b, problem):
        student = Student(hidden, lm_head, bias, lora_a, lora_b)
        # The problem's own are saved beside them so that torch refuses those changed in place.
        constants = problem.teacher_hidden, problem.teacher_lm_head, problem.teacher_bias
        listed = problem.top_k or ()
        ctx.save_for_backward(*student, problem.targets, *constants, *listed)
        ctx.problem = problem
        return sweep(student, problem, None, None).numbers

    @staticmethod
    @breaks_graph("the backward of a loss")  # compiled code that calls backward() looks in here
    @differentiable_once
    def backward(ctx, grad_numbers):
        student = Student(*ctx.saved_tensors[: len(Student._fields)])
        problem = restricted(ctx.problem, grad_numbers)
        gradients = Gradients.empty(student, ctx.needs_input_grad[:5], problem)
        sweep(student, problem, lambda rows, _: grad_numbers[:, rows], gradients)
        cast = [
            None if g is None or x is None else g.to(x.dtype)
            for g, x in zip(gradients, student, strict=True)
        ]
        return *cast, None
