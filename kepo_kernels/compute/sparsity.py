"""Selection of the rows and columns of a chunk's dlogits that carry gradient.

The gradient GEMMs run over these alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Columns are compacted only if that leaves less than this share of them: gathering them and a
# narrower product must cost less than the whole one.
WORTHWHILE = 0.5
# Few enough rows that their columns are few, and enough to feed a matrix product.
PART_ROWS = 256
BLOCK_ELEMENTS = 1 << 19  # of |dlogits| at a time


class Mass(NamedTuple):
    """Sums of |dlogits|: over the columns left out, and over all columns."""

    dropped: float
    total: float


def live_rows(coefficients: Tensor) -> Tensor:
    """Return indices (k,) of the rows that receive a gradient from the loss; coefficients (3, n).

    On a GPU it returns all rows: checking would make the host wait for every chunk.
    """
    if coefficients.device.type != "cpu":
        return torch.arange(coefficients.shape[1], device=coefficients.device)
    return coefficients.ne(0).any(0).nonzero().squeeze(-1)  # NaN is not 0


def keep_rows_(dlogits: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the live rows, which rows they were); the last of them move to the places of dead
    ones.

    So at most as many rows are moved as are dead; `live` must be ascending.
    """
    count = len(live)
    dead = torch.ones(len(dlogits), dtype=torch.bool, device=live.device)
    dead[live] = False
    places, movers = dead[:count].nonzero().squeeze(-1), live[live >= count]
    for place, mover in zip(places.tolist(), movers.tolist(), strict=True):
        dlogits[place] = dlogits[mover]
    order = torch.arange(count, device=live.device)
    order[places] = movers
    return dlogits[:count], order


def heavy_columns(dlogits: Tensor, grad_tol: float) -> tuple[Tensor | None, Mass]:
    """Return the columns that the gradient GEMMs need; None = all of them.

    With m_v = sum_i |dlogits_iv|, the lightest columns are left out as long as

        sum of their m_v <= grad_tol * sum of all m_v.

    So for rows with states x_i, sum_i |ddx_i| <= grad_tol * sum_iv |dlogits_iv| * max_v |w_v|, and
    sum_v |ddw_v| <= the same with max_i |x_i|: a bound that holds also where all errors align.
    """
    mass = _mass(dlogits)
    total = mass.sum(dtype=torch.float64)
    if not total.isfinite():
        return None, Mass(0.0, float(total))
    limit = grad_tol * total
    # V columns of at most limit / V each stay under the limit: only the others need sorting.
    light = mass <= limit / len(mass)
    sum_of_light = mass[light].sum(dtype=torch.float64)
    others = light.logical_not().nonzero().squeeze(-1)
    lightest, order = mass[others].sort()
    running = sum_of_light + lightest.cumsum(0, dtype=torch.float64)
    left_out = int((running <= limit).sum())
    if len(others) - left_out > WORTHWHILE * len(mass):
        return None, Mass(0.0, float(total))
    dropped = float(running[left_out - 1] if left_out else sum_of_light)
    return others[order[left_out:]].sort().values, Mass(dropped, float(total))


class LightColumns:
    """A chooser of columns that keeps account of the gradient they leave out."""

    def __init__(self, grad_tol: float, vocab: int, device: torch.device):
        self.grad_tol = grad_tol
        self.dropped = self.total = 0.0
        self.needed = torch.zeros(vocab, dtype=torch.bool, device=device) if grad_tol > 0 else None

    def parts(self, rows: int) -> list[slice]:
        """Return groups of rows that choose columns together: fewer rows need fewer columns."""
        step = max(1, rows) if self.grad_tol == 0.0 else PART_ROWS
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def leave_out(self, dlogits: Tensor) -> Tensor | None:
        """Return the columns that the gradient products of these rows need; None = all of them."""
        if self.needed is None:
            return None
        columns, mass = heavy_columns(dlogits, self.grad_tol)
        self.dropped, self.total = self.dropped + mass.dropped, self.total + mass.total
        self.needed[slice(None) if columns is None else columns] = True
        return columns

    @property
    def share(self) -> float:
        return self.dropped / self.total if self.total else 0.0

    @property
    def kept(self) -> Tensor | None:
        """Return the columns that some chunk needed; None if that is most of them."""
        if self.needed is None or self.needed.sum() > WORTHWHILE * len(self.needed):
            return None
        return self.needed.nonzero().squeeze(-1)


def _mass(dlogits: Tensor) -> Tensor:
    """(V,) sum of |dlogits| over the rows, a few of them at a time: a tenth of the time of a norm
    along the first dimension, and no second matrix."""
    wide = torch.float64 if dlogits.dtype == torch.float64 else torch.float32
    mass = torch.zeros(dlogits.shape[1], dtype=wide, device=dlogits.device)
    for block in dlogits.split(max(1, BLOCK_ELEMENTS // dlogits.shape[1])):
        mass += block.abs().sum(0, dtype=wide)
    return mass
