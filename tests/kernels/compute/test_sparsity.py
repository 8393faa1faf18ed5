"""Cost follows what carries gradient: dead rows, light columns, and what may be left out."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from checks import assert_close_to_oracle, make_problem
from loss_calls import arguments, assert_right, evaluate, function_of, fused, plain
from torch import Tensor

import kepo_kernels
from kepo_kernels.compute import gemm
from kepo_kernels.compute.sparsity import heavy_columns, keep_rows_, live_rows


@pytest.fixture
def work(monkeypatch) -> Counter:
    """Rows through the forward product; rows and columns through those of the gradients."""
    count = Counter()
    project, add = gemm.project_, gemm.add_gradients_

    def projecting(out: Tensor, *args: object, **settings: object) -> None:
        count["forward"] += len(out)
        project(out, *args, **settings)

    def adding(dw, dlogits, w, x, wants_dx, columns=None, *rest):
        count["gradient"] += len(dlogits)
        count["columns"] += dlogits.shape[1] if columns is None else len(columns)
        count["chunks"] += 1
        return add(dw, dlogits, w, x, wants_dx, columns, *rest)

    monkeypatch.setattr(gemm, "project_", projecting)
    monkeypatch.setattr(gemm, "add_gradients_", adding)
    return count


# --------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("policy_loss", ["clip", "cispo", "sapo", "reinforce"])
def test_zero_advantages_cost_nothing(impl, policy_loss, work):
    """Known before the first product: groups whose advantages are 0."""
    problem = make_problem(batch=4, length=5)
    problem = replace(problem, advantages=torch.tensor([0.0, 1.0, 0.0, -0.5]))
    call = arguments("grpo", problem, "completion_mask old_logprobs", policy_loss=policy_loss)
    assert_right("grpo", call, impl)
    alive = int(problem.completion_mask[[1, 3]].sum())
    assert work["forward"] == alive
    assert 0 < work["gradient"] <= alive  # some are clipped


def test_zero_advantages_with_a_penalty_cost(work):
    problem = make_problem(batch=4, length=5)
    problem = replace(problem, advantages=torch.tensor([0.0, 1.0, 0.0, -0.5]))
    options = "completion_mask old_logprobs ref_logprobs"
    assert_right("grpo", arguments("grpo", problem, options, kl_coef=0.1))
    assert work["forward"] == work["gradient"] == int(problem.completion_mask.sum())


def test_stats_of_zero_advantages_are_computed(work):
    """They were asked for: a forward product, and no gradient product."""
    problem = make_problem(batch=4, length=5)
    problem = replace(problem, advantages=torch.tensor([0.0, 1.0, 0.0, -0.5]))
    call = arguments("grpo", problem, "completion_mask", return_stats=True)
    hidden = call["hidden"].requires_grad_()
    loss, stats = kepo_kernels.fused_grpo_loss(**call)
    loss.backward()
    assert (stats.entropy[problem.completion_mask] > 0).all()
    assert work["forward"] == int(problem.completion_mask.sum())
    assert work["gradient"] == int(problem.completion_mask[[1, 3]].sum())
    assert (hidden.grad[[0, 2]] == 0).all()


@pytest.mark.parametrize("loss", ["grpo", "kepo"])
def test_clipped_tokens_cost_no_gradient(impl, loss, work):
    """Known only after the forward: far above the clip a good token sends nothing back."""
    problem = make_problem(batch=3, length=8)
    problem = replace(problem, advantages=torch.ones(3), gate=torch.zeros(3))
    problem.old_logprobs[:, ::2] -= 5.0
    problem.old_logprobs[:, 1::2] += 0.3  # ratios below 1: not clipped for A > 0
    call = arguments(loss, problem, "completion_mask old_logprobs", chunk_rows=7)
    assert_right(loss, call, impl)
    rows = problem.completion_mask.sum()
    logits = problem.hidden.double() @ problem.lm_head.double().T
    logprobs = logits.log_softmax(-1).gather(-1, problem.targets[..., None])[..., 0]
    clipped = (logprobs - problem.old_logprobs).exp() > 1.2
    live = int((problem.completion_mask & ~clipped).sum())
    assert 0 < live < rows and work["forward"] == rows
    assert work["gradient"] == live


def test_all_clipped_costs_no_gradient(work):
    problem = make_problem()
    problem = replace(problem, advantages=torch.ones(3), old_logprobs=problem.old_logprobs - 9.0)
    actual = fused("grpo", arguments("grpo", problem, "old_logprobs"))
    assert actual["loss"] != 0 and (actual["hidden"] == 0).all() and (actual["lm_head"] == 0).all()
    assert work["gradient"] == 0


def test_live_rows():
    coefficients = torch.zeros(3, 6)
    coefficients[0, 1], coefficients[2, 3], coefficients[1, 4] = 1.0, torch.nan, -1e-30
    assert live_rows(coefficients).tolist() == [1, 3, 4]


def test_keep_rows_moves_them_in_place():
    for live in ([1, 2, 5, 8], [0, 1, 2], [7, 8], [4], [0, 2, 3, 4, 5, 6, 7, 8]):
        x = torch.randn(9, 100)
        before, storage = x.clone(), x.data_ptr()
        kept, order = keep_rows_(x, torch.tensor(live))
        assert sorted(order.tolist()) == live and kept.data_ptr() == storage
        assert torch.equal(kept, before[order])


# ------------------------------------------------------------------------------------------ columns


def peaked(dtype: torch.dtype = torch.float32) -> object:
    """Rows of about 0.2 nat, whose gradients live in few of 3001 columns."""
    return make_problem(
        4, 6, hidden=48, vocab=3001, teacher_hidden=48, std=14.0, dtype=dtype, seed=3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("loss", ["gated_kd", "grpo", "kepo"])
@pytest.mark.parametrize("grad_tol", [1e-2, 1e-3, 1e-4])
def test_light_columns_are_left_out(loss, dtype, grad_tol, work):
    """Far fewer columns, and an error within the bound that is stated."""
    problem = peaked(dtype)
    options = "completion_mask bias" + ("" if loss == "grpo" else " gate")
    call = arguments(loss, problem, options, logits_dtype=None, chunk_rows=9)
    impl = "torch" if dtype == torch.float64 else "cpu"
    exact = evaluate(function_of(loss), call | {"impl": impl})
    work.clear()
    actual = evaluate(function_of(loss), call | {"impl": impl, "grad_tol": grad_tol})
    assert 0 < work["columns"] < 0.35 * 3001 * work["chunks"]
    assert torch.equal(actual["loss"], exact["loss"]) and torch.equal(actual["bias"], exact["bias"])
    differs = False
    for name in ("hidden", "lm_head"):
        error = (actual[name].double() - exact[name].double()).norm()
        rounding = 2**-8 if dtype == torch.bfloat16 else 0.0
        assert error <= (2 * grad_tol + rounding) * exact[name].double().norm(), name
        differs |= bool(error > 0)
    assert differs


def test_the_bound_holds_and_is_reported():
    """Share of sum |dlogits| left out <= grad_tol, and what follows from it for dhidden and dw."""
    for scale in (1.0, 0.3):
        dlogits = torch.randn(7, 500) * torch.logspace(0, -9, 500)[torch.randperm(500)] ** scale
        columns, mass = heavy_columns(dlogits, 1e-2)
        if columns is None:
            assert mass.dropped == 0
            continue
        dropped = torch.ones(500, dtype=torch.bool)
        dropped[columns] = False
        actual = dlogits.double().abs()[:, dropped].sum()
        assert actual <= 1e-2 * dlogits.double().abs().sum() * (1 + 1e-6)
        assert mass.dropped == pytest.approx(float(actual), rel=1e-5)
        assert mass.total == pytest.approx(float(dlogits.double().abs().sum()), rel=1e-5)
        w = torch.randn(500, 11)
        error = (dlogits[:, dropped] @ w[dropped]).norm(dim=-1).sum()
        assert error <= 1e-2 * dlogits.abs().sum() * w.norm(dim=-1).max()


def test_share_dropped_is_in_the_stats():
    call = arguments("grpo", peaked(), "completion_mask", return_stats=True, impl="cpu")
    call["hidden"].requires_grad_()
    stats = kepo_kernels.fused_grpo_loss(**call, grad_tol=1e-3)[1]
    assert 0 < stats.dropped_gradient <= 1e-3
    assert kepo_kernels.fused_grpo_loss(**call)[1].dropped_gradient is None


def test_flat_gradients_are_left_whole(work):
    """Where no column is light, all are kept, and nothing differs from the exact gradient."""
    call = arguments("grpo", make_problem(std=0.1), "completion_mask")
    exact = evaluate(function_of("grpo"), call)
    actual = evaluate(function_of("grpo"), call | {"grad_tol": 1e-3})
    assert all(torch.equal(actual[name], exact[name]) for name in exact)
    assert work["columns"] == work["chunks"] * 37


def test_no_tolerance_is_exact():
    call = arguments("grpo", peaked(torch.float64), "completion_mask")
    actual, oracle = fused("grpo", call | {"grad_tol": 0.0}), plain("grpo", call)
    for name, x in actual.items():
        assert_close_to_oracle(x, oracle[name], name=name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_keeps_every_column(value):
    dlogits = torch.rand(4, 50) * torch.logspace(0, -9, 50)
    dlogits[2, 49] = value
    assert heavy_columns(dlogits, 1e-2)[0] is None


def test_products_over_columns():
    """The gradient products over chosen columns, strip by strip, against fp64."""
    columns = torch.randperm(300)[:130].sort().values
    for operands, logits in ((torch.float32,) * 2, (torch.bfloat16, torch.float32)):
        dlogits, w = torch.randn(6, 300).to(logits), torch.randn(300, 20).to(operands)
        x, start = torch.randn(6, 20).to(operands), torch.randn(300, 20)
        dw = start.clone()
        dx = gemm.add_gradients_(dw, dlogits, w, x, True, columns, 64)
        kept: Tensor = torch.zeros(300, dtype=torch.float64)
        kept[columns] = 1
        oracle = dlogits.double() * kept
        assert_close_to_oracle(dx.float(), oracle @ w.double(), name="dx")
        assert_close_to_oracle(dw, start.double() + oracle.T @ x.double(), name="dw")
