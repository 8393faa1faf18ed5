"""Which hints state an answer: what leaks, and what is only a mention.

A hint states an answer, and is of no use as a hint, where it

- names the right option: its letter, its place ("the second option", "option 2", "#2") or its own
  words, whatever the case, accents, hyphens, punctuation or emphasis around them, one or several
  ("normal lungs");
- says that another option is the answer ("The answer is C" where it is B): that misleads;
- rules out all options but one ("neither A, C nor D"), or the right one ("B is wrong");
- gives a number that is an option as a result ("= 7", "the sum is 7", "makes seven").

It states none where it

- names several options alike ("either pneumonia or effusion", "decide between B and C", "a cyst has
  fluid, a tumour does not");
- says something of a wrong option, or rules out some of them;
- has an option's number in an expression or names what it shows ("0 + 7", "the right digit is 7");
- has a letter or an everyday word in another sense: the article "A", vitamin B, B cells,
  C. difficile, 37 °C; "there is no fluid", "the right answer".

It goes by words, and its phrases are English. An answer told in other words than the option's own
passes.
"""

from __future__ import annotations

from collections.abc import Sequence

from kepo.data.example import LETTERS, Example
from kepo.tasks.mentions import (
    LISTS,
    Mention,
    Words,
    closes,
    is_name,
    mentions,
    number,
    read,
    words_of,
)

_WINDOW = 6
"""Words on either side that are read."""
_SENTENCE = frozenset(".!?;\n")
_CLAUSE = _SENTENCE | frozenset(":,")
_LINKS = words_of(
    "or and nor vs versus with from to against between either both a an the option options & even"
)
_FILLERS = words_of(
    "a an the clearly surely simply definitely certainly probably just only really obviously "
    "most likely then letter option choice number i believe think guess actually indeed "
    "therefore"
)
_NEGATIONS = words_of(
    "not no never neither nor without cannot exclude excludes excluding excluded eliminate "
    "eliminates reject dismiss discard than"
)
_WRONG = words_of(
    "wrong incorrect false unlikely excluded impossible eliminated rejected implausible"
)
_RIGHT = words_of("right correct best better answer true it one solution likeliest")
_COPULAS = words_of("is s be was are being becomes")
_ANSWERS = words_of(
    "it this that answer one option choice solution letter what correct right diagnosis "
    "image picture scan here statement"
)
_CHOOSES = words_of(
    "choose pick select take mark tick say answer solution correct right want suggest "
    "suggests leaves leave leaving thus so hence ergo boxed guess"
)
_FOLLOWED = {  # "go with B", but not "with B"
    "with": words_of("go going stick left goes"),
    "for": words_of("go going opt vote goes"),
    "to": words_of("points point pointing goes go leads amounts"),
}
_SHOWS = words_of("see shows show")
_AUXILIARIES = words_of("is are was looks seems must should would can could has appears")
_DONE = words_of("here then as because since for")

_OPERATORS = words_of("+ plus minus times and or")
_SIGNS = ("-", "−", "–", "*", "×", "·", "/", "&", ",")
_EQUATES = words_of(
    "is s are be was equals equal makes make making gives give giving get gets got yields "
    "yield totals total sum answer result count counted find see have boxed so thus "
    "therefore hence choose pick select results"
)
_ADDS = words_of("add adds adding come comes sum sums amount amounts up equal")
_RESULTS = words_of(
    "sum total answer result it that this together altogether there they correct need"
)
_OPERANDS = words_of(
    "digit digits number numbers figure numeral left right first second other one ones upper "
    "lower top bottom picture image"
)
_NUMBER_FILLERS = words_of("a an the exactly just about simply only up you us in fact of")
_TOTALS = words_of("total all altogether together")


def states_answer(hint: str, example: Example) -> bool:
    """Whether a hint states an answer to the question, in the sense of this module's docstring.

    Takes time in proportion to the hint's length.
    """
    text, options = read(hint), example.options
    right = LETTERS.index(example.answer)
    if _has_signs(hint, options[right]) or _states_number(text, options):
        return True
    single: list[Mention] = []
    ruled_out: set[int] = set()
    groups = _grouped(mentions(text, options), text)
    ends = [0, *(group[-1].end for group in groups)]
    starts = [*(group[0].start for group in groups), len(text)]
    for group, floor, ceiling in zip(groups, ends[:-1], starts[1:], strict=True):
        first, end = group[0], group[-1].end
        if not first.by_text and len(text.words[first.start]) == 1 and is_name(text, first.start):
            continue
        named = {mention.option for mention in group}
        if _is_ruled_out(text, first.start, end, floor, ceiling):
            if first.sure or not first.by_text:
                ruled_out |= named
        elif len(named) == 1:
            single.append(first._replace(end=end))
    if right in ruled_out or len(ruled_out) >= len(options) - 1:
        return True
    alone = len({mention.option for mention in single if mention.sure}) == 1
    return any(
        (alone and mention.sure and mention.option == right) or _is_stated(text, mention)
        for mention in single
    )


def _grouped(found: Sequence[Mention], text: Words) -> list[list[Mention]]:
    """Mentions that are named in one breath, as in "A, B or C" and "pneumonia vs. effusion"."""
    groups: list[list[Mention]] = []
    for mention in found:
        end = groups[-1][-1].end if groups else None
        if end is not None and mention.start - end <= 5 and _are_linked(text, end, mention.start):
            groups[-1].append(mention)
        else:
            groups.append([mention])
    return groups


def _are_linked(text: Words, end: int, start: int) -> bool:
    between = text.words[end:start]
    marks = set("".join(text.gaps[end : start + 1])) & set(".!?;:")
    if marks - {"."} or ("." in marks and "vs" not in between):
        return False
    newline = any("\n" in gap for gap in text.gaps[end : start + 1])
    return set(between) <= _LINKS and not (newline and between)


def _is_ruled_out(text: Words, start: int, end: int, floor: int, ceiling: int) -> bool:
    """Whether words ``start`` to ``end`` are said not to be the answer, by those between ``floor``
    and ``ceiling`` around them: "it is not A", "A is wrong"."""
    if text.at(start - 1) == "over" or (text.at(start - 1), text.at(start - 2)) == (
        "of",
        "instead",
    ):
        return True
    for place in range(start - 1, max(floor, start - _WINDOW) - 1, -1):
        word = text.words[place]
        if set(text.gaps[place + 1]) & _CLAUSE or word == "except":
            break
        if word == "but":
            return text.at(place - 1) == "anything"
        if word in _NEGATIONS or (word == "out" and text.at(place - 1)[:4] == "rule"):
            return True
    for place in range(end, min(ceiling, end + _WINDOW)):
        word = text.words[place]
        if set(text.gaps[place]) & _CLAUSE:
            break
        if word in _WRONG or (word == "out" and text.at(place - 1) in ("ruled", "is", "are")):
            return True
        denied = word == "not" and text.at(place - 1) in _AUXILIARIES
        if denied and text.at(place + 1) in _RIGHT | {"the", "possible", "likely"}:
            return True
    return False


def _is_stated(text: Words, mention: Mention) -> bool:
    """Whether what the mention names is said to be the answer."""
    start, end = mention.start, mention.end
    if text.at(start - 1) in ("a", "an", "the") and not set(text.gaps[start]) & _CLAUSE:
        start -= 1
    opens = start == 0 or bool(set(text.gaps[start]) & (_SENTENCE | {":"}))
    shuts = end == len(text) or bool(set(text.gaps[end]) & (_SENTENCE - {"?"}))
    if len(text.words[start]) == 1 and not (mention.by_text or mention.sure):
        opens, shuts = start == 0, end == len(text)  # "C. difficile", "b) the content"
    if mention.by_text and not mention.sure:  # an everyday word, which must end what it states
        shuts = shuts or (start == 0 and "," in text.gaps[end])
        if not (closes(text, end - 1) or text.at(end) in _DONE):
            return False
    return (opens and shuts) or _is_led_to(text, mention) or _is_confirmed(text, end)


def _is_led_to(text: Words, mention: Mention) -> bool:
    """Whether the words before the mention lead to an answer: "it is B", "go with B"."""
    place = mention.start - 1
    joint = text.gaps[mention.start]
    for _ in range(_WINDOW):
        if text.at(place) not in _FILLERS or set(text.gaps[place + 1]) & _SENTENCE:
            break
        place -= 1
    word = text.at(place)
    if not word or set(text.gaps[place + 1]) & _SENTENCE:
        return False
    if word in ("right", "correct") and mention.by_text and ":" not in joint:
        return False  # "a right pleural effusion"
    if word in _CHOOSES or text.at(place - 1) in _FOLLOWED.get(word, ()):
        return True
    if mention.by_text and word in _SHOWS:
        return True
    about = _ANSWERS | {"there"} if mention.by_text and mention.sure else _ANSWERS
    return word in _COPULAS and bool(set(_before(text, place)) & about)


def _is_confirmed(text: Words, end: int) -> bool:
    """Whether the words from ``end`` on say that what stood before is the answer: "fits best"."""
    word, following = text.at(end), text.at(end + 1)
    if set(text.gaps[end]) & _CLAUSE:
        return False
    if word in ("fits", "wins", "remains") or (word, following) == ("it", "is"):
        return True
    if word not in _AUXILIARIES:
        return False
    for place in range(end + 1, min(len(text), end + 5)):
        if set(text.gaps[place]) & _CLAUSE:
            return False
        if text.words[place] in ("answer", "correct", "solution"):
            return True
        done = closes(text, place) or text.at(place + 1) in _DONE | {"to"}
        if text.words[place] in _RIGHT and done:
            return True
    return False


def _before(text: Words, place: int) -> list[str]:
    """The last words before one, of its sentence."""
    found: list[str] = []
    while place > 0 and len(found) < _WINDOW and not set(text.gaps[place]) & _SENTENCE:
        place -= 1
        found.append(text.words[place])
    return found


def _has_signs(hint: str, option: str) -> bool:
    """Whether an option of signs alone, such as "(.*)", stands in the hint."""
    signs = option.strip(". \t\n")
    return bool(signs) and not len(read(signs)) and signs in hint


def _states_number(text: Words, options: Sequence[str]) -> bool:
    """Whether a number that is an option is given as a result."""
    own = [read(option).words for option in options]
    values = {number(words[0]) for words in own if len(words) == 1} - {None}
    return any(
        number(word) in values and _is_result(text, place) for place, word in enumerate(text.words)
    )


def _is_result(text: Words, place: int) -> bool:
    """Whether the number there is told as what comes out, by the words and signs around it."""
    following, gap = text.words[place + 1 : place + 6], text.gaps[place]
    if place == 0 and len(text) <= 2 and not (_counts(following) or set(following) & _OPERATORS):
        return True  # "7", "two nodules"
    if _is_operand(text, place):
        return False
    after_sum = _counts(text.words[max(0, place - 1) : place]) and text.at(place - 2) in _OPERATORS
    if set(gap) & set("=→≈") or "->" in gap or (":" in gap and after_sum):
        return True
    if following[:1] == ("is",) and set(following[1:4]) & (_RESULTS | {"right", "correct"}):
        return not set(following) & _OPERANDS - {"right"}
    if set(following) & LISTS:
        return True
    if set(following[:2]) & _TOTALS and not set(text.gaps[place + 1]) & _CLAUSE:
        return True
    if text.words[place] == "one" and not closes(text, place):
        return False  # "one of them"
    return _is_equated(text, place)


def _counts(words: Sequence[str]) -> bool:
    """Whether there is a number among the words."""
    return any(number(word) is not None for word in words)


def _is_equated(text: Words, place: int) -> bool:
    """Whether the words before a number make it a result: "the sum is", "adds up to"."""
    before, shown = place - 1, False
    for _ in range(_WINDOW):
        if text.at(before) not in _NUMBER_FILLERS:
            break
        shown = shown or text.words[before] in ("a", "the")
        before -= 1
    word = text.at(before)
    if set("".join(text.gaps[before + 1 : place + 1])) & _SENTENCE:
        return False
    if word == "to":
        return text.at(before - 1) in _ADDS
    if (text.at(before - 1), word) in (("go", "with"), ("results", "in"), ("resulting", "in")):
        return True
    if word not in _EQUATES or text.at(place + 1) in ("on", "in", "at"):
        return False
    if word in ("see", "find", "have"):
        return not shown  # "you see a 7" tells a digit
    if word not in _COPULAS:
        return True
    about: list[str] = []
    for step in range(before - 1, max(-1, before - 1 - _WINDOW), -1):
        if set(text.gaps[step + 1]) & _CLAUSE:
            break
        about.append(text.words[step])
    pairs = set(zip(about[1:], about, strict=False))  # it was read backwards
    if pairs & {("number", "of"), ("right", "number")} or set(about) & _RESULTS:
        return True
    return not set(about) & _OPERANDS


def _is_operand(text: Words, place: int) -> bool:
    """Whether a number is one of several, in a sum or in a list: "0 + 7", "7 and 0"."""
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
