"""Wrong input is refused by name: the function, the arguments, what came."""

import inspect
import re

import numpy
import pytest
import torch
from bad_inputs import TABLE
from checks import unavailable
from loss_calls import Arguments
from right_calls import FUNCTIONS, GRPO, KEPO, NAN, PROBLEM
from torch import Tensor

import kepo_kernels
from kepo_kernels import KepoInputError, validate


def bits(x: Tensor) -> Tensor:
    """A copy that is equal to another one's also where both are NaN."""
    return x.detach().clone().reshape(-1).view(torch.uint8)


def is_plain(x: object) -> bool:
    """Whether its bits can be read."""
    if not isinstance(x, Tensor) or x.is_meta or x.is_nested:
        return False
    return x.layout is torch.strided


def refuse(function: str, wrong: Arguments) -> str:
    """Calls with `wrong` arguments: refused in the function's name, and left as they are."""
    call = FUNCTIONS[function] | wrong
    before = {n: bits(x) for n, x in call.items() if is_plain(x)}
    with pytest.raises(KepoInputError) as refusal:
        getattr(kepo_kernels, function)(**call)
    assert isinstance(refusal.value, ValueError)
    for name, x in before.items():
        assert torch.equal(bits(call[name]), x), name
    message = str(refusal.value)
    assert message.startswith(f"{function}: "), message
    return message


@pytest.mark.parametrize("wrong", TABLE)
def test_refused_by_name(wrong):
    functions, bad, says = TABLE[wrong]
    if wrong == "fp64 in C++" and unavailable("cpu"):
        pytest.skip(unavailable("cpu"))
    for function in functions:
        given = {name: x for name, x in bad.items() if takes(function, name) or len(bad) == 1}
        message = refuse(function, given)
        for words in says:
            assert words in message, f"{words!r} is not in {message!r}"


def takes(function: str, name: str) -> bool:
    """Whether this is an argument of the function or an engine setting."""
    parameters = inspect.signature(getattr(kepo_kernels, function)).parameters
    return name in parameters or name in validate.ENGINE_SETTINGS


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_calls_above_are_right_but_for_what_is_wrong(function):
    result = getattr(kepo_kernels, function)(**FUNCTIONS[function])
    assert torch.isfinite(result).all() and result.any()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_where_nothing_takes_part_are_not_judged(function):
    """What stands at masked tokens may be anything."""
    dead = ~PROBLEM.completion_mask
    call = dict(FUNCTIONS[function])
    call["hidden"] = PROBLEM.hidden.masked_fill(dead[..., None], NAN)
    if "targets" in call:
        call["targets"] = PROBLEM.targets.masked_fill(dead, -100)
    expected = getattr(kepo_kernels, function)(**FUNCTIONS[function])
    assert torch.equal(getattr(kepo_kernels, function)(**call), expected)


def test_triton_without_a_gpu():
    """A back-end asked for by name is used or refused, never replaced."""
    reason = unavailable("triton")
    if reason is None:
        pytest.skip("triton runs here")
    assert re.escape("impl='triton'") in re.escape(refuse(GRPO, {"impl": "triton"}))


def test_a_missing_back_end_is_refused(monkeypatch):
    from kepo_kernels.rows import cpu_rows

    monkeypatch.setattr(cpu_rows, "unavailable", lambda: "the C++ library was not built")
    message = refuse(GRPO, {"impl": "cpu"})
    assert "impl='cpu' cannot be used here: the C++ library was not built" in message
    kepo_kernels.fused_grpo_loss(**FUNCTIONS[GRPO], impl="auto")  # falls back to torch


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"completion_mask": [[1, 1]]}, "completion_mask list"),
        ({"completion_mask": torch.ones(2, 2, 2)}, "completion_mask [2, 2, 2]"),
        ({"completion_mask": torch.full((3, 4), 0.3)}, "completion_mask holds 0.3"),
        ({"gate": torch.ones(1)}, "gate [1]"),  # would be broadcast
        ({"gate": torch.ones(3, 4)}, "gate [3, 4]"),
        ({"gate": torch.tensor([1.0, -1.0, 0.0])}, "gate holds -1.0 at [1]"),
        ({"reduction": "mean"}, "reduction='mean'"),
    ],
)
def test_loss_weights_refuses_by_name(wrong, says):
    good = {"completion_mask": PROBLEM.completion_mask, "gate": PROBLEM.gate}
    kepo_kernels.loss_weights(**good)
    with pytest.raises(KepoInputError, match=rf"^loss_weights: .*{re.escape(says)}"):
        kepo_kernels.loss_weights(**good | wrong)


def test_what_is_accepted():
    """Numbers and dtypes that a strict check might wrongly refuse."""
    call = FUNCTIONS[KEPO]
    expected = kepo_kernels.fused_kepo_loss(**call, beta=1.0, temperature=1.0)
    for other in (
        {"beta": 1, "temperature": 1},
        {"targets": PROBLEM.targets.int()},
        {"completion_mask": PROBLEM.completion_mask.float()},
        {"completion_mask": PROBLEM.completion_mask.to(torch.uint8)},
        {"gate": PROBLEM.gate.double()},
        {"gate": PROBLEM.gate.long()},
        {"advantages": PROBLEM.advantages.double()},
        {"lm_head": torch.nn.Parameter(PROBLEM.lm_head)},
        {"temperature": numpy.float64(1.0)},
        {"advantages": PROBLEM.advantages.double(), "gate": PROBLEM.gate.double()},
        {"entropy_coef": 2.5e-38, "distill_coef": 1.0},
        {"epsilon_high": 3.4e38, "old_logprobs": None},
    ):
        settings = call | {"beta": 1.0, "temperature": 1.0} | other
        assert torch.equal(kepo_kernels.fused_kepo_loss(**settings), expected), other
