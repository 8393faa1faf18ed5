"""The public losses: three names for one body, a few lines of PyTorch on three numbers per token.

    loss = sum_t [ policy weight_t * policy term_t + distillation weight_t * divergence_t ]

`fused_grpo_loss` computes the first part, `fused_gated_kd_loss` the second, and `fused_kepo_loss`
either or both.

Shared arguments, wherever they appear:

    hidden            (B, T, H) or (N, H): the states that predict the targets; fp64, fp32, bf16 or
                      fp16. Where states, heads, LoRA and biases differ in dtype (fp64 may not) all
                      products and logits are fp32; each gradient is of its own tensor's dtype
    lm_head           (V, H) weight, or a `Head`: weight, softcap, logit_scale, LoRA; bias (V,) or
                      None
    teacher_hidden    (B, T, H_t) or (N, H_t), or only the open sequences, in their order: those
                      whose gate is not 0; with weights of the divergence and no gate, those with a
                      weight that is not 0 on a token of completion_mask. With CUDA states they may
                      have been stored on the CPU: each chunk's rows are copied when it is their
                      turn. Or a `TopK`, the teacher's most likely tokens: teacher_lm_head,
                      teacher_bias and teacher_temperature are then None
    teacher_lm_head   (V_t, H_t) weight, or a `Head`; teacher_bias (V_t,) or None. Vocabularies of
                      different size (151,936 against a padded 152,064) are read as the min(V, V_t)
                      rows they share, both distributions normalised over those. No teacher tensor
                      ever receives a gradient, whatever its requires_grad says.
    targets           (B, T) or (N,) int64 or int32 token ids, aligned: hidden[t] predicts
                      targets[t]
    completion_mask   (B, T) or (N,), 1 on the tokens of the loss; None = all. Values elsewhere are
                      never read. With CUDA states, mask, gate and weights may be on the CPU. If
                      each of them is there or None, the host never waits for the GPU and does not
                      read advantages, so advantages of 0 save no work; if one of them is on the
                      GPU, they do.
    temperature       > 0, divides the student's logits, and the teacher's unless
                      teacher_temperature says otherwise (None = the same)
    reduction         "token_mean", "sequence_mean" or "sum", see `loss_weights`; or pass `weights`
                      of shape (B, T) or (N,), which replace reduction and normaliser: the loss is
                      sum(weights * mask * term). `grpo_weights`, `dapo_weights`, `bnpo_weights`,
                      `dr_grpo_weights` and `sod_weights` make the usual ones
    **engine          impl="auto"|"triton"|"cpu"|"torch"; workspace_bytes, the most that may be held
                      above inputs and gradients (None = 32 to 512 MiB on CPU, 3.25 GiB on GPU,
                      of whose memory an eighth at most; `compute.chunks.chunking` explains it), or
                      chunk_rows directly; logits_dtype
                      (None = fp32, but bf16 for bf16 inputs on CPUs with bf16 instructions);
                      grad_tol=0.0, the share of sum |dlogits| of a chunk that may be left out of
                      the gradients with the columns that carry it (0 = exact; on a CPU only, and
                      worthwhile for the peaked distributions of a trained model);
                      return_stats=True returns (loss, TokenStats)

Every loss is a 0-d fp32 tensor (fp64 for fp64 inputs), exactly 0 with zero gradients when no token
takes part, and differentiable once with respect to hidden, lm_head, its LoRA and bias. Tokens of
weight 0 (mask, gate, weights) cost nothing at all. Neither do tokens of advantage 0 without penalty
or bonus, unless return_stats asks for their numbers or a CUDA call has mask, gate and weights on
the CPU (above). A token that turns out to have no gradient, e.g. a clipped one, costs no gradient
product on a CPU; on CUDA it does, because checking would make the host wait. Under autocast hidden
states, weights and biases are cast as a linear layer would cast them, and nothing else. All raise
`KepoInputError` (a ValueError) on bad input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kepo_kernels.compute.autograd import TokenLoss, TokenStats
from kepo_kernels.compute.call import Call, Result, at, begin
from kepo_kernels.compute.compiled import one_operator
from kepo_kernels.heads import Head
from kepo_kernels.objectives.policy import PolicyPart, PolicySettings, policy_term
from kepo_kernels.objectives.sequences import with_whole_sequences
from kepo_kernels.rows.top_k_rows import TopK
from kepo_kernels.teachers import Teacher, teacher_given, teacher_required
from kepo_kernels.validate import Validator


@one_operator
def fused_gated_kd_loss(
    hidden: Tensor,
    lm_head: Tensor | Head,
    teacher_hidden: Tensor | TopK,
    teacher_lm_head: Tensor | Head | None = None,
    *,
    gate: Tensor | None = None,
    completion_mask: Tensor | None = None,
    weights: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    reduction: str = "token_mean",
    **engine: object,
) -> Result:
    """Compute the divergence of the student from a frozen teacher, over sequences whose gate is
    open.

        loss = sum_t w_t D_beta(p_t, q_t),  p, q = softmax(teacher, student logits / temperature)
        D_0 = KL(p|q),  D_1 = KL(q|p),  between
        D_beta = beta KL(p|m) + (1 - beta) KL(q|m),  m = (1 - beta) q + beta p

    (generalised JSD of GKD, Agarwal et al. 2024, eq. 1; gated as in KEPO, arXiv 2602.00400.)

    Args:
        gate: (B,) bool or float >= 0 that multiplies the divergence; 0 closes a sequence, which is
            then not computed at all: neither its student nor its teacher logits are formed. None
            means that all are open, except those that `weights` close.
        beta: 0 = KL(teacher|student), 1 = KL(student|teacher), between = JSD (about five times
            smaller than a KL).

    Equals, holding whole matrices: `reference.gated_kd_loss`, i.e. for one open token at beta = 0
    `F.kl_div(log_softmax(student), log_softmax(teacher), log_target=True, reduction="sum")`.
    """
    deciding = gate, weights
    call = begin("fused_gated_kd_loss", hidden, lm_head, bias, completion_mask, engine, *deciding)
    teacher_required(call.check, teacher_hidden, teacher_lm_head)
    distillation = DistillationPart(
        teacher_hidden,
        teacher_lm_head,
        teacher_bias,
        gate,
        weights,
        reduction,
    )
    return _loss(
        call,
        None,
        distillation,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
    )


@one_operator
def fused_grpo_loss(
    hidden: Tensor,
    lm_head: Tensor | Head,
    targets: Tensor,
    advantages: Tensor,
    *,
    completion_mask: Tensor | None = None,
    weights: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_weights: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    kl_coef: float | None = None,
    kl_estimator: str = "k3",
    kl_bias_correction: bool = False,
    entropy_coef: float | None = None,
    entropy_weights: Tensor | None = None,
    policy_loss: str | Callable[[Tensor, Tensor, Tensor], Tensor] = "clip",
    importance_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    reduction: str = "sequence_mean",
    **engine: object,
) -> Result:
    """Compute the GRPO objective, or one of its relatives, on sampled tokens.

        loss = sum_t w_t [ s_t L(r_t, A_t) + kl_coef K(d_t) ] - entropy_coef sum_t h_t H(q_t)
        r_t = exp(min(log q(target_t) - old_logprobs_t, 20)), d_t = ref_logprobs_t - log q(target_t)

        "clip"       L = -min( min(r, delta) A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A )
        "cispo"      L = -stopgrad(min(r, 1 + epsilon_high)) A log q(target)
        "sapo"       L = -(4/t) sigmoid(t (r - 1)) A,  t by the sign of A
        "reinforce"  L = -A log q(target)
        K            k1 = -d,  k2 = d^2 / 2,  k3 = e^m - m - 1,  m = min(d, 20)

    Beyond 20 nats the ratio and k3 are constant and have no gradient, so every loss is finite.
    cispo's bound is 1 + epsilon_high; TRL bounds r by epsilon_high itself (its 5.0 is 4.0 here).
    In expectation over the policy's samples the gradient of k1 is 0, that of k2 the gradient of
    KL(policy|ref), that of k3 the gradient of KL(ref|policy). With kl_bias_correction those of k1
    and k3 are the gradient of KL(policy|ref).
    (GRPO, Shao et al. 2024, eq. 3; unequal bounds are DAPO's clip-higher, Yu et al. 2025; cispo,
    MiniMax-M1 2025; sapo, Gao et al. 2025; sequence level is GSPO, Zheng et al. 2025; k1 to k3,
    Schulman 2020.)

    Args:
        advantages: (B,) or one per token.
        old_logprobs: one per token, of the policy that sampled, at this temperature. None means
            that it is the current policy: the ratio is 1 and its gradient is kept (REINFORCE).
        ref_logprobs: one per token, of the frozen reference; needed when kl_coef is not 0.
        sampler_weights: (B,), (B, 1) or one per token, >= 0; they multiply L, to correct for
            rollouts from an engine whose probabilities differ, see `kepo_kernels.sampler_weights`.
            None = 1.
        delta: upper bound of the ratio, also for negative advantages (dual clip), > 1 +
            epsilon_high. None disables it.
        kl_coef, entropy_coef: None disables the term, and refuses what belongs to it; 0 (of a
            schedule) disables it and leaves ref_logprobs and entropy_weights unread. The entropy
            bonus lowers the loss.
        kl_bias_correction: True multiplies K by r, gradient included, which corrects the estimate
            for tokens that another policy sampled (TRL's use_bias_correction_kl).
        entropy_weights: h, one per token, still multiplied by the mask. None means that the bonus
            has the policy's weights w.
        policy_loss: a name, or a callable of your own: (logprobs, log_ratio, advantages) of n
            tokens, the first two with gradient, the log-ratio unbounded -> n losses, in any
            differentiable PyTorch.
        importance_level: "token", or "sequence": log r is the mean over the sequence's tokens, the
            same for all of them. Chunks then hold whole sequences; if one does not fit, the
            log-probabilities are computed in a separate pass first.
        sapo_temperature_pos, sapo_temperature_neg: t of tokens with A > 0, and of all others.

    Equals, holding whole matrices: `reference.grpo_loss`.
    """
    deciding = weights, entropy_weights
    call = begin("fused_grpo_loss", hidden, lm_head, bias, completion_mask, engine, *deciding)
    policy = PolicyPart(
        targets,
        advantages,
        old_logprobs,
        ref_logprobs,
        sampler_weights,
        PolicySettings.among(locals()),
        weights,
        entropy_weights,
        reduction,
    )
    return _loss(call, policy, None, temperature=temperature)


@one_operator
def fused_kepo_loss(
    hidden: Tensor,
    lm_head: Tensor | Head,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    teacher_hidden: Tensor | TopK | None = None,
    teacher_lm_head: Tensor | Head | None = None,
    *,
    gate: Tensor | None = None,
    completion_mask: Tensor | None = None,
    policy_weights: Tensor | None = None,
    distill_weights: Tensor | None = None,
    distill_coef: float = 1.0,
    beta: float = 0.5,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_weights: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    kl_coef: float | None = None,
    kl_estimator: str = "k3",
    kl_bias_correction: bool = False,
    entropy_coef: float | None = None,
    entropy_weights: Tensor | None = None,
    policy_loss: str | Callable[[Tensor, Tensor, Tensor], Tensor] = "clip",
    importance_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    policy_reduction: str = "sequence_mean",
    distill_reduction: str = "token_mean",
    **engine: object,
) -> Result:
    """Compute GRPO on all completions and gated distillation on good ones in one pass over the
    logits.

        loss = fused_grpo_loss(...) + distill_coef * fused_gated_kd_loss(...)

    (KEPO, arXiv 2602.00400, Eq. 7.) The policy term and the divergence of a token share one student
    GEMM, one row kernel and one gradient. Tokens of closed sequences are never multiplied with the
    teacher's head.

    Without a teacher it is `fused_grpo_loss`; without targets and advantages it is the divergence
    alone, `distill_coef * fused_gated_kd_loss(...)`, and `stats.logprobs` is 0. Tensors, penalty
    and bonus of a part that is not given are refused; its other settings have no effect. Arguments
    not listed below mean what they mean in those two losses.

    Args:
        targets, advantages: as in `fused_grpo_loss`. Both None disables the policy part.
        teacher_hidden, teacher_lm_head: as in `fused_gated_kd_loss`. Both None means no teacher.
        gate: (B,) as in `fused_gated_kd_loss`; typically accuracy >= threshold. Not needed if
            distill_weights are 0 on closed sequences.
        policy_weights, distill_weights: one per token, instead of policy_reduction /
            distill_reduction (a micro-batch passes its slice of the whole batch's `loss_weights`);
            they are still multiplied by the mask, and distill_weights by the gate.
        distill_coef: factor of the divergence; 0 disables distillation, and the teacher's GEMM.

    Equals, holding whole matrices: `reference.kepo_loss`.
    """
    deciding = gate, policy_weights, distill_weights, entropy_weights
    call = begin("fused_kepo_loss", hidden, lm_head, bias, completion_mask, engine, *deciding)
    check = call.check
    distill_coef = check.number(
        "distill_coef", distill_coef, lambda x: x >= 0, "a finite number >= 0"
    )
    has_policy = check.given_together(targets=targets, advantages=advantages)
    has_teacher = teacher_given(check, teacher_hidden, teacher_lm_head)
    check.require(
        has_policy or has_teacher,
        "neither targets and advantages (a policy part) nor teacher_hidden and teacher_lm_head (a "
        "teacher to distil from) are given; pass either, or both",
    )
    # The casts: of a part whose tensors are None only `refuse_the_rest` is called.
    policy = PolicyPart(
        cast(Tensor, targets),
        cast(Tensor, advantages),
        old_logprobs,
        ref_logprobs,
        sampler_weights,
        PolicySettings.among(locals()),
        policy_weights,
        entropy_weights,
        policy_reduction,
        prefix="policy_",
    )
    distillation = DistillationPart(
        cast(Tensor | TopK, teacher_hidden),
        teacher_lm_head,
        teacher_bias,
        gate,
        distill_weights,
        distill_reduction,
        prefix="distill_",
        coefficient=distill_coef,
    )
    if not has_policy:
        policy.refuse_the_rest(check)
    if not has_teacher:
        distillation.refuse_the_rest(check)
    return _loss(
        call,
        policy if has_policy else None,
        distillation if has_teacher else None,
        beta=beta,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
    )


@dataclass(frozen=True, eq=False)
class DistillationPart:
    """The teacher's arguments of a loss; none is checked except the coefficient."""

    teacher_hidden: Tensor | TopK
    teacher_lm_head: Tensor | Head | None
    teacher_bias: Tensor | None
    gate: Tensor | None
    weights: Tensor | None
    reduction: str
    prefix: str = ""
    """Prefix of the arguments `weights` and `reduction` in the caller's signature, as in
    distill_weights."""
    coefficient: float = 1.0

    def refuse_the_rest(self, check: Validator) -> None:
        """Refuse tensors of a teacher that was not given."""
        check.reduction(f"{self.prefix}reduction", self.reduction)
        check.unused(
            "teacher_hidden and teacher_lm_head",
            gate=self.gate,
            teacher_bias=self.teacher_bias,
            **{f"{self.prefix}weights": self.weights},
        )

    def checked(
        self, call: Call, temperature: float, teacher_temperature: float | None
    ) -> tuple[Teacher, Tensor, Tensor]:
        """Return the teacher, each token's weight of the divergence, and a mask of where it is not
        0. `temperature` is that of the teacher's logits; see `Call.teacher`."""
        call.check.gate(self.gate, call.lead)
        weights, present = call.weights(self.gate, self.weights, self.reduction, self.prefix)
        teacher = call.teacher(
            self.teacher_hidden,
            self.teacher_lm_head,
            self.teacher_bias,
            self.opened(present),
            temperature,
            teacher_temperature,
        )
        if self.coefficient == 0.0:
            present = torch.zeros_like(present)
        return teacher, self.coefficient * weights, present

    def opened(self, present: Tensor) -> Tensor | None:
        """Return (B,) values that are 0 or False on closed sequences: the gate or, if weights stand
        in for it, whether the sequence has a token of non-zero weight. None if all are open.

        `present` says where mask times weights is not 0.
        """
        if self.gate is not None or self.weights is None:
            return self.gate
        return present.any(-1) if present.dim() == 2 else present


def _loss(
    call: Call,
    policy: PolicyPart | None,
    distillation: DistillationPart | None,
    *,
    temperature: float,
    beta: float = 0.5,
    teacher_temperature: float | None = None,
) -> Result:
    """Compute any of the losses from the parts that were given: at least one of the two."""
    check = call.check
    of_teacher = check.softmax(temperature, beta, teacher_temperature)
    targets = teacher = rows = distilled = None
    if distillation is not None:
        teacher, distill_weights, distilled = distillation.checked(
            call, of_teacher, teacher_temperature
        )
    if policy is not None:
        objective = _objective(call, policy)
        targets, rows = policy.targets, objective.rows
        used = _either(objective.active, distilled)
        check.targets(targets, call.hidden, used, len(call.head.weight))
    student, problem = call.problem(
        targets,
        _either(rows, distilled),
        teacher=teacher,
        distilled=distilled,
        beta=beta,
        temperature=temperature,
    )

    def divergence_part(stats: TokenStats, rows: Tensor) -> Tensor:
        return at(distill_weights, rows) * stats.divergence

    if policy is None:
        return call.run(student, problem, divergence_part)
    policy_part = objective.token_loss
    if objective.whole_sequences:
        assert rows is not None, "a policy part has rows"
        problem, policy_part = with_whole_sequences(student, problem, call.lead, rows, policy_part)
    if distillation is None:
        return call.run(student, problem, policy_part)

    def both_parts(stats: TokenStats, rows: Tensor) -> Tensor:
        return policy_part(stats, rows) + divergence_part(stats, rows)

    return call.run(student, problem, both_parts)


@dataclass(frozen=True)
class _Objective:
    """The policy part of a loss: policy term and entropy bonus, each with its weights."""

    token_loss: TokenLoss
    active: Tensor  # bool of shape lead: the tokens of either
    rows: Tensor  # those of them that must be computed
    whole_sequences: bool


def _objective(call: Call, policy: PolicyPart) -> _Objective:
    """Check the policy's arguments and weigh its terms."""
    weights, rewarded = call.weights(None, policy.weights, policy.reduction, policy.prefix)
    term = policy_term(call.check, policy, rewarded, call.hidden)
    entropy_coef = float(policy.settings.entropy_coef or 0.0)
    bonus_weights, with_bonus = weights, rewarded
    if policy.entropy_weights is not None:
        bonus_weights, with_bonus = call.weights(None, policy.entropy_weights, "sum", "entropy_")
    policy.refuse_unused(call.check)
    active, rows = rewarded, term.alive
    if entropy_coef != 0.0:
        active, rows = active | with_bonus, rows | with_bonus

    def token_loss(stats: TokenStats, rows: Tensor) -> Tensor:
        loss = at(weights, rows) * term.token_loss(stats, rows)
        if entropy_coef != 0.0:
            loss = loss - entropy_coef * at(bonus_weights, rows) * stats.entropy
        return loss

    # With return_stats all tokens are computed, since their numbers are returned.
    rows = active if call.engine.get("return_stats") else rows
    return _Objective(token_loss, active, rows, term.whole_sequences)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor:
    """Return the union of two parts' tokens; None stands for a part that was not given."""
    if a is None:
        assert b is not None, "a call has at least one part"
        return b
    return a if b is None else a | b
