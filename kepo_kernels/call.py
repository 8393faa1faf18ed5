"""What every public function does with its arguments before and after its own few lines."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kepo_kernels.engine import TokenLoss, TokenStats, fused_loss, loss_and_gradients
from kepo_kernels.heads import Head, LoRA
from kepo_kernels.problem import Teacher
from kepo_kernels.sweep import LinearProblem, Student
from kepo_kernels.validate import Validator
from kepo_kernels.weights import loss_weights

Result = Tensor | tuple[Tensor, TokenStats]


@dataclass(frozen=True, eq=False)
class Call:
    """The student's side of a call, checked; under autocast in the dtype that it asks for."""

    check: Validator
    hidden: Tensor
    head: Head
    bias: Tensor | None
    completion_mask: Tensor | None
    engine: dict[str, object]
    needs: tuple[bool, ...] | None
    """None, or what `kepo_kernels.compiled` wants in place of a differentiable loss: which of the
    student's gradients are to be returned with it."""

    @property
    def lead(self) -> torch.Size:
        return self.hidden.shape[:-1]

    def teacher(
        self,
        hidden: Tensor,
        lm_head: Tensor | Head,
        bias: Tensor | None,
        gate: Tensor | None,
        temperature: float,
    ) -> Teacher:
        hidden, head, bias = autocast(hidden, Head.of(lm_head), bias)
        teacher = Teacher(hidden, head, bias, gate, temperature)
        teacher.check(self.check, self.hidden)
        return teacher

    def weights(self, gate: Tensor | None, **given: Tensor | str | None) -> Tensor:
        """One fp64 weight per token: `..reduction` of mask and gate, or `..weights` times both."""
        (weights_name, weights), (reduction_name, reduction) = given.items()
        self.check.reduction(reduction_name, reduction)
        self.check.lead(self.lead, **{weights_name: weights})
        self.check.same_device(self.hidden, **{weights_name: weights})
        mask = self.completion_mask
        if mask is None:
            mask = torch.ones(self.lead, dtype=torch.bool, device=self.hidden.device)
        gate = None if gate is None else gate.to(mask.device)
        if weights is None:
            return loss_weights(mask, gate, reduction)
        present = loss_weights(mask, gate, "sum")
        weights = torch.where(present != 0, weights.detach().to(torch.float64) * present, 0)
        self.check.finite(weights != 0, **{weights_name: weights})
        return weights

    def run(self, student: Student, problem: LinearProblem, token_loss: TokenLoss) -> Result:
        """The loss, and the numbers of every token if `return_stats` asks for them."""
        if self.needs is not None:
            return loss_and_gradients(student, problem, token_loss, self.needs)
        loss, stats = fused_loss(student, problem, token_loss)
        if not self.engine.get("return_stats"):
            return loss
        shaped = (x.reshape(self.lead) for x in stats[:3])
        return loss, TokenStats(*shaped, stats.dropped_gradient)


def begin(
    function: str,
    hidden: Tensor,
    lm_head: Tensor | Head,
    bias: Tensor | None,
    completion_mask: Tensor | None,
    engine: dict[str, object],
) -> Call:
    """Check what every call has."""
    check = Validator(function)
    needs = engine.pop("_needs", None)
    check.engine(engine)
    hidden, head, bias = autocast(hidden, Head.of(lm_head), bias)
    check.head(("hidden", "lm_head", "bias"), hidden, head, bias)
    check.mask(completion_mask, hidden.shape[:-1])
    check.same_device(hidden, lm_head=head.weight, bias=bias, completion_mask=completion_mask)
    return Call(check, hidden, head, bias, completion_mask, engine, needs)


def at(weights: Tensor, rows: Tensor) -> Tensor:
    """The weights of these rows of the flattened lead dimensions."""
    return weights.reshape(-1)[rows]


def autocast(hidden: Tensor, head: Head, bias: Tensor | None) -> tuple[Tensor, Head, Tensor | None]:
    """States and weights as autocast would hand them to a linear layer; nothing else is cast.

    Like there, fp64 stays as it is.
    """
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden, head, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(x: object) -> object:
        floating = isinstance(x, Tensor) and x.is_floating_point()
        return x.to(dtype) if floating and x.dtype != torch.float64 else x

    lora = None if head.lora is None else LoRA(*map(cast, head.lora[:2]), head.lora.scale)
    return cast(hidden), replace(head, weight=cast(head.weight), lora=lora), cast(bias)
