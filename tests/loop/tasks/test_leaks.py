"""Which hints state an answer: counted on labelled hints, and by kind."""

import sys
from dataclasses import replace

import hint_texts_held_out
import hint_texts_newcomer as newcomer
import pytest
from hint_texts import LEAKS, QUESTIONS
from hint_texts_fair import FAIR
from toy import worked_answer

from kepo.data.example import LETTERS
from kepo.miniature.warm_up import worked_hint
from kepo.tasks import hint_numbers, leaks, mentions, verdicts
from kepo.tasks.leaks import states_answer


def seen(labelled, questions=QUESTIONS):
    return [hint for question, hint in labelled if states_answer(hint, questions[question])]


def unseen(labelled, questions=QUESTIONS):
    return [hint for question, hint in labelled if not states_answer(hint, questions[question])]


# ---- counted ----


def test_few_of_the_labelled_hints_are_misjudged():
    """The misses and false refusals that are known; another is a change for the worse."""
    assert len(LEAKS) >= 190 and len(FAIR) >= 160
    assert unseen(LEAKS) == []
    assert seen(FAIR) == ["X-ray and CT both use radiation"]  # "CT" is part of an option's text


def test_few_of_the_hints_held_out_are_misjudged():
    """Labelled before there were rules, by who wrote the rules. First measured, 1 of 62 statements
    was missed and 0 of 62 others refused."""
    assert len(hint_texts_held_out.LEAKS) >= 60 and len(hint_texts_held_out.FAIR) >= 60
    assert len(unseen(hint_texts_held_out.LEAKS)) <= 3
    assert len(seen(hint_texts_held_out.FAIR)) <= 3


def test_the_hints_of_a_newcomer_are_counted():
    """Measured before the rules were changed for them, 121 of 350 statements were missed and 18 of
    108 others refused. What is missed now says the answer in other words or languages, or is not
    clear to be one at all."""
    assert (len(newcomer.LEAKS), len(newcomer.FAIR)) == (350, 108)
    assert len(unseen(newcomer.LEAKS, newcomer.QUESTIONS)) <= 48
    assert seen(newcomer.FAIR, newcomer.QUESTIONS) == [
        "A normal lung is black on X-ray.",
        "The normal lung is black; fluid is white.",
        "Irregular borders suggest a malignant lesion.",
        "Malignant lesions often have irregular borders.",
    ]  # each tells something of the right option, and of no other


def test_hints_that_no_rule_was_made_for_are_counted():
    """Before the rules were changed, 85 of 144 statements were missed and 25 of 73 others refused;
    after, and with no rule made for them, 24 and 1. If a rule is made for one of these, they are no
    longer unseen: say so here."""
    assert (len(newcomer.OWN_LEAKS), len(newcomer.OWN_FAIR)) == (144, 73)
    assert len(unseen(newcomer.OWN_LEAKS, newcomer.QUESTIONS)) <= 24
    assert len(seen(newcomer.OWN_FAIR, newcomer.QUESTIONS)) <= 1


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


# ---- kinds of statement ----

CHEST = newcomer.QUESTIONS["chest"]


def judged(hints, asked):
    return {hint: states_answer(hint, asked) for hint in hints}


@pytest.mark.parametrize(("right", "wrong"), [("yes", "no"), ("no", "yes")])
@pytest.mark.parametrize("text", [str.title, str.upper, str.lower])
def test_yes_and_no_are_stated_and_denied_like_other_options(right, wrong, text):
    options = (right.title(), wrong.title())
    asked = replace(CHEST, options=options, answer="A")
    right, wrong = text(right), text(wrong)
    stated = """{}. | Definitely {}. | clearly {} | {}: it is seen | {} because of the edge
    {} - it is seen | {} (it is seen) | {}, since it is sharp | Certainly {}!"""
    denied = """{} is wrong | {} is incorrect. | It cannot be {}. | The answer isn't {} | Not {}.
    It's not {}. | {} is not the answer. | "{}" is false"""
    hints = filled(stated, right) + filled(denied, wrong)
    assert set(judged(hints, asked).values()) == {True}, judged(hints, asked)
    fair = """Is it {0} or {1}? | If {0}, look closer. | Say {0} only if it is sharp
    There is no fluid. | No more than a look is needed. | The border is not sharp."""
    assert set(judged(filled(fair, right, wrong), asked).values()) == {False}


@pytest.mark.parametrize("place", range(4))
def test_to_rule_out_all_but_one_states_it(place):
    asked = replace(CHEST, answer=LETTERS[place])
    others = [letter for letter in "ABCD" if letter != LETTERS[place]]
    three = "{}, {} and {} do not fit. | Options {}, {} and {} don't match. | {}, {} and {} fail"
    hints = filled(three, *others)
    for each in ("{0} fails", "{0}: no", "{0}\u2717", "{0} is out", "{0} is wrong", "~~{0}~~"):
        hints.append(", ".join(each.format(letter) for letter in others))
    right = LETTERS[place]
    hints += filled("All options except {0} are wrong | {0} > {1} | {1} < {0}", right, others[0])
    hints += filled("prefer {0} to {1} | {0} beats {1}", right, others[0])
    first = ("first", "second", "third", "fourth")[place]
    hints += filled("Everything except the {0} is wrong | All but the {0} option fail", first)
    assert set(judged(hints, asked).values()) == {True}, judged(hints, asked)
    spared = filled("All options except {0} are wrong | Everything but {0} can be excluded", right)
    misled = replace(asked, answer=others[0])
    assert set(judged(spared, misled).values()) == {True}, judged(spared, misled)
    some = filled("{} does not fit | Options {} and {} don't match | {}: no, {}: no", *others)
    assert not any(judged([hint for hint in some if hint[0] != "A"], asked).values())


@pytest.mark.parametrize(
    ("hint", "states"),
    [
        ("The lungs are normal.", True),
        ("The lung looks quite normal", True),
        ("Lung: normal", True),
        ("a normal-appearing lung", True),
        ("normal appearance of the lung", True),
        ("The lung is normal in size?", False),
        ("The lungs are not normal.", False),
        ("The lung is here, normal or not.", False),
        ("normal heart, but the lung is dense", False),
    ],
)
def test_the_words_of_an_option_are_known_in_another_order(hint, states):
    assert states_answer(hint, CHEST) == states


@pytest.mark.parametrize(
    ("hint", "states"),
    [
        # A question or comparison that names an option by its words points at none.
        ("Compare with a normal lung: are the markings symmetric?", False),
        ("How does this differ from a normal lung?", False),
        ("Could it be a normal lung?", False),
        ("A normal lung is black; is it so here?", False),
        ("Think about what makes a normal lung dark.", False),
        # It does if it is the option alone, denies its own doubt, or says more than it asks.
        ("Normal lung?", True),
        ("Isn't this a normal lung?", True),
        ("It is a normal lung, isn't it?", True),
        ("The answer is normal lung; do you see why?", True),
        ("What you see is a normal lung.", True),
        # A condition makes no statement of a wrong option; to name the right one alone still does.
        ("If there is a meniscus choose C, otherwise look at the apices.", False),
        ("If you ask me, choose C.", True),
        ("If there is no meniscus choose B.", True),
        ("the letter after A", True),
        ("the option between A and C", True),
        ("Look at the B side of the film", False),
    ],
)
def test_what_a_question_a_comparison_and_a_condition_state(hint, states):
    assert states_answer(hint, CHEST) == states


@pytest.mark.parametrize(
    "two", ["2", "2.", "II", "\u2161", "\u2461", "\u2777", "2\ufe0f\u20e3", "\u4e8c"]
)
def test_a_number_alone_or_as_the_answer_is_a_place(two):
    """Where the options have no numbers; in a sum or with a unit it is none."""
    hints = [two, f"Answer: {two}", f"The answer is {two}", f"option {two}"]
    assert set(judged(hints, CHEST).values()) == {True}, judged(hints, CHEST)
    for hint in ("Look at 2 places.", "page 2", "The answer is 2 steps away", "7"):
        assert not states_answer(hint, CHEST)
    sizes = replace(CHEST, options=("2 cm", "3 cm", "5 cm"), answer="B")
    assert not states_answer("2", sizes)


@pytest.mark.parametrize(
    "letter", ["\U0001f171", "\U0001f171\ufe0f", "\U0001f131", "\U0001f151", "\u24b7"]
)
def test_a_letter_in_any_sign_is_that_letter(letter):
    assert states_answer(letter, CHEST) and states_answer(f"It is {letter}", CHEST)
    assert states_answer(letter, replace(CHEST, answer="C"))  # and misleads where another is right


@pytest.mark.parametrize("seven", ["7", "seven", "VII", "\u2166", "\u4e03", "\u2466", "\uff17"])
def test_a_number_in_any_script_is_a_result(seven):
    asked = newcomer.QUESTIONS["nodules"]
    hints = f"""{seven} | {seven} = 3 + 4 | It ends up being {seven}. | The picture has {seven}.
    {seven} of them are visible | It is {seven} | number {seven} | all {seven} of them"""
    assert set(judged(filled(hints), asked).values()) == {True}, judged(filled(hints), asked)
    for hint in (
        "7%",
        "7 percent of cases",
        "the left number 7",
        "the first has a 7",
        "IV contrast",
    ):
        assert not states_answer(hint, asked)


# ---- time ----


@pytest.mark.parametrize("question", ["lung", "cyst", "sum", "virus"])
@pytest.mark.parametrize(
    "piece",
    [
        *(
            "a, ",
            "A, B, C ",
            "normal lung, ",
            "7 + ",
            "the B ",
            "not ",
            "(",
            "second ",
            "nsn",
            "</b>",
        ),
        *("B now ", "normal lung now ", "lungs are very ", "what a lung ", "yes now ", "7 of "),
        *("~~", "~~B~~ ", "B > ", "all but B now ", "\U0001f171", "\u2717"),
    ],
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
    ("module", "name", "planted"),
    [
        (leaks, "_is_stated", lambda *_: False),
        (leaks, "is_ruled_out", lambda *_: False),
        (leaks, "is_name", lambda *_: False),
        (leaks, "_is_led_to", lambda *_: True),
        (hint_numbers, "_is_result", lambda *_: False),
        (hint_numbers, "_is_operand", lambda *_: False),
    ],
)
def test_the_counts_see_a_rule_that_is_broken(monkeypatch, module, name, planted):
    monkeypatch.setattr(module, name, planted)
    assert len(unseen(LEAKS)) + len(seen(FAIR)) > 1  # that one is known


@pytest.mark.parametrize(
    ("module", "name", "planted"),
    [
        (leaks, "prefers", lambda *_: False),
        (leaks, "is_neighbour", lambda *_: False),
        (leaks, "is_everyday_ruled_out", lambda *_: False),
        (leaks, "_is_yes", lambda *_: False),
        (leaks, "is_marked_right", lambda *_: True),
        (leaks, "is_conditional", lambda *_: False),
        (leaks, "is_asked", lambda *_: False),
        (leaks, "is_compared", lambda *_: False),
        (leaks, "is_compared", lambda *_: True),
        (verdicts, "_is_marked_out", lambda *_: False),
        (mentions, "_turned", lambda *_: iter(())),
        (mentions, "_answers", lambda *_: False),
        (hint_numbers, "_value", lambda *_: None),
    ],
)
def test_the_newcomers_counts_see_a_rule_that_is_broken(monkeypatch, module, name, planted):
    monkeypatch.setattr(module, name, planted)
    missed = len(unseen(newcomer.LEAKS, newcomer.QUESTIONS))
    assert missed > 48 or len(seen(newcomer.FAIR, newcomer.QUESTIONS)) > 4
