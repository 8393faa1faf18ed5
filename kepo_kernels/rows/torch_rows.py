"""The row contract in plain PyTorch.

It runs on any device and in fp64, and every installation can fall back to it.
"""

import torch
from torch import Tensor

from kepo_kernels.rows.contract import (
    NUM_STATS,
    RowSettings,
    RowStats,
    accumulate_dtype,
    shared_columns,
)

# Rows are taken a few at a time so that the temporaries (about eight of them) stay at some tens of
# megabytes however large the chunk is: the caller's workspace budget counts the logits alone.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 23}  # on a GPU a block is some seventy launches
TEMPORARIES = 14  # blocks in the dtype of the table that are alive at once, at most


def row_forward(
    logits: Tensor, targets: Tensor | None, teacher: Tensor | None, settings: RowSettings
) -> Tensor:
    """Implement `row_forward` of `kepo_kernels.rows.contract`."""
    rows = logits.shape[0]
    table = torch.zeros(NUM_STATS, rows, dtype=accumulate_dtype(logits.dtype), device=logits.device)
    for block in _blocks(logits):
        _forward_block(
            logits[block],
            None if targets is None else targets[block],
            None if teacher is None else teacher[block],
            RowStats(*(column[block] for column in table.unbind(0))),
            settings,
        )
    return table


def row_backward_(
    logits: Tensor,
    targets: Tensor | None,
    teacher: Tensor | None,
    table: Tensor,
    coefficients: Tensor,
    settings: RowSettings,
    out: Tensor | None = None,
) -> None:
    """Implement `row_backward_` of `kepo_kernels.rows.contract`."""
    for block in _blocks(logits):
        _backward_block(
            logits[block],
            None if targets is None else targets[block],
            None if teacher is None else teacher[block],
            RowStats(*table[:, block].unsqueeze(-1).unbind(0)),
            coefficients[:, block].unsqueeze(-1),
            settings,
        )
        if out is not None:
            out[block] = logits[block]


def block_elements(device: torch.device) -> int:
    return BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS["cuda"])


def _blocks(logits: Tensor) -> list[slice]:
    rows, vocab = logits.shape
    step = max(1, block_elements(logits.device) // max(1, vocab))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def capped(logits: Tensor, dtype: torch.dtype, softcap: float) -> Tensor:
    """Return the logits as the formulas use them, after the softcap, in `dtype`; -inf stays
    -inf."""
    logits = logits.to(dtype)
    if softcap == 0.0:
        return logits
    return torch.where(logits > -torch.inf, softcap * (logits / softcap).tanh(), logits)


def cap_slope(logits: Tensor, dtype: torch.dtype, softcap: float) -> Tensor:
    """d capped / d raw = 1 - tanh^2, without its cancellation at the cap: 4 e / (1 + e)^2."""
    e = (logits.to(dtype).abs() * (-2.0 / softcap)).exp()
    return 4.0 * e / (1.0 + e).square()


def _log_softmax(logits: Tensor, peak: Tensor, log_sum: Tensor, temperature: float) -> Tensor:
    return (logits - peak) / temperature - log_sum


def _log_sum(logits: Tensor, peak: Tensor, temperature: float) -> Tensor:
    return ((logits - peak.unsqueeze(-1)) / temperature).logsumexp(-1)


def _weighted(probability: Tensor, value: Tensor) -> Tensor:
    """probability * value; 0 where the probability is 0, the limit of p log p; NaN where it is."""
    return torch.where(probability > 0, probability * value, probability)


def _log_ratios(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute log q/m and log p/m, m = (1 - beta) q + beta p; m is p for beta = 1.

    log m is taken from the larger of the two, m = high (1 + (1 - w)(low/high - 1)): it does not
    underflow while one of them lives, and where they are close nothing cancels.
    """
    rise = torch.where(log_q == log_p, 0, log_p - log_q)  # both may be -inf
    if beta == 1.0:
        return log_q - log_p, torch.zeros_like(rise)
    mine, theirs = log_q.new_full((), 1.0 - beta), log_q.new_full((), beta)
    low, high = torch.where(rise > 0, mine, theirs), torch.where(rise > 0, theirs, mine)
    fall = torch.expm1(-rise.abs())  # low/high - 1
    # Where the larger has next to no weight 1 + (1 - w) fall has no digits.
    far = torch.log(high + low * torch.exp(-rise.abs()))
    log_m = torch.where(low * fall < -0.5, far, torch.log1p(low * fall))  # log m/high
    return -rise.clamp_min(0) - log_m, rise.clamp_max(0) - log_m


def _forward_block(
    logits: Tensor,
    targets: Tensor | None,
    teacher: Tensor | None,
    out: RowStats,
    settings: RowSettings,
) -> None:
    beta, temperature, teacher_temperature = settings[:3]
    logits = capped(logits, out.peak.dtype, settings.softcap)
    out.peak.copy_(logits.amax(-1))
    out.log_sum.copy_(_log_sum(logits, out.peak, temperature))
    log_q = _log_softmax(logits, out.peak.unsqueeze(-1), out.log_sum.unsqueeze(-1), temperature)
    out.entropy.copy_(-_weighted(log_q.exp(), log_q).sum(-1))
    if targets is not None:
        out.logprob.copy_(log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1))
    if teacher is None:
        out.shared_log_sum.copy_(out.log_sum)
        return

    shared = shared_columns(logits, teacher)
    logits = logits[:, :shared]
    teacher = capped(teacher[:, :shared], logits.dtype, settings.teacher_softcap)
    out.shared_log_sum.copy_(_log_sum(logits, out.peak, temperature))
    out.teacher_peak.copy_(teacher.amax(-1))
    out.teacher_log_sum.copy_(_log_sum(teacher, out.teacher_peak, teacher_temperature))
    log_q = _log_softmax(
        logits, out.peak.unsqueeze(-1), out.shared_log_sum.unsqueeze(-1), temperature
    )
    log_p = _log_softmax(
        teacher,
        out.teacher_peak.unsqueeze(-1),
        out.teacher_log_sum.unsqueeze(-1),
        teacher_temperature,
    )
    p, q = log_p.exp(), log_q.exp()
    if beta == 0.0:
        # Summed as a log(a/b) - a + b: every term is >= 0, and a rounding error in a log-sum-exp
        # cancels to first order instead of shifting the whole sum.
        out.divergence.copy_((_weighted(p, log_p - log_q) - p + q).sum(-1))
        return
    out.peak_token.copy_(logits.argmax(-1))
    ratio, teacher_ratio = _log_ratios(log_q, log_p, beta)
    out.peak_ratio.copy_(ratio.gather(-1, out.peak_token.long().unsqueeze(-1)).squeeze(-1))
    out.mean_ratio.copy_(_weighted(q, _from_peak(ratio, out)).sum(-1))
    if beta == 1.0:
        out.divergence.copy_((_weighted(q, ratio) - q + p).sum(-1))
        return
    # m - q and m - p, written so that nothing cancels when p is close to q.
    m_q, m_p = beta * (p - q), (1.0 - beta) * (q - p)
    student_kl = (_weighted(q, ratio) + m_q).sum(-1)
    teacher_kl = (_weighted(p, teacher_ratio) + m_p).sum(-1)
    out.divergence.copy_((1.0 - beta) * student_kl + beta * teacher_kl)


def _from_peak(ratio: Tensor, stats: RowStats) -> Tensor:
    """Compute log q/m relative to its value at the student's peak, where it is exactly 0, not a
    difference."""
    token = stats.peak_token.long().reshape(-1, 1)
    return (ratio - stats.peak_ratio.reshape(-1, 1)).scatter_(-1, token, 0.0)


def _backward_block(
    logits: Tensor,
    targets: Tensor | None,
    teacher: Tensor | None,
    stats: RowStats,
    coefficients: Tensor,
    settings: RowSettings,
) -> None:
    beta, temperature, teacher_temperature = settings[:3]
    raw, logits = logits, capped(logits, stats.peak.dtype, settings.softcap)
    c, g, e = coefficients
    log_q = _log_softmax(logits, stats.peak, stats.log_sum, temperature)
    q = log_q.exp()
    grad = -e * _weighted(q, log_q + stats.entropy)
    if targets is not None:
        grad -= c * q
        grad.scatter_add_(-1, targets.unsqueeze(-1), c)
    if teacher is not None:
        shared = shared_columns(logits, teacher)
        log_q = _log_softmax(logits[:, :shared], stats.peak, stats.shared_log_sum, temperature)
        teacher = capped(teacher[:, :shared], logits.dtype, settings.teacher_softcap)
        log_p = _log_softmax(
            teacher, stats.teacher_peak, stats.teacher_log_sum, teacher_temperature
        )
        q = log_q.exp()
        if beta == 0.0:
            direction = q - log_p.exp()
        else:
            ratio, _ = _log_ratios(log_q, log_p, beta)
            direction = _weighted(q, _from_peak(ratio, stats) - stats.mean_ratio)
        if 0.0 < beta < 1.0:
            direction *= 1.0 - beta
        grad[:, :shared] += g * direction
    if settings.softcap > 0.0:
        grad *= cap_slope(raw, grad.dtype, settings.softcap)
    raw.copy_(grad / temperature)
