"""The completions of a step: rescue and dynamic sampling together, bounded and repeatable."""

from dataclasses import replace

import pytest
from toy import BARE, ENV, MALFORMED, RIGHT, WRONG, ScriptedVLM, example, group_of, models_of

from kepo.config import Config
from kepo.rollout.explore import explore, is_dull
from kepo.rollout.questions import draw

CONFIG = Config(num_generations=2, prompts_per_step=4, hint_trigger="never", dynamic_sampling=3)
EXAMPLES = [example(f"q{i}") for i in range(12)]


def name_in(prompt):
    return prompt.split()[1].rstrip("?")


def answering(lively):
    """One right, one wrong to the questions named; only wrong to the others."""
    return ScriptedVLM(lambda p, nth: RIGHT if name_in(p) in lively and nth % 2 == 0 else WRONG)


def run(policy, config=CONFIG, step=1, teacher=None, hints=None):
    questions = draw(EXAMPLES, config, step)
    hints = {} if hints is None else hints
    found = explore(questions, models_of(policy, teacher), ENV, config, hints, EXAMPLES, step)
    return questions, found


def names(groups):
    return [group[0].example.id for group in groups]


@pytest.mark.parametrize(
    ("texts", "settings", "dull"),
    [
        ([RIGHT, RIGHT], {}, True),
        ([WRONG, WRONG], {}, True),
        ([RIGHT, WRONG], {}, False),
        ([BARE, WRONG], {}, True),  # other rewards, the same total
        ([BARE, WRONG], {"reward_weights": (1.0, 0.5)}, False),
        ([BARE, RIGHT], {"reward_weights": (1.0, 0.0)}, True),
        # DAPO's: all right or all wrong, whatever else they earn or are fined.
        ([WRONG, MALFORMED], {}, False),
        ([WRONG, MALFORMED], {"dynamic_reward": "accuracy"}, True),
        ([BARE, RIGHT], {"dynamic_reward": "accuracy"}, True),
        ([BARE, WRONG], {"dynamic_reward": "accuracy"}, False),
    ],
)
def test_a_group_is_dull_where_its_rewards_are_equal(texts, settings, dull):
    assert is_dull(group_of(texts), replace(CONFIG, **settings)) == dull


def test_without_dynamic_sampling_dull_groups_stay():
    policy = answering(())
    questions, found = run(policy, replace(CONFIG, dynamic_sampling=0))
    assert names(found.groups) == [q.id for q in questions] and found.resampled == 0
    assert len(policy.seen) == found.sampled == 8


def test_dull_groups_are_replaced_and_lively_ones_stay_in_their_place():
    questions = draw(EXAMPLES, CONFIG, 1)
    second = draw(EXAMPLES, CONFIG, 1, 1)
    mine, other = questions[1], next(q for q in second[:3] if q not in questions)
    _, found = run(answering({mine.id, other.id}), replace(CONFIG, dynamic_sampling=1))
    assert found.groups[1][0].example == mine
    assert names(found.groups) == [other.id, mine.id, questions[2].id, questions[3].id]
    assert found.resampled == 1 and not is_dull(found.groups[0], CONFIG)
    assert found.asked == 4 + 3  # three were dull, and as many others were tried


def test_a_dull_group_is_never_replaced_by_another_dull_one():
    policy = answering(())
    questions, found = run(policy)
    assert names(found.groups) == [q.id for q in questions] and found.resampled == 0
    # Bounded: the first round and three more of as many questions as are dull.
    assert len(policy.seen) == found.sampled == 4 * 4 * 2


def test_rounds_end_when_nothing_is_dull():
    policy = answering({e.id for e in EXAMPLES})
    _, found = run(policy)
    assert len(policy.seen) == 8 and found.resampled == 0


def test_later_rounds_ask_only_as_many_as_are_still_dull():
    questions = draw(EXAMPLES, CONFIG, 1)
    policy = answering({questions[0].id, questions[1].id})
    run(policy, replace(CONFIG, dynamic_sampling=1))
    assert len(policy.seen) == 8 + 2 * 2
    assert {name_in(p) for p in policy.seen[8:]} == {q.id for q in draw(EXAMPLES, CONFIG, 1, 1)[:2]}


def test_exchange_depends_on_seed_and_step_alone():
    def outcome(step, seed=0):
        policy = answering({"q1", "q4", "q7", "q9"})
        _, found = run(policy, replace(CONFIG, seed=seed), step)
        return names(found.groups), policy.seen

    assert outcome(1) == outcome(1) and outcome(2) == outcome(2)
    assert outcome(1)[1] != outcome(2)[1] and outcome(1)[1] != outcome(1, seed=1)[1]


def test_nothing_to_ask_is_nothing_found():
    policy = answering(())
    found = explore([], models_of(policy), ENV, CONFIG, {}, EXAMPLES, 1)
    assert found.groups == [] and policy.seen == [] and found.sampled == 0


# ---- with hints ----

HINTED = replace(
    CONFIG, teacher="t", hint_trigger="failed", num_hinted=1, max_attempts=2, dynamic_sampling=0
)


def hint_writer():
    return ScriptedVLM(lambda prompt, nth: "<hint>left</hint>")


def test_never_means_the_teacher_is_not_met():
    teacher = hint_writer()
    _, found = run(answering(()), replace(HINTED, hint_trigger="never"), teacher=teacher)
    assert teacher.seen == [] and found.report.groups == 0


def test_rescued_groups_are_lively_and_stay():
    longer = RIGHT.replace("</think>", ", seen</think>")

    def says(prompt, nth):
        return longer if "Hint:" in prompt else WRONG

    policy, teacher, hints = ScriptedVLM(says), hint_writer(), {}
    config = replace(HINTED, dynamic_sampling=2)
    questions, found = run(policy, config, teacher=teacher, hints=hints)
    assert names(found.groups) == [q.id for q in questions] and found.resampled == 0
    assert [[r.hinted for r in group] for group in found.groups] == [[False, True]] * 4
    assert hints == {q.id: "left" for q in questions}
    assert found.sampled == len(policy.seen) == 8 + 4
    wrong, right = (len(rollout.completion_ids) for rollout in found.groups[0])
    assert found.sampled_tokens == 8 * wrong + 4 * right and wrong != right


def test_exchanged_questions_are_rescued_too_and_all_is_counted():
    # Hints never help the first four; of the others one is rescued in the extra round.
    questions = draw(EXAMPLES, HINTED, 1)
    helped = next(q for q in draw(EXAMPLES, HINTED, 1, 1)[:4] if q not in questions)

    def says(prompt, nth):
        return RIGHT if "Hint:" in prompt and name_in(prompt) == helped.id else WRONG

    policy, teacher = ScriptedVLM(says), hint_writer()
    _, found = run(policy, replace(HINTED, dynamic_sampling=1), teacher=teacher)
    assert names(found.groups)[0] == helped.id and found.resampled == 1
    assert found.groups[0][1].hinted and found.report.rescued == 1
    assert found.report.groups == 8 and found.sampled == len(policy.seen)
