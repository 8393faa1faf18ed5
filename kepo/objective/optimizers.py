"""The optimisers: torch's AdamW, and bitsandbytes' with moments of 8 bits, on whole parameters or
on shares of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from kepo.sections import OptimizerConfig

MOMENTS = (1, 2)
"""Numbers of the moments in the names of bitsandbytes: state1 is the mean of the gradients, state2
that of their squares."""
BLOCK = 256
"""How many numbers of a moment share a scale."""


def optimizer_of(parameters: Iterable[Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimiser that ``config`` names, for these parameters."""
    settings: dict[str, Any] = dict(lr=config.lr, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    return AdamW8bit(parameters, **settings)


class Moment(NamedTuple):
    """One moment of one parameter, or some of its rows."""

    values: Tensor
    """Numbers in float32, or codes in uint8."""
    scales: Tensor | None
    """(blocks,) fp32, the largest magnitude of each block of codes; None where there are none."""


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments are kept in 8 bits, with a scale for every block of 256 numbers
    (Dettmers et al. 2022), by bitsandbytes.

    bitsandbytes knows nothing of sharded parameters, so it is given this rank's own rows as
    parameters of their own, over the same memory. It keeps the moments of fewer than 4,096 numbers
    in float32.
    """

    def __init__(self, parameters: Iterable[Parameter], lr: float, weight_decay: float):
        from bitsandbytes import optim

        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay))
        [group] = self.param_groups
        self._own = {p: Parameter(local(p.detach())) for p in group["params"]}
        updated = [own for own in self._own.values() if own.numel()]
        self._places = {own: place for place, own in enumerate(updated)}
        self._inner = optim.AdamW8bit(updated, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody has a closure
        [group], [inner] = self.param_groups, self._inner.param_groups
        inner["lr"] = group["lr"]
        for parameter, own in self._own.items():
            own.grad = None if parameter.grad is None else local(parameter.grad)
        self._inner.step()
        for own in self._own.values():
            own.grad = None

    def saved(self, parameter: Parameter) -> dict[str, Tensor]:
        """Return what is to be saved of this rank's rows of a parameter, by field; nothing before
        the first step, and no rows where the rank has none."""
        own = self._own[parameter]
        if not self._inner.state:
            return {}
        if not own.numel():
            return {f"state{n}": own.detach().float() for n in MOMENTS}
        state = self._inner.state[own]
        fields = [f"{kind}{n}" for kind in ("state", "absmax") for n in MOMENTS]
        found = {field: state[field] for field in fields if field in state}
        return found | {"step": torch.tensor(float(state["step"]))}

    def put_back(self, parameter: Parameter, step: int, moments: Sequence[Moment]) -> None:
        """Continue from the saved moments of this rank's rows of a parameter: as they were saved,
        or in float32, which are rounded to 8 bits where bitsandbytes keeps 8."""
        own = self._own[parameter]
        if not own.numel():
            return
        [group] = self._inner.param_groups
        self._inner.init_state(group, own, 0, self._places[own])
        state = self._inner.state[own]
        state["step"] = step
        for number, moment in zip(MOMENTS, moments, strict=True):
            held = state[f"state{number}"]
            if held.dtype == torch.uint8 and moment.scales is None:
                moment = quantised(moment.values, state[f"qmap{number}"])
            held.copy_(moment.values)
            if moment.scales is not None:
                state[f"absmax{number}"].copy_(moment.scales)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor, over the same memory; all of them if it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def quantised(values: Tensor, code: Tensor) -> Moment:
    """Return numbers in 8 bits. code: (256,) fp32, what each code stands for, as a share of its
    block's scale."""
    from bitsandbytes import functional

    codes, state = functional.quantize_blockwise(values.to(code.device), code, blocksize=BLOCK)
    return Moment(codes, state.absmax)


def widened(moment: Moment, number: int) -> Tensor:
    """Return a saved moment in float32. number: 1 for the first moment, 2 for the second, which
    has no sign."""
    if moment.scales is None:
        return moment.values
    from bitsandbytes import functional

    code = functional.create_dynamic_map(signed=number == 1)
    return functional.dequantize_blockwise(
        moment.values, absmax=moment.scales, code=code, blocksize=BLOCK
    )
