"""Intervals: against known laws, paired where they should be, and wide where little is known."""

import numpy as np
import pytest

from kepo.evaluation.statistics import bootstrap, students_t


def draws(probability, shape, seed=0):
    return (np.random.default_rng(seed).random(shape) < probability).astype(float)


def test_items_alone_give_the_binomial_interval():
    correct = draws(0.6, (1, 1, 400))
    found = bootstrap(correct)
    mean = correct.mean()
    half = 1.96 * np.sqrt(mean * (1 - mean) / 400)
    assert found.mean == mean
    assert found.low == pytest.approx(mean - half, abs=0.006)
    assert found.high == pytest.approx(mean + half, abs=0.006)


def test_every_modality_counts_the_same():
    correct = np.stack([np.ones((2, 30)), np.zeros((2, 30))], axis=1)
    assert bootstrap(correct) == pytest.approx((0.5, 0.5, 0.5))


def test_seeds_that_disagree_widen_the_interval():
    even = np.tile(draws(0.5, (1, 2, 100)), (5, 1, 1))
    uneven = np.stack([np.full((2, 100), x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)])
    narrow, wide = bootstrap(even), bootstrap(uneven)
    assert wide.high - wide.low > 4 * (narrow.high - narrow.low)


def test_differences_are_paired_in_seeds_and_items():
    easy = draws(0.5, (5, 3, 60))
    better = easy.copy()
    better[:, :, ::10] = 1.0  # right wherever the other is, and on some more
    assert bootstrap(easy, easy) == (0.0, 0.0, 0.0)
    paired = bootstrap(better, easy)
    assert paired.sign == 1
    shuffled = np.random.default_rng(1).permuted(easy, axis=2)
    unpaired = bootstrap(better, shuffled)
    assert unpaired.high - unpaired.low > 1.5 * (paired.high - paired.low)
    swapped = bootstrap(easy, better)
    assert (swapped.mean, swapped.sign) == (-paired.mean, -1)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(60):
        item = rng.normal(0, 0.15, (1, 2, 60))  # items differ, and are the same for all seeds
        seed = rng.normal(0, 0.05, (12, 1, 1))
        correct = rng.random((12, 2, 60)) < np.clip(0.5 + item + seed, 0, 1)
        found = bootstrap(correct, seed=trial)
        hits += found.low <= 0.5 <= found.high
    assert hits >= 52  # 95 % would be 57


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"minus \(2, 1, 3\)"):
        bootstrap(np.ones((2, 1, 4)), np.ones((2, 1, 3)))
    with pytest.raises(ValueError, match=r"expected \(seeds, modalities, items\)"):
        bootstrap(np.ones((2, 4)))


@pytest.mark.parametrize("n", [2, 5, 11, 12, 40])
def test_students_t(n):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(n).normal(1.0, 2.0, n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert students_t(values) == pytest.approx((values.mean(), low, high), abs=2e-3 * (high - low))


def test_one_seed_says_nothing_about_seeds():
    found = students_t([0.3])
    assert found.mean == 0.3 and found.sign == 0 and np.isinf(found.high)
