"""Find where a text mentions an option: by its letter, its place in the list, or its own words.

`kepo.tasks.leaks` reads what the text says of the option there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kepo.data.example import LETTERS
from kepo.tasks.hint_words import (
    CLAUSE,
    ROMAN,
    SENTENCE,
    Words,
    closes,
    number,
    read,
    words_of,
    wrapped,
)

ORDINALS = (
    *("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"),
    "tenth",
)
OPTION_NOUNS = words_of("option opt choice alternative possibility candidate answer item")
EXCEPT = words_of("except but than save besides from")
"""The words that except an option from all: "all except the second"; "other than" and "apart from"
do so, too."""
LISTS = words_of("options choices answers list")

_ARTICLES = frozenset(("a", "an", "the"))

# What makes a letter part of a name: "vitamin B", "B cells". Compounds, as "B-mode", are names too.
_NAMED_BEFORE = words_of(
    "question vitamin vitamins hepatitis influenza hemophilia haemophilia type types group groups "
    "grade stage class category level phase part point points region regions zone area "
    "segment line lines side edge plane panel panels figure fig image arrow label labelled labeled "
    "marked slice row column series factor protein antigen kerley stanford weber pugh plan "
    "view lead ring schatzki wave patient case exhibit appendix"
)
_NAMED_AFTER = words_of(
    "cell cells line lines lymphoma lymphocyte lymphocytes mode scan scans virus wave waves "
    "ring rings symptom symptoms strep streptococcus streptococci difficile vitamin vitamins "
    "major minor side edge border margin corner marker"
)
# An article has a noun after it and never one of these.
_AFTER_A_LETTER = words_of(
    "is was are it looks seems fits must should would can could cannot has matches remains "
    "wins makes stands appears shows describes corresponds because since as due for and or "
    "nor vs versus but here instead if with from to fails lacks beats"
)
# Options of one everyday word: it means the option only where it is stated as an answer.
_EVERYDAY = words_of(
    "yes no true false none other others both all neither unknown normal abnormal present "
    "absent left right one"
)
_IS = words_of("is are was were look looks appear appears seem seems remain remains")
_QUITE = words_of("quite perfectly entirely completely fully very clearly all rather to be both")
_LOOKS = words_of("appearing looking appearance look of the")
# "the right ...": the correct one, not the side.
_THE = ("the", "these", "those")
_LISTED = ("listed", "possible", "given", "offered", "answer")
_CORRECT = words_of(
    "answer option choice one letter way thing order track solution diagnosis place question"
)


class Mention(NamedTuple):
    """A mention of an option by words ``start`` to ``end`` (exclusive)."""

    start: int
    end: int
    option: int
    sure: bool
    """False if the words mean the option only when stated as an answer ("the second", an everyday
    word)."""
    by_text: bool = False


def mentions(text: Words, options: Sequence[str]) -> list[Mention]:
    """Return the mentions of options in ``text``, in order; of overlapping ones, the longest.

    An option that is a number is not looked for here: a number alone says nothing.
    """
    found = [*_by_text(text, options), *_turned(text, options), *_by_place(text, options)]
    found += _by_letter(text, len(options))
    found.sort(key=lambda m: (m.start, m.start - m.end))
    kept: list[Mention] = []
    for mention in found:
        if kept and mention.start < kept[-1].end:
            continue  # within a longer one: the letter in "hepatitis B"
        label = kept[-1] if kept else None
        if (
            label is not None
            and mention.by_text
            and (label.end, label.option) == (mention.start, mention.option)
            and "\n" not in text.gaps[mention.start]
        ):
            mention = mention._replace(start=kept.pop().start)  # "B. normal lung"
        kept.append(mention)
    return kept


def is_name(text: Words, place: int) -> bool:
    """Return whether the letter at ``place`` is part of a name: vitamin B, B-mode, C. difficile,
    37 °C."""
    before, after = text.gaps[place], text.gaps[place + 1]
    previous, following = text.at(place - 1), text.at(place + 1)
    asked = {text.at(place - back) for back in (1, 2, 3)} & OPTION_NOUNS
    if before.strip(" \t-(") == "" and previous in _NAMED_BEFORE and not asked:
        return True
    if "°" in before or (number(previous) is not None and before.strip() == ""):
        return True
    if previous and before in ("-", "\u2010", ".", "'", "’") and previous not in OPTION_NOUNS:
        return True
    if following and after in ("-", "\u2010", ".", "'", "’"):
        return True
    return after == " " and following in _NAMED_AFTER


def _by_text(text: Words, options: Sequence[str]) -> Iterator[Mention]:
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    length = 0
    for place, word in enumerate(text.words):
        starts[length] = place
        length += len(word)
        ends[length] = place + 1
    joined = "".join(text.words)
    for option, words in enumerate(options):
        own = own_words(words, LETTERS[option])
        if own and all(number(word) is not None for word in own):
            continue
        everyday = len(own) == 1 and own[0] in _EVERYDAY
        name = "".join(own)
        for form in dict.fromkeys((name,) if everyday else _forms(name)):
            place = joined.find(form) if form else -1
            while place >= 0:
                if place in starts and place + len(form) in ends:
                    start, end = starts[place], ends[place + len(form)]
                    yield Mention(start, end, option, not everyday or _is_side(text, start), True)
                place = joined.find(form, place + 1)


def own_words(option: str, letter: str) -> list[str]:
    """Return the words of an option, without an article or its own letter ("(A) one") before
    them."""
    label = re.match(rf"\s*(?:\({letter}\)|{letter}[.):])\s*(?=\S)", option)
    own = list(read(option[label.end() :] if label else option).words)
    while len(own) > 1 and own[0] in _ARTICLES:
        del own[0]
    return own


def _turned(text: Words, options: Sequence[str]) -> Iterator[Mention]:
    """Yield mentions of options in other word order: "the lungs are normal" is a normal lung.

    The option has several words, and its last one comes first. "Normal-appearing lung" counts, too,
    where a word about looks stands between.
    """
    for option, words in enumerate(options):
        own = own_words(words, LETTERS[option])
        if len(own) < 2:
            continue
        rest, heads = tuple(own[:-1]), _forms(own[-1])
        for place, word in enumerate(text.words):
            if word not in heads:
                continue
            start = place
            while start > 0 and place - start < 3 and text.words[start - 1] in _LOOKS:
                start -= 1
            if start < place and text.words[max(0, start - len(rest)) : start] == rest:
                yield Mention(start - len(rest), place + 1, option, True, True)
            after = place + 1
            if not (text.at(after) in _IS or ":" in text.gaps[after]):
                continue
            while after < place + 5 and text.at(after) in _IS | _QUITE:
                after += 1
            end = after + len(rest)
            broken = set("".join(text.gaps[place + 2 : end])) & CLAUSE
            ends = closes(text, end - 1) or text.at(end) in ("here", "throughout", "in", "on")
            if text.words[after:end] == rest and ends and not broken:
                yield Mention(place, end, option, True, True)


def _forms(name: str) -> tuple[str, ...]:
    """Return a name in singular and plural; a name of one character, or not ending in a letter,
    only as it is."""
    if len(name) < 2 or not name[-1].isalpha():
        return (name,)
    if len(name) < 3:
        return (name, name + "s")
    return (name, name + "s", name + "es", name.removesuffix("s") if len(name) > 4 else name)


def _is_side(text: Words, place: int) -> bool:
    """Return whether "left" or "right" at ``place`` is a side that is pointed at."""
    if text.words[place] not in ("left", "right") or text.at(place - 1) != "the":
        return False
    return text.at(place + 1) not in _CORRECT


def _by_letter(text: Words, count: int) -> Iterator[Mention]:
    letters = LETTERS[:count].lower()
    for place, word in enumerate(text.words):
        option = letters.find(word) if len(word) == 1 else -1
        if option < 0 or (word in "ai" and _is_article(text, place)):
            continue
        before, after, following = text.gaps[place], text.gaps[place + 1], text.at(place + 1)
        # "C. difficile", "a. the wall": a sentence would begin with a capital letter.
        short = after.startswith(". ") and following and text.raw[place + 1][0].islower()
        counted = after.startswith(")") and "(" not in before and following  # "b) the content"
        slashed = (before == "/" and text.at(place - 1) not in letters) or (
            after == "/" and following not in letters  # "c/o", "A/P"
        )
        yield Mention(place, place + 1, option, not (short or counted or slashed))


def _is_article(text: Words, place: int) -> bool:
    """Return whether "a" at ``place`` is an article, or "I" a pronoun, and not the letter of an
    option: a word follows that does not go with a letter ("A is", "A over B").

    Quotes, emphasis and brackets that open before that word change nothing.
    """
    gap, following = text.gaps[place + 1], text.at(place + 1)
    follows = gap[:1].isspace() and gap.strip(" \t\n([{\"'“‘*_`") == ""
    if not follows or not following:
        return False
    if "\n" in gap and (text.raw[place].isupper() or text.raw[place + 1][0].isupper()):
        return False
    if following in ("over", "rather", "not"):  # "A over B"; but "a rather large one"
        return len(text.at(place + 2)) != 1 and text.at(place + 2) != "than"
    return following not in _AFTER_A_LETTER


def _by_place(text: Words, options: Sequence[str]) -> Iterator[Mention]:
    count = len(options)
    counted = any(any(map(str.isdigit, option)) for option in options)
    for place, word in enumerate(text.words):
        following = text.at(place + 1)
        ordinal = _ordinal(word, count)
        if ordinal is not None and 0 <= ordinal < count:
            if following in OPTION_NOUNS and (word, following) != ("final", "answer"):
                yield Mention(place, place + 2, ordinal, True)
            elif following == "from" and text.at(place + 3) in ("bottom", "end", "top"):
                turned = ordinal if text.at(place + 3) == "top" else count - 1 - ordinal
                yield Mention(place, place + 4, turned, True)
            elif following in ("of", "in", "on") and text.at(place + 2) in _THE:
                listed = not LISTS.isdisjoint(text.words[place + 3 : place + 6])
                yield Mention(place, min(place + 4, len(text)), ordinal, listed)
            elif following in _LISTED and text.at(place + 2) in OPTION_NOUNS:
                yield Mention(place, place + 3, ordinal, True)
            elif text.at(place - 1) == "listed":
                yield Mention(place, place + 1, ordinal, True)
            elif following == "one":
                listed = not LISTS.isdisjoint(text.words[place + 2 : place + 5])
                yield Mention(place, place + 2, ordinal, listed)
            elif text.at(place - 1) == "the" and text.at(place - 2) in EXCEPT:
                yield Mention(place, place + 1, ordinal, True)
            elif closes(text, place) or following in ("is", "fits", "must", "looks", "seems"):
                yield Mention(place, place + 1, ordinal, False)
        elif word in ("former", "latter") and count == 2 and closes(text, place):
            yield Mention(place, place + 1, int(word == "latter"), False)
        yield from _numbered(text, place, count, counted)


def _ordinal(word: str, count: int) -> int | None:
    """Return the place in the list, from 0, that an ordinal names; None if the word names none."""
    if word in ORDINALS:
        return ORDINALS.index(word)
    if word in ("last", "final", "bottom"):
        return count - 1
    if word in ("top", "penultimate"):
        return 0 if word == "top" else count - 2
    digits = word[:-2]
    if word[-2:] in ("st", "nd", "rd", "th") and digits.isascii() and digits.isdecimal():
        return int(digits[:3]) - 1
    return None


def _numbered(text: Words, place: int, count: int, counted_options: bool) -> Iterator[Mention]:
    """Yield mentions by number: option 2, choice no. 2, option (ii); #2 and number two count only
    if they are stated as an answer.

    A bare number is a place if it is all of the hint or follows "answer", and no option has digits
    (``counted_options``).
    """
    word, gap = text.words[place], text.gaps[place]
    if word in ROMAN and (word != "i" or wrapped(text, place)):
        option = ROMAN.index(word)
    else:
        value = number(word)
        option = int(value) - 1 if value is not None and value < 100 and value % 1 == 0 else -1
    if not 0 <= option < count or "." in word:
        return
    counted = text.at(place - 1) in ("number", "no", "nr") and gap.strip() in ("", ".")
    noun = text.at(place - 2 if counted else place - 1)
    marked = counted or gap.rstrip().endswith("#")
    close = not set(text.gaps[place - counted]) & set(",;!?\n")
    if close and (noun in OPTION_NOUNS - {"answer"} or (noun == "answer" and marked)):
        yield Mention(place - 1 - counted, place + 1, option, True)
    elif not counted_options and closes(text, place) and _answers(text, place):
        yield Mention(place, place + 1, option, True)
    elif marked or (word in ROMAN and wrapped(text, place)):
        yield Mention(place - counted, place + 1, option, False)


def _answers(text: Words, place: int) -> bool:
    """Return whether a bare number at ``place`` is the whole text, or told as the answer."""
    before = place - 1
    while text.at(before) in ("is", "the", "s", "my") and place - before < 4:
        before -= 1
    if set("".join(text.gaps[before + 1 : place + 1])) & SENTENCE:
        return False
    return len(text) == 1 or text.at(before) in ("answer", "solution", "choice", "choose", "pick")
