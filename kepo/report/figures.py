"""The curves of the page: which keys stand together, and their points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kepo.report.collect import RunRecord, number, numbers
from kepo.run.curves import FORMER, points_of

MOST_POINTS = 1500
"""The most points of a curve; a longer one is drawn by the means of equal stretches of it."""


class Panel(NamedTuple):
    """A picture of the page."""

    title: str
    keys: tuple[str, ...]
    """Keys of metrics.jsonl; one that ends in ``*`` means all that begin so."""
    unit: str
    note: str
    """A sentence that says what to see in it."""
    share: bool = False
    """True if its values lie between 0 and 1."""


SPEED = "whole step"
"""The name of a curve that is not in the log: completion tokens that carried loss, over the seconds
of the whole step."""
PANELS = (
    Panel("Reward", ("reward", "rewards/*"), "", "Mean over the completions of a step."),
    Panel(
        "Loss",
        ("kepo/policy_loss", "kepo/distill_loss"),
        "",
        "The policy term, and the weighted divergence before distill_coef.",
    ),
    Panel(
        "Entropy",
        ("entropy",),
        "nat",
        "Mean over the student's tokens; near 0 it explores no more.",
    ),
    Panel(
        "Divergence from the teacher",
        ("kepo/divergence", "kl"),
        "nat",
        "Per token, of the completions whose gate is open; kl is from the start point.",
    ),
    Panel(
        "Gate",
        ("kepo/gate_rate", "kepo/teacher_skipped_frac"),
        "",
        "Completions whose gate is open, and tokens that the teacher did not have to score.",
        True,
    ),
    Panel(
        "Hints",
        ("kepo/hint_rate", "kepo/rescue_rate", "kepo/hint_accept_rate", "kepo/hinted_rate"),
        "",
        "Groups that got a hint, groups that it rescued, and completions sampled with one.",
        True,
    ),
    Panel(
        "Groups without a signal",
        ("frac_reward_zero_std", "completions/clipped_ratio"),
        "",
        "Groups whose rewards are all equal, and completions cut off at the length limit.",
        True,
    ),
    Panel(
        "Length of completions",
        ("completions/mean_length", "completions/min_length", "completions/max_length"),
        "tokens",
        "End token included.",
    ),
    Panel(
        "Tokens per second",
        (SPEED, "time/tokens_per_second/*"),
        "",
        "Completion tokens that carried loss, over the whole step; where the log has them, those "
        "of each phase, over its own seconds.",
    ),
    Panel(
        "Shares of a step's time",
        ("time/share/*",),
        "",
        "The seconds of each phase, over those of the whole step.",
        True,
    ),
    Panel(
        "Seconds of a step",
        ("step_time", "time/*"),
        "",
        "The whole step and its phases; evaluation and checkpoints are not in it.",
    ),
    Panel("Memory", ("mem/*",), "10⁹ bytes", "The most held since the start, of any process."),
    Panel("Gradient", ("grad_norm",), "", "Before clipping; a gap is a step that was skipped."),
    Panel("Learning rate", ("learning_rate",), "", "Of each step."),
)
IN_TITLES = ("rewards/", "completions/", "kepo/", "time/", "tokens_per_second/", "share/")
"""Beginnings of keys that the titles of panels say, in the order in which they are taken off."""


def panels(runs: Sequence[RunRecord]) -> dict[str, list[dict[str, Any]]]:
    """Return the panels that have points, as JSON: ``main``, and ``others`` for every other key.

    Of one run, a panel has all its keys. Of several, each key has a panel of its own, so that the
    runs' curves lie over each other.
    """
    logs = [_with_speed(run.steps) for run in runs]
    known = dict.fromkeys(
        _today(key) for log in logs for record in log for key in record if key != "step"
    )
    drawn: set[str] = set()
    main = _accuracy(runs)
    for panel in PANELS:
        keys = [key for word in panel.keys for key in _matching(word, known) if key not in drawn]
        drawn |= {*keys}
        shown = [key for key in keys if not key.endswith("/std")]
        for several in [shown] if len(runs) == 1 else [[key] for key in shown]:
            main += _drawn(panel, several, logs, alone=len(runs) == 1 or len(shown) == 1)
    others = []
    for key in known:
        if key not in drawn or key.endswith("/std"):
            others += _drawn(Panel(key, (key,), "", ""), [key], logs, alone=True)
    return {"main": main, "others": others}


def _accuracy(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the panels of greedy accuracy over the steps: by modality, or of several runs its mean
    over modalities."""
    series = []
    for place, run in enumerate(runs):
        tables = [(record["step"], record["eval"]) for record in run.evaluations]
        mean = [(step, sum(table.values()) / len(table)) for step, table in tables]
        name = "mean over modalities" if tables and len(tables[0][1]) > 1 else "accuracy"
        series.append((place, name, mean))
        for modality in sorted({name for _, table in tables for name in table}):
            points = [(step, table[modality]) for step, table in tables if modality in table]
            if len(runs) == 1 and name != "accuracy":
                series.append((place, modality, points))
    made = [_series(place, name, points) for place, name, points in series if points]
    if not made:
        return []
    note = "Greedy answers to the held-out questions; each modality counts the same in the mean."
    return [
        {"title": "Accuracy", "unit": "", "note": note, "share": True, "exact": True}
        | {"series": made}
    ]


def _drawn(
    panel: Panel, keys: Sequence[str], logs: Sequence[list[dict[str, Any]]], alone: bool
) -> list[dict[str, Any]]:
    series = []
    for place, log in enumerate(logs):
        for key in keys:
            found = [(step, number(value)) for step, value in points_of(log, key)]
            if any(value is not None for _, value in found):
                series.append(_series(place, key, found))
    if not series:
        return []
    title = panel.title if alone else f"{panel.title}: {_words(keys[0])}"
    return [
        {"title": title, "unit": panel.unit, "note": panel.note, "share": panel.share}
        | {"exact": False, "series": series}
    ]


def _series(place: int, key: str, points: Sequence[tuple[int, float | None]]) -> dict[str, Any]:
    each = -(-len(points) // MOST_POINTS)
    steps, values = [], []
    for start in range(0, len(points), each):
        part = points[start : start + each]
        known = [value for _, value in part if value is not None]
        steps.append(part[-1][0])
        values.append(float(f"{sum(known) / len(known):.5g}") if known else None)
    return {"run": place, "key": key, "name": _words(key), "x": steps, "y": values, "each": each}


def _words(key: str) -> str:
    """Return a key of the log as the page names it: without the part that the panel's title has."""
    if key.startswith("rewards/"):
        key = key.removesuffix("/mean")
    for start in IN_TITLES:
        key = key.removeprefix(start)
    return key.replace("_", " ")


def _matching(word: str, known: dict[str, None]) -> list[str]:
    if word.endswith("*"):
        return [key for key in known if key.startswith(word[:-1])]
    return [word] if word in known else []


def _today(key: str) -> str:
    return next((now for now, before in FORMER.items() if before == key), key)


def _with_speed(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records with the number that SPEED names."""
    found = []
    for record in steps:
        known = numbers(record)
        tokens, seconds = known.get("kepo/completion_tokens"), known.get("step_time")
        speed = {SPEED: tokens / seconds} if tokens is not None and seconds else {}
        found.append({**record, **speed})
    return found
