"""One step of a small model in one process or, on halves of the same batch, in two.

The two are spawned once for all cases; each case leaves its weights after the step in a file.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kepo_kernels import fused_gated_kd_loss, fused_grpo_loss, lm_head_weight

WORLD, BATCH, LENGTH, VOCAB, HIDDEN = 2, 4, 6, 37, 16
LAYOUTS = ("ddp", "root", "root_resharded", "own", "norm_and_head")
LEARNING_RATE = 0.5  # a wrong gradient then shows in the first digit of the weights


class Case(NamedTuple):
    """How a model is held, and how its head is read."""

    arch: str = "toy"  # or "vlm"
    tied: bool = False
    layout: str = "own"
    loss: str = "grpo"  # or "kd", from a frozen teacher held in the same layout; "kd_closed": the
    # second process has no open gate
    backward: str = "after"  # or "inside" of the block; "forward": loss inside of model.forward
    read: str = "lm_head_weight"  # or "full_tensor", what must not be done


class Toy(nn.Module):
    """Embedding, two layers, norm, head; `forward` stops before the head or ends in a loss."""

    def __init__(self, tied: bool):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh()) for _ in range(2)
        )
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor, loss_of: Callable | None = None) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        x = self.norm(x)
        return x if loss_of is None else loss_of(self, x)


class Parts(NamedTuple):
    """What of a model is sharded on its own."""

    blocks: list[nn.Module]
    embed: nn.Module
    norm: nn.Module
    head: nn.Module


def build(arch: str, tied: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if arch == "toy":
        return Toy(tied)
    from transformers import Qwen3VLForConditionalGeneration

    from kepo.digits.tiny import build_tokenizer
    from kepo.models.families.family import TinySize
    from kepo.models.families.qwen3_vl import tiny_config

    size = TinySize(hidden=32, layers=2, heads=2, vision_hidden=32, vision_depth=1, tied=tied)
    model = Qwen3VLForConditionalGeneration(tiny_config(build_tokenizer(), size)).float()
    for p in model.parameters():
        # Biases of 0 would after the step be their gradients alone, which cancellation rounds
        # far more coarsely than a weight.
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return model


def parts_of(model: nn.Module) -> Parts:
    if isinstance(model, Toy):
        return Parts(list(model.layers), model.embed, model.norm, model.lm_head)
    text, vision = model.model.language_model, model.model.visual
    blocks = [*text.layers, *vision.blocks]
    return Parts(blocks, text.embed_tokens, text.norm, model.lm_head)


def held(model: nn.Module, layout: str) -> nn.Module:
    """The model in the layout; "plain" leaves it as it is."""
    if layout == "plain":
        return model
    if layout == "ddp":
        trained = any(p.requires_grad for p in model.parameters())
        return DistributedDataParallel(model) if trained else model
    parts = parts_of(model)
    # One parameter belongs to one group, so a tied embedding goes where the head goes.
    tied = [parts.embed] if parts.embed.weight is parts.head.weight else []
    for block in parts.blocks:
        fully_shard(block)
    if layout == "own":
        fully_shard([*tied, parts.head] if tied else parts.head)
    if layout == "norm_and_head":  # as accelerate does it
        fully_shard([*tied, parts.norm, parts.head], reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=True if layout == "root_resharded" else None)
    return model


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """The whole batch; for a VLM with one image of one token each."""
    torch.manual_seed(1)
    ids = torch.randint(VOCAB, (BATCH, LENGTH))
    if isinstance(model, Toy):
        return {"ids": ids}
    config = model.config
    ids[:, 0], ids[:, 1] = config.vision_start_token_id, config.image_token_id
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(BATCH, 4, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([[1, 2, 2]]).repeat(BATCH, 1),
    }


def hidden_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states (B, T, H), by the forward of the wrapper or of the sharded root."""
    if "ids" in inputs:
        return model(**inputs)
    inputs = inputs | {"pixel_values": inputs["pixel_values"].flatten(0, 1)}
    out = model(**inputs, output_hidden_states=True, logits_to_keep=1, use_cache=False)
    return out.hidden_states[-1]


@contextmanager
def full_tensor(model: nn.Module):
    """The mistake: FSDP2 averages this gradient as if each process had formed all of it."""
    yield model.lm_head.weight.full_tensor()


def take_step(case: Case, rank: int = 0, world: int = 1) -> nn.Module:
    """The model after one step of SGD on this process's share of the batch."""
    layout = case.layout if world > 1 else "plain"
    model = build(case.arch, case.tied, seed=0)
    whole = inputs_of(model)
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    inputs = {name: x[share] for name, x in whole.items()}
    teacher = held(build(case.arch, case.tied, seed=5).requires_grad_(False), layout)
    model = held(model, layout)

    torch.manual_seed(2)
    targets, advantages = torch.randint(VOCAB, (BATCH, LENGTH)), torch.randn(BATCH)
    # The processes have 11 and 5 tokens: dividing by its own count would show.
    mask = torch.arange(LENGTH) < torch.tensor([6, 5, 4, 1])[:, None]
    weights = mask / mask.sum() * world
    gate = torch.tensor([1.0, 0.5, 0.0, 0.0 if case.loss == "kd_closed" else 0.7])
    read = lm_head_weight if case.read == "lm_head_weight" else full_tensor
    if case.loss != "grpo":
        with torch.no_grad():
            teacher_hidden = hidden_of(teacher, inputs)

    def loss_of(module: nn.Module, hidden: Tensor, then: Callable = lambda loss: None) -> Tensor:
        with read(module) as weight:
            if case.loss == "grpo":
                args = targets[share], advantages[share]
                loss = fused_grpo_loss(hidden, weight, *args, weights=weights[share])
            else:
                with lm_head_weight(teacher) as teacher_weight:
                    loss = fused_gated_kd_loss(
                        hidden,
                        weight,
                        teacher_hidden,
                        teacher_weight,
                        gate=gate[share],
                        weights=10 * weights[share],  # the two random models are near
                    )
            then(loss)
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    if case.backward == "inside":
        loss_of(model, hidden_of(model, inputs), Tensor.backward)
    elif case.backward == "after":
        loss_of(model, hidden_of(model, inputs)).backward()
    else:
        model(**inputs, loss_of=loss_of).backward()
    optimizer.step()
    return model


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by its name, under the same name in every layout."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    found = {}
    for name, p in inner.named_parameters():
        p = p.detach()
        found[name] = p.full_tensor() if hasattr(p, "full_tensor") else p.clone()
    return found


def run_pair(work: Callable[..., object], folder: Path, *args: object) -> list:
    """`work(rank, *args)` in two processes that can talk; what it returns, by rank."""
    torch.multiprocessing.spawn(_process, (work, folder, args), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _process(rank: int, work: Callable, folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD
    )
    torch.save(work(rank, *args), folder / f"{rank}.pt")
    dist.destroy_process_group()


def steps(rank: int, cases: Sequence[Case]) -> dict[Case, dict[str, Tensor]]:
    return {case: whole_weights(take_step(case, rank, WORLD)) for case in cases}
