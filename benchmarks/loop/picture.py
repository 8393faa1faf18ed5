"""The updates of step.py as bars: what whole steps hold, or else the seconds of an update."""

from __future__ import annotations

from pathlib import Path

COLOURS = {"fused": "#c0392b", "states": "#2980b9", "everywhere": "#7f8c8d", "whole": "#7f8c8d"}
HELD = "#dddddd"


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
