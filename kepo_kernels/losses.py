"""The public losses. Each is a few lines of ordinary PyTorch on the three numbers of a token.

Shared arguments, wherever they appear:

    hidden            (B, T, H) or (N, H): the states that predict the targets; fp64, fp32, bf16 or
                      fp16
    lm_head           (V, H) weight; bias (V,) or None
    teacher_hidden    (B, T, H_t) or (N, H_t), or only the sequences whose gate is not 0, in their
                      order
    teacher_lm_head   (V_t, H_t) weight; teacher_bias (V_t,) or None. Vocabularies of different size
                      are read as the min(V, V_t) rows they share, both distributions normalised
                      over those. No teacher tensor ever receives a gradient, whatever its
                      requires_grad says.
    targets           (B, T) or (N,) int64 or int32 token ids, aligned: hidden[t] predicts
                      targets[t]
    completion_mask   (B, T) or (N,), 1 on the tokens of the loss; None = all. What stands elsewhere
                      is never read.
    temperature       > 0, divides both models' logits
    reduction         "token_mean", "sequence_mean" or "sum", see `loss_weights`; or pass `weights`
                      of shape (B, T) or (N,), which replace reduction and normaliser: the loss is
                      sum(weights * mask * term)
    **engine          impl="auto"|"triton"|"cpu"|"torch"; workspace_bytes (None = 128 MiB on CPU,
                      2.5 GiB on GPU) for the logits of one chunk, or chunk_rows directly;
                      logits_dtype (None = fp32, but bf16 for bf16 inputs on CPUs with bf16
                      instructions); return_stats=True returns (loss, TokenStats)

Every loss is a 0-d fp32 tensor (fp64 for fp64 inputs), exactly 0 with zero gradients when no token
takes part, and differentiable once with respect to hidden, lm_head and bias. All raise
`KepoInputError` (a ValueError) on bad input.
"""

from torch import Tensor

from kepo_kernels.engine import TokenStats
from kepo_kernels.linear import Result, at, check_student, check_weights, run, token_weights
from kepo_kernels.policy import PolicySettings, policy_token_loss
from kepo_kernels.problem import Teacher, active_tokens, build_problem
from kepo_kernels.validate import Validator


def fused_gated_kd_loss(
    hidden: Tensor,
    lm_head: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    *,
    gate: Tensor | None = None,
    completion_mask: Tensor | None = None,
    weights: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reduction: str = "token_mean",
    **engine: object,
) -> Result:
    """Divergence of the student from a frozen teacher, over the sequences whose gate is open.

        loss = sum_t w_t D_beta(p_t, q_t),  p, q = softmax(teacher, student logits / temperature)
        D_0 = KL(p|q),  D_1 = KL(q|p),  between
        D_beta = beta KL(p|m) + (1 - beta) KL(q|m),  m = (1 - beta) q + beta p

    (generalised JSD of GKD, Agarwal et al. 2024, eq. 1; gated as in KEPO, arXiv 2602.00400.)

    Args:
        gate: (B,) bool or float >= 0 that multiplies the divergence; 0 closes a sequence, which is
            then not computed at all: neither its student nor its teacher logits exist. None = all
            open.
        beta: 0 = KL(teacher|student), 1 = KL(student|teacher), between = JSD (about five times
            smaller than a KL).

    Equals, holding whole matrices: `reference.gated_kd_loss`, i.e. for one open token at beta = 0
    `F.kl_div(log_softmax(student), log_softmax(teacher), log_target=True, reduction="sum")`.
    """
    check = Validator("fused_gated_kd_loss")
    lead = check_student(check, hidden, lm_head, bias, completion_mask, engine)
    check_weights(check, hidden, weights=weights, reduction=reduction)
    check.softmax(temperature, beta)
    teacher = Teacher(teacher_hidden, teacher_lm_head, teacher_bias, gate)
    teacher.check(check, hidden)
    weights = token_weights(lead, hidden, completion_mask, gate, weights, reduction)
    check.finite(weights != 0, weights=weights)
    active = active_tokens(lead, weights)
    problem = build_problem(
        check,
        hidden,
        lm_head,
        None,
        teacher,
        active,
        active,
        engine,
        beta=beta,
        temperature=temperature,
    )
    return run(
        hidden,
        lm_head,
        bias,
        problem,
        lambda stats, rows: at(weights, rows) * stats.divergence,
        engine,
    )


def fused_grpo_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    weights: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    policy_loss: str = "clip",
    importance_level: str = "token",
    temperature: float = 1.0,
    bias: Tensor | None = None,
    reduction: str = "sequence_mean",
    **engine: object,
) -> Result:
    """The GRPO objective on sampled tokens.

        loss = sum_t w_t [ -min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t)
                           + kl_coef (e^d_t - d_t - 1) - entropy_coef H(q_t) ]
        r_t  = exp(log q(target_t) - old_logprobs_t),   d_t = ref_logprobs_t - log q(target_t)

    (Shao et al. 2024, eq. 3, with the k3 estimator; unequal bounds are DAPO's clip-higher, Yu et
    al. 2025.)

    Args:
        advantages: (B,) or one per token.
        old_logprobs: per token, of the policy that sampled, at this temperature. None = that policy
            is this one: the ratio is 1 in value and its gradient is kept (REINFORCE).
        ref_logprobs: per token, of the frozen reference; needed when kl_coef is not 0.
        kl_coef, entropy_coef: 0 = term absent. The entropy bonus lowers the loss.

    Equals, holding whole matrices: `reference.grpo_loss`.
    """
    check = Validator("fused_grpo_loss")
    lead = check_student(check, hidden, lm_head, bias, completion_mask, engine)
    check_weights(check, hidden, weights=weights, reduction=reduction)
    check.softmax(temperature)
    weights = token_weights(lead, hidden, completion_mask, None, weights, reduction)
    check.finite(weights != 0, weights=weights)
    active = active_tokens(lead, weights)
    settings = PolicySettings(
        epsilon_low, epsilon_high, kl_coef, entropy_coef, policy_loss, importance_level
    )
    term = policy_token_loss(
        check, settings, lead, active, hidden, advantages, old_logprobs, ref_logprobs
    )
    check.targets(targets, hidden, active, len(lm_head))
    problem = build_problem(
        check, hidden, lm_head, targets, None, active, None, engine, temperature=temperature
    )
    return run(
        hidden,
        lm_head,
        bias,
        problem,
        lambda stats, rows: at(weights, rows) * term(stats, rows),
        engine,
    )


def fused_kepo_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    advantages: Tensor,
    teacher_hidden: Tensor,
    teacher_lm_head: Tensor,
    *,
    gate: Tensor,
    completion_mask: Tensor | None = None,
    policy_weights: Tensor | None = None,
    distill_weights: Tensor | None = None,
    distill_coef: float = 1.0,
    beta: float = 0.5,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    policy_loss: str = "clip",
    importance_level: str = "token",
    temperature: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    policy_reduction: str = "sequence_mean",
    distill_reduction: str = "token_mean",
    **engine: object,
) -> Result:
    """GRPO on every completion and gated distillation on the good ones in one pass over the logits.

        loss = fused_grpo_loss(...) + distill_coef * fused_gated_kd_loss(...)

    (KEPO, arXiv 2602.00400, Eq. 7.) A token pays for the policy term and the divergence once: one
    student GEMM, one row kernel, one gradient. Tokens of closed sequences never meet the teacher's
    head.

    Args:
        gate: (B,) as in `fused_gated_kd_loss`; typically accuracy >= threshold.
        policy_weights, distill_weights: per token, in place of policy_reduction / distill_reduction
            (a micro-batch passes its slice of the whole batch's `loss_weights`); mask, and for the
            latter the gate, still multiply.
        distill_coef: 0 = no distillation, and no teacher GEMM.
        The rest as in the two losses.

    Equals, holding whole matrices: `reference.kepo_loss`.
    """
    check = Validator("fused_kepo_loss")
    lead = check_student(check, hidden, lm_head, bias, completion_mask, engine)
    check_weights(check, hidden, policy_weights=policy_weights, policy_reduction=policy_reduction)
    check_weights(
        check, hidden, distill_weights=distill_weights, distill_reduction=distill_reduction
    )
    check.softmax(temperature, beta)
    check.number("distill_coef", distill_coef, lambda x: x >= 0, "a finite number >= 0")
    teacher = Teacher(teacher_hidden, teacher_lm_head, teacher_bias, gate)
    teacher.check(check, hidden)
    policy_weights = token_weights(
        lead, hidden, completion_mask, None, policy_weights, policy_reduction
    )
    distill_weights = distill_coef * token_weights(
        lead, hidden, completion_mask, gate, distill_weights, distill_reduction
    )
    check.finite(policy_weights != 0, policy_weights=policy_weights)
    check.finite(distill_weights != 0, distill_weights=distill_weights)
    rewarded = active_tokens(lead, policy_weights)
    distilled = active_tokens(lead, distill_weights)
    settings = PolicySettings(
        epsilon_low, epsilon_high, kl_coef, entropy_coef, policy_loss, importance_level
    )
    term = policy_token_loss(
        check, settings, lead, rewarded, hidden, advantages, old_logprobs, ref_logprobs
    )
    check.targets(targets, hidden, rewarded | distilled, len(lm_head))
    problem = build_problem(
        check,
        hidden,
        lm_head,
        targets,
        teacher,
        rewarded | distilled,
        distilled,
        engine,
        beta=beta,
        temperature=temperature,
    )

    def token_loss(stats: TokenStats, rows: Tensor) -> Tensor:
        policy, distill = at(policy_weights, rows), at(distill_weights, rows)
        return policy * term(stats, rows) + distill * stats.divergence

    return run(hidden, lm_head, bias, problem, token_loss, engine)
