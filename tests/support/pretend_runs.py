"""Runs of the comparison that only pretend: what they would have left, with an accuracy of our
choice."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from experiments import compare as module
from experiments import starts
from experiments.compare import Compare
from experiments.results import SAMPLES, SAMPLES_FILE, Results, as_csv
from kepo.digits.dataset import MODALITIES

ITEMS = 40
SKILL = {"grpo": 0.5, "kepo": 0.8, "opd": 0.5}
RAN: list = []


def at_skill(skill: float, rng: np.random.Generator) -> dict[str, str]:
    """Return by rendering which questions are answered rightly, with this probability each."""
    right = {name: rng.random(ITEMS) < skill for name in MODALITIES}
    return {name: "".join(map(str, x.astype(int))) for name, x in right.items()}


def answers_of_student(seed: int) -> dict[str, str]:
    return at_skill(0.3, np.random.default_rng(seed))


def pretend(run, config) -> None:
    """Write what a run leaves."""
    rng = np.random.default_rng((run.seed, len(run.method)))
    records: list[dict] = []
    for step in range(config.steps + 1):
        if step:
            records.append(
                {"step": step, "step_time": 2.0, "kepo/sampled_completions": 128, "entropy": 0.5}
                | {"kepo/teacher_tokens": 10, "kepo/hint_tokens": 3, "grad_norm": None}
            )
        if step % config.eval_every and step != config.steps:
            continue
        skill = SKILL.get(run.method.partition("@")[0], 0.6)
        items = at_skill(skill, rng) if step else answers_of_student(run.seed)
        means = {name: x.count("1") / ITEMS for name, x in items.items()}
        records.append({"step": step, "eval": means, "eval_items": items})
    folder = Path(config.run_dir)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    counts = {name: "".join(map(str, rng.integers(SAMPLES + 1, size=ITEMS))) for name in MODALITIES}
    (folder / SAMPLES_FILE).write_text(json.dumps(counts))


class PretendPool:
    """Trains nobody; the methods in `failing` fail."""

    failing: tuple[str, ...] = ()

    def __init__(self, jobs):
        pass

    def close(self):
        pass

    def map(self, function, arguments, what):
        for each in arguments:
            function(*each)

    def train_all(self, configs, keep, until):
        failed = {}
        for named, config in configs.items():
            RAN.append(named[1])
            if named[1].method in self.failing:
                failed[named] = "nothing worked"
                continue
            pretend(named[1], config)
            keep(named)
        return failed


def write_results(folder: Path, setting: str, runs, steps: int = 4) -> None:
    """Add runs to a folder of results, with the questions and a teacher beside them."""
    results = Results(folder / setting)
    for run in runs:
        run_dir = folder.parent / "runs" / f"{setting}-{run.split}-{run.seed}-{run.method}"
        pretend(run, SimpleNamespace(run_dir=run_dir, steps=steps, eval_every=2))
        facts = {name: "0" for name in ("fingerprint", "student", "teacher", "commit", "date")}
        results.add(run, run_dir, facts | {"machine": "a machine", "torch": "2"})
    results.write()
    rows = [
        {"split": split, "modality": name, "large": "0011" * (ITEMS // 4)}
        for split in ("validation", "test")
        for name in MODALITIES
    ]
    (folder / "questions.csv").write_text(as_csv(starts.QUESTIONS, rows))


def write_model(folder: Path, text: str, right: dict[str, str]) -> None:
    """Write a model that answers these questions rightly, the same ones of both splits."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(text.encode())
    said = json.dumps({"validation": right, "test": right})
    starts.answers_file(folder).write_text(said)


def make_teacher(root, data, name, questions):
    folder = starts.teacher_of(root, module.SETTINGS[name], questions)
    right = {name: "1110" * (ITEMS // 4) for name in MODALITIES}
    write_model(folder, f"teacher {folder.name}", right)


def make_student(root, data, name, seed, questions):
    folder = starts.student_of(root, module.SETTINGS[name], questions, seed)
    write_model(folder, f"student {seed}", answers_of_student(seed))


def pretending(folder: Path, monkeypatch) -> Compare:
    """Return settings of a comparison in which nothing is trained."""
    monkeypatch.setattr(module, "Pool", PretendPool)
    monkeypatch.setattr(PretendPool, "failing", ())
    monkeypatch.setattr(starts, "make_data", lambda root, questions: root / "data")
    large = {name: "0011" * (ITEMS // 4) for name in MODALITIES}
    monkeypatch.setattr(starts, "large_digits", lambda data: large)
    monkeypatch.setattr(starts, "make_teacher", make_teacher)
    monkeypatch.setattr(starts, "make_student", make_student)
    RAN.clear()
    chosen = folder / "chosen.json"
    chosen.write_text('{"methods": {"kepo": {"lr": 0.0002}, "grpo": {"lr": 0.0004}}}')
    return Compare(
        methods=("grpo", "kepo"),
        seeds=(1, 2, 3),
        split="test",
        steps=4,
        eval_every=2,
        root=str(folder / "root"),
        out=str(folder / "out"),
        chosen=str(chosen),
    )
