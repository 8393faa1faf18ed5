"""What a server says of a completion: the likeliest tokens at each place, as tensors that have been
checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kepo.errors import KepoTeacherError
from kepo_kernels import TopK

ABOVE_ONE = 1e-3
"""By how much probabilities that were rounded may add up to more than 1."""

ALIKE = 1e-2
"""Log-probabilities that are all this close to each other are those of a uniform law."""
MANY = 32
"""The number of log-probabilities among which that is no chance."""


class Said(NamedTuple):
    """A server's law at the places of one completion of T tokens."""

    ids: Tensor  # (T, K) int64, the likeliest first
    logprobs: Tensor  # (T, K) fp32
    own: Tensor  # (T,) fp32 log-probability of the completion's own token


def laid_out(said: Sequence[Said], length: int) -> tuple[TopK, Tensor]:
    """Return what was said of N completions as the losses take it, (N, length, K), and the
    (N, length) log-probabilities of their own tokens. Where a completion is over there are no ids
    (-1), and the log-probabilities are 0."""

    def rows(parts: Sequence[Tensor], filling: int) -> Tensor:
        whole = parts[0].new_full((len(parts), length, *parts[0].shape[1:]), filling)
        for row, part in zip(whole, parts, strict=True):
            row[: len(part)] = part
        return whole

    ids, logprobs, own = zip(*said, strict=True)
    return TopK(rows(ids, -1), rows(logprobs, 0)), rows(own, 0)


def read(answer: Any, tokens: Sequence[int], k: int, vocabulary: int, source: str) -> Said:
    """Return what an answer with ``prompt_logprobs`` says of its last tokens, which must be
    ``tokens``.

    At each place it gives a mapping from ids to log-probabilities with their ranks: of the k
    likeliest tokens, and of the prompt's own token if that is none of them. vocabulary: the number
    of ids there are. source: ``setting=address`` of the server, for the sentence of a
    KepoTeacherError about an answer that is too short, of other tokens, not finite, or uniform.
    """

    places = answer.get("prompt_logprobs") if isinstance(answer, dict) else None
    if not isinstance(places, list) or len(places) <= len(tokens):
        given = len(places) if isinstance(places, list) else "no"
        raise _wrong(
            source, f"gives {given} prompt_logprobs; expected more than {len(tokens)}, one a token"
        )
    whole = answer.get("prompt_token_ids")
    if whole is not None and whole[-len(tokens) :] != list(tokens):
        raise _wrong(source, "has read other token ids than it was sent; is it another tokenizer?")
    rows = [
        _row(place, token, k, vocabulary, source)
        for place, token in zip(places[-len(tokens) :], tokens, strict=True)
    ]
    said = Said(
        torch.tensor([ids for ids, _, _ in rows]),
        torch.tensor([logprobs for _, logprobs, _ in rows]),
        torch.tensor([own for _, _, own in rows]),
    )
    found = said.logprobs
    if k > 1 and found.numel() >= MANY and found.max() - found.min() < ALIKE:
        mean = float(said.own.mean())
        raise _wrong(
            source,
            f"says {mean:.2f} of every token, whatever it is, as a uniform law does (-ln of "
            f"{math.exp(-mean):.0f} tokens): have its weights been lost? Restart it",
        )
    return said


def as_of_vllm(answer: Any, source: str) -> dict[str, Any]:
    """Return an answer of SGLang's as `read` takes it: its places have lists of log-probability, id
    and text, of the likeliest tokens and of the prompt's own."""
    try:
        facts = answer["meta_info"]
        own = [(one[0], int(one[1])) for one in facts["input_token_logprobs"]]
        best = [[(x[0], int(x[1])) for x in one or ()] for one in facts["input_top_logprobs"]]
        places = [
            {str(token): {"logprob": logprob} for logprob, token in [*some, mine]}
            for some, mine in zip(best, own, strict=True)
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _wrong(source, f"answers /generate without its laws: {str(answer)[:200]}") from error
    return dict(prompt_logprobs=places, prompt_token_ids=[token for _, token in own])


def _row(
    place: Any, token: int, k: int, vocabulary: int, source: str
) -> tuple[list[int], list[float], float]:
    """Return ids and log-probabilities of the k likeliest tokens at a place, and that of its own
    token."""
    try:
        found = {int(one): float(facts["logprob"]) for one, facts in place.items()}
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise _wrong(source, f"gives {str(place)[:100]} as log-probabilities of a place") from error
    if token not in found:
        raise _wrong(
            source, f"says nothing of token {token}, which it was sent; is it another tokenizer?"
        )
    if len(found) < k:
        raise _wrong(source, f"gives {len(found)} log-probabilities; expected teacher_top_k={k}")
    if not all(0 <= one < vocabulary for one in found):
        raise _wrong(
            source, f"names token {max(found)}; the student has {vocabulary}: is it another one's?"
        )
    best = sorted(found, key=lambda one: -found[one])[:k]
    values = [found[one] for one in best]
    total = sum(map(math.exp, values)) if all(map(math.isfinite, values)) else math.nan
    if not (total <= 1 + ABOVE_ONE and math.isfinite(found[token])):
        raise _wrong(
            source,
            f"gives log-probabilities {values[:3]}..., which are those of no law: have its weights "
            "been lost?",
        )
    return best, values, found[token]


def _wrong(source: str, what: str) -> KepoTeacherError:
    return KepoTeacherError(f"{source} {what}")
