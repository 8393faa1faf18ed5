"""Backward: graphs, layouts and modes in which the losses are ordinary citizens of autograd."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from checks import (
    assert_close_to_oracle,
    device_of,
    make_problem,
)
from loss_calls import (
    DIFFERENTIABLE,
    LOSSES,
    OPTIONS,
    arguments,
    assert_right,
    assert_same_bits,
    call_of,
    evaluate,
    function_of,
    fused,
    leaves,
    logprobs_call,
    logprobs_sum,
)
from torch import Tensor
from torch.autograd import forward_ad

import kepo_kernels

# ---------------------------------------------------------------------------------- backward, again


@pytest.mark.parametrize("loss", LOSSES)
def test_backward_twice_on_a_retained_graph(impl, loss):
    call = leaves(call_of(loss, chunk_rows=4, impl=impl))
    call = {n: x.to(device_of(impl)) if isinstance(x, Tensor) else x for n, x in call.items()}
    wanted = [call[name] for name in DIFFERENTIABLE]
    total = function_of(loss)(**call)
    first = torch.autograd.grad(total * 3, wanted, retain_graph=True)
    second = torch.autograd.grad(total * 3, wanted)
    for one, other in zip(first, second, strict=True):
        assert one.any() and torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()  # the caller may change the one in place


def test_logprobs_backward_twice_on_a_retained_graph():
    call = leaves(logprobs_call())
    wanted = [call[name] for name in DIFFERENTIABLE]
    total = logprobs_sum(**call)
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(total, wanted), strict=True):
        assert one.any() and torch.equal(one, other)


@pytest.mark.parametrize("total", [*map(function_of, LOSSES), logprobs_sum])
def test_double_backward_is_refused(total):
    """Also where torch would let it pass and return a constant, and a sum would hide it."""
    name = total.__name__
    call = logprobs_call() if name == "logprobs_sum" else call_of(name[6:-5])
    call = leaves(call)
    result = total(**call)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (gradient,) = torch.autograd.grad(result, call["hidden"], create_graph=True)
        (gradient.pow(2).sum() + call["hidden"].sum()).backward()


def linear_loss(**call: object) -> Tensor:
    return kepo_kernels.fused_linear_loss(**call, token_loss=lambda stats, _: -stats.logprobs)


TRANSFORMS = {
    "grad": torch.func.grad,
    "vmap": lambda f: lambda x: torch.func.vmap(f)(x.unsqueeze(0)),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x),
    "jacrev": torch.func.jacrev,
    "hessian": torch.func.hessian,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("total", [*map(function_of, LOSSES), logprobs_sum, linear_loss])
def test_transforms_of_torch_func_are_refused(total, transform):
    """And the remedies that the refusal names give the gradient."""
    name = total.__name__
    call = call_of(name[6:-5]) if total in map(function_of, LOSSES) else logprobs_call()
    hidden = call.pop("hidden")
    transformed = TRANSFORMS[transform](lambda x: total(hidden=x, **call))
    with pytest.raises(kepo_kernels.KepoInputError, match=r"torch.func .*torch.autograd.grad"):
        transformed(hidden)


def test_what_to_use_in_place_of_torch_func():
    """Both remedies: autograd.grad with functional_call, and torch.func.grad of the reference."""
    call = call_of("grpo")
    hidden = call.pop("hidden")
    below = torch.nn.Linear(16, 16)

    def total(loss: Callable[..., Tensor], parameters: dict[str, Tensor]) -> Tensor:
        return loss(torch.func.functional_call(below, parameters, hidden), **call)

    parameters = {name: x.detach().requires_grad_() for name, x in below.named_parameters()}
    found = torch.autograd.grad(
        total(kepo_kernels.fused_grpo_loss, parameters), list(parameters.values())
    )
    expected = torch.func.grad(lambda x: total(kepo_kernels.reference.grpo_loss, x))(parameters)
    for one, other in zip(found, expected.values(), strict=True):
        assert one.any() and torch.allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("total", [function_of("kepo"), logprobs_sum])
def test_forward_mode_is_refused(total, name):
    """torch would let a tangent vanish where nothing requires a gradient."""
    call = logprobs_call() if total is logprobs_sum else call_of("kepo")
    with forward_ad.dual_level():
        call[name] = forward_ad.make_dual(call[name], torch.ones_like(call[name]))
        with pytest.raises(kepo_kernels.KepoInputError, match=f"{name} carries a tangent"):
            total(**call)
        with torch.no_grad(), pytest.raises(kepo_kernels.KepoInputError, match="a tangent"):
            total(**call)


@pytest.mark.parametrize("total", [function_of("grpo"), logprobs_sum])
def test_a_batch_of_upstream_gradients_is_refused(total):
    call = leaves(logprobs_call() if total is logprobs_sum else call_of("grpo"))
    result, hidden = total(**call), call["hidden"]
    with pytest.raises(RuntimeError, match="one upstream gradient at a time"):
        torch.autograd.grad(result, hidden, torch.ones(3), is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="one upstream gradient at a time"):
        torch.func.vmap(lambda v: torch.autograd.grad(result, hidden, v, retain_graph=True))(
            torch.ones(3)
        )


def test_upstream_gradient_of_a_larger_graph():
    """Through a layer below and a scale above, summed with another term."""
    problem = make_problem(length=5, dtype=torch.float64)
    below = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)

    def total(loss: Callable[..., Tensor]) -> Tensor:
        call = arguments("grpo", replace(problem, hidden=(problem.hidden @ below).tanh()))
        return loss(**call).exp() * 3 + below.square().sum()

    actual, oracle = (
        torch.autograd.grad(total(loss), below)[0]
        for loss in (kepo_kernels.fused_grpo_loss, kepo_kernels.reference.grpo_loss)
    )
    assert_close_to_oracle(actual, oracle, name="below")


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss):
    """Against finite differences, which know nothing of the oracle."""
    problem = make_problem(2, 3, hidden=4, vocab=7, teacher_hidden=3, dtype=torch.float64)
    # Off the kinks of the clip, where a difference quotient is neither of the two slopes.
    problem = replace(problem, old_logprobs=problem.old_logprobs + 0.05)
    call = leaves(arguments(loss, problem, OPTIONS[loss], chunk_rows=2, impl="torch"))

    def total(*tensors: Tensor) -> Tensor:
        return function_of(loss)(**call | dict(zip(DIFFERENTIABLE, tensors, strict=True)))

    assert torch.autograd.gradcheck(total, [call[name] for name in DIFFERENTIABLE])


def test_gradcheck_of_logprobs():
    problem = make_problem(2, 3, hidden=4, vocab=7, dtype=torch.float64)
    wanted = [x.requires_grad_() for x in (problem.hidden, problem.lm_head, problem.bias)]

    def numbers(hidden: Tensor, lm_head: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return kepo_kernels.fused_linear_logprobs(
            hidden, lm_head, problem.targets, bias=bias, return_entropy=True, chunk_rows=2
        )

    assert torch.autograd.gradcheck(numbers, wanted)


# ------------------------------------------------------------------------ layouts and circumstances


def strided(x: Tensor) -> Tensor:
    """The same values, every second element of a larger buffer of NaN."""
    buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    view = buffer[..., 1::2]
    view.copy_(x)
    return view


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


@pytest.mark.parametrize("layout", [strided, transposed])
@pytest.mark.parametrize("loss", LOSSES)
def test_layouts(impl, loss, layout):
    call = call_of(loss)
    other = {
        name: layout(x) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in call.items()
    }
    assert not other["lm_head"].is_contiguous() and not other["hidden"].is_contiguous()
    assert_right(loss, other, impl, oracle_call=call)


@pytest.mark.parametrize("name", ["hidden", "lm_head", "teacher_hidden", "bias"])
def test_expanded_inputs(impl, name):
    """Stride 0: one state for all tokens of a sequence, one column for the whole head."""
    call = call_of("kepo")
    narrow = {"lm_head": (slice(None), slice(1)), "bias": (slice(1),)}.get(
        name, (slice(None), slice(1))
    )
    expanded = call | {name: call[name][narrow].expand(call[name].shape)}
    assert 0 in expanded[name].stride()
    dense = call | {name: expanded[name].contiguous()}
    assert_right("kepo", expanded, impl, oracle_call=dense)


@pytest.mark.parametrize("loss", LOSSES)
def test_inputs_are_not_changed(impl, loss):
    call = call_of(loss, chunk_rows=4)
    before = {name: x.clone() for name, x in call.items() if isinstance(x, Tensor)}
    versions = {name: call[name]._version for name in before}
    fused(loss, call, impl)
    for name, x in before.items():
        assert torch.equal(call[name], x), name
        if device_of(impl) == "cpu":
            assert call[name]._version == versions[name], name


CAST = ("hidden", "lm_head", "bias", "teacher_hidden", "teacher_lm_head", "teacher_bias")


@pytest.mark.parametrize("total", [*map(function_of, LOSSES), logprobs_sum])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_states_and_weights_only(total, dtype):
    """As a linear layer: fp32 parameters get fp32 gradients of what their cast computes."""
    name = total.__name__
    call = logprobs_call() if name == "logprobs_sum" else call_of(name[6:-5])
    expected = evaluate(
        lambda **call: total(**{k: x.to(dtype) if k in CAST else x for k, x in call.items()}), call
    )
    with torch.autocast("cpu", dtype=dtype):
        actual = evaluate(total, call)
    assert_same_bits(actual, expected)
    assert actual["hidden"].dtype == torch.float32


def test_autocast_leaves_float64_alone():
    call = call_of("kepo", dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused("kepo", call)
    assert_same_bits(actual, fused("kepo", call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_dtype_changes_nothing(dtype):
    """Models are often loaded under another default dtype."""
    problem = make_problem(length=5, dtype=dtype)
    call = arguments("kepo", problem, OPTIONS["kepo"], logits_dtype=torch.float32)
    expected = fused("kepo", call)
    torch.set_default_dtype(torch.float64)
    try:
        actual = fused("kepo", call)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(actual, expected)


def test_teacher_never_gets_a_gradient():
    problem = make_problem(length=5)
    names = ("teacher_hidden", "teacher_lm_head", "teacher_bias")
    call = leaves(call_of("kepo")) | {
        name: getattr(problem, name).clone().requires_grad_() for name in names
    }
    kepo_kernels.fused_kepo_loss(**call).backward()
    assert call["hidden"].grad.any() and all(call[name].grad is None for name in names)
