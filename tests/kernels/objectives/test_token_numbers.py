"""The three numbers of a token as they are returned, and losses of one's own on them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checks import Problem, assert_close_to_oracle, device_of, make_problem
from loss_calls import arguments, evaluate, flat, number_dtype
from torch import Tensor

import kepo_kernels
from kepo_kernels import reference

HUGE = 10**9


def numbers_of(problem: Problem, beta: float, temperature: float) -> dict[str, Tensor]:
    """fp64 oracle of the three numbers of every token, (B, T)."""
    p = {name: x.double() for name, x in vars(problem).items() if x.is_floating_point()}
    logits = reference.project(p["hidden"], p["lm_head"], p["bias"]).flatten(0, 1)
    teacher = reference.project(p["teacher_hidden"], p["teacher_lm_head"], p["teacher_bias"])
    targets = problem.targets.flatten()
    rows = {
        "logprobs": reference.token_logprob(logits, targets, temperature),
        "divergence": reference.token_divergence(logits, teacher.flatten(0, 1), beta, temperature),
        "entropy": reference.token_entropy(logits, temperature),
    }
    return {name: x.reshape(problem.targets.shape) for name, x in rows.items()}


@pytest.mark.parametrize("shape", ["(B, T)", "(N,)"])
def test_returned_stats(impl, shape):
    """Each number on the rows that have it, 0 on the others; detached, fp32."""
    problem = make_problem(length=5, teacher_vocab=29, temperature=0.7)
    oracle = numbers_of(problem, 0.5, 0.7)
    mask, open_rows = problem.completion_mask, problem.gate[:, None] & problem.completion_mask
    for loss, logprobs_on, divergence_on, entropy_on in (
        ("gated_kd", None, open_rows, open_rows),
        ("grpo", mask, None, mask),
        ("kepo", mask, open_rows, mask),
    ):
        options = "completion_mask bias" + (" gate teacher_bias" if loss != "grpo" else "")
        call = arguments(loss, problem, options, temperature=0.7, chunk_rows=4, impl=impl)
        call |= {"return_stats": True}
        call = flat(call) if shape == "(N,)" else call
        call = {n: x.to(device_of(impl)) if isinstance(x, Tensor) else x for n, x in call.items()}
        call["hidden"].requires_grad_()
        result, stats = getattr(kepo_kernels, f"fused_{loss}_loss")(**call)
        assert result.requires_grad
        for name, rows in (
            ("logprobs", logprobs_on),
            ("divergence", divergence_on),
            ("entropy", entropy_on),
        ):
            found = getattr(stats, name)
            assert not found.requires_grad and found.dtype == torch.float32
            assert found.shape == call["hidden"].shape[:-1]
            expected = torch.zeros_like(oracle[name]) if rows is None else oracle[name] * rows
            assert_close_to_oracle(found.reshape(3, 5), expected, name=f"{loss} {name}")


@pytest.mark.parametrize("chunk_rows", [1, 3, HUGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_logprobs(impl, dtype, chunk_rows):
    """Log-probabilities and entropies, under an upstream gradient of each token's own."""
    if dtype == torch.float64 and impl != "torch":
        pytest.skip("fp64 is what torch_rows computes")
    problem = make_problem(length=5, dtype=dtype, temperature=0.7)
    upstream = torch.randn(2, 3, 5, dtype=dtype)

    def both(function) -> Callable[..., Tensor]:
        def total(**call: object) -> Tensor:
            factors = upstream.to(call["hidden"])
            return (factors * torch.stack(function(**call))).sum()

        return total

    def fused_logprobs(**call: object) -> tuple[Tensor, Tensor]:
        return kepo_kernels.fused_linear_logprobs(
            **call,
            completion_mask=problem.completion_mask.to(call["hidden"].device),
            temperature=0.7,
            return_entropy=True,
            impl=impl,
            chunk_rows=chunk_rows,
        )

    def plain_logprobs(hidden, lm_head, targets, bias) -> list[Tensor]:
        logits = reference.project(hidden, lm_head, bias).flatten(0, 1)
        numbers = (
            reference.token_logprob(logits, targets.flatten(), 0.7),
            reference.token_entropy(logits, 0.7),
        )
        return [x.reshape(3, 5) * problem.completion_mask for x in numbers]

    names = ("hidden", "lm_head", "targets", "bias")
    call = {name: getattr(problem, name) for name in names}
    moved = {name: x.to(device_of(impl)) for name, x in call.items()}
    doubled = {name: x.double() if name != "targets" else x for name, x in call.items()}
    for name, x, y in zip(
        ("logprobs", "entropy"), fused_logprobs(**moved), plain_logprobs(**doubled), strict=True
    ):
        assert x.dtype == number_dtype(dtype)
        assert_close_to_oracle(x, y, name=name)
    actual = evaluate(both(fused_logprobs), moved)
    oracle = evaluate(both(plain_logprobs), doubled)
    for name, x in actual.items():
        assert_close_to_oracle(x, oracle[name], name=name)


def test_linear_logprobs_results(impl):
    """What comes back: one tensor, two with the entropy, the detached numbers last."""
    problem = make_problem(length=4)
    call = {name: getattr(problem, name) for name in ("hidden", "lm_head", "targets")}
    call = {name: x.to(device_of(impl)) for name, x in call.items()}
    call["hidden"] = call["hidden"].flatten(0, 1).requires_grad_()
    call["targets"] = call["targets"].flatten().int()
    call["impl"] = impl
    logprobs = kepo_kernels.fused_linear_logprobs(**call)
    assert logprobs.shape == (12,) and logprobs.requires_grad
    again, entropy = kepo_kernels.fused_linear_logprobs(**call, return_entropy=True)
    assert torch.equal(logprobs, again) and entropy.requires_grad
    again, stats = kepo_kernels.fused_linear_logprobs(**call, return_stats=True)
    assert again.requires_grad and not stats.logprobs.requires_grad
    assert torch.equal(stats.logprobs, logprobs) and torch.equal(stats.entropy, entropy)
    assert not stats.divergence.any()


@pytest.mark.parametrize("chunk_rows", [2, HUGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_loss_of_ones_own(impl, dtype, chunk_rows):
    """Not linear in any of the three numbers, with a tensor of its own picked by `rows`."""
    if dtype == torch.float64 and impl != "torch":
        pytest.skip("fp64 is what torch_rows computes")
    problem = make_problem(length=5, dtype=dtype, teacher_vocab=45)
    factors = torch.randn(15, dtype=dtype)
    weights = kepo_kernels.loss_weights(problem.completion_mask, None, "sequence_mean")
    seen = []

    def token_loss(stats, rows):
        seen.append(rows)
        factor = factors.to(stats.entropy)[rows]
        return factor * stats.logprobs.tanh() + stats.divergence**2 - factor * stats.entropy.sqrt()

    names = "targets teacher_hidden teacher_lm_head teacher_bias gate completion_mask bias"
    call = {name: getattr(problem, name) for name in ("hidden", "lm_head", *names.split())}
    settings = {"beta": 1.0, "reduction": "sequence_mean", "chunk_rows": chunk_rows, "impl": impl}

    def fused_total(**call: object) -> Tensor:
        call = {name: x.to(device_of(impl)) for name, x in call.items()}
        return kepo_kernels.fused_linear_loss(**call, token_loss=token_loss, **settings)

    def plain_total(hidden, lm_head, bias, **_) -> Tensor:
        own = replace(problem, hidden=hidden, lm_head=lm_head, bias=bias)
        numbers = numbers_of(own, 1.0, 1.0)
        # Sequences whose gate is closed stay in the loss, but have no teacher.
        numbers["divergence"] = numbers["divergence"] * problem.gate[:, None]
        stats = kepo_kernels.TokenStats(**{name: x.flatten() for name, x in numbers.items()})
        return (weights.flatten() * token_loss(stats, torch.arange(15))).sum()

    actual = evaluate(fused_total, call)
    rows = torch.cat(seen).sort().values
    assert torch.equal(rows.cpu(), problem.completion_mask.flatten().nonzero().squeeze(-1))
    doubled = {n: x.double() if x.is_floating_point() else x for n, x in call.items()}
    oracle = evaluate(plain_total, doubled)
    for name, x in actual.items():
        assert_close_to_oracle(x, oracle[name], name=name)


def test_linear_loss_without_targets_or_teacher(impl):
    """The entropy alone; and cross-entropy as in the docstring."""
    problem = make_problem(length=5)
    call = {"hidden": problem.hidden, "lm_head": problem.lm_head}
    device = device_of(impl)

    def fused_total(targets, token_loss):
        return lambda **call: kepo_kernels.fused_linear_loss(
            **{name: x.to(device) for name, x in call.items()},
            targets=None if targets is None else targets.to(device),
            token_loss=token_loss,
            reduction="token_mean",
            impl=impl,
        )

    doubled = {name: x.double() for name, x in call.items()}
    for actual, oracle in (
        (
            fused_total(None, lambda stats, _: stats.entropy - stats.logprobs - stats.divergence),
            lambda hidden, lm_head: reference.token_entropy(hidden @ lm_head.T).mean(),
        ),
        (
            fused_total(problem.targets, lambda stats, _: -stats.logprobs),
            lambda hidden, lm_head: torch.nn.functional.cross_entropy(
                (hidden @ lm_head.T).flatten(0, 1), problem.targets.flatten()
            ),
        ),
    ):
        expected = evaluate(oracle, doubled)
        for name, x in evaluate(actual, call).items():
            assert_close_to_oracle(x, expected[name], name=name)
