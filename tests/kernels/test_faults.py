"""Can the tests of the losses fail? Planted mistakes, and the comparisons that must notice."""

from collections.abc import Callable

import pytest
import torch
from checks import make_problem
from loss_calls import LOSSES, arguments, assert_right
from torch import Tensor

from kepo_kernels import linear, losses, torch_rows


def scaled_gradient(factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    good = torch_rows.row_backward_

    def bad(logits: Tensor, *rest: object) -> None:
        good(logits, *rest)
        logits.mul_(factor)

    return lambda patch: patch.setattr(torch_rows, "row_backward_", bad)


def dropped_row(patch: pytest.MonkeyPatch) -> None:
    good = losses.active_tokens

    def bad(lead: torch.Size, *weights: Tensor) -> Tensor:
        active = good(lead, *weights)
        active.view(-1)[active.flatten().nonzero()[-1]] = False
        return active

    patch.setattr(losses, "active_tokens", bad)


def ignored_gate(patch: pytest.MonkeyPatch) -> None:
    good = linear.loss_weights
    patch.setattr(linear, "loss_weights", lambda mask, gate, reduction: good(mask, None, reduction))


def divided_by_all_tokens(patch: pytest.MonkeyPatch) -> None:
    good = linear.loss_weights
    patch.setattr(
        linear,
        "loss_weights",
        lambda mask, gate, reduction: (
            good(mask, gate, "sum") / mask.numel()
            if reduction == "token_mean"
            else good(mask, gate, reduction)
        ),
    )


def other_setting(**wrong: float) -> Callable[[pytest.MonkeyPatch], None]:
    good = losses.build_problem
    return lambda patch: patch.setattr(
        losses, "build_problem", lambda *args, **settings: good(*args, **settings | wrong)
    )


FAULTS = {
    "zero gradient": scaled_gradient(0.0),
    "sign flip": scaled_gradient(-1.0),
    "gradient times 1.05": scaled_gradient(1.05),
    "one gated row dropped": dropped_row,
    "gate ignored": ignored_gate,
    "divided by all tokens": divided_by_all_tokens,
    "forward instead of reverse KL": other_setting(beta=0.0),
    "temperature 1.1": other_setting(temperature=1.1),
}
OF_THE_TEACHER = ("gate ignored", "divided by all tokens", "forward instead of reverse KL")


def judge(loss: str, dtype: torch.dtype) -> None:
    """The comparisons of this file, as they are made above."""
    problem = make_problem(dtype=dtype, hidden=32, vocab=67, std=6.0)
    options = "completion_mask old_logprobs" if loss == "grpo" else "gate completion_mask"
    settings = {} if loss == "grpo" else {"beta": 1.0}
    if dtype == torch.bfloat16:
        settings["logits_dtype"] = torch.float32
    call = arguments(loss, problem, options, **settings)
    assert_right(loss, call, "torch", against_eager=dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_fault_is_not_caught(loss, dtype):
    judge(loss, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("loss", "fault"),
    [
        (loss, fault)
        for loss in LOSSES
        for fault in FAULTS
        if loss != "grpo" or fault not in OF_THE_TEACHER
    ],
)
def test_planted_faults_are_caught(loss, fault, dtype, monkeypatch):
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        judge(loss, dtype)
