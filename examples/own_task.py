"""A task of one's own: what is asked, and which answers are right.

    python examples/own_task.py            # a minute on a CPU

A task inherits from `kepo.Task` and changes what differs. Here several answers are right, as the
data's column `also` says. In a recipe it would be `task: examples/own_task.py:Synonyms`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image

import kepo
from kepo.digits.tiny import build_tiny


class Synonyms(kepo.Task):
    """Questions with an answer, for which other words are as good."""

    instruction = "Reply as <think>reasoning</think><answer>one word</answer>."

    def is_right(self, text: str, example: kepo.Example) -> bool:
        said = self.answer_of(text)
        right = [example.answer, *example.columns.get("also", [])]
        return said is not None and said.casefold() in [word.casefold() for word in right]

    def gives_away(self, hint: str, example: kepo.Example) -> bool:
        """A hint must not say any of them."""
        right = [example.answer, *example.columns.get("also", [])]
        return any(word.casefold() in hint.casefold() for word in right)


def questions(folder: Path) -> list[kepo.Example]:
    found = []
    for name, colour, also in (
        ("red", (200, 30, 30), ["crimson", "scarlet"]),
        ("grey", (128, 128, 128), ["gray"]),
    ):
        picture = folder / f"{name}.png"
        Image.new("RGB", (32, 32), colour).save(picture)
        found.append(
            kepo.Example(
                id=name,
                question="Which colour is it?",
                answer=name,
                images=(picture,),
                columns={"also": also},
            )
        )
    return found


def main(folder: Path, steps: int) -> tuple[kepo.Result, kepo.Scores]:
    build_tiny(folder / "model", size="student", seed=0)
    asked = questions(folder)
    config = kepo.Config(
        student=str(folder / "model"),
        run_dir=str(folder / "run"),
        steps=steps,
        prompts_per_step=2,
        num_generations=4,
        max_completion_length=24,
        lr=1e-3,
        gate_reward=None,
        hint_trigger="never",
        distill_coef=0.0,
    )
    result = kepo.train(config, task=Synonyms(), data=asked)
    assert result.checkpoint is not None
    scores = kepo.evaluate(result.checkpoint, asked, task=Synonyms(), samples=4)
    return result, scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    with tempfile.TemporaryDirectory() as name:
        _, scores = main(Path(name), parser.parse_args().steps)
    print(scores)
