"""The tables and numbers of the page, made of the results; each says itself what was not run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from experiments.analysis import OOD, UNLEARNED, Scores
from experiments.choose import read_choice
from experiments.methods import FACTORIAL, MAIN, NEW, TUNED, method_of
from experiments.plan import BEST_NEW, BLOCKS, PLAN, SPLITS, TUNING_SEEDS, Block
from experiments.results import SAMPLES, read_rows
from experiments.settings import SETTINGS
from experiments.starts import TEACHERS
from kepo.digits.dataset import MODALITIES
from kepo.digits.demo import SOURCE
from kepo.evaluation.statistics import Interval, bootstrap, students_t

OURS = "kepo"
WORDS = {1: "holds", 0: "undecided", -1: "the reverse holds"}
MEASURES: Mapping[str, Callable[[Scores, str, Sequence[int]], np.ndarray]] = {
    "ood": lambda scores, *run: scores.accuracy(*run),
    "ood_seen": lambda scores, *run: scores.accuracy(*run, kind="seen"),
    "ood_unseen": lambda scores, *run: scores.accuracy(*run, kind="unseen"),
    "source": lambda scores, *run: scores.accuracy(*run, [SOURCE]),
    "source_seen": lambda scores, *run: scores.accuracy(*run, [SOURCE], kind="seen"),
    "source_unseen": lambda scores, *run: scores.accuracy(*run, [SOURCE], kind="unseen"),
    "inverted": lambda scores, *run: scores.accuracy(*run, [UNLEARNED]),
    "area": lambda scores, *run: scores.area(*run),
    "drawdown": lambda scores, *run: scores.drawdown(*run),
    "drawdown_source": lambda scores, *run: scores.drawdown(*run, [SOURCE]),
    "drawdown_seen": lambda scores, *run: scores.drawdown(*run, [SOURCE], kind="seen"),
    "pass": lambda scores, *run: scores.passes(*run),
}
"""What a run is measured by, as (seeds,); OOD but for `source` and `inverted`."""
BUDGETS = {"completions": ("sampled_completions",), "teacher": ("teacher_tokens", "hint_tokens")}


class NotRunError(Exception):
    """What something on the page needs is not there; the text is what the page says instead."""


class Book:
    """The results, and what was chosen."""

    def __init__(self, results: Path, chosen: Path):
        self.results = results
        self.choice = read_choice(chosen)

    def scores(self, setting: str = "cliff", split: str = "test") -> Scores:
        return self._read(setting, split)  # a default and its name are one key of the cache

    @cache  # noqa: B019  a page has one book
    def _read(self, setting: str, split: str) -> Scores:
        return Scores(self.results / setting, split)

    def seeds(self, scores: Scores, *methods: str) -> list[int]:
        """Return the seeds that all of the methods have; raises NotRunError for fewer than two."""
        seeds = scores.seeds(*methods)
        if len(seeds) < 2:
            raise NotRunError("one seed yet" if seeds else "not run yet")
        return seeds

    def methods(self, block: Block) -> list[str]:
        """Return the methods of a block; the best new one by name, once it was chosen."""
        best = self.choice.best_new or BEST_NEW
        return [best if name == BEST_NEW else name for name in block.methods]


# ---- numbers ----


def level(book: Book, method: str, measure: str = "ood", setting: str = "cliff") -> Interval:
    """Return a measure of a method, with Student's interval over its seeds."""
    scores = book.scores(setting)
    return students_t(MEASURES[measure](scores, method, book.seeds(scores, method)))


def gap(
    book: Book, method: str, other: str, measure: str = "ood", setting: str = "cliff"
) -> Interval:
    """Return how much larger a measure of a method is than another's, over their common seeds.

    ``completions`` and ``teacher`` are OOD accuracy at equal budgets of these (BUDGETS)."""
    scores = book.scores(setting)
    seeds = book.seeds(scores, method, other)
    if measure in BUDGETS:
        return students_t(scores.at_equal(BUDGETS[measure], method, other, seeds))
    ours, theirs = (MEASURES[measure](scores, name, seeds) for name in (method, other))
    return students_t(ours - theirs)


def drawn(book: Book, method: str, other: str, modalities: Sequence[str] = OOD) -> Interval:
    """Return the interval of `gap` by a bootstrap over seeds and questions."""
    scores = book.scores()
    seeds = book.seeds(scores, method, other)
    ours, theirs = (scores.right(name, seeds, modalities) for name in (method, other))
    return bootstrap(ours, theirs)


def same(book: Book, method: str, other: str) -> str:
    """Return how many answers two methods differ in, over all evaluations of their common seeds."""
    scores = book.scores()
    seeds = book.seeds(scores, method, other)
    ours, theirs = (
        np.stack([scores.right(name, seeds, [*MODALITIES], step) for step in scores.steps(name)])
        for name in (method, other)
    )
    return f"{(ours != theirs).sum():,} of {ours.size:,} answers are otherwise"


def common_seeds(book: Book, method: str, other: str, setting: str = "cliff") -> str:
    """Return how many seeds two methods have in common."""
    scores = book.scores(setting)
    return str(len(book.seeds(scores, method, other)))


def tuned(book: Book, spelling: str) -> str:
    """Return the OOD accuracy of a method on the validation split, in percent, or "not run"."""
    scores = book.scores(split="validation")
    if not {*TUNING_SEEDS} <= {*scores.seeds(spelling)}:
        return "not run"
    return f"{100 * scores.accuracy(spelling, TUNING_SEEDS).mean():.1f}"


def below(book: Book, setting: str = "cliff", measure: str = "source", split: str = "test") -> str:
    """Return how many runs end below their start, in domain (``source``) or out of it (``ood``),
    and of which methods."""
    scores = book.scores(setting, split)
    if not scores.rows:
        raise NotRunError("not run yet")
    fallen = {}
    for name in scores.methods():
        curve = scores.curve(name, scores.seeds(name), [SOURCE] if measure == "source" else OOD)
        fallen[name] = int((curve[:, -1] < curve[:, 0]).sum())
    which = ", ".join(f"{count} of `{name}`" for name, count in fallen.items() if count)
    return f"{sum(fallen.values())} of {len(scores.rows)} runs" + f" ({which})" * bool(which)


def points(x: Interval, signed: bool = False) -> str:
    """Return a share in percent with its interval."""
    if np.isnan(x.mean):
        return "–"
    form = "+.1f" if signed else ".1f"
    mean, low, high = (f"{100 * value:{form}}".replace("-", "−") for value in x)
    return f"{mean} [{low}, {high}]"


# ---- tables ----


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def told(find: Callable[..., Interval], *arguments: object, signed: bool = False) -> str:
    """Return a number with its interval, or why there is none."""
    try:
        return points(find(*arguments), signed)
    except NotRunError as error:
        return str(error)


def state(book: Book) -> str:
    """Return the plan: its blocks, and how many of their runs are there."""
    rows = []
    for block in PLAN:
        scores = book.scores(block.setting, block.split)
        methods = book.methods(block)
        there = sum(len({*scores.seeds(method)} & {*block.seeds}) for method in methods)
        seeds = f"{block.seeds[0]}–{block.seeds[-1]}"
        planned = len(methods) * len(block.seeds)
        rows.append(
            [f"`{block.name}`", block.why, f"`{block.setting}`", block.split, seeds]
            + [f"{there} of {planned}"]
        )
    return table(["block", "question", "setting", "split", "seeds", "runs"], rows)


def chosen(book: Book) -> str:
    """Return the grids of the validation split, with the points that were chosen."""
    rows = []
    for spelling in BLOCKS["tune"].methods:
        name, _, changes = spelling.partition("@")
        best = _is_chosen(book, spelling)
        rows.append([f"`{name}`", changes.replace(",", ", "), tuned(book, spelling), best])
    for name in NEW:
        best = "chosen" if name == book.choice.best_new else ""
        about = f"as `{method_of(name).tuned_as}`"
        rows.append([f"`{name}`", about, tuned(book, name), best])
    return table(["method", "settings", "OOD accuracy, validation", ""], rows)


def _is_chosen(book: Book, spelling: str) -> str:
    name, _, changes = spelling.partition("@")
    point = {k: float(v) for k, _, v in (one.partition("=") for one in changes.split(","))}
    return "chosen" if book.choice.methods.get(name) == point else ""


def accuracy(book: Book) -> str:
    """Return the accuracy of the main methods and of where they start."""
    columns = ("source_seen", "source_unseen", "ood_seen", "ood_unseen", "ood", "area", "pass")
    scores, rows = book.scores(), []
    for name in _shown(book):
        seeds = len(scores.seeds(name))
        found = [told(level, book, name, column) for column in columns]
        rows.append([f"`{name}`", str(seeds), *found])
    header = ["method", "seeds", "in domain, seen digits", "unseen digits", "OOD, seen digits"]
    header += ["unseen digits", "OOD", "OOD, mean over the steps", f"OOD, pass@{SAMPLES}"]
    return table(header, [*_warm_ups(book), *rows])


def _warm_ups(book: Book) -> list[list[str]]:
    """Return the row of where all methods start."""
    scores = book.scores()
    seeds = scores.seeds(OURS)
    if len(seeds) < 2:
        return []
    cells = [
        points(students_t(scores.accuracy(OURS, seeds, where, kind=kind, step=0)))
        for where, kind in (
            *((([SOURCE]), kind) for kind in ("seen", "unseen")),
            *((OOD, kind) for kind in ("seen", "unseen", "every")),
        )
    ]
    return [["warm-up", str(len(seeds)), *cells, "", ""]]


def _shown(book: Book) -> list[str]:
    best = [book.choice.best_new] if book.choice.best_new else []
    return list(dict.fromkeys([*MAIN, "kdpo_tau0", *best]))


def verdicts(book: Book) -> str:
    """Return the paper's claims, each against its rivals, with verdicts by Student's t."""
    fall = "largest fall, "
    claims = (
        ("better OOD accuracy", "OOD accuracy", "ood", 1),
        ("ends higher on the cliff", "in domain, digits unseen at the start", "source_unseen", 1),
        ("more stable training", f"{fall}in domain", "drawdown_source", -1),
        ("more stable training", f"{fall}in domain, digits seen", "drawdown_seen", -1),
        ("more stable training", f"{fall}OOD", "drawdown", -1),
    )
    rows = []
    for claim, words, measure, sign in claims:
        for other in ("grpo", "dapo", "opd", "opd_kl", "gkd", "kdpo_tau0"):
            pair = (OURS, other) if sign > 0 else (other, OURS)
            try:
                found = gap(book, *pair, measure)
            except NotRunError:
                rows.append([claim, words, f"`{other}`", "not run", "not run"])
                continue
            rows.append([claim, words, f"`{other}`", points(found, True), WORDS[found.sign]])
    return table(["claim", "measured as", "against", "points, ours better", "here"], rows)


def differences(book: Book) -> str:
    """Return what KEPO's OOD accuracy is above that of the others, at equal steps and budgets."""
    rows = []
    for other in _shown(book):
        if other != OURS:
            rows.append(
                [f"`{other}`"]
                + [told(gap, book, OURS, other, signed=True)]
                + [told(drawn, book, OURS, other, signed=True)]
                + [told(gap, book, OURS, other, by, signed=True) for by in BUDGETS]
                + [told(gap, book, OURS, other, "ood_unseen", signed=True)]
                + [told(gap, book, OURS, other, "ood_seen", signed=True)]
            )
    header = ["`kepo` less", "equal steps", "the same by bootstrap", "equal completions"]
    header += ["equal teacher tokens", "unseen digits", "seen digits"]
    return table(header, rows)


def again(book: Book, name: str) -> str:
    """Return whether the runs of a block were made, in words."""
    one = BLOCKS[name]
    scores = book.scores(one.setting, one.split)
    there = [len({*scores.seeds(m)} & {*one.seeds}) for m in book.methods(one)]
    if not any(there):
        return "planned, not run"
    planned = len(there) * len(one.seeds)
    return "run again" if sum(there) == planned else f"{sum(there)} of {planned} runs made"


def block(book: Book, name: str, other: str = OURS) -> str:
    """Return the methods of a block of the plan, each less another on their common seeds."""
    one, rows = BLOCKS[name], []
    scores = book.scores(one.setting)
    if not any(scores.seeds(method) for method in book.methods(one)):
        raise NotRunError("not run")
    for method in book.methods(one):
        seeds = str(len(scores.seeds(method)))
        about = "chosen from `new`" if method == BEST_NEW else method_of(method).about
        found = [told(level, book, method, "ood", one.setting)]
        for measure in ("ood", "completions", "source_unseen"):
            arguments = (book, method, other, measure, one.setting)
            found.append("" if method == other else told(gap, *arguments, signed=True))
        rows.append([f"`{method}`", about, seeds, *found])
    header = ["method", "", "seeds", "OOD", f"OOD, less `{other}`", "at equal completions"]
    return table([*header, "in domain, unseen digits"], rows)


def factorial(book: Book) -> str:
    """Return the effects of policy term, gate and hints on OOD accuracy, paired by seed."""
    scores = book.scores()
    seeds = book.seeds(scores, *FACTORIAL.values())
    cells = {cell: scores.accuracy(name, seeds) for cell, name in FACTORIAL.items()}

    def mean(**fixed: object) -> np.ndarray:
        names = ("policy", "gate", "hints")
        chosen = [
            values
            for cell, values in cells.items()
            if all(dict(zip(names, cell, strict=True))[name] == x for name, x in fixed.items())
        ]
        return np.mean(chosen, axis=0)

    def hints(**fixed: object) -> np.ndarray:
        return mean(hints=True, **fixed) - mean(hints=False, **fixed)

    effects = {
        "policy term": mean(policy=True) - mean(policy=False),
        "hints": hints(),
        "gate: where right, less everywhere": mean(gate="right") - mean(gate="none"),
        "gate: where wrong, less everywhere": mean(gate="wrong") - mean(gate="none"),
        "gate: where right, less where wrong": mean(gate="right") - mean(gate="wrong"),
        "hints, with distillation where right": hints(gate="right"),
        "hints, with distillation everywhere": hints(gate="none"),
        "hints, with distillation where wrong": hints(gate="wrong"),
        "hints, with a policy term": hints(policy=True),
        "hints, without": hints(policy=False),
    }
    rows = [[name, points(students_t(values), True)] for name, values in effects.items()]
    return table([f"effect on OOD accuracy, {len(seeds)} seeds", "points"], rows)


def cells(book: Book) -> str:
    """Return the OOD accuracy of every cell of the factorial."""
    rows = [
        [f"`{name}`", method_of(name).about, told(level, book, name)]
        + [told(level, book, name, "source_unseen")]
        for name in FACTORIAL.values()
    ]
    return table(["cell", "", "OOD", "in domain, unseen digits"], rows)


def cost(book: Book) -> str:
    """Return what a run of each method costs."""
    columns = (
        *("sampled_completions", "data_completions", "student_tokens"),
        *("teacher_tokens", "hint_tokens", "hint_groups", "hint_accepted"),
    )
    scores = book.scores()
    names = [n for n in (*_shown(book), "gate_only", "hints_only", "retry") if scores.seeds(n)]
    rows = [
        [f"`{n}`", str(len(scores.seeds(n)))]
        + [f"{scores.cost(n, column):,.0f}" for column in columns]
        for n in names
    ]
    header = ["mean of a run", "seeds", "completions sampled"]
    header += ["of the data", "tokens trained on", "tokens the teacher scored"]
    return table([*header, "tokens of its hints", "groups hinted", "successes put in"], rows)


def dynamics(book: Book) -> str:
    """Return entropy, length and rates up to the first and the last evaluation."""
    columns = ("entropy", "length", "equal_rewards", "gate_rate", "hint_rate", "rescue_rate")
    scores, rows = book.scores(), []
    for name in _shown(book):
        seeds = scores.seeds(name)
        line = [f"`{name}`", str(len(seeds))]
        for column in columns if seeds else ():
            course = scores.course(name, seeds, column)
            if np.isnan(course).all():
                line.append("")
                continue
            first, last = np.nanmean(course[:, 0]), np.nanmean(course[:, -1])
            line.append(f"{first:.3g} → {last:.3g}")
        if seeds:
            rows.append(line)
    header = [
        "first → last ten steps",
        "seeds",
        "entropy, nats",
        "tokens",
        "groups of equal rewards",
    ]
    return table([*header, "gate open", "groups hinted", "groups rescued"], rows)


def renderings(book: Book) -> str:
    """Return the accuracy on every rendering, of the teachers too."""
    scores = book.scores()
    rows = [
        [f"`{name}`"]
        + [f"{100 * scores.accuracy(name, scores.seeds(name), [m]).mean():.0f}" for m in MODALITIES]
        for name in _shown(book)
        if scores.seeds(name)
    ]
    for name, by in _teachers(book).items():
        rows.append([name, *(f"{100 * by[m]:.0f}" for m in MODALITIES)])
    return table(["accuracy, %", *MODALITIES], rows)


def _teachers(book: Book) -> dict[str, dict[str, float]]:
    """Return the accuracy of the teachers on the test split, by rendering."""
    found: dict[str, dict[str, float]] = {}
    for row in read_rows(book.results / "teachers.csv", TEACHERS):
        if row["split"] == "test":
            style = "" if row["hint_style"] == "sum" else f", hints: {row['hint_style']}"
            name = f"teacher, {row['teacher_steps']} steps{style}"
            found.setdefault(name, {})[row["modality"]] = float(row["accuracy"])
    return found


def settings(book: Book) -> str:
    """Return the settings, with what they are about."""
    return table(["setting", ""], [[f"`{name}`", one.about] for name, one in SETTINGS.items()])


def methods(book: Book) -> str:
    """Return the main methods, with what they are and what was chosen for each."""
    rows = []
    for name in dict.fromkeys([*MAIN, *FACTORIAL.values(), *NEW]):
        method = method_of(name)
        tuned = book.choice.methods.get(method.tuned_as)
        told = ", ".join(f"{k} {v:g}" for k, v in tuned.items()) if tuned else "not chosen yet"
        rows.append(
            [f"`{name}`", method.about, told if name in TUNED else f"as `{method.tuned_as}`"]
        )
    return table(["method", "", "learning rate and coefficient"], rows)


def made_by(book: Book) -> str:
    """Return which code, on which machine, made how many runs."""
    scores = [book.scores(name, split) for name in SETTINGS for split in SPLITS]
    rows = [row for one in scores for row in one.rows.values()]
    if not rows:
        raise NotRunError("no run yet")
    named = ", ".join(sorted({row["commit"] for row in rows}))
    machines = "; ".join(sorted({f"{row['machine']}, torch {row['torch']}" for row in rows}))
    hours = sum(float(row["seconds"]) for row in rows) / 3600
    return f"{len(rows)} runs, {hours:.1f} hours of one thread ({machines}; commit {named})"
