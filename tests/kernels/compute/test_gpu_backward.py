"""What only the backward on a GPU does, on the device that computes on the CPU: the range of fp16,
slices that are not copied, gradients that the first chunk writes, what is refused there.
"""

import pytest
import torch
from checks import make_problem
from loss_calls import OPTIONS, arguments, evaluate, function_of
from pretend_cuda import numbers, on_device, pretend_cuda
from test_host_waits import moved
from torch import Tensor

import kepo_kernels
from kepo_kernels import KepoInputError, LoRA
from kepo_kernels.compute import autograd, gemm, sweep

# Two operands rounded to fp16 (2^-11 each) under dlogits rounded to fp16.
OF_FP16 = 3 * 2**-11
SIZES = {"batch": 4, "length": 6}


def small_weights(rows: Tensor) -> Tensor:
    """Weights of a mean over 10^5 tokens and less, and of very different chunks."""
    return torch.logspace(-8, -5, rows.numel()).view(rows.shape)[:, torch.randperm(rows.shape[1])]


def fp16_error(chunk_rows: int | None) -> float:
    """The largest relative error of fp16's accumulated gradients, as they are before the cast."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).half()

    x, w, y, v = normal(4, 6, 16), normal(203, 16), normal(4, 6, 24), normal(203, 24)
    a, b, bias = normal(2, 16), normal(203, 2), normal(203)
    leaves = (x, w, bias, a, b)
    weights = small_weights(torch.empty(4, 6))
    settings = {"weights": weights, "impl": "torch", "chunk_rows": chunk_rows}

    def gradients(on, dtype: torch.dtype) -> list[Tensor]:
        there = [on(leaf.to(dtype)).requires_grad_() for leaf in leaves]
        x, w, bias, a, b = there
        head = kepo_kernels.Head(w, lora=LoRA(a, b, 0.5))
        teacher = (on(y.to(dtype)), on(v.to(dtype)))
        loss = kepo_kernels.fused_gated_kd_loss(x, head, *teacher, bias=bias, **settings)
        # As GradScaler's factor, which comes too late for what was formed in forward.
        return torch.autograd.grad(loss * 2.0**16, there)

    expected = gradients(lambda x: x.clone(), torch.float32)
    with pretend_cuda():
        found = [numbers(x).float() for x in gradients(on_device, torch.float16)]
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("chunk_rows", [None, 5])
def test_fp16_gradients_do_not_vanish(chunk_rows):
    assert fp16_error(chunk_rows) <= OF_FP16


def test_without_the_factor_they_vanish(monkeypatch):
    monkeypatch.setattr(sweep.HalfScale, "raised", lambda self, back, gradients: back)
    monkeypatch.setattr(sweep.HalfScale, "inverse", 1.0)
    assert fp16_error(5) > 10 * OF_FP16


def test_a_factor_that_is_forgotten_between_chunks_is_noticed(monkeypatch):
    monkeypatch.setattr(sweep.HalfScale, "_multiply", lambda *_: None)
    assert fp16_error(5) > 10 * OF_FP16


def sums_of_states(weights: Tensor, monkeypatch) -> Tensor:
    """The fp32 gradient of fp16 states, two rows a chunk, before it is cast."""
    torch.manual_seed(0)
    x, w, targets = torch.randn(8, 16).half(), torch.randn(203, 16).half(), torch.arange(8)
    seen = []

    def keep(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(gradient)
        return gradient.to(dtype)

    monkeypatch.setattr(autograd, "_scaled_on_gpu", keep)
    with pretend_cuda():
        hidden, factors = on_device(x).requires_grad_(), on_device(weights)
        loss = kepo_kernels.fused_linear_loss(
            hidden,
            on_device(w),
            on_device(targets),
            lambda stats, rows: -factors[rows] * stats.logprobs,
            reduction="sum",
            impl="torch",
            chunk_rows=2,
        )
        torch.autograd.grad(loss, hidden)
        return numbers(seen[0])


LIGHT = torch.tensor([1.0, 1.0, 1e-9, 1e-9, 1.0, 1.0, 1e-9, 1e-9])


def test_a_light_chunk_after_a_heavy_one_keeps_its_digits(monkeypatch):
    heavy = sums_of_states(torch.ones(8), monkeypatch)
    found = sums_of_states(LIGHT, monkeypatch) / LIGHT[:, None]
    assert ((found - heavy).norm(dim=-1) <= OF_FP16 * heavy.norm(dim=-1)).all()


def test_a_coefficient_of_nan_stays_in_its_row(monkeypatch):
    broken = LIGHT.clone()
    broken[1] = torch.nan
    found = sums_of_states(broken, monkeypatch).isnan().any(-1)
    assert found.tolist() == [row == 1 for row in range(8)]


@pytest.mark.parametrize("loss", ["grpo", "kepo"])
def test_a_slice_of_longer_sequences_is_not_copied(loss):
    """The states that predict completions are a slice of those of prompt and completion."""
    problem = make_problem(**SIZES)
    call = arguments(loss, problem, OPTIONS[loss])
    expected = evaluate(function_of(loss), call)
    for name in ("hidden", "teacher_hidden"):
        if name in call:
            longer = torch.full((4, 9, call[name].shape[-1]), torch.nan)
            longer[:, 2:8] = call[name]
            call[name] = longer[:, 2:8]
    flattened = []
    with pytest.MonkeyPatch.context() as patch:
        flatten = Tensor.flatten
        patch.setattr(
            Tensor, "flatten", lambda x, *a: flattened.append(flatten(x, *a)) or flattened[-1]
        )
        found = evaluate(function_of(loss), call)
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name
    widths = {x.shape[-1] for x in flattened if x.dim() == 2 and len(x) == 24}
    assert not widths & {problem.hidden.shape[-1], problem.teacher_hidden.shape[-1]}


@pytest.mark.parametrize("loss", ["gated_kd", "grpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_chunk_writes_the_heads_gradient(loss, dtype, monkeypatch):
    """It starts from memory that held NaN, and is never filled with zeros."""
    call = arguments(loss, make_problem(**SIZES), OPTIONS[loss], chunk_rows=5, impl="torch")
    call = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point() else x
        for name, x in call.items()
        if name not in ("bias", "teacher_bias", "old_logprobs", "gate", "completion_mask")
    }
    expected = evaluate(function_of(loss), call)
    made = []
    zeros = sweep.pages.zeros
    monkeypatch.setattr(
        sweep.pages, "zeros", lambda shape, *rest: made.append(tuple(shape)) or zeros(shape, *rest)
    )
    with pretend_cuda():
        found = {k: numbers(x) for k, x in evaluate(function_of(loss), moved(call)).items()}
    assert tuple(call["lm_head"].shape) not in made
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, x in found.items():
        assert float((x - expected[name]).norm()) <= tolerance * float(expected[name].norm()), name


def test_no_rows_leave_zeros_there():
    call = arguments("gated_kd", make_problem(**SIZES), impl="torch")
    call["completion_mask"] = torch.zeros(4, 6, dtype=torch.bool)
    with pretend_cuda():
        found = {k: numbers(x) for k, x in evaluate(function_of("gated_kd"), moved(call)).items()}
    assert all(not x.any() for x in found.values())


def test_grad_tol_is_refused_there():
    call = arguments("grpo", make_problem(**SIZES), impl="torch", grad_tol=1e-3)
    with pretend_cuda(), pytest.raises(KepoInputError, match=r"grad_tol=0\.001.*cuda.*CPU only"):
        kepo_kernels.fused_grpo_loss(**moved(call))


def test_dx_is_formed_in_fp32():
    w, dlogits = torch.randn(37, 8).bfloat16(), torch.randn(5, 37).bfloat16()
    with pretend_cuda():
        dx = numbers(gemm.hidden_gradient(on_device(dlogits), on_device(w)))
    assert dx.dtype == torch.float32
    assert torch.equal(dx, dlogits.float() @ w.float())
