"""Arithmetic in words, made by rule: what somebody has, gets and gives, and how many are left.

    python examples/real_language_model/questions.py runs/real/data

writes train.jsonl, choice.jsonl and test.jsonl there. No calculation of one file is in another, so
that none of the answers can be remembered: settings are chosen on `choice`, `test` is asked twice,
before and after.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

SIZES = {"train": 2000, "choice": 100, "test": 200}
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jack")
THINGS = ("apples", "books", "coins", "eggs", "flowers", "marbles", "pencils", "stamps")
FIRST = {  # what happens to a and b
    "+": (
        "{name} has {a} {things}. {name} buys {b} more",
        "There are {a} {things} in a box. {name} puts {b} more into it",
        "{name} finds {a} {things}, and later another {b}",
    ),
    "-": (
        "{name} has {a} {things}. {name} gives away {b}",
        "There are {a} {things} in a box. {name} takes out {b}",
        "{name} buys {a} {things} and loses {b} of them",
    ),
    "*": (
        "{name} has {a} bags with {b} {things} in each",
        "There are {a} boxes. Each box holds {b} {things}",
        "{name} fills {a} rows with {b} {things} each",
    ),
}
SECOND = {  # and then, with c
    "+": ("Then {c} more are added", "Then {c} more arrive", "A friend brings {c} more"),
    "-": ("Then {c} are taken away", "Then {c} are sold", "A friend gets {c} of them"),
}
ASKED = ("How many {things} are there now?", "How many {things} are left at the end?")

Sum = tuple[int, str, int, str, int]


def sums() -> list[Sum]:
    """Return every calculation a, b and c allow whose results are from 1 to 99, in order."""
    found: list[Sum] = []
    for first in FIRST:
        low, high = (2, 10) if first == "*" else (2, 50)
        for a in range(low, high):
            for b in range(2, 10 if first == "*" else 30):
                for second in SECOND:
                    for c in range(2, 20):
                        middle = result(a, first, b)
                        if 1 <= middle <= 99 and 1 <= result(middle, second, c) <= 99:
                            found.append((a, first, b, second, c))
    return found


def result(a: int, sign: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[sign]


def record(kind: str, number: int, calculation: Sum, draw: random.Random) -> dict[str, str]:
    """Return a line of the file: a question, its worked solution and its answer."""
    a, first, b, second, c = calculation
    words = dict(name=draw.choice(NAMES), things=draw.choice(THINGS), a=a, b=b, c=c)
    told = ". ".join(draw.choice(words) for words in (FIRST[first], SECOND[second], ASKED))
    middle = result(a, first, b)
    end = result(middle, second, c)
    return {
        "id": f"{kind}-{number}",
        "question": told.format(**words),
        "rationale": f"{a} {first} {b} = {middle}, {middle} {second} {c} = {end}",
        "answer": str(end),
        "question_type": {"+": "sum", "-": "difference", "*": "product"}[first],
    }


def questions(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Return the records of each file; kinds of first calculation are equally frequent."""
    draw = random.Random(seed)
    by_sign = {sign: [one for one in sums() if one[1] == sign] for sign in FIRST}
    for drawn in by_sign.values():
        draw.shuffle(drawn)
    signs = list(FIRST)
    found = {}
    for kind, size in SIZES.items():
        chosen = [by_sign[signs[i % len(signs)]].pop() for i in range(size)]
        found[kind] = [record(kind, i, one, draw) for i, one in enumerate(chosen)]
    return found


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, records in questions().items():
        lines = "".join(json.dumps(one) + "\n" for one in records)
        (folder / f"{kind}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the three files are written")
    write(parser.parse_args().folder)
