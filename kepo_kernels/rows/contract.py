"""The row contract: the task of every back-end on one chunk of logits.

A *row* is one completion token. From its student logits, its target id and (perhaps) its teacher
logits a back-end computes three numbers - `logprob`, `divergence`, `entropy` - and, given what the
loss sends back to them, the gradient on the logits. A back-end is a module with exactly two
functions:

    row_forward(logits, targets, teacher, settings) -> table
    row_backward_(logits, targets, teacher, table, coefficients, settings, out=None) -> None

    logits        (n, V)   student logits, before softcap and temperature; `row_backward_`
                           overwrites them with dlogits, the gradient on these same raw logits
    targets       (n,)     int64 token ids in [0, V), or None: no log-probability is wanted, and
                           `logprob` is 0
    teacher       (n, V_t) teacher logits in the dtype of `logits`, or None: the divergence is 0
    table         (11, n)  the columns of `RowStats`, in fp32 (fp64 for fp64 logits)
    coefficients  (3, n)   d loss / d logprob, d loss / d divergence, d loss / d entropy; dtype of
                           `table`
    settings               a `RowSettings`
    out           (n, V)   None, or where dlogits go instead, in any float dtype; what then stands
                           in `logits` is undefined

The divergence reads only the `min(V, V_t)` leading columns that both vocabularies share, each side
normalised over those; `logprob` and `entropy` read the student's whole row. A back-end never sees a
mask, a gate, an advantage or a normaliser: rows without weight are gone before it is called. The
formulas are in docs/math.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowSettings(NamedTuple):
    """Settings of the row kernels: how logits are read, and which divergence is computed.

    A softcap of s > 0 reads the logit z as s tanh(z / s); 0 disables it. A logit of -inf, a token
    that is ruled out, stays -inf under a softcap (tanh would make it -s, a token like any other).
    """

    beta: float = 0.5  # in [0, 1]
    temperature: float = 1.0  # > 0, divides the (capped) student logits
    teacher_temperature: float = 1.0  # > 0, divides the (capped) teacher logits
    softcap: float = 0.0  # of the student logits
    teacher_softcap: float = 0.0


class RowStats(NamedTuple):
    """The results of `row_forward` for each row.

    `row_backward_` needs all of them but the first two.

    A softmax is kept as the row's largest logit and the log of the sum that remains, so that
    log q = (logit - peak) / temperature - log_sum loses nothing where q is near 1, and is exactly 0
    when V = 1. Logits and peaks are capped ones throughout.
    """

    logprob: Tensor  # (n,) log q(target)
    divergence: Tensor  # (n,) D_beta(teacher p, student q) over the shared columns
    entropy: Tensor  # (n,) of q, in nats
    peak: Tensor  # (n,) largest student logit, not divided by the temperature
    log_sum: Tensor  # (n,) log sum exp((logit - peak) / temperature) over all V columns
    shared_log_sum: Tensor  # (n,) the same over the shared columns; log_sum without a teacher
    teacher_peak: Tensor  # (n,) largest of the teacher's shared logits; 0 without a teacher
    teacher_log_sum: Tensor  # (n,) of the teacher's shared columns; 0 without a teacher
    # log q/m (log q/p for beta = 1), relative to its value at q's peak among the shared columns, so
    # that the peak's own gradient entry is not a difference of near-equal numbers. KL(q|m) is the
    # sum of the last two. All are 0 for beta = 0, which needs no ratio, and without a teacher.
    peak_token: Tensor  # (n,) the peak's column, exact up to 2^24
    peak_ratio: Tensor  # (n,) log q/m there
    mean_ratio: Tensor  # (n,) mean under q of log q/m - peak_ratio


NUM_STATS = len(RowStats._fields)
NUM_COEFFICIENTS = 3


def accumulate_dtype(logits_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a row's numbers: fp64 for fp64 logits, fp32 for everything else."""
    return torch.float64 if logits_dtype == torch.float64 else torch.float32


def shared_columns(logits: Tensor, teacher: Tensor | None) -> int:
    """Return the number of leading columns that the divergence reads."""
    return logits.shape[1] if teacher is None else min(logits.shape[1], teacher.shape[1])
