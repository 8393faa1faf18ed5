"""Support for `torch.compile`: there each loss is one opaque operator and breaks no graph.

The chunk loop depends on data (masks, gates, what carries gradient), which a graph cannot hold.
The operator runs it eagerly when the graph runs, and returns the gradients beside the loss; its
backward only scales them, as in eager mode. Outside compiled regions nothing here is used.
"""

import ast
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kepo_kernels.compute import gemm
from kepo_kernels.compute.autograd import TokenStats, differentiable_once
from kepo_kernels.compute.call import autocast
from kepo_kernels.compute.graph_breaks import breaks_graph
from kepo_kernels.heads import Head, LoRA
from kepo_kernels.rows.top_k_rows import TopK

LOSSES: dict[str, Callable] = {}
HEADS = {"lm_head": "bias", "teacher_lm_head": "teacher_bias"}
STUDENT = ("hidden", "lm_head", "bias", "lm_head.lora_a", "lm_head.lora_b")


def one_operator(function: Callable) -> Callable:
    """Make a loss a single operator under torch.compile.

    A loss of the caller's own in Python (`policy_loss` as a callable) cannot be one: the graph then
    breaks around the call. It also breaks for arguments that the loss refuses in eager mode.
    """
    parameters = inspect.signature(function).parameters.values()
    positional = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
    required = [x.name for x in parameters if x.default is x.empty and x.kind is not x.VAR_KEYWORD]
    LOSSES[function.__name__] = function
    broken = breaks_graph(f"{function.__name__} with a Python callable")(function)
    refused = breaks_graph(f"{function.__name__} with an argument that it refuses")(function)
    transformed = breaks_graph(f"{function.__name__} under torch.func or forward-mode AD")(function)

    @wraps(function)
    def loss(*args, **kwargs):
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return transformed(*args, **kwargs)
        names = positional[: len(args)]  # strict=False with a rest is an error under torch 2.8
        if len(args) > len(positional) or any(name in kwargs for name in names):
            return refused(*args, **kwargs)
        arguments = dict(zip(names, args, strict=True)) | kwargs
        if callable(arguments.get("policy_loss")):
            return broken(**arguments)
        flat = _flattened(arguments)
        complete = all(name in flat for name in required)
        if not (complete and all(_fits(x) for x in flat.values())):
            return refused(**arguments)
        return _call_operator(function.__name__, flat)

    return loss


def _flattened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by name, including those of the heads, cast as autocast asks."""
    flat = dict(arguments)
    listed = flat.get("teacher_hidden")
    if isinstance(listed, TopK):
        flat["teacher_hidden"], flat["teacher_hidden.logprobs"] = listed.ids, listed.logprobs
    for head_name, bias_name in HEADS.items():
        states_name = "hidden" if head_name == "lm_head" else "teacher_hidden"
        if flat.get(head_name) is None or states_name not in flat:
            continue
        if f"{states_name}.logprobs" in flat:
            continue  # a head beside a TopK, which the loss itself refuses
        given = flat[head_name]
        bias = flat.get(bias_name)
        if isinstance(given, Head) and given.bias is not None:
            if bias is not None:
                continue  # two biases: a Head fits no schema, so that the loss itself refuses them
            bias = given.bias
        on = flat["hidden"].device if isinstance(flat["hidden"], Tensor) else None
        cast = autocast(flat[states_name], Head.of(given), bias, on)
        flat[states_name], head, flat[bias_name] = cast
        flat[head_name] = head.weight
        if not isinstance(given, Head):
            continue
        flat[f"{head_name}.softcap"] = head.softcap
        flat[f"{head_name}.logit_scale"] = head.logit_scale
        if head.lora is not None:
            for part, value in zip(LoRA._fields, head.lora, strict=True):
                flat[f"{head_name}.lora_{part}"] = value
    return flat


def _fits(value: object) -> bool:
    """Return whether an operator's schema can hold the value and a graph knows how to create it.

    Meta tensors do not fit: the operator would compute nothing and return it as the loss.
    """
    if isinstance(value, Tensor) and (
        value.device.type == "meta" or value.layout is not torch.strided
    ):
        return False
    known = value is None or isinstance(value, (Tensor, torch.dtype, str, int, float))
    return known or getattr(value, "ndim", None) == 0  # a numpy scalar


def _call_operator(name: str, arguments: dict[str, Any]):
    """Call the operator with its arguments sorted by what an operator's schema can hold.

    Numbers go in as numbers, so that another value is not another graph. A graph would still be
    compiled anew for every float that an operator takes as such (torch's tensorify_python_scalars
    fixes it), but not for one that an arithmetic operator has made a tensor. It is on the CPU,
    where reading it waits for no device.
    """
    one = torch.ones((), dtype=torch.float64, device="cpu")
    tensors, floats, ints, constants = {}, {}, {}, []
    return_stats = arguments.pop("return_stats", False)
    for key, value in arguments.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, torch.dtype):
            constants.append(f"'{key}': '{value}'")
        elif value is None or isinstance(value, (str, bool)):
            constants.append(f"'{key}': {value!r}")
        elif isinstance(value, int):
            ints[key] = value
        elif isinstance(value, float):
            floats[key] = one * value
        else:
            floats[key] = torch.as_tensor(value)  # a numpy scalar; integers stay integers
    student = [tensors.pop(key, None) for key in STUDENT]
    constants.append(f"'return_stats': {return_stats!r}")
    names = "; ".join([" ".join(x) for x in (tensors, floats, ints)])
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in student]
    total, numbers, share, *_ = torch.ops.kepo_kernels.fused_loss(
        name,
        "{" + ", ".join(constants) + "}",
        names,
        *student,
        list(tensors.values()),
        list(floats.values()),
        list(ints.values()),
        needs,
    )
    if not return_stats:
        return total
    dropped = share if arguments.get("grad_tol", 0.0) > 0.0 else None
    shaped = numbers.detach().reshape(3, *arguments["hidden"].shape[:-1])
    return total, TokenStats(shaped[0], shaped[1], shaped[2], dropped)


Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


# It reads masks on the device, so it cannot be captured; with this tag "reduce-overhead" leaves
# it out of its graphs, in versions of torch that have the tag.
UNCAPTURED = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


@torch.library.custom_op("kepo_kernels::fused_loss", mutates_args=(), tags=UNCAPTURED)
def _operator(
    function: str,
    constants: str,
    names: str,
    hidden: Tensor,
    lm_head: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    others: Sequence[Tensor],
    floats: Sequence[Tensor],
    ints: Sequence[int],
    needs: Sequence[bool],
) -> Parts:
    """Run the loss; `names` says which argument each of the other tensors, floats (0-d, on the CPU)
    and ints is.

    Returns (loss, numbers (3, N), share of gradient dropped, the five gradients); a gradient that
    is not needed is empty.
    """
    with ExitStack() as inside:
        # Operators run below autograd; the loss differentiates its own vectors.
        for key in ("AutogradFunctionality", "ADInplaceOrView"):
            key = getattr(torch._C.DispatchKey, key)
            inside.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        inside.enter_context(torch.autocast(hidden.device.type, enabled=False))
        given = zip(STUDENT, (hidden, lm_head, bias, lora_a, lora_b), strict=True)
        student = {name: x.detach() for name, x in given if x is not None}
        arguments = ast.literal_eval(constants) | student
        rest = (others, [x.item() for x in floats], ints)
        for keys, values in zip(names.split(";"), rest, strict=True):
            arguments |= zip(keys.split(), values, strict=True)
        formed = LOSSES[function](**_nested(arguments), _needs=tuple(needs))
    gradients = [hidden.new_empty(0) if x is None else x for x in formed.gradients]
    gradients[0] = gradients[0].flatten(0, -2) if needs[0] else gradients[0]
    return formed.total, formed.numbers, formed.dropped, *gradients


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Rebuild the keyword arguments that `_flattened` took apart."""
    arguments = {key: value for key, value in flat.items() if "." not in key}
    for name in HEADS:
        if f"{name}.logit_scale" not in flat:
            continue
        softcap, scale = flat[f"{name}.softcap"], flat[f"{name}.logit_scale"]
        lora = None
        if f"{name}.lora_a" in flat:
            lora = LoRA(*(flat[f"{name}.lora_{part}"] for part in LoRA._fields))
        arguments[name] = Head(arguments[name], softcap, scale, lora)
    if "teacher_hidden.logprobs" in flat:
        listed = TopK(flat["teacher_hidden"], flat["teacher_hidden.logprobs"])
        arguments["teacher_hidden"] = listed
    if isinstance(arguments.get("logits_dtype"), str):
        arguments["logits_dtype"] = getattr(torch, arguments["logits_dtype"].split(".")[1])
    return arguments


@_operator.register_fake
def _(
    function,
    constants,
    names,
    hidden,
    lm_head,
    bias,
    lora_a,
    lora_b,
    others,
    floats,
    ints,
    needs,
) -> Parts:
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
    _, _, _, *student, others, floats, ints, needs = inputs
    # torch takes an empty list for a list of tensors.
    ctx.lists = [None] * len(others), [None] * len(floats), None if ints else []
    ctx.needs = list(needs)
    ctx.like = [None if x is None else (x.shape, x.dtype) for x in student]
    ctx.save_for_backward(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


@differentiable_once
def _backward(ctx, grad_total, *_):
    gradients = [
        (x * grad_total.to(x.dtype)).to(like[1]).reshape(like[0]) if need else None
        for x, like, need in zip(ctx.saved_tensors, ctx.like, ctx.needs, strict=True)
    ]
    return (
        None,
        None,
        None,
        *gradients,
        *ctx.lists,
        None,
    )  # torch takes an empty list for a list of tensors


_operator.register_autograd(_backward, setup_context=_save)
