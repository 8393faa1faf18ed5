"""The same losses by other hands. Each provider returns a call, or raises NotComparable with why.

    eager     whole matrices in plain torch, as one writes them in a trainer
    compiled  the same through torch.compile
    liger     Liger's chunked JSD and GRPO, and its fused cross-entropy
    trl       TRL's fused head and chunked divergence
    cce       cut-cross-entropy
    torch_lce torch's own chunked linear_cross_entropy

Where a peer has no gate it gets the open rows only, which its user would have to select. Where its
chunks are counted in sequences it gets as many as its other losses have rows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.losses.losses_of_ours import NotComparable
from benchmarks.losses.measure import Call
from benchmarks.losses.problems import Problem
from kepo_kernels.compute import gemm

BASE_CASE = {"kd_tol": "kd_open", "grpo_tol": "grpo", "two_calls": "joint"}
BETA = 0.5
EPSILON = 0.2
LIGER_ROWS = 1024  # of a chunk, its JSD's default; its GRPO's is one sequence, however short


def dtypes(given: torch.dtype, device: torch.device, asked: str = "auto") -> list[torch.dtype]:
    """In which dtypes a peer may be fastest on a problem made in `given`, the likeliest first.

    On a CPU without instructions for it torch multiplies 16-bit matrices many times slower than
    fp32 ones, and peers leave their products to torch. With them bf16 mostly wins, but not for a
    peer whose row work costs more than its products: both are tried there.
    """
    if asked != "auto":
        return [getattr(torch, asked)]
    if device.type != "cpu" or given == torch.float32:
        return [given]
    fast = given == torch.bfloat16 and gemm.fast_bf16(device)
    return [given, torch.float32] if fast else [torch.float32]


def jsd(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """GKD's generalised Jensen-Shannon divergence, mean over the rows: (n, V), (n, V) -> ().

    Each KL is summed before they are weighted, which spares three whole matrices.
    """
    log_q, log_p = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    del logits, teacher_logits
    log_m = torch.logaddexp(log_q + log(1 - BETA), log_p + log(BETA))
    kl_p = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    kl_q = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return (BETA * kl_p + (1 - BETA) * kl_q).mean()


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """GRPO's objective on (B, T) log-probabilities."""
    ratio = (logprobs - old_logprobs).exp()
    bounded = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    advantages = advantages.unsqueeze(1)
    return -torch.minimum(ratio * advantages, bounded * advantages).mean()


def _kd(x: Tensor, w: Tensor, y: Tensor, teacher_w: Tensor, rows: Tensor | None) -> Tensor:
    x = x.flatten(0, 1)
    return jsd((x if rows is None else x[rows]) @ w.T, y @ teacher_w.T)


def _grpo(x: Tensor, w: Tensor, targets: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    return clipped(token_logprobs(x @ w.T, targets), old, advantages)


def _joint(
    x: Tensor,
    w: Tensor,
    targets: Tensor,
    old: Tensor,
    advantages: Tensor,
    y: Tensor,
    teacher_w: Tensor,
    rows: Tensor,
) -> Tensor:
    logits = x @ w.T
    policy = clipped(token_logprobs(logits, targets), old, advantages)
    return policy + jsd(logits.flatten(0, 1)[rows], y @ teacher_w.T)


def _logprobs(x: Tensor, w: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
    return (token_logprobs(x @ w.T, targets) * upstream).sum()


def _ce(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x.flatten(0, 1) @ w.T, targets.flatten())


def eager(problem: Problem, case: str, wrap: Callable = lambda function: function) -> Call:
    p, case = problem, BASE_CASE.get(case, case)
    rows = _open_rows(p, case)
    policy = (p.targets, p.old_logprobs, p.advantages)
    teacher = (p.teacher_hidden.flatten(0, 1)[rows], p.teacher_lm_head)
    function, *tensors = {
        "kd_open": (_kd, *teacher, None),
        "kd_half": (_kd, *teacher, rows),
        "grpo": (_grpo, *policy),
        "joint": (_joint, *policy, *teacher, rows),
        "logprobs": (_logprobs, p.targets, p.upstream),
        "ce": (_ce, p.targets),
    }[case]
    loss = wrap(function)
    return lambda: p.gradients(loss(p.hidden, p.lm_head, *tensors))


def compiled(problem: Problem, case: str) -> Call:
    torch._dynamo.config.recompile_limit = 64  # one code object serves many shapes here
    return eager(problem, case, torch.compile)


def liger(problem: Problem, case: str) -> Call:
    losses = _imported("liger_kernel.chunked_loss")
    p, case = problem, BASE_CASE.get(case, case)
    if case == "logprobs":
        raise NotComparable("has no log-probabilities per token")
    if case == "ce":
        if not p.hidden.is_cuda:
            raise NotComparable("its fused cross-entropy is a Triton kernel and needs a GPU")
        fused = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
        x, targets = p.hidden.flatten(0, 1), p.targets.flatten()
        return lambda: p.gradients(fused(p.lm_head, x, targets))
    grpo = losses.LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        loss_type="grpo",
        chunk_size=max(1, LIGER_ROWS // p.targets.shape[1]),
    )
    distil = losses.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA)
    mask = torch.ones_like(p.targets)
    rows = _open_rows(p, case)
    labels, teacher = p.targets.flatten()[rows], p.teacher_hidden.flatten(0, 1)[rows]

    def policy() -> Tensor:
        found = grpo(
            p.hidden,
            p.lm_head,
            p.targets,
            mask,
            p.advantages,
            old_per_token_logps=p.old_logprobs,
        )
        return found[0]

    def kd() -> Tensor:
        x = p.hidden.flatten(0, 1)[rows]
        return distil(x, p.lm_head, teacher, p.teacher_lm_head, labels)

    if case == "grpo":
        return lambda: p.gradients(policy())
    if case == "joint":
        return _one_after_the_other(p, policy, kd)
    return lambda: p.gradients(kd())


def trl(problem: Problem, case: str) -> Call:
    head = _imported("trl.kernels", "trl >= 1.16").ChunkedLogProbFunction
    divergence = _imported("trl.kernels.chunked_divergence", "trl >= 1.16")
    width = _imported("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    p, case = problem, BASE_CASE.get(case, case)
    targets, rows = p.targets.flatten(), _open_rows(p, case)
    teacher = p.teacher_hidden.flatten(0, 1)[rows]

    def logprobs() -> Tensor:
        x = p.hidden.flatten(0, 1)
        return head.apply(x, p.lm_head, None, targets, 1.0, width, None, 1.0, ())[0]

    def policy() -> Tensor:
        return clipped(logprobs().view(p.targets.shape), p.old_logprobs, p.advantages)

    def kd() -> Tensor:
        x = p.hidden.flatten(0, 1)[rows]
        student, frozen = (x, p.lm_head, None), (teacher, p.teacher_lm_head, None)
        return divergence.ChunkedDivergenceFunction.apply(*student, *frozen, BETA)[0].mean()

    if case == "joint":
        return _one_after_the_other(p, policy, kd)
    loss = {
        "kd_open": kd,
        "kd_half": kd,
        "grpo": policy,
        "logprobs": lambda: (logprobs() * p.upstream.flatten()).sum(),
        "ce": lambda: -logprobs().mean(),
    }[case]
    return lambda: p.gradients(loss())


def cce(problem: Problem, case: str) -> Call:
    if case != "ce":
        raise NotComparable("has cross-entropy only")
    cut = _imported("cut_cross_entropy").linear_cross_entropy
    p = problem
    # Its Triton kernels want a GPU and 16-bit inputs.
    kernels = p.hidden.is_cuda and p.hidden.dtype != torch.float32
    impl = "cce" if kernels else "torch_compile"
    return lambda: p.gradients(cut(p.hidden, p.lm_head, p.targets, impl=impl))


def torch_lce(problem: Problem, case: str) -> Call:
    if case != "ce":
        raise NotComparable("has cross-entropy only")
    if not hasattr(F, "linear_cross_entropy"):
        raise NotComparable(f"torch {torch.__version__} has no linear_cross_entropy")
    p, targets = problem, problem.targets.flatten()
    options = torch.nn.LinearCrossEntropyOptions()

    def call() -> object:
        x = p.hidden.flatten(0, 1)
        return p.gradients(F.linear_cross_entropy(x, p.lm_head, targets, options=options))

    return call


def _open_rows(p: Problem, case: str) -> Tensor:
    opened = p.gate(case)[:, None].expand(p.targets.shape)
    return opened.flatten().nonzero().squeeze(-1)


def _one_after_the_other(p: Problem, *losses: Callable[[], Tensor]) -> Call:
    """What a peer without a joint loss does in its place."""

    def call() -> tuple[Tensor, ...]:
        first, second = (p.gradients(loss()) for loss in losses)
        return tuple(a.add_(b) for a, b in zip(first, second, strict=True))

    return call


def _imported(module: str, package: str = ""):
    try:
        return import_module(module)
    except (ImportError, AttributeError) as error:
        package = package or module.partition(".")[0].replace("_", "-")
        raise NotComparable(f"{package} cannot be imported ({error})") from error


PEERS: dict[str, Callable[[Problem, str], Call]] = {
    "eager": eager,
    "compiled": compiled,
    "liger": liger,
    "trl": trl,
    "cce": cce,
    "torch_lce": torch_lce,
}
# Their first calls of a new number of rows compile something.
COMPILING = ("compiled", "liger", "cce")
