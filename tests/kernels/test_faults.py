"""Can the tests of the losses fail? Thirteen planted faults, and the rule that must notice each.

They are the mistakes that fused losses have been seen to make. Each is planted in the real call and
judged as the other tests judge, against the fp64 oracle in fp32 and bf16.
"""

import re
from collections.abc import Callable

import pytest
import torch
from checks import make_problem
from loss_calls import LOSSES, arguments, assert_right
from torch import Tensor

from kepo_kernels.compute import call, gemm, problem
from kepo_kernels.rows import torch_rows

Plant = Callable[[pytest.MonkeyPatch], None]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def scaled_gradient(factor: float) -> Plant:
    good = torch_rows.row_backward_

    def bad(logits: Tensor, *rest: object) -> None:
        good(logits, *rest)
        logits.mul_(factor)

    return lambda patch: patch.setattr(torch_rows, "row_backward_", bad)


def dropped_rows(count: int) -> Plant:
    """The last of those that take part."""
    good = call.Call.weights

    def bad(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        weights, active = good(*args, **kwargs)
        active.view(-1)[active.flatten().nonzero()[-count:]] = False
        return weights, active

    return lambda patch: patch.setattr(call.Call, "weights", bad)


def phantom_columns(patch: pytest.MonkeyPatch, count: int = 7) -> None:
    """Logits of 0 beyond the vocabulary, as a block of columns that is not masked reads them."""
    forward, backward = torch_rows.row_forward, torch_rows.row_backward_

    def wider(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat((x, x.new_zeros(len(x), count)), -1)

    def bad_forward(logits: Tensor, targets: Tensor, teacher: Tensor, *rest: object) -> Tensor:
        return forward(wider(logits), targets, wider(teacher), *rest)

    def bad_backward(logits: Tensor, targets: Tensor, teacher: Tensor, *rest: object) -> None:
        wide = wider(logits)
        backward(wide, targets, wider(teacher), *rest)
        logits.copy_(wide[:, :-count])

    patch.setattr(torch_rows, "row_forward", bad_forward)
    patch.setattr(torch_rows, "row_backward_", bad_backward)


def other_settings(**wrong: float) -> Plant:
    good = problem.RowSettings
    return lambda patch: patch.setattr(
        problem, "RowSettings", lambda **settings: good(**settings | wrong)
    )


def other_weights(bad: Callable[..., Tensor]) -> Plant:
    good = call.loss_weights
    return lambda patch: patch.setattr(call, "loss_weights", lambda *given: bad(good, *given))


def gate_ignored(good: Callable, mask: Tensor, gate: Tensor | None, reduction: str) -> Tensor:
    return good(mask, None, reduction)


def divided_by_all(good: Callable, mask: Tensor, gate: Tensor | None, reduction: str) -> Tensor:
    if gate is None or reduction != "token_mean":
        return good(mask, gate, reduction)
    return good(mask, gate, "sum") / mask.numel()


def unwritten_tail(patch: pytest.MonkeyPatch) -> None:
    """The rows of dW behind the last whole block of 32."""
    good = gemm.accumulate_head_

    def bad(dw: Tensor, *rest: object) -> None:
        good(dw, *rest)
        dw[len(dw) // 32 * 32 :] = 0.0

    patch.setattr(gemm, "accumulate_head_", bad)


def through_fp8(patch: pytest.MonkeyPatch) -> None:
    """Scaled to the range of fp8, as it would be done on purpose."""
    good = gemm.hidden_gradient

    def bad(*given: object) -> Tensor:
        x = good(*given)
        scale = 448.0 / x.abs().max()
        return (x * scale).to(torch.float8_e4m3fn).to(x.dtype) / scale

    patch.setattr(gemm, "hidden_gradient", bad)


FAULTS = {
    "zero grads": scaled_gradient(0.0),
    "sign flip": scaled_gradient(-1.0),
    "one gated row dropped": dropped_rows(1),
    "last 16 rows dropped": dropped_rows(16),
    "7 phantom columns": phantom_columns,
    "forward instead of reverse KL": other_settings(beta=0.0),
    "gate ignored": other_weights(gate_ignored),
    "divided by N not by gate count": other_weights(divided_by_all),
    "T=1.1": other_settings(temperature=1.1, teacher_temperature=1.1),
    "vocab tail of dW unwritten": unwritten_tail,
    "grads x2": scaled_gradient(2.0),
    "grads x1.05": scaled_gradient(1.05),
    "dH through fp8": through_fp8,
}
OF_THE_TEACHER = (
    "forward instead of reverse KL",
    "gate ignored",
    "divided by N not by gate count",
)


def judge(loss: str, dtype: torch.dtype) -> None:
    """The comparison that the tests of the losses make, of rows as peaked as a trained model's."""
    x = make_problem(batch=5, length=11, dtype=dtype, hidden=32, vocab=67, std=6.0)
    options = "completion_mask old_logprobs" if loss == "grpo" else "gate completion_mask"
    settings = {} if loss == "grpo" else {"beta": 1.0}
    if dtype == torch.bfloat16:
        settings["logits_dtype"] = torch.float32
    given = arguments(loss, x, options, **settings)
    assert_right(loss, given, "torch", against_eager=dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_fault_is_not_caught(loss, dtype):
    judge(loss, DTYPES[dtype])


def verdict(fault: str, loss: str, dtype: str) -> str:
    if loss == "grpo" and fault in OF_THE_TEACHER:
        return "-"
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        try:
            judge(loss, DTYPES[dtype])
        except AssertionError as error:
            if not re.search("exceeds|is exactly", str(error)):
                raise  # not the comparison's
            return "caught"
    return "MISSED"


def test_planted_faults_are_caught():
    """Every fault, by the rule of either dtype, in every loss that it concerns."""
    rules = [(loss, dtype) for loss in LOSSES for dtype in DTYPES]
    found = {fault: [verdict(fault, *rule) for rule in rules] for fault in FAULTS}
    head = f"{'planted fault':32}" + "".join(f"{' '.join(rule):>15}" for rule in rules)
    lines = [f"{fault:32}" + "".join(f"{v:>15}" for v in row) for fault, row in found.items()]
    table = "\n".join(["", head, *lines])
    print(table)
    assert len(found) == 13
    assert not any("MISSED" in row for row in found.values()), table
