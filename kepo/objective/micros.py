"""The micro-batches of a step: whole groups, as many as fit, equal work for all ranks.

Work is counted in tokens of the rows that a model computes: with ``share_prompts`` a row is a
prompt with its completions (kepo.models.packing), without it a prompt with one completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kepo.distributed.processes import rank, world_size
from kepo.models.encoding import Prompt
from kepo.models.packing import packed_length
from kepo.models.vlm import VLM
from kepo.objective.batch import Batch
from kepo.sections import OptimizerConfig

WORTH_A_CUT = 0.95
"""A group is cut for the sake of equal work if the rank with the most tokens gets at most this
share of them."""


class Row(NamedTuple):
    """One row of a model's forward."""

    places: tuple[int, ...]
    """Places in the batch of the completions that are computed in it."""
    tokens: int
    teacher: int = 0
    """The place of their teacher: a micro-batch has one."""


Micro = list[Row]
"""The rows of a micro-batch; they are padded to the longest."""


def lay_out(batch: Batch, policy: VLM, config: OptimizerConfig) -> tuple[list[list[Batch]], float]:
    """Return this rank's micro-batches of each mini-batch of a step, and the share of padding in
    those of all ranks."""
    minis, plans = batch.mini_batches(), []
    for mini in minis:
        lengths = policy.encoder.lengths(mini.prompts)
        plans.append(plan_micros(mini, lengths, config, policy.share_prompts))
    own = [own_micros(mini, plan) for mini, plan in zip(minis, plans, strict=True)]
    return own, padding([share for plan in plans for share in plan])


def own_micros(batch: Batch, plan: Sequence[Sequence[Micro]]) -> list[Batch]:
    """Return this rank's micro-batches of a mini-batch, as `plan_micros` laid them out.

    Every rank gets equally many, so that all ranks can work on each at once. Where a share has run
    out they are one completion without any loss.
    """
    own = [batch.select([p for row in micro for p in row.places]) for micro in plan[rank()]]
    return own + [batch.lossless()] * (max(map(len, plan)) - len(own))


def plan_micros(
    batch: Batch,
    prompt_lengths: Sequence[int],
    config: OptimizerConfig,
    share_prompts: bool,
    ranks: int | None = None,
) -> list[list[Micro]]:
    """Lay out the micro-batches of every rank. prompt_lengths: tokens of each completion's prompt.
    ranks: their number; None = those of this run.

    The longest rows come first, each to the rank that has the fewest tokens so far; rows of similar
    length then fill a micro-batch up to ``micro_batch`` completions and ``micro_tokens`` tokens,
    padding included. Groups that are left when all ranks have equally many are cut, if the rank
    with the most tokens gets fewer that way.
    """
    lengths, teachers = batch.completion_mask.sum(-1).tolist(), batch.teacher.tolist()

    def row(places: Sequence[int]) -> Row:
        own, first = [lengths[place] for place in places], places[0]
        tokens = prompt_lengths[first] + own[0]
        if share_prompts:
            tokens = packed_length(prompt_lengths[first], own)
        return Row(tuple(places), tokens, teachers[first])

    rows = sorted(_rows(batch, row, config, share_prompts), key=_longest_first)
    shares = _evened(rows, row, world_size() if ranks is None else ranks)
    return [_filled(share, config) for share in shares]


def padding(plan: Sequence[Sequence[Micro]]) -> float:
    """Return the share of all computed tokens that is padding."""
    micros = [micro for share in plan for micro in share]
    computed = sum(len(micro) * max(row.tokens for row in micro) for micro in micros)
    return 1.0 - sum(map(_tokens, micros)) / max(1, computed)


def _rows(
    batch: Batch,
    row: Callable[[Sequence[int]], Row],
    config: OptimizerConfig,
    share_prompts: bool,
) -> list[Row]:
    """Return the rows of a step, in the order of the batch."""

    def fitting(places: Sequence[int]) -> list[Row]:
        """Cut a group in halves until it fits, or is one completion."""
        whole = row(places)
        few = len(places) <= config.micro_batch
        short = config.micro_tokens is None or whole.tokens <= config.micro_tokens
        if len(places) == 1 or (few and short):
            return [whole]
        return [part for half in _in_parts(whole, 2, row) for part in fitting(half.places)]

    if not share_prompts:
        return [row([place]) for place in range(len(batch))]
    groups: dict[Prompt, list[int]] = {}
    for place, prompt in enumerate(batch.prompts):
        groups.setdefault(prompt, []).append(place)
    return [part for places in groups.values() for part in fitting(places)]


def _in_parts(one: Row, parts: int, row: Callable[[Sequence[int]], Row]) -> list[Row]:
    """Cut a row into so many, or into single completions."""
    each = -(-len(one.places) // parts)
    return [row(one.places[first : first + each]) for first in range(0, len(one.places), each)]


def _evened(
    rows: Sequence[Row], row: Callable[[Sequence[int]], Row], ranks: int
) -> list[list[Row]]:
    """Share rows out, the longest first in ``rows``; cut those left over when all ranks have
    equally many, into so few parts as it takes."""
    whole = len(rows) // ranks * ranks
    longest = max((len(one.places) for one in rows[whole:]), default=1)
    shares, parts = _shared_out(rows, ranks), 2
    while parts < 2 * longest:
        cut = [part for one in rows[whole:] for part in _in_parts(one, parts, row)]
        other = _shared_out([*rows[:whole], *cut], ranks)
        if _most(other) < WORTH_A_CUT * _most(shares):
            shares = other
        parts *= 2
    return shares


def _shared_out(rows: Sequence[Row], ranks: int) -> list[list[Row]]:
    """Give each row, the longest first, to the rank that has the fewest tokens so far."""
    shares: list[list[Row]] = [[] for _ in range(ranks)]
    for row in sorted(rows, key=_longest_first):
        min(shares, key=_tokens).append(row)
    return shares


def _filled(rows: Sequence[Row], config: OptimizerConfig) -> list[Micro]:
    """Put rows of one teacher, the longest first, together as long as they fit."""
    micros: list[Micro] = []
    for row in sorted(rows, key=lambda row: row.teacher):
        if micros and micros[-1][0].teacher == row.teacher:
            micro = micros[-1]
            count = sum(len(other.places) for other in micro) + len(row.places)
            tokens = (len(micro) + 1) * micro[0].tokens
            if count <= config.micro_batch and tokens <= (config.micro_tokens or tokens):
                micro.append(row)
                continue
        micros.append([row])
    return micros


def _longest_first(row: Row) -> tuple[int, tuple[int, ...]]:
    return -row.tokens, row.places


def _most(shares: Sequence[Sequence[Row]]) -> int:
    """Return the largest number of tokens of any rank: the others wait for that one."""
    return max(map(_tokens, shares))


def _tokens(rows: Sequence[Row]) -> int:
    return sum(row.tokens for row in rows)
