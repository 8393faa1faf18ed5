"""Questions without options: answered by a number, perhaps with a unit, or by a short text."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from dataclasses import replace

from kepo.data.example import LETTERS, Example
from kepo.tasks.formulas import same_formula
from kepo.tasks.hint_words import number, read
from kepo.tasks.leaks import states_answer
from kepo.tasks.quantities import other_money, quantity, same_quantity
from kepo.tasks.task import Task

_ARTICLES = ("a", "an", "the")
_POLAR = ("yes", "no")
_AS_POLAR: dict[tuple[str, ...], tuple[str, ...]] = {("true",): ("yes",), ("false",): ("no",)}
_SIGNS = re.compile(r"[\\^_{}=+*/<>√π]|[-\u2212](?=\s*[\d(])|(?<=[\d)])!")
_MATH = re.compile(r"\\[A-Za-z]+|[\^_=<>√π]|\d\s?[A-Za-z]\b")
_LONGEST = 1000
"""The characters of the longest answer that is read as a formula."""


class OpenAnswer(Task):
    """The task whose answers are numbers or short texts.

    An answer is right if both are numbers, equal within ``answer_tolerance`` times the right one
    and in the same unit (`kepo.tasks.quantities`); if both are the same words, whatever their case,
    accents, punctuation and articles, true being yes and false no; or, where math-verify is
    installed and the right answer is a formula, if that finds them equal. Of an example with
    options the right option's text is the answer, and the options are not shown.
    """

    def __init__(
        self,
        *,
        system_prompt: str = "",
        prompt_template: str = "",
        answer_tolerance: float = 1e-4,
    ) -> None:
        super().__init__(system_prompt=system_prompt, prompt_template=prompt_template)
        self.answer_tolerance = answer_tolerance

    def right_answer(self, example: Example) -> str:
        if not example.options:
            return example.answer
        return example.options[LETTERS.index(example.answer)]

    def same(self, said: str, right: str) -> bool:
        if super().same(said.strip(), right.strip()):  # of signs alone, too
            return True
        mine, theirs = quantity(said), quantity(right)
        if mine is not None and theirs is not None:
            return same_quantity(mine, theirs, self.answer_tolerance)
        if other_money(said, right):
            return False
        words, others = (_AS_POLAR.get(words, words) for words in map(plain_words, (said, right)))
        if words and words == others and signs(said) == signs(right):
            return True
        return bool(_MATH.search(right)) and same_mathematics(said, right)

    def chance(self, example: Example) -> float:
        return 0.5 if self.right_answer(example).casefold().strip(". ") in _POLAR else 0.0

    def gives_away(self, hint: str, example: Example) -> bool:
        """Return whether a hint has the right answer's words, or its number, in it.

        Yes and no are judged as options are: by what is said of them (`kepo.tasks.leaks`).
        """
        right = self.right_answer(example)
        if right.casefold().strip(". ") in _POLAR:
            letter = LETTERS[_POLAR.index(right.casefold().strip(". "))]
            return states_answer(hint, replace(example, options=_POLAR, answer=letter))
        if value := quantity(right):
            told = (number(word) for word in read(hint).words)
            if any(one is not None and one == abs(value.value) for one in told):
                return True
        words, said = plain_words(right), plain_words(hint)
        if not words:
            return super().gives_away(hint, example)
        places = range(len(said) - len(words) + 1)
        return any(said[place : place + len(words)] == words for place in places)


def plain_words(text: str) -> tuple[str, ...]:
    """Return the words of a text without case, accents, punctuation and articles."""
    return tuple(word for word in read(text).words if word not in _ARTICLES)


def signs(text: str) -> str:
    """Return the mathematical signs of a text, which words leave out."""
    return "".join(_SIGNS.findall(unicodedata.normalize("NFKC", text)))


def same_mathematics(said: str, right: str) -> bool:
    """Return whether math-verify finds two formulas equal; False where it is not installed."""
    if len(said) > _LONGEST or importlib.util.find_spec("math_verify") is None:
        return False
    return same_formula(said, right)
