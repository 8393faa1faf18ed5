"""The named weights: values by hand, micro-batches that add up, what is refused."""

import math
import re

import pytest
import torch

from kepo_kernels import reference, weights
from kepo_kernels.errors import KepoInputError

FLOAT64 = torch.float64
NAN = float("nan")
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
HELPERS = {
    "grpo_weights": {"completion_mask": MASK},
    "bnpo_weights": {"completion_mask": MASK},
    "dapo_weights": {"completion_mask": MASK, "num_items": 8},
    "dr_grpo_weights": {"completion_mask": MASK, "max_completion_length": 10},
    "sampler_weights": {
        "old_logprobs": torch.zeros(3, 4),
        "sampler_logprobs": torch.zeros(3, 4),
        "completion_mask": MASK,
    },
    "sod_weights": {
        "steps": torch.zeros(3, 4, dtype=torch.int64),
        "logprobs": torch.zeros(3, 4),
        "teacher_logprobs": torch.zeros(3, 4),
        "completion_mask": MASK,
    },
}
LOG_2 = math.log(2.0)


def call(name: str, **changes: object) -> torch.Tensor:
    return getattr(weights, name)(**HELPERS[name] | changes)


def assert_values(actual: torch.Tensor, expected: list) -> None:
    assert actual.dtype == FLOAT64
    expected = torch.tensor(expected, dtype=FLOAT64)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------- normalisations


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        # weight of a token of the first (two tokens) and of the second sequence (three)
        ("grpo_weights", 1 / 6, 1 / 9),
        ("bnpo_weights", 1 / 5, 1 / 5),
        ("dapo_weights", 1 / 8, 1 / 8),
        ("dr_grpo_weights", 1 / 30, 1 / 30),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_normalisations_by_hand(name, first, second, dtype):
    actual = call(name, completion_mask=MASK.to(dtype))
    assert_values(actual, [[first] * 2 + [0] * 2, [second] * 3 + [0], [0] * 4])


@pytest.mark.parametrize(
    ("name", "weight"),
    [("grpo_weights", 1 / 4), ("bnpo_weights", 1 / 3), ("dapo_weights", 1 / 8)]
    + [("dr_grpo_weights", 1 / 40)],
)
def test_normalisations_of_flat_tokens(name, weight):
    """N tokens are N sequences."""
    actual = call(name, completion_mask=torch.tensor([1, 0, 1, 1]))
    assert_values(actual, [weight, 0, weight, weight])


def test_dapo_divides_by_the_tokens_of_the_whole_batch():
    """Micro-batches of unequal length add up to the whole; a tensor and no number are one thing."""
    whole = weights.dapo_weights(MASK)
    assert torch.equal(whole, weights.bnpo_weights(MASK))
    for items in (5, 5.0, torch.tensor(5), torch.tensor(5.0)):
        parts = [weights.dapo_weights(MASK[rows], items) for rows in (slice(0, 1), slice(1, 3))]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", HELPERS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4)])
def test_nothing_is_no_error(name, shape):
    """No sequences, no positions, no tokens: all 0, of the right shape."""
    empty = {
        key: x.new_zeros(shape) for key, x in HELPERS[name].items() if isinstance(x, torch.Tensor)
    }
    if name == "dapo_weights":
        empty["num_items"] = torch.tensor(0)
    assert torch.equal(call(name, **empty), torch.zeros(shape, dtype=FLOAT64))


# -------------------------------------------------------------------------- sampler corrections

OLD = torch.tensor(
    [[0.0, LOG_2, 9.0, 9.0], [2 * LOG_2, -LOG_2, 0.0, 9.0], [9.0, NAN, 9.0, 9.0]], dtype=FLOAT64
)
SAMPLER = torch.tensor(
    [[0.0, 0.0, NAN, 1e9], [0.0, 0.0, NAN, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=FLOAT64
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # token ratios 1, 2 | 4, 1/2, NaN = 1; sequences 2 | 2 | 1
        ({}, [[1, 2, 0, 0], [2, 0.5, 1, 0], [0, 0, 0, 0]]),
        ({"high": None}, [[1, 2, 0, 0], [4, 0.5, 1, 0], [0, 0, 0, 0]]),
        ({"low": 0.75, "high": 1.5}, [[1, 1.5, 0, 0], [1.5, 0.75, 1, 0], [0, 0, 0, 0]]),
        ({"mode": "mask"}, [[1, 2, 0, 0], [0, 0.5, 1, 0], [0, 0, 0, 0]]),
        ({"mode": "mask", "low": 0.75}, [[1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]),
        ({"level": "sequence"}, [2, 2, 1]),
        ({"level": "sequence", "high": 1.5}, [1.5, 1.5, 1]),
        ({"level": "sequence", "mode": "mask", "high": 1.5}, [0, 0, 1]),
        ({"level": "sequence", "mode": "mask", "low": 1.5, "high": None}, [2, 2, 0]),
    ],
)
def test_sampler_weights_by_hand(settings, expected):
    assert_values(weights.sampler_weights(OLD, SAMPLER, MASK, **settings), expected)


def test_sampler_weights_are_constants():
    old = OLD.clone().requires_grad_()
    assert not weights.sampler_weights(old, SAMPLER, MASK).requires_grad


def test_sampler_weights_of_flat_tokens():
    """Every token is its own sequence."""
    mask = torch.tensor([1, 1, 0])
    old, sampler = torch.tensor([LOG_2, 0.0, NAN]).double(), torch.zeros(3, dtype=FLOAT64)
    for level, outside in (("token", 0.0), ("sequence", 1.0)):
        actual = weights.sampler_weights(old, sampler, mask, level=level)
        assert_values(actual, [2.0, 1.0, outside])


def test_a_ratio_that_overflows_is_truncated():
    old = torch.full((1, 4), 500.0, dtype=FLOAT64)
    mask = torch.ones(1, 4)
    actual = weights.sampler_weights(old, old * 0, mask, level="sequence", high=3.0)
    assert actual.tolist() == [3.0]


# ---------------------------------------------------------------------------------- SOD's steps


def test_sod_weights_by_hand():
    """Steps of distance 0.1 | 0.4 | 0.05 give 1, 1/4 and, at most, 1.2."""
    steps = torch.tensor([[0, 0, 1, 1, 1, 5, 5]])
    gap = torch.tensor([[0.2, 0.0, -0.3, NAN, 0.5, -0.05, 0.05]], dtype=FLOAT64)
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1]])
    teacher = torch.full_like(gap, -2.0)
    actual = weights.sod_weights(steps, teacher + gap, teacher, mask, epsilon=1e-12)
    expected = torch.tensor([[1, 1, 0.25, 0, 0.25, 1.2, 1.2]], dtype=FLOAT64)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    unbounded = weights.sod_weights(steps, teacher + gap, teacher, mask, epsilon=0.1, delta=9)
    expected = torch.tensor([[1, 1, 0.4, 0, 0.4, 4 / 3, 4 / 3]], dtype=FLOAT64)
    torch.testing.assert_close(unbounded, expected, rtol=1e-10, atol=0)


def test_sod_weights_token_by_token():
    """The definition in loops, over random steps, masks with holes, a first step without tokens."""
    torch.manual_seed(3)
    steps = torch.randint(0, 2, (5, 9)).cumsum(-1) - 3
    mask = torch.rand(5, 9) < 0.7
    mask[0] = False
    mask[1, steps[1] == steps[1, 0]] = False
    student, teacher = torch.randn(2, 5, 9)
    actual = weights.sod_weights(steps.int(), student, teacher, mask)
    expected = torch.zeros(5, 9, dtype=FLOAT64)
    for b in range(5):
        distance = {}
        for k in steps[b].unique().tolist():
            of_step = (steps[b] == k) & mask[b]
            if of_step.any():
                distance[k] = (student[b] - teacher[b]).double().abs()[of_step].mean().item()
        for t in mask[b].nonzero().flatten().tolist():
            first = distance[min(distance)]
            expected[b, t] = min((first + 1e-6) / (distance[steps[b, t].item()] + 1e-6), 1.2)
    assert expected.unique().numel() > 5
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_sod_weights_are_constants():
    logprobs = torch.randn(3, 4, requires_grad=True)
    assert not call("sod_weights", logprobs=logprobs).requires_grad


# --------------------------------------------------------------------------------- what is refused

ONES = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        (name, {"completion_mask": mask}, says)
        for name in HELPERS
        for mask, says in (
            ([[1, 1]], "completion_mask list"),
            (torch.ones(2, 2, 2), "completion_mask [2, 2, 2]"),
            (torch.full((3, 4), 0.3), "completion_mask holds 0.3"),
            (torch.ones(3, 4).to_sparse(), "completion_mask is a sparse_coo tensor"),
            (torch.nested.nested_tensor([torch.ones(2)] * 3), "completion_mask is a nested tensor"),
        )
    ]
    + [
        ("dapo_weights", {"num_items": -1}, "num_items=-1"),
        ("dapo_weights", {"num_items": "5"}, "num_items='5'"),
        ("dapo_weights", {"num_items": NAN}, "num_items=nan"),
        ("dapo_weights", {"num_items": 0}, "num_items=0, but completion_mask has tokens"),
        ("dapo_weights", {"num_items": torch.tensor(0)}, "num_items=0, but"),
        ("dapo_weights", {"num_items": torch.ones(3)}, "num_items [3]"),
        ("dapo_weights", {"num_items": 1e-320}, "num_items=1e-320; expected a finite number >= 0"),
        (
            "dapo_weights",
            {"num_items": torch.tensor(1e-320, dtype=torch.float64)},
            "size that float64 holds, 4.5e-308 to 1.8e+308",
        ),
        ("dapo_weights", {"num_items": torch.tensor(3).to_sparse()}, "num_items is a sparse_coo"),
        ("dr_grpo_weights", {"max_completion_length": 0}, "max_completion_length=0"),
        ("dr_grpo_weights", {"max_completion_length": 1e-320}, "a size that float64 holds"),
        ("dr_grpo_weights", {"max_completion_length": 1e308}, "finite also times the number of"),
        ("dr_grpo_weights", {"max_completion_length": None}, "max_completion_length=None"),
        ("sampler_weights", {"level": "tokens"}, "level='tokens'"),
        ("sampler_weights", {"mode": "clip"}, "mode='clip'"),
        ("sampler_weights", {"low": -1.0}, "low=-1.0"),
        ("sampler_weights", {"high": math.inf}, "high=inf"),
        ("sampler_weights", {"low": 3.0}, "low=3.0 is above high=2.0"),
        ("sampler_weights", {"old_logprobs": None}, "old_logprobs NoneType"),
        ("sampler_weights", {"old_logprobs": ONES[:1]}, "old_logprobs [1, 4]"),  # would broadcast
        ("sampler_weights", {"old_logprobs": ONES * NAN}, "old_logprobs holds nan at [0, 0]"),
        ("sampler_weights", {"sampler_logprobs": ONES[:, :1]}, "sampler_logprobs [3, 1]"),
        ("sampler_weights", {"sampler_logprobs": -ONES / 0}, "sampler_logprobs holds -inf"),
        ("sampler_weights", {"old_logprobs": ONES.to("meta")}, "old_logprobs on meta"),
        (
            "sampler_weights",
            {"high": 1e-320},
            "high=1e-320; expected a finite number >= 0",
        ),
        ("sampler_weights", {"old_logprobs": ONES.to_sparse()}, "old_logprobs is a sparse_coo"),
        ("sod_weights", {"epsilon": 1e-320}, "epsilon=1e-320"),
        ("sod_weights", {"steps": ONES}, "steps [3, 4] float32"),
        ("sod_weights", {"steps": torch.tensor([0, 1])}, "steps [2]"),
        ("sod_weights", {"steps": -MASK.cumsum(-1)}, "steps holds -2 at [0, 1]"),
        ("sod_weights", {"logprobs": ONES * NAN}, "logprobs holds nan at [0, 0]"),
        ("sod_weights", {"teacher_logprobs": 1.0}, "teacher_logprobs float"),
        ("sod_weights", {"epsilon": 0}, "epsilon=0"),
        ("sod_weights", {"delta": -0.1}, "delta=-0.1"),
        ("sod_weights", {"completion_mask": torch.ones(4)}, "flat tokens have no steps"),
    ],
)
def test_refusals_name_the_argument(name, wrong, says):
    call(name)
    with pytest.raises(KepoInputError, match=rf"^{name}: .*{re.escape(says)}"):
        call(name, **wrong)


def test_reductions_of_the_oracle_are_these():
    """Two implementations of one definition."""
    for name, reduction in (("grpo_weights", "sequence_mean"), ("bnpo_weights", "token_mean")):
        assert torch.equal(call(name), reference.reduction_weights(MASK, None, reduction))
