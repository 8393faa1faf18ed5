"""Open answers: numbers with units, short texts, formulas; what a hint gives away of them."""

import pytest
from toy import example

from kepo.tasks.open_answer import OpenAnswer, same_mathematics
from kepo.tasks.quantities import quantity

TASK = OpenAnswer(answer_tolerance=0.01)


def is_right(said, right, task=TASK):
    asked = example("q", options=(), answer=right)
    return task.is_right(f"<think>x</think><answer>{said}</answer>", asked)


SAME = [
    ("42", "42"),
    ("42.0", "42"),
    (" 42. ", "42"),
    ("1,250", "1250"),
    ("$18", "18"),
    ("18 dollars", "18"),
    ("18 dollars", "18"),
    ("18", "18 euros"),
    ("\u20ac18", "18 euros"),
    ("18 \u20ac", "18\u20ac"),
    ("18$", "$18"),
    ("\\$18", "18 USD"),
    ("$18$ euros", "\u20ac18"),
    ("$18$", "\u20ac18"),  # dollars around a formula
    ("$$ 18 $$", "18 pounds"),
    ("\u00a518", "18 yuan"),
    ("\u00a518", "18 yen"),
    ("$18 per hour", "18 per hour"),
    ("18 dollars per hour", "$18 per hour"),
    ("$5 million", "5,000,000 dollars"),
    ("18 or 20", "\u20ac18 or \u20ac20"),
    ("$5\\text{ cm}$", "50 mm"),
    ("<", "<"),
    ("True", "yes"),
    ("no", "false."),
    ("-5", "\u22125"),
    ("1/3", "0.3333"),
    ("3e-4", "0.0003"),
    ("2 \\times 10^{3}", "2000"),
    ("100.5", "100"),  # within a hundredth
    ("5 cm", "50 mm"),
    ("0.5 L", "500 ml"),
    ("2 hours", "120 min"),
    ("12 %", "12 percent"),
    ("50", "50 mm"),
    ("3 apples", "3 Apple"),
    ("Pneumonia", "pneumonia"),
    ("the left lung.", "Left lung"),
    ("Yes", "yes"),
    ("caf\u00e9", "cafe"),
    ("x-ray", "X-ray"),
    ("\\boxed{42}", "42"),
    ("$\\boxed{42}$", "42"),
    ("\\boxed{42}.", "42"),
    ("**42**", "42"),
    ("\\(42\\)", "42"),
    ("42 apples left in the basket", "42"),
    ("5\\text{ cm}", "50 mm"),
    ("5\\,\\mathrm{cm}", "5 cm"),
    ("5 m\u00b2", "5 m^{2}"),
    ("90^\\circ", "90 degrees"),
    ("37\u00b0C", "37 degrees C"),
    ("5 million", "5,000,000"),
    ("2\\pi", "2\\pi"),
]
OTHER = [
    ("18 euros", "$18"),
    ("$18", "\u20ac18"),
    ("18 EUR", "18 USD"),
    ("18\u20ac", "18$"),
    ("$\\$18$", "18 euros"),
    ("$18$ euros", "$18"),
    ("\u00a518", "$18"),
    ("18 yen", "18 yuan"),
    ("$18 per hour", "\u20ac18 per hour"),
    ("$5 million", "5,000,000 euros"),
    ("$18 or $20", "\u20ac18 or \u20ac20"),
    ("18 cents", "$18"),
    ("18 %", "$18"),
    ("18 apples", "$18"),
    ("true", "no"),
    ("41", "42"),
    ("5", "-5"),
    ("102", "100"),
    ("0", "1"),
    ("0.001", "0"),
    ("5 cm", "5 mm"),
    ("5 M", "5 m"),
    ("5 kg", "5 m"),
    ("3 pears", "3 apples"),
    ("42 or 43", "42"),
    ("42 or forty", "42"),
    ("\\boxed{42} or 43", "42"),
    ("42^2", "42"),
    ("42!", "42"),
    ("42\\pi", "42"),
    ("42\u03c0", "42"),
    ("42x", "42"),
    ("42 + x", "42"),
    ("42 minus one", "42"),
    ("42 squared", "42"),
    ("42 dozen", "42"),
    ("42 million", "42"),
    ("2", "2\\pi"),
    ("2", "2\u03c0"),
    ("3", "3x"),
    ("3", "3!"),
    ("5 feet", "5 feet and 6 inches"),
    ("37 \u00b0F", "37 \u00b0C"),
    ("41 = 42", "42"),
    ("1/0", "1"),
    ("9" * 400, "1"),
    ("left", "left lung"),
    ("not pneumonia", "pneumonia"),
    ("no", "yes"),
    ("", "yes"),
    ("\u200b", "yes"),
    ("x + 1", "x 1"),
    ("x-1", "x 1"),
]


@pytest.mark.parametrize(("said", "right"), SAME)
def test_the_same_answer_is_right_however_it_is_written(said, right):
    assert is_right(said, right)


@pytest.mark.parametrize(("said", "right"), OTHER)
def test_another_answer_is_wrong(said, right):
    assert not is_right(said, right)


def test_the_tolerance_is_relative_to_the_right_answer():
    exact = OpenAnswer(answer_tolerance=0.0)
    assert is_right("1000.0", "1000", exact) and not is_right("1000.1", "1000", exact)
    assert is_right("0.1 m", "10 cm", exact)  # units are converted in floating point
    half = OpenAnswer(answer_tolerance=0.5)
    assert is_right("1.5", "1", half) and not is_right("1.6", "1", half)
    assert is_right("0.5", "1", half) and is_right("-1.5", "-1", half)


@pytest.mark.parametrize(
    "text",
    ["", "pi", "1 2", "3 < 4", "1e999", "--1", "1/0", "one"]
    + [
        "1e" + "9" * 5000,
        "1 x 10^" + "9" * 5000,
        "1/" + "9" * 5000,
        "9" * 5000,
        "1 " + "a " * 9999,
    ],
    ids=lambda text: text[:8],
)
def test_what_is_no_number_is_none(text):
    assert quantity(text) is None


def test_of_an_example_with_options_the_right_text_is_the_answer():
    asked = example("q", options=("pneumonia", "effusion"), answer="B")
    assert TASK.is_right("<answer>Effusion</answer>", asked)
    assert not TASK.is_right("<answer>B</answer>", asked)
    assert TASK.messages(asked)[-1]["content"].startswith("question q?\nReply as")
    assert TASK.worked_answer(asked) == "<answer>effusion</answer>"


@pytest.mark.parametrize(
    ("hint", "right"),
    [
        ("It is 42.", "42"),
        ("count to forty-two, i.e. 42", "42"),
        ("seven nodules", "7"),
        ("they are 5 million", "5 million"),
        ("Think of pneumonia", "Pneumonia"),
        ("The answer is yes", "yes"),
    ],
)
def test_a_hint_with_the_answer_in_it_gives_it_away(hint, right):
    assert TASK.gives_away(hint, example("q", options=(), answer=right))


@pytest.mark.parametrize(
    ("hint", "right"),
    [
        ("add 40 and 2", "42"),
        ("look at the lower lobe", "pneumonia"),
        ("yes and no questions need evidence", "left"),
    ],
)
def test_a_hint_without_it_does_not(hint, right):
    assert not TASK.gives_away(hint, example("q", options=(), answer=right))


def test_formulas_are_compared_by_math_verify():
    pytest.importorskip("math_verify")
    assert is_right("1 + x^2", "x^2 + 1") and is_right("\\frac{1}{2}", "\\frac{2}{4}")
    assert is_right("0.5", "\\frac{1}{2}") and not is_right("x^2 - 1", "x^2 + 1")


def test_without_it_formulas_are_texts(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not same_mathematics("1 + x^2", "x^2 + 1")
    assert is_right("x^2 + 1", "x^2 + 1") and not is_right("x^2 - 1", "x^2 + 1")


def test_an_endless_formula_is_no_answer_and_costs_nothing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: pytest.fail("it was looked at"))
    assert not is_right("{" * 5000, "x^2 + 1")
