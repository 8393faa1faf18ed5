"""`torch.compile`: inside a compiled region each loss is one opaque operator, and breaks no graph.

The chunk loop depends on data (masks, gates, what carries gradient), which a graph cannot hold.
The operator runs it eagerly when the graph runs, and returns the gradients beside the loss; its
backward only scales them, as in eager mode. Outside compiled regions nothing here is used.
"""

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, wraps

import torch
from torch import Tensor

from kepo_kernels import gemm
from kepo_kernels.call import autocast
from kepo_kernels.engine import TokenStats
from kepo_kernels.heads import Head, LoRA

LOSSES: dict[str, Callable] = {}
HEADS = {"lm_head": "bias", "teacher_lm_head": "teacher_bias"}
STUDENT = ("hidden", "lm_head", "bias", "lm_head.lora_a", "lm_head.lora_b")


def one_operator(function: Callable) -> Callable:
    """Makes a loss an operator under torch.compile.

    A loss of the caller's own in Python (`policy_loss` as a callable) cannot be one: the graph then
    breaks around the call.
    """
    names = tuple(inspect.signature(function).parameters)
    LOSSES[function.__name__] = function
    broken = breaks_graph(f"{function.__name__} with a Python callable")(function)

    @wraps(function)
    def loss(*args, **kwargs):
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if callable(arguments.get("policy_loss")):
            return broken(**arguments)
        return _call_operator(function.__name__, arguments)

    return loss


def breaks_graph(what: str) -> Callable[[Callable], Callable]:
    """Makes a function run outside of the graph, once and with a reason, under torch.compile.

    `torch.compiler.disable` does that, but as a decorator it would import the whole compiler, and
    Triton, with this package. So it is applied when a compiler first asks.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=f"{what} runs outside of the graph")
                return _disabled(function)(*args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate


def _call_operator(name: str, arguments: dict[str, object]):
    """Flattens the arguments to what an operator's schema can hold."""
    tensors, settings = {}, []
    for head_name, bias_name in HEADS.items():
        if head_name not in arguments:
            continue
        states = "hidden" if head_name == "lm_head" else "teacher_hidden"
        head = Head.of(arguments.pop(head_name))
        cast = autocast(arguments.pop(states), head, arguments.pop(bias_name, None))
        tensors[states], head, bias = cast
        tensors[head_name] = head.weight
        if bias is not None:
            tensors[bias_name] = bias
        if head.lora is not None:
            tensors[f"{head_name}.lora_a"], tensors[f"{head_name}.lora_b"] = head.lora[:2]
            settings.append(f"'{head_name}.lora_scale': {head.lora.scale!r}")
        settings.append(f"'{head_name}.softcap': {head.softcap!r}")
        settings.append(f"'{head_name}.logit_scale': {head.logit_scale!r}")
    return_stats = arguments.pop("return_stats", False)
    for key, value in arguments.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, torch.dtype):
            settings.append(f"'{key}': '{value}'")
        elif value is not None:
            settings.append(f"'{key}': {value!r}")
    student = [tensors.pop(key, None) for key in STUDENT]
    settings.append(f"'return_stats': {return_stats!r}")
    settings.append("'tensors': '" + " ".join(tensors) + "'")
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student]
    total, numbers, share, *_ = torch.ops.kepo_kernels.fused_loss(
        name, "{" + ", ".join(settings) + "}", *student, list(tensors.values()), needs
    )
    if not return_stats:
        return total
    dropped = share if arguments.get("grad_tol", 0.0) > 0.0 else None
    shaped = numbers.detach().reshape(3, *student[0].shape[:-1])
    return total, TokenStats(shaped[0], shaped[1], shaped[2], dropped)


@cache
def _disabled(function: Callable) -> Callable:
    return torch.compiler.disable(function)


Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# It reads masks on the device, so it cannot be captured: with this tag mode="reduce-overhead" leaves
# it out of its CUDA graphs, in versions of torch that have the tag.
UNCAPTURED = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


@torch.library.custom_op("kepo_kernels::fused_loss", mutates_args=(), tags=UNCAPTURED)
def _operator(
    function: str,
    settings: str,
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    others: Sequence[Tensor],
    needs: Sequence[bool],
) -> Parts:
    """(loss, numbers (3, N), share of gradient dropped, the five gradients, empty if not needed)"""
    with ExitStack() as inside:
        # Operators run below autograd; a loss differentiates vectors of its own.
        for key in ("AutogradFunctionality", "ADInplaceOrView"):
            key = getattr(torch._C.DispatchKey, key)
            inside.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        inside.enter_context(torch.autocast(hidden.device.type, enabled=False))
        given = zip(STUDENT, (hidden, lm_head, bias, lora_a, lora_b), strict=True)
        student = {name: x.detach() for name, x in given if x is not None}
        arguments = _arguments(ast.literal_eval(settings), student, others)
        formed = LOSSES[function](**arguments, _needs=tuple(needs))
    gradients = [hidden.new_empty(0) if x is None else x for x in formed.gradients]
    gradients[0] = gradients[0].flatten(0, -2) if needs[0] else gradients[0]
    return formed.total, formed.numbers, formed.dropped, *gradients


def _arguments(
    settings: dict[str, object], student: dict[str, Tensor], others: Sequence[Tensor]
) -> dict[str, object]:
    """The keyword arguments that `_call_operator` flattened."""
    names = settings.pop("tensors").split()
    arguments = settings | student | dict(zip(names, others, strict=True))
    for name in HEADS:
        if name not in arguments:
            continue
        softcap, scale = arguments.pop(f"{name}.softcap"), arguments.pop(f"{name}.logit_scale")
        lora = None
        if f"{name}.lora_a" in arguments:
            parts = ("lora_a", "lora_b", "lora_scale")
            lora = LoRA(*(arguments.pop(f"{name}.{part}") for part in parts))
        arguments[name] = Head(arguments[name], softcap, scale, lora)
    if "logits_dtype" in arguments:
        arguments["logits_dtype"] = getattr(torch, arguments["logits_dtype"].split(".")[1])
    return arguments


@_operator.register_fake
def _(function, settings, hidden, lm_head, bias, lora_a, lora_b, others, needs) -> Parts:
    wide = gemm.gradient_dtype(hidden.dtype)  # of losses and numbers, too
    student = (hidden, lm_head, bias, lora_a, lora_b)
    gradients = [
        torch.empty_like(x, dtype=wide, memory_format=torch.contiguous_format)
        if need
        else hidden.new_empty(0)
        for x, need in zip(student, needs, strict=True)
    ]
    gradients[0] = gradients[0].flatten(0, -2) if needs[0] else gradients[0]
    rows = math.prod(hidden.shape[:-1])  # Size.numel() would fix a dynamic length
    numbers = hidden.new_empty(3, rows, dtype=wide)
    share = hidden.new_empty((), dtype=wide)
    return hidden.new_empty((), dtype=wide), numbers, share, *gradients


def _save(ctx, inputs, output) -> None:
    _, _, hidden, lm_head, bias, lora_a, lora_b, others, needs = inputs
    ctx.others = len(others)
    student = (hidden, lm_head, bias, lora_a, lora_b)
    ctx.needs = list(needs)
    ctx.like = [None if x is None else (x.shape, x.dtype) for x in student]
    ctx.save_for_backward(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_total, *_):
    gradients = [
        (x * grad_total.to(x.dtype)).to(like[1]).reshape(like[0]) if need else None
        for x, like, need in zip(ctx.saved_tensors, ctx.like, ctx.needs, strict=True)
    ]
    return None, None, *gradients, [None] * ctx.others, None


_operator.register_autograd(_backward, setup_context=_save)
