"""Checks of arguments that every public function runs before any arithmetic.

Nothing here changes, broadcasts or clamps an input. Shapes, dtypes and devices are checked always.
Values (token ids, finiteness) are checked where looking at them costs no device synchronisation,
that is on CPU tensors, and only at tokens that take part.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NoReturn, TypedDict, cast

import torch
from torch import Tensor

from kepo_kernels.errors import KepoInputError
from kepo_kernels.heads import Head
from kepo_kernels.rows.dispatch import IMPLS

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("token_mean", "sequence_mean", "sum")
POLICY_LOSSES = ("clip", "cispo", "sapo", "reinforce")
IMPORTANCE_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")


class Engine(TypedDict, total=False):
    """The engine settings of a call, as `Validator.engine` returns them.

    `logits_dtype` is checked later, by `Validator.logits_dtype`, where the operands are known.
    """

    impl: str
    workspace_bytes: int | None
    chunk_rows: int | None
    logits_dtype: torch.dtype | None
    grad_tol: float
    return_stats: bool


ENGINE_SETTINGS = tuple(Engine.__annotations__)


def describe(x: object) -> str:
    """Describe a tensor as "[4096, 2048] bfloat16 on cuda:0", anything else by its type's name."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    if x.is_nested:  # torch does not tell its shape
        return "nested tensor"
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


class Validator:
    """Checks of one public function's arguments; its errors name that function."""

    def __init__(self, function: str):
        self.function = function
        self.dtype = torch.float64
        """The dtype in which numbers and per-token values are used; `head` sets it."""

    def refuse(self, message: str) -> NoReturn:
        raise KepoInputError(f"{self.function}: {message}")

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            self.refuse(message)

    def given_together(self, **given: object) -> bool:
        """Return whether these arguments are given; refuse them if only some are."""
        missing = [name for name, x in given.items() if x is None]
        there = [name for name in given if name not in missing]
        self.require(
            not there or not missing,
            f"{' and '.join(there)} came without {' and '.join(missing)}; "
            f"{' and '.join(given)} must be given together or not at all",
        )
        return not missing

    def unused(self, part: str, **given: object) -> None:
        """Refuse arguments of a part that the call does not have."""
        for name, x in given.items():
            self.require(
                x is None,
                f"{name} is given without {part} and would have no effect; pass {part}, or leave "
                f"{name} out",
            )

    def none_bad(self, name: str, x: Tensor, bad: Tensor, expected: str) -> None:
        """Refuse `x`, naming the first of its elements that is bad, if any is."""
        if bad.any():
            where = bad.nonzero()[0].tolist()
            self.refuse(f"{name} holds {x[tuple(where)].item()} at {where}; expected {expected}")

    def head(
        self, names: tuple[str, str, str], hidden: Tensor, head: Head, bias: Tensor | None
    ) -> None:
        """Check that hidden (..., H), the head's weight (V, H), its LoRA and bias (V,) fit."""
        hidden_name, head_name, bias_name = names
        lm_head = head.weight
        given = [(hidden_name, hidden), (head_name, lm_head)]
        given += [] if bias is None else [(bias_name, bias)]
        if head.lora is not None:
            given += [(f"{head_name}.lora.a", head.lora.a), (f"{head_name}.lora.b", head.lora.b)]
        for name, x in given:
            self.require(isinstance(x, Tensor), f"{name} is {describe(x)}; expected a tensor")
        for name, x in given:
            self.strided(name, x)
            self.whole(name, x)
            self.require(
                x.dtype in FLOATS,
                f"{name} {describe(x)}; expected one of "
                + ", ".join(str(d).removeprefix("torch.") for d in FLOATS),
            )
        self.require(
            hidden.dim() in (2, 3),
            f"{hidden_name} {describe(hidden)}; expected (B, T, H) or (N, H)",
        )
        self.require(
            lm_head.dim() == 2 and lm_head.numel() > 0,
            f"{head_name} {describe(lm_head)}; expected a non-empty weight (V, H)",
        )
        self.require(
            hidden.shape[-1] == lm_head.shape[1],
            f"{hidden_name} {describe(hidden)} and {head_name} {describe(lm_head)} disagree on the "
            f"hidden size ({hidden.shape[-1]} and {lm_head.shape[1]}); {head_name} must be "
            f"(V, {hidden.shape[-1]})",
        )
        self.require(
            bias is None or bias.shape == lm_head.shape[:1],
            f"{bias_name} {describe(bias)}; expected ({lm_head.shape[0]},), one value per row of "
            f"{head_name}",
        )
        for name, x in given[1:]:
            self.dtypes((hidden_name, hidden), (name, x))
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.number(f"{head_name}.logit_scale", head.logit_scale, lambda x: x > 0, "a number > 0")
        if head.softcap is not None:
            self.number(
                f"{head_name}.softcap", head.softcap, lambda x: x > 0, "None or a number > 0"
            )
        if head.lora is None:
            return
        a, b, scale = head.lora
        self.number(f"{head_name}.lora.scale", scale, lambda x: True, "a finite number")
        self.require(
            a.dim() == b.dim() == 2
            and a.shape[1] == lm_head.shape[1]
            and b.shape == (len(lm_head), len(a)),
            f"{head_name}.lora.a {describe(a)} and .b {describe(b)} do not fit {head_name} "
            f"{describe(lm_head)}; expected (r, {lm_head.shape[1]}) and ({len(lm_head)}, r)",
        )
        for name, x in given[-2:]:
            self.require(
                x.device == lm_head.device,
                f"{head_name} is on {lm_head.device} and {name} on {x.device}; move one",
            )

    def dtypes(self, first: tuple[str, Tensor], second: tuple[str, Tensor]) -> None:
        """Check that both tensors are fp64 or neither is; products of the other dtypes are formed
        in fp32."""
        (a_name, a), (b_name, b) = first, second
        self.require(
            a.dtype == b.dtype or torch.float64 not in (a.dtype, b.dtype),
            f"{a_name} {describe(a)} and {b_name} {describe(b)} differ in dtype; float64 goes with "
            "float64 alone: cast one of them",
        )

    def strided(self, name: str, x: object) -> None:
        """Refuse sparse, nested and mkldnn tensors, for which torch lacks most operations."""
        if not isinstance(x, Tensor):
            return
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.").strip("_")
        self.require(
            kind == "strided",
            f"{name} is a {kind} tensor; expected a strided one on the CPU or a CUDA device: call "
            + ("torch.nested.to_padded_tensor" if kind in ("nested", "jagged") else ".to_dense()"),
        )

    def whole(self, name: str, x: Tensor) -> None:
        """Refuse a shard of a parameter that is distributed over several devices."""
        self.require(
            type(x).__name__ != "DTensor",
            f"{name} is a sharded DTensor; expected a plain tensor: a head that fully_shard holds "
            "comes from `with kepo_kernels.lm_head_weight(model) as weight` (a bare full_tensor() "
            "would train it wrongly), states of this process's own tokens from to_local()",
        )
        self.require(
            not hasattr(x, "ds_id") or x.numel() > 0,
            f"{name} is a parameter that DeepSpeed ZeRO-3 has partitioned; run the loss and its "
            "backward inside deepspeed.zero.GatheredParameters([lm_head.weight]), where "
            "kepo_kernels.lm_head_weight(model) finds it whole",
        )

    def same_device(self, hidden: Tensor, **tensors: Tensor | None) -> None:
        self.require(
            hidden.device.type != "meta",
            f"hidden {describe(hidden)} has no values; expected tensors on the CPU or a CUDA "
            "device: move the model there with to_empty() and load its weights",
        )
        for name, x in tensors.items():
            if x is not None and x.device != hidden.device:
                self.refuse(f"hidden is on {hidden.device} and {name} on {x.device}; move one")

    def same_device_or_cpu(self, hidden: Tensor, **tensors: Tensor | None) -> None:
        """Check the device of tensors that decide which rows take part: with CUDA states they may
        also be on the CPU."""
        others = {
            name: x
            for name, x in tensors.items()
            if x is not None and not (hidden.is_cuda and x.device.type == "cpu")
        }
        self.same_device(hidden, **others)

    def lead(self, lead: torch.Size, **tensors: Tensor | None) -> None:
        """Check that each tensor has one value per token, or is None."""
        for name, x in tensors.items():
            self.strided(name, x)
            self.require(
                x is None or (isinstance(x, Tensor) and x.shape == lead and not x.is_complex()),
                f"{name} {describe(x)}; expected one value per token, shape {list(lead)} (hidden "
                "without its last dimension)",
            )

    def per_sequence_or_token(
        self, lead: torch.Size, columns: bool = False, **tensors: Tensor
    ) -> None:
        """Check that each tensor has one value per sequence or per token. With `columns`, one per
        sequence may also have shape (B, 1)."""
        shapes = [lead, lead[:1]] + [torch.Size((*lead[:1], 1))] * columns
        for name, x in tensors.items():
            self.strided(name, x)
            self.require(
                isinstance(x, Tensor) and x.shape in shapes and not x.is_complex(),
                f"{name} {describe(x)}; expected shape {list(lead[:1])} (per sequence) or "
                f"{list(lead)} (per token)",
            )

    def mask(self, completion_mask: Tensor | None, lead: torch.Size) -> None:
        self.lead(lead, completion_mask=completion_mask)
        if completion_mask is None:
            return
        self.require(
            not completion_mask.is_complex(),
            f"completion_mask {describe(completion_mask)}; expected bool or 0/1",
        )
        if on_cpu(completion_mask) and completion_mask.dtype != torch.bool:
            bad = (completion_mask != 0) & (completion_mask != 1)
            expected = "bool or 0/1; pass fractional token weights as `weights`"
            self.none_bad("completion_mask", completion_mask, bad, expected)

    def gate(self, gate: Tensor | None, lead: torch.Size) -> None:
        if gate is None:
            return
        self.strided("gate", gate)
        self.require(
            isinstance(gate, Tensor) and gate.shape == lead[:1] and not gate.is_complex(),
            f"gate {describe(gate)}; expected shape {list(lead[:1])}, one real value per sequence",
        )
        if on_cpu(gate) and gate.dtype != torch.bool:
            bad = ~((gate >= 0) & self._finite_in_use(gate))
            self.none_bad("gate", gate, bad, f"bool or finite values >= 0{self._in_use(gate)}")

    def targets(self, targets: Tensor, hidden: Tensor, active: Tensor, vocab: int) -> None:
        """Check that targets are token ids, in range wherever they are read."""
        self.require(
            isinstance(targets, Tensor), f"targets is {describe(targets)}; expected token ids"
        )
        self.lead(hidden.shape[:-1], targets=targets)
        self.same_device(hidden, targets=targets)
        self.require(
            targets.dtype in (torch.int64, torch.int32),
            f"targets {describe(targets)}; expected int64 or int32 token ids",
        )
        if on_cpu(targets):
            bad = active & ((targets < 0) | (targets >= vocab))
            expected = f"token ids in [0, {vocab}) wherever completion_mask and weights are not 0"
            self.none_bad("targets", targets, bad, expected)

    def finite(self, active: Tensor, **tensors: Tensor | None) -> None:
        """Refuse NaN and Inf at tokens that take part, also after conversion to `dtype`."""
        for name, x in tensors.items():
            if x is None or not on_cpu(x) or not x.is_floating_point():
                continue
            bad = active & ~self._finite_in_use(x)
            expected = f"finite values at tokens that take part{self._in_use(x)}"
            self.none_bad(name, x, bad, expected)

    def _finite_in_use(self, x: Tensor) -> Tensor:
        return torch.isfinite(x.to(self.dtype) if x.dtype == torch.float64 else x)

    def _in_use(self, x: Tensor) -> str:
        """Return what an error adds if values are used in another dtype than their own."""
        if x.dtype != torch.float64 or self.dtype == torch.float64:
            return ""
        return f", as float32, in which they are used (up to {torch.finfo(self.dtype).max:.2g})"

    def number(
        self, name: str, value: object, holds: Callable[[float], bool], expected: str
    ) -> float:
        """Return `value` as a Python float, whatever kind of number it is.

        Besides fulfilling `holds`, it must be 0, or such that it, its inverse and four times the
        inverse are representable in the dtype in which it is used.
        """
        number = plain(value)
        good = isinstance(number, Real) and not isinstance(number, bool)
        try:
            good = good and math.isfinite(number) and holds(number)
        except OverflowError:  # an int beyond all floats
            good = False
        self.require(good, f"{name}={value!r}; expected {expected}")
        number = float(number)
        most = torch.finfo(self.dtype).max
        least = 8.0 / most
        self.require(
            number == 0.0 or least <= abs(number) <= most,
            f"{name}={value!r}; expected {expected}, of a size that "
            f"{str(self.dtype).removeprefix('torch.')} holds, {least:.2g} to {most:.2g}",
        )
        return number

    def integer(self, name: str, value: object, least: int, expected: str) -> int:
        """Return `value` as a Python int, whatever kind of integer it is."""
        number = plain(value)
        good = isinstance(number, int) and not isinstance(number, bool) and number >= least
        self.require(good, f"{name}={value!r}; expected {expected}")
        return int(number)

    def flag(self, name: str, value: object) -> bool:
        """Return `value` as a Python bool; a number is refused."""
        value = plain(value)
        self.require(isinstance(value, bool), f"{name}={value!r}; expected True or False")
        return bool(value)

    def softmax(
        self, temperature: float, beta: float = 0.5, teacher_temperature: float | None = None
    ) -> float:
        """Check the softmax settings; return the teacher's temperature: its own or the
        student's."""
        temperature = self.number(
            "temperature", temperature, lambda x: x > 0, "a finite number > 0"
        )
        self.number("beta", beta, lambda x: 0 <= x <= 1, "a number in [0, 1]")
        if teacher_temperature is None:
            return temperature
        expected = "None or a finite number > 0"
        return self.number("teacher_temperature", teacher_temperature, lambda x: x > 0, expected)

    def choice(self, name: str, value: object, choices: tuple[str, ...], other: str = "") -> None:
        self.require(
            isinstance(value, str) and value in choices,
            f"{name}={value!r}; expected one of {', '.join(choices)} {other}".rstrip(),
        )

    def reduction(self, name: str, value: object) -> None:
        self.choice(name, value, REDUCTIONS)

    def engine(self, settings: dict[str, Any]) -> Engine:
        """Check the call's own dict of engine settings and return it; its numbers are replaced by
        Python's."""
        for name in settings:
            self.require(
                name in ENGINE_SETTINGS,
                f"unexpected argument {name!r}; engine settings are {', '.join(ENGINE_SETTINGS)}",
            )
        self.choice("impl", settings.get("impl", "auto"), ("auto", *IMPLS))
        for name in ("workspace_bytes", "chunk_rows"):
            if settings.get(name) is not None:
                expected = "a positive integer or None"
                settings[name] = self.integer(name, settings[name], 1, expected)
        if "grad_tol" in settings:
            settings["grad_tol"] = self.number(
                "grad_tol", settings["grad_tol"], lambda x: 0 <= x < 1, "a number in [0, 1)"
            )
        settings["return_stats"] = self.flag("return_stats", settings.get("return_stats", False))
        return cast(Engine, settings)  # its names and kinds are what was checked above

    def logits_dtype(self, wanted: torch.dtype | None, operands: torch.dtype) -> None:
        allowed = {torch.float64: (torch.float64,), torch.bfloat16: (torch.float32, torch.bfloat16)}
        accepted = allowed.get(operands, (torch.float32,))
        self.require(
            wanted is None or wanted in accepted,
            f"logits_dtype={wanted} with {operands} hidden and lm_head; expected None or "
            + " or ".join(map(str, accepted)),
        )


def plain(value: Any) -> Any:
    """Convert a numpy scalar, or a 0-d CPU tensor that requires no gradient, to a Python number.

    Anything else is returned as it is.
    """
    if isinstance(value, Tensor):
        readable = value.dim() == 0 and on_cpu(value) and not value.requires_grad
        return value.item() if readable else value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def on_cpu(x: Tensor) -> bool:
    """Return whether the values of `x` can be read without waiting for a device.

    Meta and fake tensors have no values: False.
    """
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)
