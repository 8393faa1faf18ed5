"""Find hints that give a number among the options as a result."""

from __future__ import annotations

from collections.abc import Sequence

from kepo.data.example import LETTERS
from kepo.tasks.hint_words import CLAUSE, SENTENCE, Words, closes, number, words_of
from kepo.tasks.mentions import LISTS, own_words

_WINDOW = 6
"""The number of words that are read before a number."""
_COPULAS = words_of("is s be being was are becomes")
_SEEN = words_of("visible seen present there shown")
_OPERATORS = words_of("+ plus minus times and or")
_SIGNS = ("-", "−", "–", "*", "×", "·", "/", "&", ",")
_EQUATES = words_of(
    "is s are be was equals equal makes make making gives give giving get gets got yields "
    "yield totals total sum answer result count counted find see have boxed so thus "
    "therefore hence choose pick select results being has contains holds"
)
_ADDS = words_of("count counting add adds adding come comes sum sums amount amounts up equal")
_RESULTS = words_of(
    "sum total answer result it that this together altogether there they correct need"
)
_OPERANDS = words_of(
    "digit digits number numbers figure numeral left right first second other one ones upper "
    "lower top bottom picture image"
)
_SIDES = words_of("left right first second upper lower top bottom")
_NUMBER_FILLERS = words_of("a an the exactly just about simply only up you us in fact of")
_TOTALS = words_of("total all altogether together")
_ROMAN_FIGURES = (
    *("", "", "II", "III", "", "", "VI", "VII", "VIII", "IX", "", "XI", "XII", "XIII", "XIV"),
    *("XV", "XVI", "XVII", "XVIII", "XIX", "XX"),
)


def states_number(text: Words, options: Sequence[str]) -> bool:
    """Return whether the text gives a number that is an option as a result."""
    own = [own_words(option, letter) for letter, option in zip(LETTERS, options, strict=False)]
    values = {number(words[0]) for words in own if len(words) == 1} - {None}
    return bool(values) and any(
        _value(text, place) in values and _is_result(text, place) for place in range(len(text))
    )


def _value(text: Words, place: int) -> float | None:
    """Return the number at ``place``, also in capital Roman figures, but for IV, which is a way to
    give a drug; None if there is none."""
    roman = text.raw[place] in _ROMAN_FIGURES
    return float(_ROMAN_FIGURES.index(text.raw[place])) if roman else number(text.words[place])


def _is_result(text: Words, place: int) -> bool:
    """Return whether the words and signs around the number at ``place`` make it a result."""
    following, gap = text.words[place + 1 : place + 6], text.gaps[place]
    if following[:1] == ("%",):
        return False
    if place == 0 and len(text) <= 2 and not (_counts(following) or set(following) & _OPERATORS):
        return True  # "7", "two nodules"
    if _is_operand(text, place):
        return False
    after_sum = _counts(text.words[max(0, place - 1) : place]) and text.at(place - 2) in _OPERATORS
    if set(gap) & set("=→≈") or "->" in gap or (":" in gap and after_sum):
        return True
    if following[:1] == ("is",) and set(following[1:4]) & (_RESULTS | {"right", "correct"}):
        return not set(following) & _OPERANDS - {"right"}
    if set(following) & LISTS or ("=" in text.gaps[place + 1] and _counts(following[:1])):
        return True  # "7 in the list", "7 = 3 + 4"
    if text.at(place - 1) in ("option", "choice", "number") and closes(text, place):
        return not gap.strip() and text.at(place - 2) not in _SIDES  # "the left number 7"
    if set(following[:2]) & _TOTALS and not set(text.gaps[place + 1]) & CLAUSE:
        return True
    if text.words[place] == "one" and not closes(text, place):
        return False  # "one of them"
    if following[:1] == ("of",) and set(following[1:2]) & {"them", "these", "those"}:
        return True
    opens = place == 0 or bool(set(gap) & SENTENCE) or text.at(place - 1) in ("are", "were")
    for verb in (1, 2):  # "seven nodules are visible"
        if opens and following[verb : verb + 1] in (("are",), ("is",)):
            return bool(set(following[verb + 1 : verb + 2]) & _SEEN)
    return _is_equated(text, place)


def _counts(words: Sequence[str]) -> bool:
    """Return whether there is a number among the words."""
    return any(number(word) is not None for word in words)


def _is_equated(text: Words, place: int) -> bool:
    """Return whether the words before a number make it a result: "the sum is", "adds up to"."""
    before, shown = place - 1, False
    for _ in range(_WINDOW):
        if text.at(before) not in _NUMBER_FILLERS:
            break
        shown = shown or text.words[before] in ("a", "the")
        before -= 1
    word = text.at(before)
    if set("".join(text.gaps[before + 1 : place + 1])) & SENTENCE:
        return False
    if word == "to":
        return text.at(before - 1) in _ADDS
    if (text.at(before - 1), word) in (("go", "with"), ("results", "in"), ("resulting", "in")):
        return True
    if word not in _EQUATES or text.at(place + 1) in ("on", "in", "at"):
        return False
    if word in ("has", "contains", "holds"):
        return (
            not shown
            and closes(text, place)
            and not set(text.words[max(0, before - 2) : before]) & _SIDES
        )
    if word in ("see", "find", "have"):
        return not shown  # "you see a 7" tells a digit
    if word not in _COPULAS:
        return True
    about: list[str] = []
    for step in range(before - 1, max(-1, before - 1 - _WINDOW), -1):
        if set(text.gaps[step + 1]) & CLAUSE:
            break
        about.append(text.words[step])
    pairs = set(zip(about[1:], about, strict=False))  # the words were read backwards
    if pairs & {("number", "of"), ("right", "number")} or set(about) & _RESULTS:
        return True
    return not set(about) & _OPERANDS


def _is_operand(text: Words, place: int) -> bool:
    """Return whether a number is one of several in a sum or a list: "0 + 7", "7 and 0"."""
    for neighbour, sign, gap in (
        (place - 1, place - 2, text.gaps[place]),
        (place + 1, place + 2, text.gaps[place + 1]),
    ):
        word = text.at(neighbour)
        if word in ("+", "plus", "minus", "times"):
            return True
        if word in ("and", "or") and number(text.at(sign)) is not None:
            return True
        if number(word) is not None and gap.strip() in _SIGNS:
            return True
    return False
