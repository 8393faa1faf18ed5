"""The general calls: numbers per token, and any per-token loss of the caller's own.

Arguments that are not explained here mean what they mean in `kepo_kernels.losses`.
"""

from torch import Tensor

from kepo_kernels.compute.autograd import TokenLoss, TokenStats, row_numbers
from kepo_kernels.compute.call import Call, Result, at, begin
from kepo_kernels.compute.devices import moved
from kepo_kernels.compute.graph_breaks import breaks_graph
from kepo_kernels.heads import Head
from kepo_kernels.rows.top_k_rows import TopK
from kepo_kernels.teachers import teacher_given, teacher_required
from kepo_kernels.validate import describe
from kepo_kernels.weights import per_token


@breaks_graph("fused_linear_logprobs")
def fused_linear_logprobs(
    hidden: Tensor,
    lm_head: Tensor | Head,
    targets: Tensor,
    *,
    completion_mask: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    return_entropy: bool = False,
    **engine: object,
) -> Tensor | tuple[Tensor | TokenStats, ...]:
    """Compute log q(target) of every token and, if asked for, the entropy of q; both are
    differentiable.

        q = softmax((hidden @ lm_head^T + bias) / temperature),   entropy = -sum q log q  in nats

    Returns (B, T) or (N,) fp32 (fp64 for fp64 inputs), 0 outside the mask. Backward recomputes the
    logits, so nothing of size N x V is ever kept. With `return_stats=True` the detached
    `TokenStats` are returned last.

    Equals `log_softmax(logits / temperature).gather(-1, targets)`, in any upstream gradient.
    """
    call = begin("fused_linear_logprobs", hidden, lm_head, bias, completion_mask, engine)
    call.check.softmax(temperature)
    _, active = call.weights(None, weights=None, reduction="sum")
    call.check.targets(targets, call.hidden, active, len(call.head.weight))
    student, problem = call.problem(targets, active, temperature=temperature)
    return _returned(call, row_numbers(student, problem), "logprobs", return_entropy)


@breaks_graph("fused_linear_divergence")
def fused_linear_divergence(
    hidden: Tensor,
    lm_head: Tensor | Head,
    teacher_hidden: Tensor | TopK,
    teacher_lm_head: Tensor | Head | None = None,
    *,
    completion_mask: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    return_entropy: bool = False,
    **engine: object,
) -> Tensor | tuple[Tensor | TokenStats, ...]:
    """Compute the divergence of every token and, if asked for, the entropy of the student; both are
    differentiable.

        D_beta(p, q) of `fused_gated_kd_loss`,   entropy = -sum q log q  in nats

    Returns (B, T) or (N,) fp32 (fp64 for fp64 inputs), 0 outside the mask. Backward recomputes both
    models' logits, so nothing of size N x V is ever kept; on a CPU only for tokens with an upstream
    gradient. A loss whose factors are known beforehand is cheaper by `fused_gated_kd_loss`, which
    takes them as weights and computes the logits once. With `return_stats=True` the detached
    `TokenStats` are returned last.

    Args:
        teacher_hidden: as in the losses; or of the sequences alone that have a token in
            completion_mask.

    Equals, holding whole matrices: `reference.linear_divergence`, in any upstream gradient.
    """
    call = begin("fused_linear_divergence", hidden, lm_head, bias, completion_mask, engine)
    of_teacher = call.check.softmax(temperature, beta, teacher_temperature)
    teacher_required(call.check, teacher_hidden, teacher_lm_head)
    _, active = call.weights(None, weights=None, reduction="sum")
    opened = None
    if completion_mask is not None:
        opened = active.any(-1) if active.dim() == 2 else active
    states = teacher_hidden, teacher_lm_head, teacher_bias
    teacher = call.teacher(*states, opened, of_teacher, teacher_temperature)
    student, problem = call.problem(
        None, active, teacher=teacher, distilled=active, beta=beta, temperature=temperature
    )
    stats = row_numbers(student, problem)
    return _returned(call, stats, "divergence", return_entropy)


def _returned(
    call: Call, stats: TokenStats, name: str, return_entropy: bool
) -> Tensor | tuple[Tensor | TokenStats, ...]:
    """Return the named number of every token, then what else the caller asked for."""
    stats = TokenStats(*(x.reshape(call.lead) for x in stats[:3]))
    number: Tensor = getattr(stats, name)
    result: list[Tensor | TokenStats] = [number]
    if return_entropy:
        result.append(stats.entropy)
    if call.engine.get("return_stats"):
        result.append(TokenStats(*(x.detach() for x in stats[:3])))
    return number if len(result) == 1 else tuple(result)


@breaks_graph("fused_linear_loss with a Python token_loss")
def fused_linear_loss(
    hidden: Tensor,
    lm_head: Tensor | Head,
    targets: Tensor | None,
    token_loss: TokenLoss,
    *,
    teacher_hidden: Tensor | TopK | None = None,
    teacher_lm_head: Tensor | Head | None = None,
    gate: Tensor | None = None,
    completion_mask: Tensor | None = None,
    weights: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reduction: str = "sum",
    **engine: object,
) -> Result:
    """Compute any per-token loss of your own, at the cost of the built-in ones.

        loss = sum_t w_t token_loss(stats, rows)_t

    Args:
        targets: None when the loss reads no log-probabilities (`stats.logprobs` is then 0).
        token_loss: called once per chunk with `TokenStats` of vectors (n,) that carry gradient, and
            `rows` (n,), the indices of these tokens in the flattened (B * T,) or (N,) order, to
            pick your own per-token tensors with.
            Returns n losses, in any differentiable PyTorch; chunks must not depend on each other.
        gate: (B,); sequences with gate 0 have no teacher: their `stats.divergence` is 0, but they
            stay in the loss.
        weights: one per token; tokens of weight 0 are not computed. None means the weights of
            `reduction` over the mask.

    Example, cross-entropy:
    `fused_linear_loss(hidden, lm_head, targets, lambda stats, rows: -stats.logprobs,
    reduction="token_mean")`.
    """
    deciding = gate, weights
    call = begin("fused_linear_loss", hidden, lm_head, bias, completion_mask, engine, *deciding)
    check, lead = call.check, call.lead
    of_teacher = check.softmax(temperature, beta, teacher_temperature)
    check.require(
        callable(token_loss), f"token_loss is {type(token_loss).__name__}; expected a callable"
    )
    if not teacher_given(check, teacher_hidden, teacher_lm_head):
        check.unused("teacher_hidden and teacher_lm_head", gate=gate, teacher_bias=teacher_bias)
    check.gate(gate, lead)
    weights, active = call.weights(None, weights=weights, reduction=reduction)
    teacher = distilled = None
    if teacher_hidden is not None:
        states = teacher_hidden, teacher_lm_head, teacher_bias
        teacher = call.teacher(*states, gate, of_teacher, teacher_temperature)
        distilled = active
        if gate is not None:
            distilled = active & per_token(moved(gate, active.device) != 0, lead)
    if targets is not None:
        check.targets(targets, call.hidden, active, len(call.head.weight))
    student, problem = call.problem(
        targets, active, teacher=teacher, distilled=distilled, beta=beta, temperature=temperature
    )

    def weighted(stats: TokenStats, rows: Tensor) -> Tensor:
        values = token_loss(stats, rows)
        check.require(
            isinstance(values, Tensor) and values.shape == rows.shape,
            f"token_loss returned {describe(values)} for {len(rows)} rows; expected one loss per "
            f"row, shape [{len(rows)}]",
        )
        return at(weights, rows) * values

    return call.run(student, problem, weighted)
