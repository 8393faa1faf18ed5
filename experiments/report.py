"""The report of a comparison: tables with intervals, the paper's three claims, pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.methods import METHODS, Setting
from experiments.results import Results
from kepo.digits.demo import SOURCE
from kepo.disk.durable import make_folder, replacing, write_durably
from kepo.evaluation.statistics import Interval, bootstrap, students_t

BASELINE = "grpo"
OURS = "kepo"
WORDS = {1: "holds", 0: "undecided", -1: "does not hold"}


def write_report(results: Results, setting: Setting, out: Path) -> str:
    """Write ``out/report.md`` and ``out/report.png``; return the report."""
    if not results.runs:
        return f"no results in {out}"
    methods = [name for name in METHODS if name in results.methods()]
    text = "\n".join(
        [
            f"# {out.name}: {len(methods)} methods",
            "",
            f"{setting.about} " + _protocol(results, setting),
            "",
            "![accuracy, curves and cost](report.png)",
            "",
            "## Accuracy",
            "",
            _accuracy_table(results, methods),
            "",
            f"## Against {BASELINE} and against {OURS}",
            "",
            _differences(results, methods),
            "",
            "## The paper's claims",
            "",
            _claims(results),
            "",
            "## By rendering",
            "",
            _modality_table(results, methods),
            "",
            "## Cost",
            "",
            _cost_table(results, methods),
            "",
            "## At the start",
            "",
            _start(results, methods),
            "",
        ]
    )
    make_folder(out)
    write_durably(out / "report.md", text)
    _plot(results, methods, out / "report.png")
    return text


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _protocol(results: Results, setting: Setting) -> str:
    last = results.eval_steps()[-1]
    row = next(iter(results.runs.values()))
    commits = ", ".join(sorted({run["commit"] for run in results.runs.values()}))
    return (
        f"Every method starts from the same warm-up of a seed and makes {last} steps of "
        f"{setting.common['prompts_per_step']} questions, {setting.common['num_generations']} "
        f"samples each, at one learning rate, on the rendering {SOURCE!r} alone. Accuracy is "
        "greedy, on questions about unseen scans, the same for all runs; OOD is the mean of the "
        "seven renderings that were never trained on. In brackets 95 % intervals from a crossed "
        "bootstrap over seeds and questions; differences are paired in both. "
        f"({row['machine']}, torch {row['torch']}, commit {commits}.)"
    )


def _others(results: Results) -> list[str]:
    return [modality for modality in results.modalities() if modality != SOURCE]


def last(results: Results, method: str, modalities: list[str]) -> np.ndarray:
    """Return 1 for right and 0 for wrong after the last step: (seeds, modalities, items)."""
    step = results.eval_steps()[-1]
    return results.correct(method, results.seeds(method), step, modalities)


def final(
    results: Results, method: str, modalities: list[str], minus: str | None = None
) -> Interval:
    """Return the accuracy after the last step; with ``minus``, its paired difference to that
    method's."""
    step = results.eval_steps()[-1]
    seeds = results.seeds(method) if minus is None else results.seeds(method, minus)
    correct = results.correct(method, seeds, step, modalities)
    other = None if minus is None else results.correct(minus, seeds, step, modalities)
    return bootstrap(correct, other)


def _accuracy_table(results: Results, methods: list[str]) -> str:
    rows = []
    seeds = results.seeds(methods[0])
    start = [
        bootstrap(results.correct(methods[0], seeds, 0, modalities))
        for modalities in ([SOURCE], _others(results))
    ]
    rows.append(["warm-up", "where all start", str(len(seeds)), *map(_percent, start)])
    for method in methods:
        found = [final(results, method, m) for m in ([SOURCE], _others(results))]
        count = str(len(results.seeds(method)))
        rows.append([f"`{method}`", METHODS[method].about, count, *map(_percent, found)])
    return table(["method", "", "seeds", f"in domain ({SOURCE})", "OOD mean"], rows)


def _differences(results: Results, methods: list[str]) -> str:
    """Return the differences in OOD accuracy, by crossed bootstrap and, stricter, by Student's t
    over the seeds' means."""
    rows = []
    for method in methods:
        row = [f"`{method}`"]
        for other in (BASELINE, OURS):
            seeds = results.seeds(method, other) if other in methods else []
            if method == other or not seeds:
                row += ["", ""]
                continue
            difference = final(results, method, _others(results), minus=other)
            of_seeds = students_t(_ood(results, method, seeds) - _ood(results, other, seeds))
            row += [_percent(difference, True), _bounds(of_seeds)]
        rows.append(row)
    header = ["OOD, points", f"over `{BASELINE}`", "t over seeds", f"over `{OURS}`", "t over seeds"]
    return table(header, rows)


def _ood(results: Results, method: str, seeds: list[int], step: int | None = None) -> np.ndarray:
    step = results.eval_steps()[-1] if step is None else step
    return results.correct(method, seeds, step, _others(results)).mean((1, 2))


def _claims(results: Results) -> str:
    present = [name for name in (BASELINE, "opd") if name in results.methods()]
    if OURS not in results.methods() or not present:
        return f"Needs `{OURS}` and `{BASELINE}` or `opd`."
    claims: list[tuple[str, str, Callable[[str], Interval]]] = [
        (
            "more stable training",
            "fall from the best OOD accuracy of a run to its last, theirs less ours",
            lambda other: students_t(
                _fall(results, other, results.seeds(OURS, other))
                - _fall(results, OURS, results.seeds(OURS, other))
            ),
        ),
        (
            "better OOD accuracy",
            "OOD accuracy after the last step, ours less theirs",
            lambda other: final(results, OURS, _others(results), minus=other),
        ),
        (
            "no collapse on the learning cliff",
            f"accuracy after the last step on {SOURCE!r}, where a third failed, ours less theirs",
            lambda other: final(results, OURS, [SOURCE], minus=other),
        ),
    ]
    rows = []
    for name, measured, difference in claims:
        for other in present:
            found = difference(other)
            rows.append([name, measured, f"`{other}`", _percent(found, True), WORDS[found.sign]])
    return table(["claim", "measured as", "against", "points", "at this scale"], rows)


def _fall(results: Results, method: str, seeds: list[int]) -> np.ndarray:
    """Return the best OOD accuracy of all evaluations after the start, less the last: (seeds,)."""
    steps = results.eval_steps()[1:]
    curve = np.stack([_ood(results, method, seeds, step) for step in steps])
    return curve.max(0) - curve[-1]


def _modality_table(results: Results, methods: list[str]) -> str:
    modalities = [SOURCE, *_others(results)]
    rows = [
        [f"`{method}`"] + [f"{100 * x:.0f}" for x in last(results, method, modalities).mean((0, 2))]
        for method in methods
    ]
    return table(["accuracy, %", *modalities], rows)


def _cost_table(results: Results, methods: list[str]) -> str:
    rows = []
    for method in methods:
        cost = {
            name: results.cost(method, name)
            for name in (
                *("seconds", "sampled_completions", "teacher_tokens", "student_tokens"),
                *("hint_groups", "hint_accepted"),
            )
        }
        skipped = 1 - cost["teacher_tokens"] / max(1.0, cost["student_tokens"])
        rows.append(
            [f"`{method}`", f"{cost['seconds']:.0f}", f"{cost['sampled_completions']:.0f}"]
            + [f"{cost['teacher_tokens']:.0f}", f"{100 * skipped:.0f} %"]
            + [f"{cost['hint_groups']:.0f}", f"{cost['hint_accepted']:.0f}"]
        )
    header = ["per run", "seconds, one thread", "completions sampled", "teacher tokens"]
    header += ["tokens without teacher", "groups hinted", "successes put in"]
    return table(header, rows)


def _start(results: Results, methods: list[str]) -> str:
    """Return a table of the shares of groups that are hinted, are rescued, or have equal rewards,
    in the first and the last five steps."""
    rows = []
    for method in methods:
        line = [f"`{method}`"]
        for column in ("hint_rate", "rescue_rate", "frac_reward_zero_std"):
            _, values = results.curve(method, column)
            ends = (values[:, :5], values[:, -5:])
            line += ["" if np.isnan(x).all() else f"{100 * np.nanmean(x):.0f} %" for x in ends]
        rows.append(line)
    header = ["mean of the first and last five steps", "groups hinted", "", "rescued", ""]
    return table([*header, "equal rewards", ""], rows)


def _percent(x: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * x.mean:{sign}.1f} {_bounds(x, signed)}"


def _bounds(x: Interval, signed: bool = True) -> str:
    sign = "+" if signed else ""
    return f"[{100 * x.low:{sign}.1f}, {100 * x.high:{sign}.1f}]"


def _plot(results: Results, methods: list[str], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8), constrained_layout=True)
    colours = {name: f"C{place}" if place < 10 else "grey" for place, name in enumerate(methods)}
    places = range(len(methods))
    for axis, modalities, title in (
        (axes[0, 0], _others(results), "OOD mean, after the last step"),
        (axes[0, 1], [SOURCE], f"in domain ({SOURCE}), after the last step"),
    ):
        found = [final(results, method, modalities) for method in methods]
        means = np.array([100 * x.mean for x in found])
        spread = np.array([[100 * (x.mean - x.low), 100 * (x.high - x.mean)] for x in found]).T
        axis.bar(places, means, yerr=spread, capsize=3, color=list(colours.values()))
        axis.set(title=title, ylabel="accuracy, %", ylim=(max(0, means.min() - 20), None))
        axis.set_xticks(places, methods, rotation=30, ha="right")
    steps = results.eval_steps()
    for method in methods:
        seeds = results.seeds(method)
        curve = 100 * np.stack([_ood(results, method, seeds, step) for step in steps])
        _band(axes[0, 2], steps, curve.T, method, colours[method])
    axes[0, 2].set(title="OOD mean over steps", ylabel="accuracy, %", xlabel="step")
    for axis, column, title in (
        (axes[1, 0], "accuracy", "accuracy of samples in training"),
        (axes[1, 1], "frac_reward_zero_std", "groups of equal rewards"),
    ):
        for method in methods:
            at, values = results.curve(method, column)
            _band(axis, at, _smooth(values), method, colours[method])
        axis.set(title=title, xlabel="step")
    axis = axes[1, 2]
    thousands = [results.cost(method, "teacher_tokens") / 1000 for method in methods]
    axis.bar(places, thousands, color=list(colours.values()))
    axis.set(title="teacher tokens per run, thousands")
    axis.set_xticks(places, methods, rotation=30, ha="right")
    axes[0, 2].legend(fontsize="small")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    with replacing(picture) as part:
        figure.savefig(part, dpi=100)
    plt.close(figure)


def _band(axis: Any, steps: list[int], values: np.ndarray, label: str, colour: str) -> None:
    """Draw the mean over seeds, in a band from the lowest to the highest."""
    axis.plot(steps, values.mean(0), label=label, color=colour)
    if len(values) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), alpha=0.1, color=colour)


def _smooth(values: np.ndarray, window: int = 9) -> np.ndarray:
    """Return the trailing mean along the steps."""
    sums = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
    ends = np.arange(1, values.shape[1] + 1)
    starts = np.maximum(0, ends - window)
    return (sums[:, ends] - sums[:, starts]) / (ends - starts)
