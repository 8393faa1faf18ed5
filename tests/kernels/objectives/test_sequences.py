"""Sequence-level ratios: chunks that hold whole sequences, and the pass before where none can."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from checks import make_problem
from loss_calls import arguments, assert_right, fused

from kepo_kernels.compute import gemm
from kepo_kernels.compute.problem import whole_sequence_chunks
from kepo_kernels.compute.sweep import ActiveRows
from kepo_kernels.objectives import sequences

OPTIONS = "completion_mask old_logprobs"


@pytest.fixture
def projected(monkeypatch) -> Counter:
    """Student rows through the forward product."""
    count, project = Counter(), gemm.project_

    def counting(out, x, w, *args, **settings):
        count[w.shape[1]] += len(x)
        project(out, x, w, *args, **settings)

    monkeypatch.setattr(gemm, "project_", counting)
    return count


@pytest.mark.parametrize("policy_loss", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("loss", ["grpo", "kepo"])
@pytest.mark.parametrize("chunk_rows", [9, 14, 1000])
def test_no_second_product_where_a_sequence_fits(impl, loss, policy_loss, chunk_rows, projected):
    problem = make_problem(batch=5, length=7, seed=2)
    settings = {"importance_level": "sequence", "policy_loss": policy_loss}
    call = arguments(loss, problem, OPTIONS, chunk_rows=chunk_rows, **settings)
    assert_right(loss, call, impl)
    assert projected[16] == problem.completion_mask.sum()


@pytest.mark.parametrize("loss", ["grpo", "kepo"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 6])
def test_a_pass_before_where_it_does_not(impl, loss, chunk_rows, projected):
    problem = make_problem(batch=5, length=7, seed=2)
    assert problem.completion_mask.sum(-1).max() == 7
    extras = {"kl_coef": 0.1, "entropy_coef": 0.1, "delta": 1.5}
    call = arguments(
        loss,
        problem,
        OPTIONS + " ref_logprobs bias",
        importance_level="sequence",
        chunk_rows=chunk_rows,
        **extras,
    )
    assert_right(loss, call, impl)
    assert projected[16] == 2 * problem.completion_mask.sum()


def test_both_ways_agree():
    problem = make_problem(batch=5, length=7)
    call = arguments("grpo", problem, OPTIONS, importance_level="sequence")
    whole, cut = fused("grpo", call | {"chunk_rows": 7}), fused("grpo", call | {"chunk_rows": 5})
    for name, x in whole.items():
        assert torch.allclose(x, cut[name], rtol=1e-5, atol=1e-7), name


def test_a_sequence_with_and_without_teacher(projected):
    """Tokens of one sequence on both sides of the teacher's split meet in no chunk."""
    problem = make_problem(batch=2, length=6)
    weights = torch.ones(2, 6).double()
    weights[1, 3:] = 0.0
    call = arguments("kepo", problem, "old_logprobs", importance_level="sequence")
    call |= {"distill_weights": weights, "gate": torch.ones(2)}
    actual = fused("kepo", call)
    assert projected[16] == 24
    policy = fused("grpo", arguments("grpo", problem, "old_logprobs", importance_level="sequence"))
    distill = arguments("gated_kd", problem, "", weights=weights)
    expected = policy["loss"] + fused("gated_kd", distill)["loss"]
    assert torch.allclose(actual["loss"], expected, rtol=1e-6)


def test_zero_advantage_tokens_stay_in_the_mean(impl):
    """Advantages per token: a token of advantage 0 is still part of its sequence's ratio."""
    problem = make_problem(batch=3, length=6)
    advantages = torch.randn(3, 6) * torch.randint(2, (3, 6))
    advantages[1] = 0.0
    problem = replace(problem, advantages=advantages)
    assert_right("grpo", arguments("grpo", problem, OPTIONS, importance_level="sequence"), impl)


def test_flat_tokens_are_their_own_sequences(impl):
    from loss_calls import flat

    call = flat(arguments("grpo", make_problem(), OPTIONS, importance_level="sequence"))
    assert_right("grpo", call, impl)


def active(rows: list[int], split: int) -> ActiveRows:
    found = torch.tensor(rows, dtype=torch.int64)
    return ActiveRows(found, torch.arange(split), (), found)


@pytest.mark.parametrize(
    ("rows", "split", "longest", "chunks"),
    [
        ([0, 1, 2, 10, 11, 20], 0, 4, ((0, 3), (3, 6))),
        ([0, 1, 2, 10, 11, 20], 3, 100, ((0, 3), (3, 6))),  # never across the teacher's split
        ([0, 1, 2, 10, 11, 20], 0, 100, ((0, 6),)),
        ([0, 1, 2, 3], 0, 3, None),  # too long
        ([0, 1, 2, 3], 2, 4, None),  # on both sides
        ([0, 10, 1], 2, 4, None),
        ([], 0, 4, ()),
    ],
)
def test_chunks_never_cut_a_sequence(rows, split, longest, chunks):
    assert whole_sequence_chunks(active(rows, split), 10, longest) == chunks


def test_a_cut_sequence_would_be_noticed(monkeypatch):
    """The comparison above can fail: chunks that cut sequences, taken for ones that do not."""
    monkeypatch.setattr(
        sequences, "whole_sequence_chunks", lambda plan, tokens, longest: plan.chunks
    )
    problem = make_problem(batch=5, length=7)
    call = arguments("grpo", problem, OPTIONS, importance_level="sequence", chunk_rows=4)
    with pytest.raises(AssertionError, match="exceeds"):
        assert_right("grpo", call)
