"""Which hints state an answer: counted on labelled hints, and by kind."""

import sys
from dataclasses import replace

import hint_texts_held_out
import pytest
from hint_texts import LEAKS, QUESTIONS
from hint_texts_fair import FAIR

from kepo.data.example import LETTERS
from kepo.digits.warm_up import worked_hint
from kepo.tasks import leaks
from kepo.tasks.leaks import states_answer
from kepo.tasks.multiple_choice import worked_answer


def seen(labelled):
    return [hint for question, hint in labelled if states_answer(hint, QUESTIONS[question])]


def unseen(labelled):
    return [hint for question, hint in labelled if not states_answer(hint, QUESTIONS[question])]


# ---- counted ----


def test_few_of_the_labelled_hints_are_misjudged():
    """The misses and false refusals that are known; another is a change for the worse."""
    assert len(LEAKS) >= 190 and len(FAIR) >= 160
    assert unseen(LEAKS) == ["the option after the first"]
    assert seen(FAIR) == ["X-ray and CT both use radiation"]  # "CT" is part of an option's text


def test_few_of_the_hints_held_out_are_misjudged():
    """Labelled before there were rules, by who wrote the rules. First measured, 1 of 62 statements
    was missed and 0 of 62 others refused."""
    assert len(hint_texts_held_out.LEAKS) >= 60 and len(hint_texts_held_out.FAIR) >= 60
    assert len(unseen(hint_texts_held_out.LEAKS)) <= 3
    assert len(seen(hint_texts_held_out.FAIR)) <= 3


# ---- every letter, place and number alike ----

LETTER = """
The answer must be {} | It has to be {} | answer {} | Answer:{} | {} is correct
{} is your answer | I'd lean towards {} | Go with {}. | choose option {} | stick with {} | try {}
only {} fits | {} matches what is seen | {} makes the most sense | {} stands out
Of the four, {} is best | This leaves only {}. | By elimination: {} | The answer's {}
that would be {} | Hence: {} | => {} | Answer ({}) | [{}] | $\\boxed{{\\text{{{}}}}}$ | <b>{}</b>
<answer>{}</answer> | The answer is `{}` | Nothing but {} makes sense | none other than {}
psst, {} | {}) | {}? | answer-{} | option_{} | ans={} | {} is the one | This matches {}
Everything speaks for {} | {} because the angles are sharp | {} – the angles are sharp
The angles are sharp ({}) | The angles are sharp.\\n{} | (**{}**)
"""
PLACE = """
the {} option | option {n} | option no. {n} | choice #{n} | answer choice {n}
number {n} is correct | go with #{n} | It's the {} one | The {} is right
the {} of the four options | the answer is the {} | the {} listed option | choose the {}
The one listed {} | OPTION {n}! | option_{n} | the **{}** choice
"""
RESULT = """
{} | = {} | 0 + 1 = {} | the sum is {} | they add up to {} | that makes {} | you get {}
in total {} | {} altogether | {} is the sum | answer: {} | pick {} | 3 and 4 are {} | 3+4 → {}
3 plus 4: {} | so {} | \\boxed{{{}}} | '{}' | find {} in the list | Their sum is, in fact, {}.
The sum of the two digits: {}
"""
OPERAND = """
{} + 0 | 0+{} | {}, 0 | 0 and {} | the digits are {} and 0 | the left digit is a {}
left: {}, right: 0 | the first is {} and the second is 0 | a {} on the left | I see a {} and a 0
add {} to 0 | add 0 to {} | zero plus {} | the sum of {} and 0 | what is {} + 0? | {} + 0 =
({} + 0) | it starts with a {} | {} & 0
"""


def filled(table, *words, **named):
    cells = [cell.strip() for line in table.strip().splitlines() for cell in line.split(" | ")]
    return [cell.replace("\\n", "\n").format(*words, **named) for cell in cells]


@pytest.mark.parametrize("letter", "ABCDabcd")
def test_every_letter_is_seen_in_every_phrase(letter):
    about = replace(QUESTIONS["lung"], answer=letter.upper())
    assert [hint for hint in filled(LETTER, letter) if not states_answer(hint, about)] == []


@pytest.mark.parametrize(
    ("place", "words"),
    list(enumerate(zip(("first", "second", "third", "fourth"), "1234", strict=True))),
)
def test_every_place_is_seen_in_every_phrase(place, words):
    about = replace(QUESTIONS["lung"], answer=LETTERS[place])
    hints = filled(PLACE, words[0], n=words[1])
    assert [hint for hint in hints if not states_answer(hint, about)] == []


@pytest.mark.parametrize("value", ["7", "13", "2", "seven", "thirteen", "Two"])
def test_a_number_is_an_answer_where_it_is_a_result(value):
    """The right one gives the answer away, a wrong one misleads."""
    for answer in "BCD":
        about = replace(QUESTIONS["sum"], answer=answer)
        assert [hint for hint in filled(RESULT, value) if not states_answer(hint, about)] == []
        assert [hint for hint in filled(OPERAND, value) if states_answer(hint, about)] == []


@pytest.mark.parametrize("a", range(10))
def test_no_worked_hint_of_the_digits_states_its_sum(a):
    for b in range(10):
        total = a + b
        options = tuple(str(total + step) for step in (0, 1, 2, 3))
        asked = replace(
            QUESTIONS["sum"], options=options, answer="A", rationale=f"{a} + {b} = {total}"
        )
        assert worked_hint(asked) == f"{a} + {b}" and not states_answer(f"{a} + {b}", asked)
        assert states_answer(asked.rationale, asked)
        assert states_answer(worked_answer(asked), asked)


# ---- an option's words ----


@pytest.mark.parametrize(
    "gap", [" ", "-", "_", "\u2010", "\u2011", "\u2013", "\u00a0", "\u00ad", ""]
)
def test_what_stands_between_the_words_of_an_option_does_not_hide_it(gap):
    for hint in (f"normal{gap}lung", f"It shows a NORMAL{gap}Lung.", f"**normal{gap}lung**"):
        assert states_answer(hint, QUESTIONS["lung"])


@pytest.mark.parametrize(
    ("hint", "leaks"),
    [
        ("Die Antwort ist B", True),
        ("\u7b54\u6848\u662fB\u3002", True),  # Chinese, without spaces: the answer is B
        ("\u8fd9\u662f\u6b63\u5e38\u80ba", True),  # the option's words
        ("\u770b\u80ba", False),
        ("Regarde \u00e0 gauche", False),
        ("\u24b7", True),
    ],
)
def test_letters_and_words_are_found_in_other_languages_too(hint, leaks):
    options = ("\u80ba\u708e", "\u6b63\u5e38\u80ba", "x")
    assert states_answer(hint, replace(QUESTIONS["lung"], options=options, answer="B")) == leaks


def test_a_word_that_only_holds_an_option_is_another_word():
    asked = replace(QUESTIONS["lung"], options=("ray", "lung"), answer="B")
    for hint in ("lungfish", "prolung", "the lung2 file"):
        assert not states_answer(hint, asked)


def test_the_longer_of_two_options_is_the_one_that_is_named():
    asked = replace(QUESTIONS["lung"], options=("no pneumonia", "pneumonia", "abscess"), answer="B")
    assert not states_answer("I doubt it: no pneumonia would look so dense", asked)
    assert states_answer("signs of pneumonia", asked)


# ---- time ----


@pytest.mark.parametrize("question", ["lung", "cyst", "sum", "virus"])
@pytest.mark.parametrize(
    "piece",
    ["a, ", "A, B, C ", "normal lung, ", "7 + ", "the B ", "not ", "(", "second ", "nsn", "</b>"],
)
def test_work_is_linear_in_the_hint(question, piece):
    """Lines of Python run for a text and for one four times as long."""

    def lines(text):
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            states_answer(text, QUESTIONS[question])
        finally:
            sys.settrace(before)
        return count

    short, long = (lines(piece * n + "x") for n in (100, 400))
    assert long <= 4.5 * short


def test_a_hint_of_100_kilobytes_is_read():
    long = "look at the edges, and then at the middle. " * 2_400
    assert len(long) > 100_000 and not states_answer(long, QUESTIONS["lung"])
    assert states_answer(long + "It is B.", QUESTIONS["lung"])


# ---- the counts can fail ----


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("_is_stated", lambda *_: False),
        ("_is_result", lambda *_: False),
        ("_is_ruled_out", lambda *_: False),
        ("_is_operand", lambda *_: False),
        ("is_name", lambda *_: False),
        ("_is_led_to", lambda *_: True),
    ],
)
def test_the_counts_see_a_rule_that_is_broken(monkeypatch, name, planted):
    monkeypatch.setattr(leaks, name, planted)
    assert len(unseen(LEAKS)) + len(seen(FAIR)) > 2  # those two are known
