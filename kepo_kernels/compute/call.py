"""Steps common to all public functions: what they do with their arguments before and after their
own few lines."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kepo_kernels.compute.autograd import TokenLoss, TokenStats, fused_loss, loss_and_gradients
from kepo_kernels.compute.devices import moved
from kepo_kernels.compute.problem import Request, build_problem
from kepo_kernels.compute.sweep import LinearProblem, Student
from kepo_kernels.heads import Head, LoRA
from kepo_kernels.rows.top_k_rows import TopK
from kepo_kernels.teachers import StatesTeacher, Teacher, TopKTeacher, refuse_beside_top_k
from kepo_kernels.validate import Engine, Validator
from kepo_kernels.weights import loss_weights

Result = Tensor | tuple[Tensor, TokenStats]

AUTOCASTING = ("cpu", "cuda")


@dataclass(frozen=True, eq=False)
class Call:
    """The student's side of a call, checked, and cast as autocast asks."""

    check: Validator
    hidden: Tensor
    head: Head
    bias: Tensor | None
    completion_mask: Tensor | None
    found_on: torch.device
    """Device on which the rows that take part are determined. It is the CPU, where that waits for
    no GPU, if everything that decides it is on the CPU or None; else the states' device."""
    engine: Engine
    needs: tuple[bool, ...] | None
    """The student's gradients to return with the loss, for `kepo_kernels.compute.compiled`. None
    means that the loss is differentiable instead."""

    @property
    def lead(self) -> torch.Size:
        return self.hidden.shape[:-1]

    def teacher(
        self,
        hidden: Tensor | TopK,
        lm_head: Tensor | Head | None,
        bias: Tensor | None,
        opened: Tensor | None,
        temperature: float,
        teacher_temperature: float | None,
    ) -> Teacher:
        """Return the checked teacher.

        `temperature` is that of its logits: `teacher_temperature`, or the student's if that is
        None.
        """
        if isinstance(hidden, TopK):
            refuse_beside_top_k(
                self.check,
                teacher_lm_head=lm_head,
                teacher_bias=bias,
                teacher_temperature=teacher_temperature,
            )
            listed = TopKTeacher(opened, hidden)
            listed.check(self.check, self.hidden)
            return listed
        assert lm_head is not None, "states come with a head"
        bias = merged_bias(self.check, "teacher_", Head.of(lm_head), bias)
        hidden, head, bias = autocast(hidden, Head.of(lm_head), bias, self.hidden.device)
        teacher = StatesTeacher(opened, hidden, head, bias, temperature)
        teacher.check(self.check, self.hidden)
        return teacher

    def weights(
        self, gate: Tensor | None, weights: Tensor | None, reduction: str, prefix: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Return one fp64 weight per token, on the states' device: the reduction of mask and gate,
        or `weights` times both. Also return where it is not 0, on the device where rows are
        found.

        `prefix` is the prefix of weights and reduction in the caller's signature.
        """
        name = f"{prefix}weights"
        self.check.reduction(f"{prefix}reduction", reduction)
        self.check.lead(self.lead, **{name: weights})
        self.check.same_device_or_cpu(self.hidden, **{name: weights})
        mask, here = self.completion_mask, self.found_on
        mask = torch.ones(self.lead, dtype=torch.bool, device=here) if mask is None else mask
        mask = moved(mask.detach(), here)
        gate, weights = (None if x is None else moved(x.detach(), here) for x in (gate, weights))
        if weights is None:
            weights = loss_weights(mask, gate, reduction)
        else:
            present = loss_weights(mask, gate, "sum")
            weights = torch.where(present != 0, weights.to(torch.float64) * present, 0)
            self.check.finite(weights != 0, **{name: weights})
        return moved(weights, self.hidden.device), weights != 0

    def problem(
        self,
        targets: Tensor | None,
        active: Tensor,
        *,
        teacher: Teacher | None = None,
        distilled: Tensor | None = None,
        beta: float = 0.5,
        temperature: float = 1.0,
    ) -> tuple[Student, LinearProblem]:
        """Build the chunk loop's problem for these tokens; see `Request`."""
        side = self.check, self.hidden, self.head, self.bias, self.engine
        return build_problem(Request(*side, targets, active, teacher, distilled, beta, temperature))

    def run(self, student: Student, problem: LinearProblem, token_loss: TokenLoss) -> Result:
        """Return the loss, and the numbers of every token if `return_stats` asks for them."""
        if self.needs is not None:
            formed = loss_and_gradients(student, problem, token_loss, self.needs)
            return formed  # type: ignore[return-value]  # to the operator alone, no user's call
        loss, stats = fused_loss(student, problem, token_loss)
        if not self.engine.get("return_stats"):
            return loss
        logprobs, divergence, entropy = (x.reshape(self.lead) for x in stats[:3])
        return loss, TokenStats(logprobs, divergence, entropy, stats.dropped_gradient)


def begin(
    function: str,
    hidden: Tensor,
    lm_head: Tensor | Head,
    bias: Tensor | None,
    completion_mask: Tensor | None,
    engine: dict[str, Any],
    *deciding: Tensor | None,
) -> Call:
    """Run the checks common to all calls; `deciding` are gate and weights, which decide the rows
    that take part."""
    check = Validator(function)
    needs = engine.pop("_needs", None)
    settings = check.engine(engine)
    bias = merged_bias(check, "", Head.of(lm_head), bias)
    refuse_transforms(check, hidden, Head.of(lm_head), bias)
    hidden, head, bias = autocast(hidden, Head.of(lm_head), bias)
    check.head(("hidden", "lm_head", "bias"), hidden, head, bias)
    check.mask(completion_mask, hidden.shape[:-1])
    check.same_device(hidden, lm_head=head.weight, bias=bias)
    check.same_device_or_cpu(hidden, completion_mask=completion_mask)
    given = [x.device for x in (completion_mask, *deciding) if isinstance(x, Tensor)]
    cpu = torch.device("cpu")
    found_on = cpu if hidden.is_cuda and all(x == cpu for x in given) else hidden.device
    return Call(check, hidden, head, bias, completion_mask, found_on, settings, needs)


def merged_bias(check: Validator, prefix: str, head: Head, bias: Tensor | None) -> Tensor | None:
    """Return the bias of a head, which is its own or an argument of the call; refuse both."""
    check.require(
        bias is None or head.bias is None,
        f"{prefix}bias is given beside {prefix}lm_head.bias; expected one of them: a Head with a "
        f"bias needs no {prefix}bias",
    )
    return head.bias if bias is None else bias


def refuse_transforms(check: Validator, hidden: Tensor, head: Head, bias: Tensor | None) -> None:
    """Refuse transforms that need more than one backward pass: gradients are formed in forward."""
    instead = "kepo_kernels.reference has the same losses in plain PyTorch, where it works"
    check.require(
        not torch._C._are_functorch_transforms_active(),
        "called under a transform of torch.func (grad, vjp, jvp, vmap, jacrev, hessian), which the "
        "fused losses do not take; call the loss outside of it and torch.autograd.grad(loss, "
        f"inputs) on the result, with torch.func.functional_call for parameters; {instead}",
    )
    lora = () if head.lora is None else head.lora[:2]
    tangents = [
        name
        for name, x in zip(Student._fields, (hidden, head.weight, bias, *lora), strict=False)
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None
    ]
    check.require(
        not tangents,
        f"{', '.join(tangents)} carries a tangent of forward-mode AD, which the fused losses do "
        f"not propagate; use backward(), or torch.autograd.grad; {instead}",
    )


def at(weights: Tensor, rows: Tensor) -> Tensor:
    """Return the weights of these rows of the flattened lead dimensions."""
    return weights.reshape(-1)[rows]


def autocast(
    hidden: Tensor, head: Head, bias: Tensor | None, on: torch.device | None = None
) -> tuple[Tensor, Head, Tensor | None]:
    """Cast states and weights as autocast would for a linear layer; nothing else is cast.

    As with a linear layer, fp64 stays fp64. `on` is where they are multiplied, if that is not where
    the states are.
    """
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    device = device if on is None else on.type
    # A device without autocast, as meta, would raise. torch.amp knows which have it, but not under
    # torch.compile before torch 2.13.
    if device not in AUTOCASTING or not torch.is_autocast_enabled(device):
        return hidden, head, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:  # or anything else, which is refused later
        floating = isinstance(x, Tensor) and x.is_floating_point() and x.layout is torch.strided
        return x.to(dtype) if floating and x.dtype != torch.float64 else x

    lora = head.lora
    if lora is not None:
        lora = LoRA(cast(lora.a), cast(lora.b), lora.scale)
    # Written out: torch.compile traces neither dataclasses.replace nor *map(...) in every version.
    head = Head(cast(head.weight), head.softcap, head.logit_scale, lora)
    return cast(hidden), head, None if bias is None else cast(bias)
