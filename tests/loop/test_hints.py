"""Rescue, with a scripted teacher and policy: who is helped, who is replaced, who sees the hint."""

from dataclasses import replace

from toy import MALFORMED, RIGHT, WRONG, ScriptedVLM, example, rollout

from kepo.batch import collate
from kepo.config import Config
from kepo.hints import replace_worst, rescue
from kepo.prompts import hinted_prompt, question_prompt

CONFIG = Config(teacher="t", num_generations=4, num_hinted=2, max_attempts=3)
TEACHER_SAYS = "<hint>look left</hint>"


def teacher(text=TEACHER_SAYS):
    return ScriptedVLM(lambda prompt, nth: text)


def failed_group(name="bad"):
    return [
        rollout(WRONG, name),
        rollout(MALFORMED, name),
        rollout(WRONG, name),
        rollout(WRONG, name),
    ]


def fine_group(name="fine"):
    return [rollout(WRONG, name), rollout(RIGHT, name), rollout(WRONG, name), rollout(WRONG, name)]


def test_only_groups_without_any_success_are_touched():
    policy, helper = ScriptedVLM(lambda prompt, nth: RIGHT), teacher()
    fine, bad = fine_group(), failed_group()
    groups, report = rescue([fine, bad], policy, helper, CONFIG)
    assert groups[0] == fine and all(a is b for a, b in zip(groups[0], fine, strict=True))
    assert len(helper.seen) == 1 and "question bad?" in helper.seen[0]
    assert policy.seen == [hinted_prompt(example("bad"), "look left")] * 2
    assert (report.failed, report.rescued, report.attempts, report.accepted) == (1, 1, 1, 2)


def test_successes_replace_the_worst_each_once():
    groups, _ = rescue([failed_group()], ScriptedVLM(lambda p, n: RIGHT), teacher(), CONFIG)
    # the malformed one had reward 0, the others 1 for their format: it goes first, then the last
    assert [r.text for r in groups[0]] == [WRONG, RIGHT, WRONG, RIGHT]
    assert [r.hinted for r in groups[0]] == [False, True, False, True]


def test_all_failing_but_well_formatted_counts_as_failed():
    group = [rollout(WRONG, "bad") for _ in range(4)]
    _, report = rescue([group], ScriptedVLM(lambda p, n: WRONG), teacher(), CONFIG)
    assert report.failed == 1


def test_single_successes_are_kept_and_the_rest_tried_again():
    policy = ScriptedVLM(lambda prompt, nth: RIGHT if nth in (1, 4) else WRONG)
    groups, report = rescue([failed_group()], policy, teacher(), CONFIG)
    assert sum(r.hinted for r in groups[0]) == 2
    assert (report.attempts, report.sampled, report.accepted) == (3, 6, 2)


def test_attempts_are_bounded_and_a_hopeless_group_stays_as_it_was():
    policy, group = ScriptedVLM(lambda prompt, nth: WRONG), failed_group()
    groups, report = rescue([group], policy, teacher(), CONFIG)
    assert groups == [group] and len(policy.seen) == CONFIG.max_attempts * CONFIG.num_hinted
    assert (report.attempts, report.rescued) == (3, 0)


def test_each_group_gets_its_own_hint():
    helper = ScriptedVLM(lambda prompt, nth: f"<hint>{prompt.split('?')[0]}</hint>")
    policy = ScriptedVLM(lambda prompt, nth: RIGHT)
    rescue([failed_group("b1"), failed_group("b2")], policy, helper, CONFIG)
    asked = [hinted_prompt(example(name), f"question {name}") for name in ("b1", "b2")]
    assert policy.seen == [asked[0]] * 2 + [asked[1]] * 2


def test_an_unusable_hint_leaves_the_group_alone():
    for text in ("no tags", "<hint>a</hint><hint>b</hint>", "<hint></hint>", "<hint>never closed"):
        policy, group = ScriptedVLM(lambda prompt, nth: RIGHT), failed_group()
        groups, report = rescue([group], policy, teacher(text), CONFIG)
        assert groups == [group] and not policy.seen and report.unhinted == 1


def test_no_hints_asked_for_means_nothing_runs():
    policy, helper = ScriptedVLM(lambda p, n: RIGHT), teacher()
    _, report = rescue([failed_group()], policy, helper, replace(CONFIG, num_hinted=0))
    assert not policy.seen and not helper.seen and report.failed == 1


def test_inputs_are_not_changed():
    group = failed_group()
    before = list(group)
    rescue([group], ScriptedVLM(lambda p, n: RIGHT), teacher(), CONFIG)
    assert all(a is b for a, b in zip(group, before, strict=True))


def test_teacher_is_told_the_answer_only_when_asked_to():
    for with_answer in (False, True):
        helper = teacher()
        config = replace(CONFIG, hint_with_answer=with_answer)
        rescue([failed_group()], ScriptedVLM(lambda p, n: RIGHT), helper, config)
        assert ("The answer is A" in helper.seen[0]) == with_answer


def test_replacing_more_than_there_are_stops_at_the_group():
    group = [rollout(WRONG), rollout(MALFORMED)]
    assert [r.text for r in replace_worst(group, [rollout(RIGHT)] * 5, CONFIG)] == [RIGHT, RIGHT]


def test_the_training_batch_never_shows_the_hint():
    groups, _ = rescue([failed_group()], ScriptedVLM(lambda p, n: RIGHT), teacher(), CONFIG)
    batch = collate(groups, CONFIG)
    assert {prompt.text for prompt in batch.prompts} == {question_prompt(example("bad"))}
    assert batch.gate.tolist() == [False, True, False, True]  # successes are distilled on
    assert (batch.advantages > 0).tolist() == [False, True, False, True]
