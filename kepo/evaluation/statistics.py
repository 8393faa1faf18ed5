"""Intervals for accuracies: of one model on some questions, or of several seeds on the same ones.

For the latter, a method's results are an array correct (seeds, modalities, items) of 0 and 1. Seeds
differ in warm-up, data order and sampling; items are the same for every seed and method. Both are
samples of something larger, so both are drawn again: a seed with all its items, an item for all
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """Return 1 if the interval is above zero, -1 if below, 0 if undecided."""
        return int(self.low > 0) - int(self.high < 0)


def bootstrap(correct: np.ndarray, minus: np.ndarray | None = None, seed: int = 0) -> Interval:
    """Return the mean over seeds, modalities, items, and its percentile interval from 10,000 draws.

        mean_s mean_m mean_i correct[s, m, i]          every modality counts the same

    minus: another method's results; the interval is then that of the difference, with the same
    seeds and items drawn for both (paired). Items are drawn within their modality. With one seed
    only the items vary. (Crossed bootstrap, Owen 2007, "The pigeonhole bootstrap".)
    """
    values = np.asarray(correct, dtype=np.float64)
    if minus is not None:
        if np.shape(minus) != values.shape:
            raise ValueError(
                f"bootstrap: correct has shape {values.shape} and minus {np.shape(minus)}; "
                "expected the same seeds, modalities and items"
            )
        values = values - minus
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(
            f"bootstrap: correct has shape {values.shape}; expected (seeds, modalities, items)"
        )
    seeds, modalities, items = values.shape
    draw = np.random.default_rng(seed)
    total = np.zeros(DRAWS)
    of_seed = _shares(draw, seeds)  # (D, S)
    for modality in range(modalities):
        of_item = _shares(draw, items)  # (D, I)
        total += (of_seed @ values[:, modality] * of_item).sum(1)
    low, high = np.quantile(total / modalities, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def _shares(draw: np.random.Generator, n: int) -> np.ndarray:
    """Return (DRAWS, n): how often each of n was drawn, in n draws with replacement, over n."""
    drawn = draw.integers(n, size=(DRAWS, n)) + n * np.arange(DRAWS)[:, None]
    return np.bincount(drawn.ravel(), minlength=DRAWS * n).reshape(DRAWS, n) / n


def students_t(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the mean of numbers, one per seed or question, with Student's t interval, which is
    infinite for fewer than two."""
    values = np.asarray(values, dtype=np.float64)
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    half = _t975(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the chance that one of k completions is right, from ``samples`` of which ``right``
    are; it is unbiased (Chen et al. 2021, eq. 1).

        1 - C(n - c, k) / C(n, k)
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass_at_k: samples={samples}, right={right}, k={k}; expected 0 <= right <= samples "
            "and 1 <= k <= samples"
        )
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def wilson(right: float, count: int) -> Interval:
    """Return the share ``right / count`` with Wilson's interval, which stays within 0 and 1.

        (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    (Wilson 1927.) Raises ValueError unless 0 <= right <= count and count >= 1.
    """
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"wilson: right={right} of count={count}; expected 0 <= right <= count")
    p, z2 = right / count, _Z975**2 / count
    middle, half = p + z2 / 2, math.sqrt(z2 * (p * (1 - p) + z2 / 4))
    # At 0 and 1 the bound is exact, whatever the rounding of middle and half.
    low = 0.0 if right == 0 else (middle - half) / (1 + z2)
    high = 1.0 if right == count else (middle + half) / (1 + z2)
    return Interval(p, low, high)


_Z975 = 1.959964  # the 0.975 quantile of the normal distribution

# The 0.975 quantiles of Student's t for 1, 2, 3 ... degrees of freedom.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _t975(freedom: int) -> float:
    """Return the 0.975 quantile of Student's t; above 10 degrees of freedom to 0.1 % (Cornish and
    Fisher's series)."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z = _Z975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
