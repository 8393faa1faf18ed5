"""The tables of the page: summary, accuracy before and after, data left out, settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from kepo.config import Config
from kepo.evaluation.statistics import wilson
from kepo.report.collect import RunRecord, mapping, number, numbers
from kepo.run.curves import points_of

NOT_KNOWN = "–"


class Score(NamedTuple):
    """An accuracy; its interval is None where the number of questions is not known."""

    share: float
    low: float | None = None
    high: float | None = None


class Accuracy(NamedTuple):
    """What one run scores on the questions of one modality, or of one type."""

    name: str
    questions: int | None
    chance: float | None
    before: Score | None
    after: Score
    """The last evaluation; ``before`` is the first, None if that is the last too."""
    mended: int | None
    """Questions that were answered wrong before and right after; ``broken`` is the reverse."""
    broken: int | None


def accuracies(run: RunRecord, kind: str) -> list[Accuracy]:
    """Return a row for each modality (kind "modalities") or type of question ("question_types")."""
    key = {"modalities": "eval", "question_types": "eval_types"}[kind]
    tables = [
        (record, numbers(record.get(key))) for record in run.evaluations if mapping(record.get(key))
    ]
    if not tables:
        return []
    asked = mapping(mapping(run.data.get("eval")).get(kind))
    (first, old), (last, new) = tables[0], tables[-1]
    rows = []
    for name, share in new.items():
        facts = numbers(asked.get(name))
        before, after = (_items(record, name, key) for record in (first, last))
        count = len(after) or int(facts.get("questions", 0)) or None
        one = len(tables) == 1
        paired = not one and len(before) == len(after) > 0
        pairs = [*zip(before, after, strict=True)] if paired else []
        rows.append(
            Accuracy(
                name,
                count,
                facts.get("chance"),
                None if one or name not in old else _score(old[name], count),
                _score(share, count),
                pairs.count(("0", "1")) if paired else None,
                pairs.count(("1", "0")) if paired else None,
            )
        )
    return rows


def mean_of(rows: Sequence[Accuracy]) -> Accuracy | None:
    """Return the mean over rows, each counting the same; None for fewer than two."""
    if len(rows) < 2:
        return None
    chances = [row.chance for row in rows if row.chance is not None]
    befores = [row.before.share for row in rows if row.before is not None]
    counts = [row.questions for row in rows if row.questions is not None]
    mended = [row.mended for row in rows if row.mended is not None]
    broken = [row.broken for row in rows if row.broken is not None]
    complete = len(rows)
    return Accuracy(
        "mean",
        sum(counts) if len(counts) == complete else None,
        sum(chances) / complete if len(chances) == complete else None,
        Score(sum(befores) / complete) if len(befores) == complete else None,
        Score(sum(row.after.share for row in rows) / complete),
        sum(mended) if len(mended) == complete else None,
        sum(broken) if len(broken) == complete else None,
    )


def compared(runs: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """Return the accuracies of the runs side by side: a table by modality, one by question type.

    A row has a cell for each run, None where the run did not ask such questions; the last row of a
    table of several is their mean.
    """
    tables = []
    for title, kind in (("Modality", "modalities"), ("Question type", "question_types")):
        columns = [{row.name: row for row in accuracies(run, kind)} for run in runs]
        names = dict.fromkeys(name for column in columns for name in column)
        rows = [_row(name, [column.get(name) for column in columns]) for name in names]
        if len(rows) > 1:
            means = [mean_of([*column.values()]) for column in columns]
            rows.append(_row("mean", means) | {"mean": True})
        if rows:
            tables.append({"title": title, "rows": rows})
    return tables


def _row(name: str, cells: Sequence[Accuracy | None]) -> dict[str, Any]:
    there = [cell for cell in cells if cell is not None]
    return {
        "name": name,
        "questions": next((cell.questions for cell in there if cell.questions is not None), None),
        "chance": next((cell.chance for cell in there if cell.chance is not None), None),
        "cells": [None if cell is None else cell._asdict() for cell in cells],
        "mean": False,
    }


def _items(record: dict[str, Any], name: str, key: str) -> str:
    """Return the 0 and 1 of each question; "" for types, whose items are not logged."""
    found = mapping(record.get("eval_items")).get(name) if key == "eval" else None
    return found if isinstance(found, str) and not set(found) - {"0", "1"} else ""


def _score(share: float, count: int | None) -> Score:
    if count is None or not 0 <= share <= 1:
        return Score(share)
    _, low, high = wilson(round(share * count), count)
    return Score(share, low, high)


def summary(run: RunRecord) -> list[tuple[str, str, str]]:
    """Return ``(name, value, explanation)`` of what a reader asks first."""
    rows = accuracies(run, "modalities")
    whole = mean_of(rows) or (rows[0] if rows else None)
    over = f"mean over {len(rows)} modalities" if len(rows) > 1 else "greedy, held-out questions"
    steps = number(run.config.get("steps"))
    seconds = sum(value for _, value in _values(run, "step_time"))
    cards = [
        ("Accuracy", *_gain(whole, over)),
        ("Steps", f"{run.done}" + (f" of {steps:.0f}" if steps else ""), _duration(seconds)),
    ]
    for name, key, form in (
        ("Reward", "reward", "{:.2f}"),
        ("Gate open", "kepo/gate_rate", "{:.0%}"),
        ("Groups hinted", "kepo/hint_rate", "{:.0%}"),
        ("Groups rescued", "kepo/rescue_rate", "{:.0%}"),
    ):
        early, late = _ends(run, key)
        if early is None or late is None:
            cards.append((name, NOT_KNOWN, ""))
        else:
            first = f"last tenth of the steps; first: {form.format(early)}"
            cards.append((name, form.format(late), first))
    tokens = sum(value for _, value in _values(run, "kepo/completion_tokens"))
    speed = f"{tokens / seconds:,.0f}" if tokens and seconds else NOT_KNOWN
    memory = max((value for _, value in _values(run, "mem/peak_gb")), default=None)
    cards += [
        ("Tokens per second", speed, "trained on, over the whole step" if tokens else ""),
        (
            "Peak memory",
            f"{memory:.1f} GB" if memory is not None else NOT_KNOWN,
            "most of any process" if memory is not None else "",
        ),
    ]
    return cards


def _gain(whole: Accuracy | None, over: str) -> tuple[str, str]:
    """Return an accuracy after, and from where it came over which questions."""
    if whole is None:
        return NOT_KNOWN, "not evaluated"
    if whole.before is None:
        return f"{whole.after.share:.1%}", over
    return f"{whole.after.share:.1%}", f"before: {whole.before.share:.1%}; {over}"


def _values(run: RunRecord, key: str) -> list[tuple[int, float]]:
    found = [(step, number(value)) for step, value in points_of(run.steps, key)]
    return [(step, value) for step, value in found if value is not None]


def _ends(run: RunRecord, key: str) -> tuple[float | None, float | None]:
    """Return the means over the first and the last tenth of the steps."""
    values = [value for _, value in _values(run, key)]
    if not values:
        return None, None
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds of steps"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes of steps"
    return f"{seconds / 3600:.1f} hours of steps"


def left_out(run: RunRecord) -> list[dict[str, Any]]:
    """Return what data.json says of training and evaluation data, in the order of the file."""
    found = []
    for name, title in (("train", "Training"), ("eval", "Evaluation")):
        record = mapping(run.data.get(name))
        if not record:
            continue
        problems = record.get("first_problems")
        bad = numbers(record.get("bad_records"))
        found.append(
            {
                "title": title,
                "path": str(record.get("path", NOT_KNOWN)),
                "layout": str(record.get("layout", NOT_KNOWN)),
                "records": _whole(record.get("records")),
                "questions": _whole(record.get("questions")),
                "bad": {kind: int(count) for kind, count in bad.items()},
                "total": int(sum(bad.values())),
                "problems": [str(one) for one in problems] if isinstance(problems, list) else [],
                "quirks": {
                    kind: int(count) for kind, count in numbers(record.get("quirks")).items()
                },
            }
        )
    return found


def shared_pictures(run: RunRecord) -> str | None:
    """Return a sentence about pictures that are trained on and evaluated on; None if there is no
    evaluation."""
    shared = mapping(run.data.get("shared"))
    count = number(shared.get("images"))
    if count is None:
        return None
    by = "content" if shared.get("compared") == "contents" else "path"
    if not count:
        return f"No picture of the evaluation is trained on, compared by {by}."
    return (
        f"{count:.0f} pictures are trained on and evaluated on, compared by {by}: "
        f"{_whole(shared.get('eval_questions'))} of the evaluation's questions are about them."
    )


def _whole(value: Any) -> str:
    found = number(value)
    return NOT_KNOWN if found is None else f"{found:,.0f}"


class Setting(NamedTuple):
    """A setting of the runs."""

    name: str
    default: str
    values: list[str]
    """Its value in each run."""
    differs: bool
    """True if the runs have different values."""


def settings(runs: Sequence[RunRecord]) -> tuple[list[Setting], list[Setting]]:
    """Return ``(the settings that are not the default in some run, all others)``."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    names = dict.fromkeys([*defaults, *(name for run in runs for name in run.config)])
    changed: list[Setting] = []
    plain: list[Setting] = []
    for name in names:
        values = [_spelt(run.config[name]) if name in run.config else NOT_KNOWN for run in runs]
        default = _spelt(defaults[name]) if name in defaults else NOT_KNOWN
        known = {value for value in values if value != NOT_KNOWN}
        one = Setting(name, default, values, len({*values}) > 1)
        if known:
            (changed if known != {default} else plain).append(one)
    return changed, plain


def _spelt(value: Any) -> str:
    """Return a value as a recipe in YAML spells it, roughly."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_spelt, value))}]"
    words: dict[Any, str] = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
