"""Read what a hint says of an option: that it is out, better than another, or excepted."""

from __future__ import annotations

from itertools import pairwise

from kepo.tasks.hint_words import CLAUSE, SENTENCE, Words, clause_around, closes, words_of
from kepo.tasks.mentions import EXCEPT, Mention

WINDOW = 6
"""The number of words that are read on either side."""
RIGHT = words_of("right correct best better answer true it one solution likeliest")
AUXILIARIES = words_of("is are was looks seems must should would can could has appears")
_NEGATIONS = words_of(
    "not no never neither nor without cannot exclude excludes excluding excluded eliminate "
    "eliminates reject dismiss discard than"
)
_WRONG = words_of(
    "wrong incorrect false unlikely excluded impossible eliminated rejected implausible absent "
    "missing improbable dismissed discarded refuted untrue fail fails lack lacks"
)
_NO, _YES = words_of("no wrong false incorrect out"), words_of("yes right true correct")
_FITS = words_of("fit match apply work hold suit agree explain")
_DENIED = AUXILIARIES | words_of("do does did will might may")
_ALL = words_of("all every everything everyone each any anything nothing none options choices")
_BEATS = words_of("beats outranks outweighs trumps")
_NEXT_TO = words_of("after before following preceding")
_NAMES = words_of("letter one option choice")
_COMPARED = words_of(
    "compare compared comparing compares contrast contrasted differ differs different differences "
    "distinguish distinguishes distinguishing unlike versus how whether recall remember resemble "
    "resembles if"
)
_ASKS = words_of("make makes would does do did sets set distinguishes a an the signs features")
_BE = words_of("is s was be can ca could say")


def is_ruled_out(text: Words, start: int, end: int, floor: int, ceiling: int) -> bool:
    """Return whether the words between ``floor`` and ``ceiling`` say that words ``start`` to
    ``end``, which they surround, are not the answer: "it is not A", "A is wrong"."""
    if text.at(start - 1) == "over" or (text.at(start - 1), text.at(start - 2)) == (
        "of",
        "instead",
    ):
        return True
    if _is_marked_out(text, end):
        return True
    for place in range(start - 1, max(floor, start - WINDOW) - 1, -1):
        word = text.words[place]
        if set(text.gaps[place + 1]) & CLAUSE or word == "except":
            break
        if word == "but":
            return text.at(place - 1) == "anything"
        if word in _NEGATIONS or (word == "out" and text.at(place - 1)[:4] == "rule"):
            return True
    for place in range(end, min(ceiling, end + WINDOW)):
        word = text.words[place]
        if set(text.gaps[place]) & CLAUSE:
            break
        if word in _WRONG or (word == "out" and text.at(place - 1) in ("ruled", "is", "are")):
            return True
        denied = word == "not" and text.at(place - 1) in _DENIED
        if denied and text.at(place + 1) in RIGHT | _FITS | {"the", "possible", "likely"}:
            return True
    return False


def _is_marked_out(text: Words, end: int) -> bool:
    """Return whether a no stands behind the name: "A: no, B: yes"."""
    mark = text.gaps[end].strip(" )]}*_")
    if text.at(end) not in _NO or mark not in (":", "-", "=", "") or not closes(text, end):
        return False
    return bool(mark) or text.at(end) != "no"


def is_marked_right(text: Words, end: int) -> bool:
    """Return whether the verdict behind the name is a yes."""
    return text.at(end) in _YES and ":" in text.gaps[end] and closes(text, end)


def is_everyday_ruled_out(text: Words, mention: Mention) -> bool:
    """Return whether an option of one everyday word is denied as an answer: "not no", "no is
    wrong".

    Elsewhere the word may have its own sense: "there is not normal perfusion".
    """
    start, end = mention.start, mention.end
    if text.at(start - 1) in ("a", "an", "the"):
        start -= 1
    denied = start - 1
    if text.at(denied) == "be" and text.at(denied - 1) in ("not", "cannot"):
        denied -= 1
    begins = denied <= 0 or bool(set(text.gaps[denied]) & SENTENCE)
    if text.at(denied) == "cannot" and closes(text, end - 1):
        return True
    if text.at(denied) == "not" and closes(text, end - 1):
        return begins or text.at(denied - 1) in _BE
    begins = start == 0 or bool(set(text.gaps[start]) & SENTENCE)
    if not begins or text.at(end) not in ("is", "was", "can", "cannot", "would", "must"):
        return False
    return is_ruled_out(text, start, end, start, len(text))


def prefers(text: Words, first: Mention, second: Mention) -> bool:
    """Return whether one of two options named in a row is said to be better: "B > A", "B beats A",
    "prefer B to A"."""
    between = text.words[first.end : second.start]
    signs = set("".join(text.gaps[first.end : second.start + 1]))
    if not between and signs & set("<>") and not signs & set("-=/"):
        return len(text.words[first.start]) == len(text.words[second.start]) == 1
    if len(between) == 1 and between[0] in _BEATS:
        return True
    before = set(text.words[max(0, first.start - 2) : first.start])
    return bool(before & {"prefer", "favour", "favor"}) and between[:1] == ("to",)


def is_spared(text: Words, mention: Mention) -> bool:
    """Return whether the option is the one left of all: "all options except B are wrong"."""
    place = mention.start - 1
    while text.at(place) in ("the", "option", "choice", "letter"):
        place -= 1
    window = text.words[max(0, place - WINDOW) : max(0, place)]
    return text.at(place) in EXCEPT and bool(set(window) & _ALL)


def is_neighbour(text: Words, group: list[Mention]) -> bool:
    """Return whether an option is named by its neighbours: "the letter after A", "the option
    between A and C"."""
    place = group[0].start - 1
    while text.at(place) in ("the", "option"):
        place -= 1
    if text.at(place - 1) not in _NAMES:
        return False
    places = {mention.option for mention in group}
    if text.at(place) == "between":
        return len(places) == 2 and max(places) - min(places) == 2
    return len(places) == 1 and text.at(place) in _NEXT_TO


def is_compared(text: Words, mention: Mention) -> bool:
    """Return whether the clause asks about or compares what the option's words name: "how does it
    differ from a normal lung", "think about what makes a lesion malignant"."""
    first, _, _ = clause_around(text, mention.start, mention.end, CLAUSE)
    before = text.words[first : mention.start][-2 * WINDOW :]
    if set(before) & _COMPARED:
        return True
    return any(word in ("what", "which") and verb in _ASKS for word, verb in pairwise(before))


def is_asked(text: Words, mention: Mention, marks: frozenset[str]) -> bool:
    """Return whether the words between ``marks`` around the mention are an open question: not
    "normal lung?" alone, nor "isn't it a normal lung?"."""
    first, last, end = clause_around(text, mention.start, mention.end, marks)
    alone = last - first <= mention.end - mention.start + 1
    return "?" in end and not alone and "not" not in text.words[first:last]


def is_conditional(text: Words, mention: Mention) -> bool:
    """Return whether the sentence puts the mention under a condition: "if there is fluid, choose
    C"."""
    first, _, _ = clause_around(text, mention.start, mention.end, SENTENCE)
    return text.at(first) == "if" and text.at(first + 1) not in ("i", "you")
