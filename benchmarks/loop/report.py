"""What phases.py found: rows as a table and as a file while it works, and in the end a picture."""

from __future__ import annotations

import csv
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.loop.update import Mismatch

COLUMNS = (
    *("machine", "capability", "threads", "python", "torch", "transformers", "commit", "date"),
    *("device", "dtype", "student", "teacher", "student_parameters", "teacher_parameters"),
    *("lora_rank", "V", "completions", "prompt_tokens", "completion_tokens", "micro_batch"),
    *("gate_rate", "phase", "way", "teacher_tokens", "seconds", "seconds_p20", "seconds_p80"),
    *("rounds", "peak_mib", "held_mib", "above_mib", "planned_mib", "reserved_mib"),
    *("planned_reserve_mib", "loss", "gradient_norm", "gradient_gap"),
    *("x_seconds", "x_seconds_p20", "x_seconds_p80", "x_peak", "x_above", "note"),
)
Row = dict[str, object]
T = TypeVar("T")
HEAD = {
    **dict(gate_rate="gate", phase="phase", way="way", seconds="seconds", x_seconds="fused/it"),
    **dict(teacher_tokens="teacher tokens", peak_mib="peak MiB", held_mib="held", note="note"),
    **dict(planned_mib="planned", x_peak="fused/it", x_above="above", gradient_gap="gap"),
}
COLOURS = {"fused": "#c0392b", "states": "#2980b9", "everywhere": "#7f8c8d", "whole": "#7f8c8d"}
HELD = "#dddddd"


class Report:
    """Rows, each printed and on disk as soon as it is known; what failed; what time is left."""

    def __init__(self, facts: Row, file: Path | None, ends: float) -> None:
        self.facts, self.file, self.ends = facts, file, ends
        self.rows: list[Row] = []
        self.failed = False
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        print(line(HEAD), flush=True)

    def left(self) -> float:
        return self.ends - time.monotonic()

    def add(self, row: Row) -> None:
        row = self.facts | row
        self.rows.append(row)
        print(line(row), flush=True)
        if self.file is not None:
            with self.file.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
                writer.writerow({name: text(value) for name, value in row.items()})

    def attempt(self, row: Row, needs: float, work: Callable[[], T]) -> T | None:
        """What it returns; None, and a row that says why, where it does not come to its end."""
        if self.left() < needs:
            self.add(row | {"note": "left out: the time is over"})
            return None
        try:
            return work()
        except torch.OutOfMemoryError as error:
            note = f"out of memory: {error}"
        except Exception as error:
            self.failed = True
            if not isinstance(error, Mismatch):
                traceback.print_exc()
            note = f"{type(error).__name__}: {error}"
        self.add(row | {"note": note.splitlines()[0][:200]})
        return None


def line(row: Row) -> str:
    """A row of the table, or its head."""

    def cell(name: str, form: str, width: int) -> str:
        value = row.get(name)
        if not isinstance(value, str):
            value = "" if value is None or value != value else format(value, form)
        return value.rjust(width)

    def span(name: str) -> str:
        ends = [row.get(f"{name}_{part}") for part in ("p20", "p80")]
        words = "[p20 p80]" if row is HEAD else ""
        return (words if None in ends else "[{:.2f} {:.2f}]".format(*ends)).rjust(13)

    words = [cell("gate_rate", "g", 5), f"{row['phase']:9} {row.get('way', ''):12}"]
    words += [cell("seconds", ".3f", 8), span("seconds")]
    words += [cell("x_seconds", ".2f", 8), span("x_seconds"), cell("teacher_tokens", "d", 14)]
    words += [cell(name, ".0f", 8) for name in ("peak_mib", "held_mib", "planned_mib")]
    words += [cell("x_peak", ".3f", 8), cell("x_above", ".3f", 6), cell("gradient_gap", ".0e", 6)]
    return " ".join([*words, cell("note", "", 0)]).rstrip()


def text(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def draw(rows: list[dict], file: Path) -> None:
    """One group of bars for each gate rate. Beside whole matrices what is held before the step, and
    on it what the step takes; else seconds, the teacher's tokens above."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row.get("seconds")]
    rates, ways = (list(dict.fromkeys(row[name] for row in rows)) for name in ("gate_rate", "way"))
    memory = "whole" in ways
    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for row in rows:
        place = rates.index(row["gate_rate"]) * (len(ways) + 1) + ways.index(row["way"])
        colour = COLOURS[row["way"]]
        if memory:
            held, top = row["held_mib"] / 1024, row["peak_mib"] / 1024
            axis.bar(place, held, 0.9, color=HELD)
            axis.bar(place, top - held, 0.9, bottom=held, color=colour)
            words = f"{top:.2f}"
        else:
            middle, low, top = (row[f"seconds{part}"] for part in ("", "_p20", "_p80"))
            axis.bar(place, middle, 0.9, color=colour)
            axis.errorbar(place, middle, [[middle - low], [top - middle]], color="black", lw=1)
            words = str(row["teacher_tokens"])
        axis.text(place, top, words, ha="center", va="bottom", size=8)
    centres = [place * (len(ways) + 1) + (len(ways) - 1) / 2 for place in range(len(rates))]
    axis.set_xticks(centres, [f"gate rate {rate:g}" for rate in rates])
    axis.set_ylabel(
        "peak memory of a training step, GiB"
        if memory
        else "seconds per update; teacher tokens above"
    )
    axis.set_title(
        "{machine} ({capability}), {threads} threads, torch {torch}\n"
        "student {student}, teacher {teacher}, V={V}, {dtype}, "
        "{completion_tokens} tokens in micro-batches of {micro_batch} completions".format(
            **rows[0]
        ),
        size=8,
        loc="left",
    )
    named = {way: COLOURS[way] for way in ways} | ({"held before": HELD} if memory else {})
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in named.values()]
    figure.legend(patches, list(named), loc="outside lower center", ncols=len(named))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
