"""The comparison of a call that nobody picked: the one tolerance rule, or what its dtype allows."""

import torch
from cases import full_teacher
from checks import OF_ROUNDING, RELATIVE_ERROR, SMALLEST_ORACLE
from loss_calls import Arguments, assert_right, each_tensor, fused, plain
from torch import Tensor

OF_ALLOWED = 4.0  # what another order of the same sums may make of an error


def well_conditioned(loss: str, call: Arguments, impl: str, frozen: tuple[str, ...] = ()) -> bool:
    """Raises AssertionError unless value and gradients are right; False if they cannot be told.

    The rule is that of checks.assert_close_to_oracle. Where a drawn call misses it, the loss may be
    the small difference of large terms, an element 0 by coincidence, a divergence of two columns
    nearly 0: a relative error is then the inputs' rounding many times over. What the arithmetic
    (fp64, or fp32 for the other dtypes) allows is what plain torch in fp32 misses, or what the
    oracle moves by when its inputs are nudged by one ulp:

        ||e|| <= OF_ALLOWED max(||e of eager fp32||, ||oracle nudged - oracle||) + the rule's bound
    """
    whole = full_teacher(call)
    try:
        assert_right(loss, call, impl, oracle_call=whole, frozen=frozen)
    except AssertionError:
        if not _as_good_as_allowed(loss, call, whole, impl, frozen):
            raise
        return False
    return True


def _as_good_as_allowed(
    loss: str, call: Arguments, whole: Arguments, impl: str, frozen: tuple[str, ...]
) -> bool:
    actual, oracle = fused(loss, call, impl, frozen), plain(loss, whole, frozen=frozen)
    arithmetic = torch.float64 if call["hidden"].dtype == torch.float64 else torch.float32
    others = [plain(loss, _nudged(whole, arithmetic), frozen=frozen) for _ in range(3)]
    if arithmetic == torch.float32:
        others.append(plain(loss, whole, arithmetic, frozen))

    def error(x: Tensor, name: str) -> float:
        return float((x.double().cpu() - oracle[name]).norm())

    for name, x in actual.items():
        bound = OF_ALLOWED * max(error(other[name], name) for other in others)
        size = float(oracle[name].norm())
        bound += RELATIVE_ERROR[arithmetic] * size
        if arithmetic == torch.float64 and size < SMALLEST_ORACLE:
            bound += RELATIVE_ERROR[arithmetic]  # the oracle has no more digits itself
        if x.dtype not in RELATIVE_ERROR:
            bound += OF_ROUNDING * error(oracle[name].to(x.dtype), name)
        if not error(x, name) <= bound:
            return False
    return True


def _nudged(call: Arguments, arithmetic: torch.dtype) -> Arguments:
    """Every number that logits are made of one ulp up or down, in fp64."""

    def nudge(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        up = torch.randint(2, x.shape).double() * 2.0 - 1.0
        return x.double() * (1.0 + up * torch.finfo(arithmetic).eps)

    sides = ("hidden", "lm_head", "bias")
    names = [*sides, *(f"teacher_{name}" for name in sides)]
    return call | {name: each_tensor(call[name], nudge) for name in names if name in call}
