"""`FusedHead` in two processes: gradients of halves of a batch, over every layout of a model."""

from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch
import two_processes
from tiny_heads import batch, build, gradients
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from two_processes import BATCH, WORLD

from kepo_kernels import FusedHead, fused_kepo_loss, fused_linear_logprobs, head_of, lm_head_weight

DDP = ("ddp", "ddp_unused")
FSDP = ("one", "one_resharded", "layers", "layers_resharded", "own", "own_kept", "norm_and_head")
LAYOUTS = (*DDP, *FSDP)
OTHERS = ("zero3", "accelerate")


class Case(NamedTuple):
    """A model, how it is held, its loss, and how the loss is computed."""

    kind: str = "untied"
    layout: str = "own"
    loss: str = "logprobs"  # which reads the weight again in backward; or "kepo", which does not
    way: str = "model"  # "outside": lm_head(hidden, loss=) after the wrapper's forward; "bypass":
    # the wrapped model's forward, without its wrapper; "no_hooks": lm_head.forward
    micro: int = 1  # micro-batches, all but the last without synchronisation
    first: str = "install"  # before the model is wrapped; or "wrap"


def inner_of(model: nn.Module) -> nn.Module:
    model = getattr(model, "module", model)  # of DDP, or of DeepSpeed
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_of(model: nn.Module) -> nn.Module:
    return getattr(model.model, "language_model", model.model)


def made(kind: str) -> nn.Module:
    if kind.startswith("vlm"):
        return two_processes.build("vlm", kind == "vlm, tied", seed=0).double()
    return build(kind)


def in_zero3(model: nn.Module) -> nn.Module:
    """DeepSpeed's engine around it; no weight is small enough to stay whole."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": BATCH // WORLD,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    if trained:
        config["optimizer"] = {"type": "SGD", "params": {"lr": 0.5}}
        config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, model_parameters=trained or None, config=config)[0]


@contextmanager
def whole_head(teacher: nn.Module, layout: str):
    """The frozen teacher's head, gathered until the loss has formed its gradients."""
    if layout == "zero3":
        import deepspeed

        weights = list(inner_of(teacher).get_output_embeddings().parameters())
        gathered = deepspeed.zero.GatheredParameters(weights)
    else:
        gathered = lm_head_weight(teacher)
    with gathered:
        yield head_of(teacher)


def as_accelerate_does(model: nn.Module) -> nn.Module:
    """Sharded by accelerate itself, whose Accelerator wants a GPU for that."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(text_of(inner_of(model)).layers[0]).__name__],
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def held(model: nn.Module, layout: str) -> nn.Module:
    if layout in OTHERS:
        return {"zero3": in_zero3, "accelerate": as_accelerate_does}[layout](model)
    if layout in DDP:
        return DistributedDataParallel(model, find_unused_parameters=layout == "ddp_unused")
    inner = inner_of(model)
    embed, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    # One parameter belongs to one group, so a tied embedding goes where the head goes.
    tied = [embed] if embed.weight is getattr(head, "weight", None) else []
    again = layout.endswith("_resharded")
    if not layout.startswith("one"):
        for layer in text_of(inner).layers:
            fully_shard(layer, reshard_after_forward=again or None)
    if layout == "leaves":  # of a LoRA, whose three weights then are in groups of their own
        for leaf in (m for m in head.modules() if isinstance(m, nn.Linear)):
            fully_shard(leaf)
    if layout.startswith("own"):
        fully_shard([*tied, head] if tied else head, reshard_after_forward=layout == "own")
    if layout == "norm_and_head":  # as accelerate does it
        [norm] = [x for n, x in text_of(inner).named_children() if n in ("norm", "final_layernorm")]
        fully_shard([*tied, norm, head], reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=again or None)
    return model


def loss_of(case: Case, layout: str, x: dict[str, Tensor], teacher: nn.Module, world: int):
    """A function of states and head, whose mean over processes is the loss of the whole batch."""

    def logprobs(hidden, head):
        numbers = fused_linear_logprobs(hidden, head, x["targets"], return_entropy=True)
        return world * sum((each * u).sum() for each, u in zip(numbers, x["upstream"], strict=True))

    if case.loss == "logprobs":
        return logprobs
    with torch.no_grad():
        states = teacher(input_ids=x["ids"], loss=lambda hidden, head: hidden)

    def kepo(hidden, head):
        with whole_head(teacher, layout) as teacher_head:
            return fused_kepo_loss(
                hidden,
                head,
                x["targets"],
                x["advantages"],
                states,
                teacher_head,
                gate=x["gate"],
                policy_weights=world * x["weights"],
                distill_weights=world * x["weights"],
            )

    return kepo


def compute(case: Case, model: nn.Module, x: dict[str, Tensor], loss) -> Tensor:
    inner = inner_of(model)
    inputs = {"input_ids": x["ids"]}
    if case.kind.startswith("vlm"):
        inputs |= {name: x[name] for name in ("mm_token_type_ids", "image_grid_thw")}
        inputs["pixel_values"] = x["pixel_values"].flatten(0, 1).double()
    if case.way == "model":
        return model(**inputs, loss=loss)
    if case.way == "bypass":
        return inner(**inputs, loss=loss)
    hidden = model(**inputs, loss=lambda hidden, head: hidden)
    head = inner.get_output_embeddings()
    return head(hidden, loss=loss) if case.way == "outside" else head.forward(hidden, loss=loss)


def take(case: Case, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The gradients of one step, on this process's share of the batch."""
    layout = case.layout if world > 1 else "plain"
    model, teacher = made(case.kind), build("untied", seed=5).requires_grad_(False)
    FusedHead.install(teacher)
    if case.first == "install":
        FusedHead.install(model)
    if layout != "plain":
        model = held(model, layout)
        teacher = held(teacher, layout) if layout not in DDP else teacher
    FusedHead.install(model)
    whole = batch()
    if case.kind.startswith("vlm"):
        whole |= two_processes.inputs_of(inner_of(model))
        whole["ids"] = whole.pop("input_ids")
    whole["advantages"], whole["gate"] = whole["upstream"][0, :, 0], torch.tensor([1, 0.5, 0, 0.7])
    whole["upstream"] = whole["upstream"].transpose(0, 1)
    places = torch.arange(len(whole["ids"])).view(world, case.micro, -1)[rank]
    for count, place in enumerate(places, 1):
        x = {name: each[place] for name, each in whole.items()}
        x["upstream"] = x["upstream"].transpose(0, 1)
        last = count == case.micro
        if layout in (*FSDP, "accelerate"):
            model.set_requires_gradient_sync(last)
        with nullcontext() if last or layout not in DDP else model.no_sync():
            loss = compute(case, model, x, loss_of(case, layout, x, teacher, world))
            model.backward(loss) if layout == "zero3" else loss.backward()
    if layout == "zero3":
        return zero3_gradients(model)
    found = gradients(model.module if layout in DDP else model)
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in found.items()}


def zero3_gradients(engine: nn.Module) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_grad

    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    return {name: safe_get_full_grad(p).clone() for name, p in trained.items()}


def take_all(rank: int, cases: Sequence[Case]) -> dict[Case, dict[str, Tensor] | str]:
    """The gradients of every case; for one that raises the same in both processes, what it says."""
    results = {}
    for case in cases:
        try:
            results[case] = take(case, rank, WORLD)
        except (RuntimeError, ValueError) as problem:
            results[case] = f"{type(problem).__name__}: {problem}"
    return results
