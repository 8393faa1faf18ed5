"""Tasks: boxes, templates, system turns, and classes from a user's file."""

import pytest
from toy import ENV, TASK, example

from kepo.config import Config
from kepo.errors import KepoConfigError
from kepo.evaluation.report import evaluate
from kepo.rollout.encodable import faults_of
from kepo.rollout.prompts import hint_prompt, prompt_of
from kepo.tasks.environment import task_of, with_own
from kepo.tasks.multiple_choice import MultipleChoice
from kepo.tasks.open_answer import OpenAnswer
from kepo.tasks.task import Task

# ---- boxes ----


@pytest.mark.parametrize(
    "text",
    [
        "So \\boxed{B}.",
        "So \\boxed{\\text{B}}.",
        "<answer>$\\boxed{\\textbf{ B }}$</answer>",
        "<think>maybe \\boxed{A}</think>So \\boxed{B}",
        "thought</think>\\boxed{B}",
        "<answer>\\boxed{B}</answer>",
        "\\boxed{ (b) }",
        "\\boxed {B}",
    ],
)
def test_a_box_is_an_answer(text):
    assert TASK.answer_of(text) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{A} or \\boxed{B}",
        "<think>\\boxed{B}",
        "<think>\\boxed{B}</think>",
        "<think>x</think><think>y</think>\\boxed{B}",
        "\\boxed{B",
        "boxed{B}",
        "\\boxed{B} <answer>A",
        "<answer>\\boxed{A}\\boxed{B}</answer>",
    ],
)
def test_what_is_no_single_box_is_none(text):
    assert TASK.answer_of(text) is None


def test_braces_nest_in_a_box():
    assert OpenAnswer().answer_of("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert OpenAnswer().answer_of("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"


# ---- what is asked ----


def test_ten_options_are_asked_and_judged():
    asked = example("q", options=tuple(f"finding {i}" for i in range(10)), answer="J")
    assert TASK.messages(asked)[-1]["content"].splitlines()[10] == "J. finding 9"
    assert TASK.is_right("<answer>j</answer>", asked) and TASK.chance(asked) == 0.1
    assert TASK.gives_away("it is J", asked) and not TASK.gives_away("look again", asked)


def test_a_system_prompt_is_the_first_turn_unless_the_question_brings_one():
    task = MultipleChoice(system_prompt="Be brief.")
    assert prompt_of(task, example("q")).earlier == (("system", "Be brief."),)
    assert hint_prompt(task, example("q"), with_answer=False).earlier[0] == ("system", "Be brief.")
    own = example("q", earlier=(("system", "Be long."), ("user", "Hi"), ("assistant", "Hello")))
    assert prompt_of(task, own).earlier == own.earlier
    greeted = example("q", earlier=(("user", "Hi"), ("assistant", "Hello")))
    assert prompt_of(task, greeted).earlier == (("system", "Be brief."), *greeted.earlier)


def test_a_template_is_filled_with_the_question_and_columns():
    task = MultipleChoice(prompt_template="[{ward}] {question}\n{{x}} {1} {instruction}")
    asked = example("q", question="Is {ward} here?", columns={"ward": "{question}"})
    first, *_, last = task.messages(asked)[-1]["content"].split("\n")
    assert first == "[{question}] Is {ward} here?"  # what is filled in is not filled again
    assert last == "{x} {1} Reply as <think>reasoning</think><answer>letter</answer>."
    assert task.check(example("q")).startswith(
        "does not fit prompt_template: {ward} is no column of question 'q'; it has question"
    )


def test_a_template_without_the_question_is_refused():
    with pytest.raises(KepoConfigError, match=r"^prompt_template='\{q\}' has no \{question\}"):
        Task(prompt_template="{q}")


@pytest.mark.parametrize("name", ["answer", "solution", "messages", "prompt"])
def test_a_template_that_shows_the_answer_is_refused(name):
    words = rf"^prompt_template='.*' would show the right answer .*: \{{{name}\}} holds it; leave"
    for kind in (Task, MultipleChoice, OpenAnswer):
        with pytest.raises(KepoConfigError, match=words):
            kind(prompt_template=f"{{question}} {{{name}}}")
        assert kind(prompt_template=f"{{question}} {{{{{name}}}}}")


@pytest.mark.parametrize("gold", ["A", "a.", "Yes", "**A**", "So \\boxed{yes}", "by 3\n#### A"])
def test_a_column_that_is_the_answer_under_another_name_is_refused(gold):
    task = MultipleChoice(prompt_template="{question} {gold}")
    asked = [example("q", columns={"gold": gold}), example("r", columns={"gold": "A"})]
    with pytest.raises(
        KepoConfigError, match=r"\{gold\} is the answer of all 2 questions; leave it"
    ):
        faults_of(asked, task, [])
    other = example("s", columns={"gold": "B"}), example("t", columns={"gold": "\\boxed{A"})
    assert faults_of([*asked, *other], task, []) == {}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (dict(options=()), "has no options, which task: multiple_choice asks about"),
        (dict(answer="C"), "has the answer 'C', which is no letter of its options"),
        (dict(options=(), answer="yes"), "has no options"),
    ],
)
def test_an_example_unfit_for_the_task_is_said(fields, why):
    assert why in TASK.check(example("q", **fields))


def test_open_answers_need_an_answer():
    assert OpenAnswer().check(example("q", options=(), answer=" ")) == "has no answer"
    assert OpenAnswer().check(example("q", options=(), answer="7")) is None
    assert TASK.check(example("q")) is None


# ---- a user's own ----

OWN = """
import kepo
from beside import RIGHT

class Mine(kepo.Task):
    instruction = "Say it."
    def is_right(self, text, example):
        return text == RIGHT
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_task.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("RIGHT = 'eight'")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_class_of_a_file_is_a_task(own):
    task = task_of(Config(task="my_task.py:Mine", system_prompt="s"))
    assert task.is_right("eight", example("q")) and not task.is_right("nine", example("q"))
    assert prompt_of(task, example("q")).text == "question q?\nSay it."
    assert task.system_prompt == "s"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("anything", "task='anything'; expected one of multiple_choice, open_answer, or a class"),
        ("no_file.py:Mine", "task='no_file.py:Mine': there is no file no_file.py in "),
        ("my_task.py:Yours", "task='my_task.py:Yours': my_task.py has no Yours"),
        ("my_task.py:", "task='my_task.py:'; expected package.module:name or file.py:name"),
        ("my_task.py:RIGHT", "task='my_task.py:RIGHT' is 'eight'; expected a class of kepo.Task"),
        ("no.module:Mine", "task='no.module:Mine': importing no.module raised ModuleNotFound"),
        ("broken.py:Mine", "task='broken.py:Mine': importing broken.py raised ZeroDivision"),
    ],
)
def test_a_name_that_leads_nowhere_is_said(own, name, words):
    (own / "broken.py").write_text("1 / 0")
    with pytest.raises(KepoConfigError) as caught:
        task_of(Config(task=name))
    assert str(caught.value).startswith(words)


def test_the_environment_is_that_of_the_config():
    assert isinstance(ENV.task, MultipleChoice) and list(ENV.rewards) == ["accuracy", "format"]


# ---- a task of one's own that is wrong ----


@pytest.mark.parametrize("said", ["hello", None, [], [{"role": "user"}], [("user", "x")]])
def test_a_chat_that_is_none_is_said_with_the_task(said):
    class Odd(Task):
        def messages(self, example):
            return said

    with pytest.raises(KepoConfigError, match=r"^task='Odd' asks .* of example 'q'; expected a"):
        prompt_of(Odd(), example("q"))


def test_what_a_task_raises_is_said_with_the_task_the_example_and_the_line():
    class Odd(Task):
        def messages(self, example, **_):
            return example.columns["ward"]

        hint_request = check = is_right = gives_away = messages

    def words(name):
        return rf"^task='Odd' raised KeyError on example 'q': '{name}' \(test_tasks.py, line \d+\)$"

    asked, odd = example("q"), Odd()
    for call in (
        lambda: prompt_of(odd, asked),
        lambda: hint_prompt(odd, asked, with_answer=False),
        lambda: faults_of([asked], odd, []),
    ):
        with pytest.raises(KepoConfigError, match=words("ward")):
            call()


def test_a_class_that_cannot_be_made_is_said_with_the_setting(tmp_path):
    (tmp_path / "own.py").write_text(
        "import kepo\n\n\nclass Bare(kepo.Task):\n    def __init__(self):\n        pass\n"
    )
    with pytest.raises(KepoConfigError, match=r"^task='.*Bare': making it with system_prompt and"):
        task_of(Config(task=f"{tmp_path}/own.py:Bare"))


@pytest.mark.parametrize("task", [OpenAnswer, 3])
def test_what_is_no_task_is_refused_from_python(task):
    with pytest.raises(KepoConfigError, match=r"^task=.*; expected an object of kepo.Task"):
        evaluate("no model", [], task=task)
    with pytest.raises(KepoConfigError, match=r"^task=.*; expected an object of kepo.Task"):
        with_own(Config(), task, None)


def test_a_task_from_python_may_be_named():
    config, env = with_own(Config(), "open_answer", None)
    assert config.task == "open_answer" and type(env.task) is OpenAnswer
