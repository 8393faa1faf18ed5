"""Tell hints that state an answer from hints that only mention an option.

A hint states an answer, and is of no use as a hint, if it

- names the right option: its letter, its place ("the second option", "option 2", "#2", "the letter
  after A") or its own words, whatever the case, accents, hyphens, punctuation or emphasis around
  them, one or several ("normal lungs"), in another order ("the lungs are normal");
- says that another option is the answer ("The answer is C" where it is B): that misleads;
- puts one option before another ("B > A", "prefer B to A");
- rules out all options but one ("neither A, C nor D", "A: no, C: no, D: no", "not no" where the
  other is yes), or the right one ("B is wrong");
- gives a number that is an option as a result ("= 7", "7 = 3 + 4", "the sum is 7", "makes seven").

It states no answer if it

- names several options alike ("either pneumonia or effusion", "decide between B and C", "a cyst has
  fluid, a tumour does not");
- says something of a wrong option, or rules out some of them;
- names an option by its words in a question ("could it be a normal lung?") or a comparison ("how
  does it differ from a normal lung"): that points at none. It does if the option is all that is
  asked ("normal lung?") or the question denies ("isn't it a normal lung?");
- names a wrong option under a condition ("if there is fluid, choose C");
- has an option's number in an expression or names what it shows ("0 + 7", "the right digit is 7");
- has a letter or an everyday word in another sense: the article "A", vitamin B, B cells,
  C. difficile, 37 °C; "there is no fluid", "the right answer".

The check goes by words, and its phrases are English. It passes an answer told in other words than
the option's own, and much from a writer who knows these rules: it is a sieve, not a proof. It
refuses general statements about the right option alone ("malignant lesions have ragged borders").
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from kepo.data.characters import composed
from kepo.data.example import LETTERS, Example
from kepo.tasks.hint_numbers import states_number
from kepo.tasks.hint_words import CLAUSE, SENTENCE, Words, closes, read, words_of
from kepo.tasks.mentions import Mention, is_name, mentions
from kepo.tasks.verdicts import (
    AUXILIARIES,
    RIGHT,
    WINDOW,
    is_asked,
    is_compared,
    is_conditional,
    is_everyday_ruled_out,
    is_marked_right,
    is_neighbour,
    is_ruled_out,
    is_spared,
    prefers,
)

_LINKS = words_of(
    "or and nor vs versus with from to against between either both a an the option options & even"
)
_FILLERS = words_of(
    "a an the clearly surely simply definitely certainly probably just only really obviously "
    "most likely then letter option choice number i believe think guess actually indeed "
    "therefore"
)
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
_DONE = words_of("here then as because since for there indeed")
_SURE = words_of(
    "definitely clearly surely certainly obviously absolutely simply indeed so plainly"
)
_OPEN = words_of("if a when only whether or say and")
_HANGS = words_of("or only if needs need would means requires and")


def states_answer(hint: str, example: Example) -> bool:
    """Return whether a hint states an answer to the question, as defined in the module's docstring.

    The time taken is proportional to the hint's length.
    """
    text, options = read(hint), example.options
    right = LETTERS.index(example.answer)
    if _has_signs(hint, options[right]) or states_number(text, options):
        return True
    found = mentions(text, options)
    if any(prefers(text, *pair) for pair in pairwise(found)):
        return True
    single: list[Mention] = []
    ruled_out: set[int] = set()
    groups = _grouped(found, text)
    ends = [0, *(group[-1].end for group in groups)]
    starts = [*(group[0].start for group in groups), len(text)]
    for group, floor, ceiling in zip(groups, ends[:-1], starts[1:], strict=True):
        first, end = group[0], group[-1].end
        if not first.by_text and len(text.words[first.start]) == 1 and is_name(text, first.start):
            continue
        if is_neighbour(text, group):
            return True
        named = {mention.option for mention in group}
        spared = len(named) == 1 and is_spared(text, first)
        everyday = first.by_text and not first.sure
        if everyday and is_everyday_ruled_out(text, first):
            ruled_out |= named
        elif not spared and is_ruled_out(text, first.start, end, floor, ceiling):
            if not everyday:
                ruled_out |= named
        elif len(named) == 1:
            single.append(first._replace(end=end))
    if right in ruled_out or len(ruled_out) >= len(options) - 1:
        return True
    pointed = [mention for mention in single if mention.sure and not _only_asks(text, mention)]
    if {mention.option for mention in pointed} == {right}:
        return True
    return any(_is_stated(text, mention) or is_spared(text, mention) for mention in single)


def _only_asks(text: Words, mention: Mention) -> bool:
    """Return whether the mention is an option's words in a question or comparison, which points at
    no option."""
    return mention.by_text and (
        is_asked(text, mention, SENTENCE - {";"}) or is_compared(text, mention)
    )


def _grouped(found: Sequence[Mention], text: Words) -> list[list[Mention]]:
    """Return the mentions in groups that are named in one breath, as in "A, B or C" and "pneumonia
    vs. effusion"."""
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


def _is_stated(text: Words, mention: Mention) -> bool:
    """Return whether the mentioned option is said to be the answer."""
    start, end = mention.start, mention.end
    if mention.by_text and (
        is_asked(text, mention, SENTENCE | {":"}) or is_compared(text, mention)
    ):
        return False
    if is_conditional(text, mention):
        return False
    if is_marked_right(text, end) or _is_yes(text, mention):
        return True
    while text.at(start - 1) in _SURE and not set(text.gaps[start]) & SENTENCE:
        start -= 1
    if text.at(start - 1) in ("a", "an", "the") and not set(text.gaps[start]) & CLAUSE:
        start -= 1
    opens = start == 0 or bool(set(text.gaps[start]) & (SENTENCE | {":"}))
    shuts = end == len(text) or bool(set(text.gaps[end]) & (SENTENCE - {"?"}))
    if len(text.words[start]) == 1 and not (mention.by_text or mention.sure):
        opens, shuts = start == 0, end == len(text)  # "C. difficile", "b) the content"
    if mention.by_text and not mention.sure:  # an everyday word, which must end what it states
        parted = bool(text.gaps[end].strip()) and not set(text.gaps[end]) & {"?", "/"}
        shuts = shuts or (opens and (parted or text.at(end) in ("because", "since")))
        if not (closes(text, end - 1) or text.at(end) in _DONE):
            return False
    return (opens and shuts) or _is_led_to(text, mention) or _is_confirmed(text, end)


def _is_yes(text: Words, mention: Mention) -> bool:
    """Return whether the mention is an option "yes", said without a condition; "yes" has no other
    sense."""
    return (
        text.words[mention.start : mention.end] == ("yes",)
        and text.at(mention.start - 1) not in _OPEN
        and text.at(mention.end) not in _HANGS
    )


def _is_led_to(text: Words, mention: Mention) -> bool:
    """Return whether the words before the mention lead to an answer: "it is B", "go with B"."""
    place = mention.start - 1
    joint = text.gaps[mention.start]
    for _ in range(WINDOW):
        if text.at(place) not in _FILLERS or set(text.gaps[place + 1]) & SENTENCE:
            break
        place -= 1
    word = text.at(place)
    if not word or set(text.gaps[place + 1]) & SENTENCE:
        return False
    if text.words[mention.start] == "right" and text.at(place - 1) in ("that", "you"):
        return False  # "that is right"
    if word in ("right", "correct") and mention.by_text and ":" not in joint:
        return False  # "a right pleural effusion"
    if word in _CHOOSES or text.at(place - 1) in _FOLLOWED.get(word, ()):
        return True
    if mention.by_text and word in _SHOWS:
        return True
    about = _ANSWERS | {"there"} if mention.by_text and mention.sure else _ANSWERS
    return word in _COPULAS and bool(set(_before(text, place)) & about)


def _is_confirmed(text: Words, end: int) -> bool:
    """Return whether the words from ``end`` on confirm the option before them: "fits best"."""
    word, following = text.at(end), text.at(end + 1)
    if set(text.gaps[end]) & CLAUSE:
        return False
    if word in ("fits", "wins", "remains") or (word, following) == ("it", "is"):
        return True
    if word not in AUXILIARIES:
        return False
    for place in range(end + 1, min(len(text), end + 5)):
        if set(text.gaps[place]) & CLAUSE:
            return False
        if text.words[place] in ("answer", "correct", "solution"):
            return True
        done = closes(text, place) or text.at(place + 1) in _DONE | {"to"}
        if text.words[place] in RIGHT and done:
            return True
    return False


def _before(text: Words, place: int) -> list[str]:
    """Return the last words before ``place`` in the same sentence."""
    found: list[str] = []
    while place > 0 and len(found) < WINDOW and not set(text.gaps[place]) & SENTENCE:
        place -= 1
        found.append(text.words[place])
    return found


def _has_signs(hint: str, option: str) -> bool:
    """Return whether the hint contains an option of signs alone, such as "(.*)"."""
    signs = composed(option).strip(". \t\n")
    return bool(signs) and not len(read(signs)) and signs in composed(hint)
