"""What a run leaves: tidy rows, one per shape, case and provider, and the ratios we promise."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from pathlib import Path

from benchmarks.losses.measure import Measurement, Quantiles
from benchmarks.stamp import PACKAGES

COLUMNS = (
    *("machine", "capability", "threads", "python", "torch", *PACKAGES, "commit", "date"),
    *("shape", "device", "dtype", "N", "H", "Ht", "V", "entropy"),
    *("case", "provider", "seconds", "seconds_p20", "seconds_p80"),
    *("x_floor", "x_floor_p20", "x_floor_p80", "peak_mib", "grad_error", "rounds"),
    *("ratio", "ratio_p20", "ratio_p80", "target", "met", "note"),
)
Row = dict[str, object]


@dataclass(frozen=True)
class Promise:
    """A ratio of measurements of one shape, and what it must not exceed.

    Each side is the `(case, provider)` of calls whose times, or peaks of memory, are added up.
    """

    name: str
    title: str
    target: dict[str, float]  # by device type; a device that is not here has no such promise
    shapes: tuple[str, ...]  # where it is promised; elsewhere the ratio is printed without target
    over: tuple[str, str]
    by: tuple[tuple[str, str], ...]
    memory: bool = False


# All but grad_tol, which is refused on CUDA, is promised on both devices. What saves work on CUDA
# is what is known before the call, mask, gate and weights; not that a token's coefficients are 0.
PROMISES = (
    Promise(
        "kd/floor",
        "gated KD, all open / its bare GEMMs",
        {"cpu": 1.10, "cuda": 1.15},
        ("design",),
        ("kd_open", "ours"),
        (("kd_open", "floor"),),
    ),
    Promise(
        "half/open",
        "gated KD, half open / all open",
        {"cpu": 0.55, "cuda": 0.55},
        ("design",),
        ("kd_half", "ours"),
        (("kd_open", "ours"),),
    ),
    Promise(
        "joint/two_calls",
        "KEPO at once / GRPO, then gated KD",
        {"cpu": 0.65, "cuda": 0.65},
        ("joint",),
        ("joint", "ours"),
        (("two_calls", "ours"),),
    ),
    Promise(
        "kd_tol/dense_floor",
        "KD with grad_tol (CPU) / its dense bare GEMMs",
        {"cpu": 0.62},
        ("peaked",),
        ("kd_tol", "ours"),
        (("kd_tol", "floor"),),
    ),
    Promise(
        "grpo_tol/dense_floor",
        "GRPO with grad_tol (CPU) / its dense bare GEMMs",
        {"cpu": 0.45},
        ("peaked",),
        ("grpo_tol", "ours"),
        (("grpo_tol", "floor"),),
    ),
    Promise(
        "memory/eager",
        "peak memory / torch eager's",
        {"cpu": 0.20, "cuda": 0.20},
        ("memory",),
        ("kd_open", "ours"),
        (("kd_open", "eager"),),
        memory=True,
    ),
)
GRADIENT_ERROR = 1e-3  # of the cases with grad_tol


def measured_row(case: str, provider: str, result: Measurement, floor: Measurement | None) -> Row:
    over = result.over([floor]) if floor else Quantiles.of([])
    return {
        "case": case,
        "provider": provider,
        **_quantiles("seconds", result.seconds),
        **_quantiles("x_floor", over),
        "peak_mib": result.peak_mib,
        "rounds": result.rounds,
        "note": result.note,
        **({"dtype": result.dtype} if result.dtype else {}),
    }


def ratio_row(name: str, ratio: Quantiles, target: float | None, note: str) -> Row:
    met = "" if target is None else "yes" if ratio.median <= target else "no"
    return {
        "case": f"ratio:{name}",
        "provider": "ours",
        **_quantiles("ratio", ratio),
        "target": target,
        "met": met,
        "note": note,
    }


def promised_rows(
    shape: str, device: str, measured: dict[tuple[str, str], Measurement]
) -> list[Row]:
    """The promises whose measurements this run has."""
    rows = []
    for promise in PROMISES:
        needed = (promise.over, *promise.by)
        if any(key not in measured for key in needed):
            continue
        mine, others = measured[promise.over], [measured[key] for key in promise.by]
        if promise.memory:
            if shape not in promise.shapes:  # other shapes' peers are scaled, or too small
                continue
            if mine.peak_mib is None or any(not other.peak_mib for other in others):
                continue
            ratio = Quantiles.of([mine.peak_mib / sum(other.peak_mib for other in others)])
        else:
            ratio = mine.over(others)
        target = promise.target.get(device) if shape in promise.shapes else None
        rows.append(ratio_row(promise.name, ratio, target, promise.title))
    return rows


def write(path: Path, rows: Iterable[Row], columns: tuple[str, ...] = COLUMNS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(value) for name, value in row.items()} for row in rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows as text; a ValueError if this is not a results file."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} is no results file of bench_loss.py: no column {missing[0]}")
        return list(reader)


def _quantiles(name: str, values: Quantiles) -> Row:
    return dict(zip((name, f"{name}_p20", f"{name}_p80"), values, strict=True))


def _text(value: object) -> object:
    if value is None or (isinstance(value, float) and isnan(value)):
        return ""
    return f"{value:.5g}" if isinstance(value, float) else value
