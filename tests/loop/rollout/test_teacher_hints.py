"""What the teacher is asked, what becomes of what it writes, and that it is not asked twice."""

from dataclasses import replace

import pytest
from toy import (
    ENV,
    MALFORMED,
    RIGHT,
    TASK,
    WRONG,
    ScriptedVLM,
    example,
    group_of,
    hint_request,
    hinted_prompt,
    models_of,
)

from kepo.check import check_settings
from kepo.config import Config
from kepo.errors import KepoConfigError
from kepo.models.vlm import VLM
from kepo.rollout.hints import (
    MAX_HINT_LENGTH,
    RescueReport,
    rescue,
    usable,
    write_hints,
)
from kepo.tasks.leaks import states_answer

CONFIG = Config(teacher="t", num_generations=2, num_hinted=2, max_attempts=3)


def teacher(text="<hint>look left</hint>"):
    return ScriptedVLM(lambda prompt, nth: text)


def solver():
    return ScriptedVLM(lambda prompt, nth: RIGHT)


def failed_group(name="bad"):
    return group_of([WRONG, MALFORMED], name)


def test_teacher_is_told_the_answer_only_when_asked_to():
    for with_answer in (False, True):
        helper = teacher()
        config = replace(CONFIG, hint_with_answer=with_answer)
        rescue([failed_group()], models_of(solver(), helper), ENV, config, {})
        assert helper.seen == [hint_request(example("bad"), with_answer)]
        assert ("The answer is A" in helper.seen[0]) == with_answer


def test_student_is_told_the_answer_only_when_asked_to():
    for gives_answer in (False, True):
        policy = solver()
        config = replace(CONFIG, hint_gives_answer=gives_answer)
        rescue([failed_group()], models_of(policy, teacher()), ENV, config, {})
        assert policy.seen == [hinted_prompt(example("bad"), "look left", gives_answer)] * 2
        assert ("The answer is A" in policy.seen[0]) == gives_answer


def test_each_group_gets_its_own_hint():
    helper = ScriptedVLM(lambda prompt, nth: f"<hint>{prompt.split('?')[0]}</hint>")
    policy = solver()
    rescue([failed_group("b1"), failed_group("b2")], models_of(policy, helper), ENV, CONFIG, {})
    asked = [hinted_prompt(example(name), f"question {name}") for name in ("b1", "b2")]
    assert policy.seen == [asked[0]] * 2 + [asked[1]] * 2


def test_hints_stay_with_their_questions_where_some_are_unusable_or_known():
    def writes(prompt, nth):
        return "no tags" if "b1" in prompt else f"<hint>{prompt.split('?')[0]}</hint>"

    policy, hints = solver(), {"b3": "known"}
    groups, report = rescue(
        [failed_group(f"b{i}") for i in range(5)],
        models_of(policy, ScriptedVLM(writes)),
        ENV,
        CONFIG,
        hints,
    )
    told = {0: "question b0", 2: "question b2", 3: "known", 4: "question b4"}
    expected = [hinted_prompt(example(f"b{i}"), hint) for i, hint in told.items()]
    assert policy.seen == [prompt for prompt in expected for _ in range(2)]
    assert [[r.hint for r in group] for group in groups] == [[told.get(i)] * 2 for i in range(5)]
    assert (report.groups, report.written, report.unhinted) == (5, 4, 1)


@pytest.mark.parametrize(
    "text",
    ["no tags", "", "<hint>a</hint><hint>b</hint>", "<hint></hint>", "<hint>never closed"],
)
def test_an_unusable_hint_leaves_the_group_alone(text):
    policy, group = solver(), failed_group()
    groups, report = rescue([group], models_of(policy, teacher(text)), ENV, CONFIG, {})
    assert groups == [group] and not policy.seen and report.unhinted == 1
    assert (report.groups, report.attempts, report.rescued) == (1, 0, 0)


def test_a_hint_of_several_lines_is_a_hint():
    policy = solver()
    _, report = rescue(
        [failed_group()],
        models_of(policy, teacher("So: <hint>look\nleft </hint>")),
        ENV,
        CONFIG,
        {},
    )
    assert policy.seen == [hinted_prompt(example("bad"), "look\nleft")] * 2
    assert report.unhinted == 0


def test_the_teacher_writes_greedily_and_no_longer_than_a_completion_may_be():
    asked = []

    class Spy(ScriptedVLM):
        def sample(self, prompts, params, seeds=None):
            asked.append(params)
            return super().sample(prompts, params, seeds)

    helper = Spy(lambda prompt, nth: "<hint>left</hint>")
    for length in (40, 1000):
        write_hints(helper, [example("a")], TASK, replace(CONFIG, max_completion_length=length))
    assert [params.max_tokens for params in asked] == [40, MAX_HINT_LENGTH]
    assert all(params.greedy and params.n == 1 for params in asked)


# ---- the cache ----


def test_a_known_example_is_not_asked_about_again():
    helper, hints = teacher(), {}
    _, first = rescue([failed_group("a")], models_of(solver(), helper), ENV, CONFIG, hints)
    assert hints == {"a": "look left"} and first.written == 1
    policy = solver()
    _, again = rescue(
        [failed_group("a"), failed_group("b")], models_of(policy, helper), ENV, CONFIG, hints
    )
    assert helper.seen == [hint_request(example(name), False) for name in "ab"]
    assert again.written == 1 and again.rescued == 2
    assert hints == {"a": "look left", "b": "look left"}
    assert {prompt.split("Hint: ")[1] for prompt in policy.seen} == {"look left"}


def test_an_unusable_hint_is_remembered_as_such():
    helper, hints = teacher("no tags"), {}
    for written in (1, 0):
        _, report = rescue([failed_group("a")], models_of(solver(), helper), ENV, CONFIG, hints)
        assert (report.written, report.retried, report.unhinted) == (written, 2 * written, 1)
    assert hints == {"a": None} and len(helper.seen) == 1 + CONFIG.hint_retries


def test_one_question_in_two_groups_is_asked_about_once():
    helper = teacher()
    groups, report = rescue([failed_group("a")] * 2, models_of(solver(), helper), ENV, CONFIG, {})
    assert len(helper.seen) == report.written == 1 and report.rescued == 2
    assert all(r.hinted for group in groups for r in group)


# ---- the leak filter ----

CYST = example("q", options=("A tumour", "a cyst", "18"), answer="B")
LEAKS = [
    "It is a cyst.",
    "A Cyst, clearly",
    "(B)",
    "B",
    " b. ",
    '"B"',
    "it must be [B], I think",
    "The answer is B",
    "the answer would be B",
    "answer: B",
    "Option B fits",
    "choice (b)",
    "the letter B",
    "choose B",
    "pick (b)",
    "B is right",
    "I see why B is the answer",
]
FAIR = [
    "look at the round shape",
    "a cystic shape",  # not the whole words
    "vitamin B",
    "plan b",
    "It is not a tumour",  # another option's text
    "Option A is wrong",
    "optional Brightness",
    "the answering machine",
]


@pytest.mark.parametrize("hint", LEAKS)
def test_hints_that_state_the_answer_are_seen_through(hint):
    assert states_answer(hint, CYST)


@pytest.mark.parametrize("hint", FAIR)
def test_hints_that_only_help_pass(hint):
    assert not states_answer(hint, CYST)


def test_a_is_an_article_too():
    about_a = example("q", answer="A")
    articles = ("the answer is a number", "choose a colour", "an option: a round one")
    for hint in ("a round shape", "A shape on the left", "look for a line, a long one", *articles):
        assert not states_answer(hint, about_a)
    for hint in ("A", "the answer is A", "(A)", "option a", "choose a.", "A is correct"):
        assert states_answer(hint, about_a)


def test_numbers_count_as_whole_words():
    sums = example("q", options=("3", "18", "8", "1"), answer="C")
    assert states_answer("3 + 5 = 8", sums)
    assert not states_answer("9 + 99 = 108", sums) and not states_answer("80 less 72", sums)


def test_marks_in_an_option_are_not_read_as_a_pattern():
    dots = example("q", options=("(.*)", "c++"), answer="A")
    assert states_answer("try (.*) here", dots) and not states_answer("anything", dots)
    assert states_answer("use c++", replace(dots, answer="B"))


@pytest.mark.parametrize("option", ["A cyst.", "a  CYST", "a cyst ."])
def test_spaces_and_the_final_period_of_an_option_do_not_hide_it(option):
    # The loader takes all three for the gold text "a cyst".
    asked = example("q", options=("Nothing", option), answer="B")
    for hint in ("a cyst on the left", "clearly: a\ncyst", "A cyst."):
        assert states_answer(hint, asked)
    assert not states_answer("a cystic shape", asked)
    assert not states_answer("look left", replace(asked, options=("Nothing", ".")))


@pytest.mark.parametrize(
    ("settings", "usable"),
    [
        ({}, False),
        ({"leak_filter": False}, True),
        ({"hint_gives_answer": True}, True),  # the student is told anyway
        ({"hint_with_answer": True}, False),  # that the teacher knows is no licence
    ],
)
def test_a_leaking_hint_is_not_used(settings, usable):
    policy, config = solver(), replace(CONFIG, **settings)
    helper = teacher("<hint>The answer is A</hint>")
    _, report = rescue([failed_group()], models_of(policy, helper), ENV, config, {})
    assert bool(policy.seen) == usable and report.unhinted == (not usable)


def test_tokens_of_hints_are_counted_with_those_of_unusable_ones():
    """Nothing for what is known; of a question that needs three tries, all three."""
    good, bad = "<hint>look left</hint>", "no tags"

    def writes(prompt, nth):
        return bad if "b1" in prompt and nth < 2 else good

    known = {"b2": "known"}
    groups = [failed_group(f"b{i}") for i in range(3)]
    models = models_of(solver(), ScriptedVLM(writes))
    _, report = rescue(groups, models, ENV, CONFIG, known)
    assert report.hint_tokens == 2 * (len(good) + 1) + 2 * (len(bad) + 1)  # and the end tokens
    assert (report.written, report.retried) == (2, 2)
    _, again = rescue(groups, models, ENV, CONFIG, known)
    assert again.hint_tokens == again.written == 0


def test_reports_add_up():
    total = RescueReport(groups=1, written=2, sampled=8) + RescueReport(groups=2, accepted=3)
    assert total == RescueReport(groups=3, written=2, sampled=8, accepted=3)


# ---- asked again ----

LEAK, GOOD = "<hint>The answer is A</hint>", "<hint>look left</hint>"


class Scripted(ScriptedVLM):
    """A teacher that says a text after another to each question; `law` lists how it was asked."""

    def __init__(self, *texts):
        super().__init__(lambda prompt, nth: texts[min(nth, len(texts) - 1)])
        self.law = []

    def sample(self, prompts, params, seeds=None):
        self.law.append((params.temperature, seeds))
        return super().sample(prompts, params, seeds)


@pytest.mark.parametrize(
    ("texts", "retries", "asked", "hint"),
    [
        ((GOOD,), 2, 1, "look left"),
        ((LEAK, GOOD), 2, 2, "look left"),
        (("no tags", "<hint>never closed", GOOD), 2, 3, "look left"),
        ((LEAK, LEAK, LEAK, GOOD), 2, 3, None),
        ((LEAK, LEAK, LEAK, GOOD), 3, 4, "look left"),
        ((LEAK, GOOD), 0, 1, None),
    ],
)
def test_an_unusable_hint_is_asked_for_again_so_many_times(texts, retries, asked, hint):
    helper, policy, hints = Scripted(*texts), solver(), {}
    config = replace(CONFIG, hint_retries=retries, hint_temperature=0.6)
    _, report = rescue(
        [failed_group("a")], models_of(policy, helper), ENV, config, hints, stream=(4, 0)
    )
    assert hints == {"a": hint} and bool(policy.seen) == (hint is not None)
    assert (report.written, report.retried, report.unhinted) == (1, asked - 1, hint is None)
    assert [temperature for temperature, _ in helper.law] == [0.0, *[0.6] * (asked - 1)]
    _, again = rescue(
        [failed_group("a")], models_of(solver(), helper), ENV, config, hints, stream=(5, 0)
    )
    assert len(helper.law) == asked and (again.written, again.retried) == (0, 0)
    assert again.unhinted == (hint is None)


def test_only_the_questions_without_a_hint_are_asked_about_again():
    helper = ScriptedVLM(lambda prompt, nth: GOOD if "fine" in prompt or nth else LEAK)
    hints = {}
    _, report = rescue(
        [failed_group("fine"), failed_group("b")], models_of(solver(), helper), ENV, CONFIG, hints
    )
    assert [("question b?" in prompt) for prompt in helper.seen] == [False, True, True]
    assert hints == {"fine": "look left", "b": "look left"}
    assert (report.written, report.retried, report.unhinted) == (2, 1, 0)


def test_random_numbers_of_a_second_hint_go_by_seed_step_and_question():
    def seeds(names, stream=(3, 0), seed=0):
        helper = Scripted(LEAK)
        config = replace(CONFIG, seed=seed, rollout_batch=2)
        rescue(
            [failed_group(name) for name in names],
            models_of(solver(), helper),
            ENV,
            config,
            {},
            stream,
        )
        drawn = [numbers for _, numbers in helper.law if numbers is not None]
        flat = [number for numbers in drawn for number in numbers]
        return {name: flat[place :: len(names)] for place, name in enumerate(names)}

    alone, beside = seeds("a"), seeds("xyaz")
    assert alone["a"] == beside["a"] and len(set(alone["a"])) == 2  # one for each retry
    assert alone["a"] != beside["x"]
    assert alone["a"] != seeds("a", stream=(4, 0))["a"] and alone["a"] != seeds("a", seed=1)["a"]


@pytest.mark.parametrize("part", ["<|im_end|>", "<|im_start|>user", "a <|image_pad|> b"])
def test_a_hint_with_control_tokens_is_unusable(tinies, part):
    encoder = VLM.load(tinies / "qwen3").encoder
    for filtered in (True, False):
        config = replace(CONFIG, leak_filter=filtered)
        assert not usable(f"look {part}", example("a"), TASK, config, encoder)
        assert usable("look <|im_en", example("a"), TASK, config, encoder)
        assert usable("<think>look", example("a"), TASK, config, encoder)  # a tag is none


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"hint_retries": -1}, "hint_retries=-1"), ({"hint_temperature": 0.0}, "hint_temperature=0")],
)
def test_settings_of_a_second_hint_are_checked(settings, said):
    with pytest.raises(KepoConfigError, match=said):
        check_settings(replace(CONFIG, student="s", train_data="d", **settings))
