"""The open calls: log-probabilities per token, and any per-token loss of the caller's own.

Arguments that are not explained here mean what they mean in `kepo_kernels.losses`, whose built-in
objectives share the helpers at the end of this file.
"""

import torch
from torch import Tensor

from kepo_kernels.engine import (
    LinearProblem,
    TokenLoss,
    TokenStats,
    fused_loss,
    row_numbers,
)
from kepo_kernels.problem import Teacher, active_tokens, build_problem
from kepo_kernels.validate import Validator, describe
from kepo_kernels.weights import loss_weights, per_token

Result = Tensor | tuple[Tensor, TokenStats]


def fused_linear_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    completion_mask: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    return_entropy: bool = False,
    **engine: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """log q(target) of every token, and the entropy of q if asked for; both differentiable.

        q = softmax((hidden @ lm_head^T + bias) / temperature),   entropy = -sum q log q  in nats

    Returns (B, T) or (N,) fp32 (fp64 for fp64 inputs), 0 outside the mask. Backward computes the
    logits again, so nothing of size N x V is ever kept. With `return_stats=True` the detached
    `TokenStats` come last.

    Equals `log_softmax(logits / temperature).gather(-1, targets)`, in any upstream gradient.
    """
    check = Validator("fused_linear_logprobs")
    lead = check_student(check, hidden, lm_head, bias, completion_mask, engine)
    check.softmax(temperature)
    active = active_tokens(lead, token_weights(lead, hidden, completion_mask, None, None, "sum"))
    check.targets(targets, hidden, active, len(lm_head))
    problem = build_problem(
        check, hidden, lm_head, targets, None, active, None, engine, temperature=temperature
    )
    stats = row_numbers(hidden.flatten(0, -2), lm_head, bias, problem)
    stats = TokenStats(*(x.reshape(lead) for x in stats))
    result = (stats.logprobs,) + ((stats.entropy,) if return_entropy else ())
    if engine.get("return_stats"):
        result += (TokenStats(*(x.detach() for x in stats)),)
    return result[0] if len(result) == 1 else result


def fused_linear_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor | None,
    token_loss: TokenLoss,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_lm_head: Tensor | None = None,
    gate: Tensor | None = None,
    completion_mask: Tensor | None = None,
    weights: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reduction: str = "sum",
    **engine: object,
) -> Result:
    """Any per-token loss of your own, at the cost of the built-in ones: the open door.

        loss = sum_t w_t token_loss(stats, rows)_t

    Args:
        targets: None when the loss reads no log-probabilities (`stats.logprobs` is then 0).
        token_loss: called once per chunk with `TokenStats` of vectors (n,) that carry gradient, and
            `rows` (n,), the indices of these tokens in the flattened (B * T,) or (N,) order, to
            pick your own per-token tensors with.
            Returns n losses, in any differentiable PyTorch; chunks must not depend on each other.
        gate: (B,): sequences with 0 have no teacher, `stats.divergence` is 0 there. They stay in
            the loss.
        weights: per token; 0 = the token does not exist. None = `reduction` of the mask.

    Example, cross-entropy:
    `fused_linear_loss(hidden, lm_head, targets, lambda stats, rows: -stats.logprobs,
    reduction="token_mean")`.
    """
    check = Validator("fused_linear_loss")
    lead = check_student(check, hidden, lm_head, bias, completion_mask, engine)
    check_weights(check, hidden, weights=weights, reduction=reduction)
    check.softmax(temperature, beta)
    check.require(
        callable(token_loss), f"token_loss is {type(token_loss).__name__}; expected a callable"
    )
    check.require(
        (teacher_hidden is None) == (teacher_lm_head is None),
        "teacher_hidden and teacher_lm_head must be given together or not at all",
    )
    for name, x in (("gate", gate), ("teacher_bias", teacher_bias)):
        check.require(
            x is None or teacher_hidden is not None,
            f"{name} is given without teacher_hidden and would have no effect; pass the teacher, "
            "or leave it out (`weights` and `completion_mask` take sequences out of the loss)",
        )
    check.gate(gate, lead)
    weights = token_weights(lead, hidden, completion_mask, None, weights, reduction)
    check.finite(weights != 0, weights=weights)
    active = active_tokens(lead, weights)
    teacher = distilled = None
    if teacher_hidden is not None:
        teacher = Teacher(teacher_hidden, teacher_lm_head, teacher_bias, gate)
        teacher.check(check, hidden)
        distilled = active if gate is None else active & per_token(gate != 0, lead)
    if targets is not None:
        check.targets(targets, hidden, active, len(lm_head))
    problem = build_problem(
        check,
        hidden,
        lm_head,
        targets,
        teacher,
        active,
        distilled,
        engine,
        beta=beta,
        temperature=temperature,
    )

    def weighted(stats: TokenStats, rows: Tensor) -> Tensor:
        values = token_loss(stats, rows)
        check.require(
            isinstance(values, Tensor) and values.shape == rows.shape,
            f"token_loss returned {describe(values)} for {len(rows)} rows; expected one loss per "
            f"row, shape [{len(rows)}]",
        )
        return at(weights, rows) * values

    return run(hidden, lm_head, bias, problem, weighted, engine)


def check_student(
    check: Validator,
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    completion_mask: Tensor | None,
    engine: dict[str, object],
) -> torch.Size:
    """Check what every call has; returns the lead dimensions, (B, T) or (N,)."""
    check.engine(engine)
    check.head(("hidden", "lm_head", "bias"), hidden, lm_head, bias)
    lead = hidden.shape[:-1]
    check.mask(completion_mask, lead)
    check.same_device(hidden, lm_head=lm_head, bias=bias, completion_mask=completion_mask)
    return lead


def check_weights(check: Validator, hidden: Tensor, **given: Tensor | str | None) -> None:
    """One pair of arguments that say how much each token counts: `..weights` and `..reduction`."""
    (weights_name, weights), (reduction_name, reduction) = given.items()
    check.reduction(reduction_name, reduction)
    check.lead(hidden.shape[:-1], **{weights_name: weights})
    check.same_device(hidden, **{weights_name: weights})


def token_weights(
    lead: torch.Size,
    hidden: Tensor,
    completion_mask: Tensor | None,
    gate: Tensor | None,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    """One weight per token, fp64: `reduction` of mask and gate, or the caller's own times both."""
    mask = completion_mask
    if mask is None:
        mask = torch.ones(lead, dtype=torch.bool, device=hidden.device)
    gate = None if gate is None else gate.to(mask.device)
    if weights is None:
        return loss_weights(mask, gate, reduction)
    present = loss_weights(mask, gate, "sum")
    return torch.where(present != 0, weights.detach().to(torch.float64) * present, 0)


def at(weights: Tensor, rows: Tensor) -> Tensor:
    """The weights of these rows of the flattened lead dimensions."""
    return weights.reshape(-1)[rows]


def run(
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    problem: LinearProblem,
    token_loss: TokenLoss,
    engine: dict[str, object],
) -> Result:
    """The loss, and the numbers of every token if `return_stats` asks for them."""
    loss, stats = fused_loss(hidden.flatten(0, -2), lm_head, bias, problem, token_loss)
    if not engine.get("return_stats"):
        return loss
    return loss, TokenStats(*(x.reshape(hidden.shape[:-1]) for x in stats))
