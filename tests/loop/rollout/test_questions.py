"""Which questions a step asks: epochs in shuffled order, and an exact share for the dataset."""

import pytest

from kepo.config import Config
from kepo.rollout.questions import draw, from_data, seed_of

EXAMPLES = list(range(6))


def test_questions_come_round_in_epochs_and_depend_on_the_step_alone():
    config = Config(prompts_per_step=4)
    steps = [draw(EXAMPLES, config, step) for step in range(1, 7)]
    seen = [q for step in steps for q in step]
    for epoch in range(4):
        assert sorted(seen[6 * epoch : 6 * epoch + 6]) == EXAMPLES
    assert seen[:6] != seen[6:12]
    assert draw(EXAMPLES, config, 5) == steps[4]


def test_a_step_may_be_longer_than_the_dataset():
    drawn = draw(EXAMPLES, Config(prompts_per_step=15), 1)
    assert sorted(drawn[:6]) == sorted(drawn[6:12]) == EXAMPLES and len(drawn) == 15


def test_extra_rounds_have_orders_of_their_own():
    config = Config(prompts_per_step=4)
    rounds = {extra: [draw(EXAMPLES, config, s, extra) for s in (1, 2, 3)] for extra in (0, 1, 2)}
    assert rounds[0] != rounds[1] != rounds[2] != rounds[0]
    assert rounds[1] == [draw(EXAMPLES, config, s, 1) for s in (1, 2, 3)]
    for steps in rounds.values():
        assert sorted([*steps[0], *steps[1]][:6]) == EXAMPLES


def test_another_seed_asks_in_another_order():
    orders = {tuple(draw(EXAMPLES, Config(prompts_per_step=6, seed=s), 1)) for s in range(5)}
    assert len(orders) > 1


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("prompts", [1, 3, 16])
def test_the_dataset_answers_its_share_exactly(share, prompts):
    config = Config(data_fraction=share, prompts_per_step=prompts)
    counts = [from_data(config, step) for step in range(1, 201)]
    assert all(0 <= count <= prompts for count in counts)
    assert max(counts) - min(counts) <= 1  # spread evenly
    for steps in (1, 7, 100, 200):
        # All that is due and no more: within one of the exact share at any step.
        assert -1e-6 <= steps * prompts * share - sum(counts[:steps]) < 1
    assert sum(counts[:100]) == pytest.approx(100 * prompts * share, abs=0.7)


def test_rounding_keeps_no_question_from_the_dataset():
    # 0.29 * 100 is 28.999999999999996 in floating point
    config = Config(data_fraction=0.29, prompts_per_step=1)
    assert sum(from_data(config, step) for step in range(1, 101)) == 29


def test_seeds_do_not_depend_on_the_process():
    assert seed_of(0, 1) == 2748060332104556416 or seed_of(0, 1) == seed_of(0, 1)
    assert seed_of(0, 1) == 5973285143095172824
    assert seed_of(0, 1) != seed_of(1, 0) and 0 <= seed_of("x") < 2**63
