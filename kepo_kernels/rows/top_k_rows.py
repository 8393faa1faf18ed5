"""The row contract for a teacher of K tokens, by the kernels of any back-end.

The K tokens and the tail, which is all others, are K + 1 bins. Of a row's logits the K are taken
out: they become -inf, and what the kernels then see, and keep in their table, is the tail alone.

    r          (V,)     softmax of the tail; its entropy H_r, and log q_T = log-sum-exp of the tail
    log q      (K + 1,) of the bins, from the K logits and log q_T, normalised over them
    entropy    = H(bins) + q_T H_r
    logprob    = log q of the target's bin, and + log r of the target in the tail
    divergence = D(bins)

The bins are a row of a small vocabulary, whose divergence, entropy and gradient b are those of
`torch_rows` in fp64. The tail's part of b falls on its tokens by r, which the kernels compute:

    du_v = b_v                                                        v one of the K
    du_v = b_T r_v + c (1[v = t] - r_v) [t in the tail] - e q_T r_v (log r_v + H_r)    otherwise

Nothing here is a difference of near-equal numbers: q_T = 1 - sum q_k is never formed.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from kepo_kernels.rows import torch_rows
from kepo_kernels.rows.contract import RowSettings, RowStats

BIN_BYTES = 8 * (torch_rows.TEMPORARIES + 12)
"""Bytes that a row holds at once for each of its K + 1 bins, at most."""


LEAST_TAIL = 1e-7


class TopK(NamedTuple):
    """A teacher's K most likely tokens at every position, in place of `teacher_hidden`.

    A server's `prompt_logprobs` are of this kind. Such a teacher has no head and costs no matrix
    product. Its other tokens are one bin, the tail, and so are the student's: the divergence is
    that of two distributions over K + 1 bins,

        p = (p_1 ... p_K, 1 - sum p_k),   q = (q_1 ... q_K, 1 - sum q_k)

    which is at most the divergence over all tokens, and equal to it where both give the tail's
    tokens the same shares of it. The tail p has is at least 1e-7, so that a student's mass there
    has a finite price, and p is divided by its sum; where the student can produce no token of the
    tail there is no such bin.

    It equals TRL's divergences with a tail: for beta = 0 that of its ServerDistillationTrainer
    (`loss_add_tail=True`), for beta = alpha that of its SDPO (`distillation_add_tail=True`; there
    the K are the student's). Both give the student's tail the least mass, too, and there no
    gradient. verl's `forward_kl_topk` has no tail: its sum of p_k log(p_k / q_k) over the K, with
    bounded log-probabilities, is no divergence and may be negative.
    """

    ids: Tensor
    """(B, T, K) or (N, K) int64 or int32 token ids, each at most once; -1 pads where a position has
    fewer than K."""
    logprobs: Tensor
    """Of the same shape, their log-probabilities under the whole softmax of the teacher, at its
    temperature. Those of padding are not read."""


class _Bins(NamedTuple):
    """What the backward of a chunk needs of its forward; all in fp64."""

    places: Tensor  # (n, K) columns of the K tokens; padding stands at a token of its own row
    listed: Tensor  # (n, K) bool, which are no padding
    raw: Tensor  # (n, K) their logits
    log_q: Tensor  # (n, K + 1)
    log_p: Tensor  # (n, K + 1)
    table: Tensor  # of the bins
    target: Tensor  # (n, 1) column of the target, or of one of the K where there are no targets
    target_bin: Tensor | None  # (n,); K is the tail
    target_raw: Tensor  # (n,) its logit


class TopKRows:
    """Rows of one chunk with a `TopK` teacher (n, K), as `kepo_kernels.rows.contract` has them.

    Forward changes the logits, and backward needs what it left of them: one object, one chunk.
    """

    def __init__(self, kernels: ModuleType):
        self.kernels = kernels

    def row_forward(
        self, logits: Tensor, targets: Tensor | None, teacher: TopK, settings: RowSettings
    ) -> Tensor:
        """Return a table whose first three columns are the row's, and the others the tail's."""
        ids = teacher.ids.long()
        listed, vocab = ids >= 0, logits.shape[1]
        last = ids.amax(1, keepdim=True)  # -1 where nothing is listed: nothing is taken out
        places = torch.where(listed, ids, last).clamp(0, vocab - 1)
        target = places[:, :1] if targets is None else targets.unsqueeze(-1)
        target_raw = logits.gather(1, target).squeeze(-1).double()
        found = logits.gather(1, places)
        # On a GPU, where ids are not checked, one beyond the vocabulary makes its row NaN.
        raw = torch.where(ids < vocab, found.double(), torch.nan).masked_fill(~listed, -torch.inf)
        logits.scatter_(1, places, torch.where(last < 0, found, -torch.inf))

        table = self.kernels.row_forward(logits, None, None, settings)
        gone = table[RowStats._fields.index("peak")] == -torch.inf  # no token of the tail lives
        table = torch.where(gone, 0.0, table)  # of no probability and entropy, and no NaN
        self.tail = RowStats(*table.double().unbind(0))
        log_q = _log_shares(_capped(raw, settings), self.tail, gone, settings.temperature)
        log_p = _log_teacher(teacher.logprobs, listed, gone)
        bins = RowSettings(beta=settings.beta)
        target_bin = None
        if targets is not None:
            hit = listed & (ids == target)
            target_bin = torch.where(hit.any(1), hit.int().argmax(1), ids.shape[1])
        of_bins = torch_rows.row_forward(log_q, target_bin, log_p, bins)
        self.bins = _Bins(
            places, listed, raw, log_q, log_p, of_bins, target, target_bin, target_raw
        )
        numbers = RowStats(*of_bins.unbind(0))
        logprob = numbers.logprob
        if target_bin is not None:
            in_tail = target_bin == ids.shape[1]
            logprob = torch.where(in_tail, logprob + self._log_r(settings), logprob)
        entropy = numbers.entropy + log_q[:, -1].exp() * self.tail.entropy
        of_row = torch.stack((logprob, numbers.divergence, entropy)).to(table.dtype)
        return torch.cat((of_row, table[3:]))

    def row_backward_(
        self,
        logits: Tensor,
        targets: Tensor | None,
        teacher: TopK,
        table: Tensor,
        coefficients: Tensor,
        settings: RowSettings,
        out: Tensor | None = None,
    ) -> None:
        """Overwrite the logits that `row_forward` left, or `out`, with the gradient."""
        x, tail = self.bins, self.tail
        c, _, e = back = coefficients.double()
        q = x.log_q.exp()
        share = q[:, -1]
        # d (e q_T H_r) / d bin = e H_r q_T (1[bin = tail] - q)
        mixed = (e * tail.entropy * share).unsqueeze(-1)
        slope = x.log_q.clone()
        bins = RowSettings(beta=settings.beta)
        torch_rows.row_backward_(slope, x.target_bin, x.log_p, x.table, back, bins)
        slope -= mixed * q
        slope[:, -1:] += mixed
        in_tail = None if x.target_bin is None else x.target_bin == x.places.shape[1]
        c = torch.zeros_like(c) if in_tail is None else torch.where(in_tail, c, 0.0)
        of_tail = torch.stack((c - slope[:, -1], torch.zeros_like(c), e * share))
        tail_table = table.clone()
        tail_table[RowStats._fields.index("entropy")] = tail.entropy
        self.kernels.row_backward_(
            logits,
            x.target.squeeze(-1).contiguous(),
            None,
            tail_table,
            of_tail.to(table.dtype),
            settings,
            out,
        )

        out = logits if out is None else out
        values = _raw_gradient(slope[:, :-1], x.raw, settings)
        # Padding writes what its place gets anyway.
        at_place = values.gather(1, x.listed.int().mul(x.places + 1).argmax(1, keepdim=True))
        values = torch.where(x.listed, values, at_place)
        nothing = ~x.listed.any(1, keepdim=True)
        values = torch.where(nothing, out.gather(1, x.places).double(), values)
        out.scatter_(1, x.places, values.to(out.dtype))
        if in_tail is None:
            return
        # The kernels have added at the target what all of the tail was to lose.
        log_r = self._log_r(settings)
        r = log_r.exp()
        value = slope[:, -1] * r - c * torch.expm1(log_r)
        value -= e * share * torch.where(r > 0, r * (log_r + tail.entropy), r)
        value = _raw_gradient(value, x.target_raw, settings).unsqueeze(-1)
        value = torch.where(in_tail.unsqueeze(-1), value, out.gather(1, x.target).double())
        out.scatter_(1, x.target, value.to(out.dtype))

    def _log_r(self, settings: RowSettings) -> Tensor:
        """Return log r (n,) of the target, which is meant where it is in the tail."""
        capped = _capped(self.bins.target_raw, settings)
        return (capped - self.tail.peak) / settings.temperature - self.tail.log_sum


def _capped(raw: Tensor, settings: RowSettings) -> Tensor:
    return torch_rows.capped(raw, raw.dtype, settings.softcap)


def _raw_gradient(gradient: Tensor, raw: Tensor, settings: RowSettings) -> Tensor:
    """Return the gradient on raw logits, from that on capped ones over the temperature."""
    if settings.softcap > 0.0:
        gradient = gradient * torch_rows.cap_slope(raw, raw.dtype, settings.softcap)
    return gradient / settings.temperature


def _log_shares(capped: Tensor, tail: RowStats, gone: Tensor, temperature: float) -> Tensor:
    """Return the student's log q of the bins, (n, K + 1), from the K logits and the tail's sum."""
    tail_peak = tail.peak.masked_fill(gone, -torch.inf)
    peak = torch.maximum(capped.amax(1), tail_peak)
    of_tail = (tail_peak - peak) / temperature + tail.log_sum
    of_all = torch.cat(((capped - peak.unsqueeze(1)) / temperature, of_tail.unsqueeze(1)), 1)
    return of_all.log_softmax(1)


def _log_teacher(logprobs: Tensor, listed: Tensor, gone: Tensor) -> Tensor:
    """Return the teacher's log p of the bins, (n, K + 1)."""
    log_p = torch.where(listed, logprobs.double(), -torch.inf)
    rest = (1.0 - log_p.exp().sum(1)).clamp(min=LEAST_TAIL).masked_fill(gone, 0.0)
    log_p = torch.cat((log_p, rest.log().unsqueeze(1)), 1)
    return log_p - log_p.logsumexp(1, keepdim=True)
