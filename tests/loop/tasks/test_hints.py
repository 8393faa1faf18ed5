"""Rescue, with a scripted teacher and policy: who is helped, who is replaced, who is accepted."""

from dataclasses import replace

import pytest
from toy import (
    BARE,
    ENV,
    MALFORMED,
    RIGHT,
    WRONG,
    ScriptedVLM,
    example,
    group_of,
    hinted_prompt,
    models_of,
    question_prompt,
    rollout,
)

from kepo.config import Config
from kepo.objective.batch import collate
from kepo.rollout.hints import all_failed, replace_worst, rescue, succeeds

CONFIG = Config(teacher="t", num_generations=4, num_hinted=2, max_attempts=3)
TEACHER_SAYS = "<hint>look left</hint>"


def teacher(text=TEACHER_SAYS):
    return ScriptedVLM(lambda prompt, nth: text)


def solver():
    return ScriptedVLM(lambda prompt, nth: RIGHT)


def failed_group(name="bad"):
    return group_of([WRONG, MALFORMED, WRONG, WRONG], name)


def fine_group(name="fine"):
    return group_of([WRONG, RIGHT, WRONG, WRONG], name)


# ---- who is triggered ----


def test_only_groups_without_any_success_are_touched():
    policy, helper = solver(), teacher()
    fine, bad = fine_group(), failed_group()
    groups, report = rescue([fine, bad], models_of(policy, helper), ENV, CONFIG, {})
    assert groups[0] == fine and all(a is b for a, b in zip(groups[0], fine, strict=True))
    assert len(helper.seen) == 1 and "question bad?" in helper.seen[0]
    assert policy.seen == [hinted_prompt(example("bad"), "look left")] * 2
    assert (report.groups, report.rescued, report.attempts, report.accepted) == (1, 1, 1, 2)


def test_all_failing_but_well_formatted_counts_as_failed():
    group = group_of([WRONG] * 4, "bad")
    policy = ScriptedVLM(lambda prompt, nth: WRONG)
    _, report = rescue([group], models_of(policy, teacher()), ENV, CONFIG, {})
    assert report.groups == 1


@pytest.mark.parametrize(
    ("reward", "threshold", "texts", "failed"),
    [
        ("accuracy", 1.0, [WRONG, MALFORMED], True),
        ("accuracy", 1.0, [WRONG, BARE], False),
        ("total", 1.0, [MALFORMED, MALFORMED], True),
        ("total", 1.0, [MALFORMED, WRONG], False),  # its format alone is worth 1
        ("total", 2.0, [WRONG, BARE], True),
        ("total", 2.0, [WRONG, RIGHT], False),
        ("format", 1.0, [BARE, MALFORMED], True),
        ("format", 1.0, [MALFORMED, WRONG], False),
    ],
)
def test_a_group_fails_by_the_reward_that_is_named(reward, threshold, texts, failed):
    config = replace(CONFIG, hint_reward=reward, hint_threshold=threshold)
    group = group_of(texts)
    assert all_failed(group, config) == failed
    helper = teacher()
    _, report = rescue([group], models_of(solver(), helper), ENV, config, {})
    assert report.groups == len(helper.seen) == failed


def test_always_helps_every_group_that_has_room():
    config = replace(CONFIG, hint_trigger="always", num_hinted=3)
    full, one_left = group_of([RIGHT] * 4, "a"), group_of([RIGHT] * 3 + [WRONG], "b")
    none = failed_group("c")
    policy, helper = solver(), teacher()
    groups, report = rescue([full, one_left, none], models_of(policy, helper), ENV, config, {})
    assert groups[0] == full and len(helper.seen) == 2
    assert [r.hinted for r in groups[1]] == [False, False, False, True]
    assert sum(r.hinted for r in groups[2]) == 3
    assert (report.groups, report.rescued, report.accepted) == (2, 2, 4)
    assert not any("question a?" in prompt for prompt in policy.seen + helper.seen)


def test_a_group_whose_samples_are_all_fine_is_left_alone_whatever_fails():
    # It "fails" on a threshold out of reach, but has no failure that could be replaced.
    config = replace(CONFIG, hint_reward="total", hint_threshold=5.0)
    helper = teacher()
    _, report = rescue([group_of([RIGHT] * 4)], models_of(solver(), helper), ENV, config, {})
    assert helper.seen == [] and report.groups == 0


def test_never_and_no_teacher_mean_no_hints():
    assert not replace(CONFIG, hint_trigger="never").hints
    assert not replace(CONFIG, teacher=None).hints
    assert CONFIG.hints and replace(CONFIG, hint_trigger="always").hints


def test_a_retry_is_the_same_attempts_without_a_hint():
    """No teacher is asked for anything, and the same samples as with hints are drawn and judged."""
    config = replace(CONFIG, hint_for="nobody")
    late = ScriptedVLM(lambda prompt, nth: RIGHT if nth > 2 else WRONG)  # the fourth try is right
    groups, report = rescue([failed_group(), fine_group()], models_of(late), ENV, config, {})
    assert late.seen == [question_prompt(example("bad"))] * 6  # three rounds of two, no hint in any
    assert (report.groups, report.attempts, report.sampled) == (1, 3, 6)
    assert (report.written, report.unhinted, report.successes, report.accepted) == (0, 0, 3, 2)
    assert [r.text for r in groups[0]] == [WRONG, RIGHT, WRONG, RIGHT]
    assert not any(r.hinted for group in groups for r in group)
    alone = replace(config, teacher=None)
    assert not config.hints and config.rescues and alone.rescues
    assert replace(alone, distill_coef=0.0).taught_by == {}
    assert replace(config, distill_coef=0.0).taught_by == {}  # its teacher is not even read
    assert not replace(alone, hint_trigger="never").rescues


def test_a_hint_for_the_teacher_samples_nothing_and_marks_the_failures():
    config = replace(CONFIG, hint_for="teacher", hint_trigger="always", num_hinted=1)
    policy, helper = solver(), teacher()
    one_right, all_right = fine_group(), group_of([RIGHT] * 4, "well")
    given = [one_right, failed_group(), all_right]
    groups, report = rescue(given, models_of(policy, helper), ENV, config, {})
    assert policy.seen == [] and len(helper.seen) == 2
    assert (report.groups, report.written, report.sampled, report.rescued) == (2, 2, 0, 0)
    marked = [[r.teacher_hint for r in group] for group in groups]
    look, own = "look left", None
    assert marked == [[look, own, look, look], [look] * 4, [own] * 4]
    told = hinted_prompt(example("bad"), look)
    assert [r.teacher_prompt.text for r in groups[1]] == [told] * 4
    assert groups[0][1].teacher_prompt is None and one_right[0].teacher_hint is None  # a copy
    assert not any(r.hinted or r.prompt.text == told for group in groups for r in group)
    assert collate(groups, config).opened.tolist() == [True] * 12  # the right ones by the gate
    closed = replace(config, gate_side="wrong")
    assert collate(groups, closed).opened.tolist() == [True, False] + [True] * 6 + [False] * 4


def test_a_hint_for_the_teacher_that_is_unusable_leaves_the_group_to_the_gate():
    config = replace(CONFIG, hint_for="teacher", hint_retries=0)
    groups, report = rescue([failed_group()], models_of(solver(), teacher("?")), ENV, config, {})
    assert report.unhinted == 1 and not collate(groups, config).opened.any()


def test_nothing_runs_where_no_group_needs_help():
    policy, helper = solver(), teacher()
    fine = fine_group()
    groups, report = rescue([fine], models_of(policy, helper), ENV, CONFIG, {})
    assert policy.seen == helper.seen == [] and report.groups == report.attempts == 0
    assert groups == [fine] and rescue([], models_of(policy, helper), ENV, CONFIG, {})[0] == []


# ---- who is replaced ----


def test_successes_replace_the_worst_each_once():
    groups, _ = rescue([failed_group()], models_of(solver(), teacher()), ENV, CONFIG, {})
    # the malformed one had reward 0, the others 1 for their format: it goes first, then the last
    assert [r.text for r in groups[0]] == [WRONG, RIGHT, WRONG, RIGHT]
    assert [r.hinted for r in groups[0]] == [False, True, False, True]


def test_a_success_is_never_replaced():
    # By the total, BARE is as bad as WRONG: it is right, and stays.
    config = replace(CONFIG, hint_trigger="always", num_hinted=4)
    groups, _ = rescue(
        [group_of([BARE, WRONG, RIGHT, WRONG])], models_of(solver(), teacher()), ENV, config, {}
    )
    assert [r.text for r in groups[0]] == [BARE, RIGHT, RIGHT, RIGHT]
    assert [r.hinted for r in groups[0]] == [False, True, False, True]


def test_no_more_are_replaced_than_num_hinted():
    policy = solver()
    for room in (1, 3):
        config = replace(CONFIG, num_hinted=room)
        groups, report = rescue([failed_group()], models_of(policy, teacher()), ENV, config, {})
        assert sum(r.hinted for r in groups[0]) == room == report.accepted


def test_replacing_more_than_there_are_stops_at_the_group():
    group = [rollout(WRONG), rollout(MALFORMED)]
    assert [r.text for r in replace_worst(group, [rollout(RIGHT)] * 5, CONFIG)] == [RIGHT, RIGHT]


def test_inputs_are_not_changed():
    group = failed_group()
    before = list(group)
    rescue([group], models_of(solver(), teacher()), ENV, CONFIG, {})
    assert all(a is b for a, b in zip(group, before, strict=True))


# ---- who is accepted ----


def test_single_successes_are_kept_and_the_rest_tried_again():
    policy = ScriptedVLM(lambda prompt, nth: RIGHT if nth in (1, 4) else WRONG)
    groups, report = rescue([failed_group()], models_of(policy, teacher()), ENV, CONFIG, {})
    assert sum(r.hinted for r in groups[0]) == 2
    assert (report.attempts, report.sampled, report.accepted) == (3, 6, 2)


def test_successes_beyond_the_room_are_counted_but_not_used():
    policy = ScriptedVLM(lambda prompt, nth: WRONG if nth == 0 else RIGHT)
    _, report = rescue([failed_group()], models_of(policy, teacher()), ENV, CONFIG, {})
    assert (report.sampled, report.successes, report.accepted) == (4, 3, 2)


def test_attempts_are_bounded_and_a_hopeless_group_stays_as_it_was():
    policy, group = ScriptedVLM(lambda prompt, nth: WRONG), failed_group()
    groups, report = rescue([group], models_of(policy, teacher()), ENV, CONFIG, {})
    assert groups == [group] and len(policy.seen) == CONFIG.max_attempts * CONFIG.num_hinted
    assert (report.attempts, report.rescued) == (3, 0)


def test_later_rounds_ask_only_the_groups_that_still_lack():
    def says(prompt, nth):
        return RIGHT if "easy" in prompt or ("later" in prompt and nth >= 2) else WRONG

    policy = ScriptedVLM(says)
    bad = [failed_group(name) for name in ("easy", "later", "hopeless")]
    groups, report = rescue(bad, models_of(policy, teacher()), ENV, CONFIG, {})
    asked = [sum(f"question {n}?" in p for p in policy.seen) for n in ("easy", "later", "hopeless")]
    assert asked == [2, 4, 6]
    assert [sum(r.hinted for r in group) for group in groups] == [2, 2, 0]
    assert (report.groups, report.rescued, report.attempts, report.sampled) == (3, 2, 6, 12)


@pytest.mark.parametrize(
    ("facts", "settings", "accepted"),
    [
        (dict(text=RIGHT), {}, True),
        (dict(text=BARE), {}, True),
        (dict(text=WRONG), {}, False),
        (dict(text=RIGHT, truncated=True), {}, False),
        (dict(text="<think>The hint says x</think><answer>A</answer>"), {}, False),
        (dict(text="<think>HINTS: x</think><answer>A</answer>"), {}, False),
        (dict(text=BARE), dict(accept_reward="total", accept_threshold=2.0), False),
        (dict(text=RIGHT), dict(accept_reward="total", accept_threshold=2.0), True),
        (dict(text=WRONG), dict(accept_reward="format"), True),
    ],
)
def test_what_counts_as_a_success(facts, settings, accepted):
    config = replace(CONFIG, **settings)
    assert succeeds(rollout(**facts), config) == accepted


def test_what_is_refused_replaces_nothing():
    long = "<think>" + "x" * 40 + "</think>" + BARE
    for text, length in (("<think>As hinted</think>" + BARE, 128), (long, 40)):
        config = replace(CONFIG, max_completion_length=length)
        policy, group = ScriptedVLM(lambda prompt, nth, text=text: text), failed_group()
        groups, report = rescue([group], models_of(policy, teacher()), ENV, config, {})
        assert groups == [group] and len(policy.seen) == 6 and report.successes == 0


# ---- what is scored ----


def test_the_training_batch_never_shows_the_hint():
    groups, _ = rescue([failed_group()], models_of(solver(), teacher()), ENV, CONFIG, {})
    batch = collate(groups, CONFIG)
    assert {prompt.text for prompt in batch.prompts} == {question_prompt(example("bad"))}
    assert batch.opened.tolist() == [False, True, False, True]  # successes are distilled on
    assert (batch.advantages > 0).tolist() == [False, True, False, True]
    assert batch.hinted.tolist() == [False, True, False, True]


def test_group_statistics_are_those_after_the_rescue():
    groups, _ = rescue([failed_group()], models_of(solver(), teacher()), ENV, CONFIG, {})
    batch = collate(groups, replace(CONFIG, scale_rewards="none"))
    assert batch.advantages.tolist() == [-0.5, 0.5, -0.5, 0.5]  # totals 1, 2, 1, 2
