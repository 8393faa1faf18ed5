"""A reward of one's own, on questions of one's own, with a tiny model made on the spot.

    python examples/own_reward.py          # a minute on a CPU

A reward is a function with TRL's signature. It is given lists of one length, one entry for each
completion: the columns of the data among them, here `longest`. It returns numbers, or None where it
does not apply. In a recipe it would be `rewards: [accuracy, examples/own_reward.py:concise]`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

import kepo
from kepo.digits.tiny import build_tiny

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}


def concise(
    completions: list[str], longest: list[int | None], **columns: object
) -> list[float | None]:
    """1 for what is no longer than its question allows; None where that says nothing."""
    pairs = zip(completions, longest, strict=True)
    return [None if most is None else float(len(text) <= most) for text, most in pairs]


def questions(folder: Path) -> list[dict]:
    """Records as a line of a JSON Lines file has them; `longest` is a column of ours."""
    found = []
    for place, (name, colour) in enumerate(COLOURS.items()):
        picture = folder / f"{name}.png"
        Image.new("RGB", (32, 32), colour).save(picture)
        found.append(
            {
                "question": "Which colour is it?",
                "options": list(COLOURS),
                "answer": name,
                "image": str(picture),
                "longest": 40 if place else None,
            }
        )
    return found


def main(folder: Path, steps: int) -> kepo.Result:
    build_tiny(folder / "model", size="student", seed=0)
    config = kepo.Config(
        student=str(folder / "model"),
        run_dir=str(folder / "run"),
        steps=steps,
        prompts_per_step=3,
        num_generations=4,
        max_completion_length=24,
        lr=1e-3,
        gate_reward=None,
        hint_trigger="never",
        distill_coef=0.0,
    )
    return kepo.train(config, data=questions(folder), rewards=[concise, "format"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    with tempfile.TemporaryDirectory() as name:
        result = main(Path(name), parser.parse_args().steps)
    print(f"mean reward of the last step: concise {result.metrics['rewards/concise/mean']:.2f}")
