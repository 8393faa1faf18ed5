"""verl's FSDP engine without processes and GPUs: its own step, on a tiny model and one batch."""

import importlib.util
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
import verl.models.transformers.monkey_patch as patches
import verl.utils.experimental.torch_functional as functional
import verl.workers.engine.fsdp.transformer_impl as fsdp
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils
from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from kepo_kernels.integrations.verl import use_kepo

VOCAB = 61
PROMPTS, RESPONSES = (3, 2, 5), (6, 9, 1)
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    attn_implementation="sdpa",
)


def tiny(kind: str = "Qwen2", tied: bool = False) -> torch.nn.Module:
    """A model whose weights are far from 0."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(**SIZES, tie_word_embeddings=tied)
    # verl replaces the forward of the class: of one of our own, so that it ends with the test.
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    model = type(f"{kind}Here", (model_class,), {})(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.3 * torch.randn_like(x))
    return model


def patched(model: torch.nn.Module) -> torch.nn.Module:
    """The model as verl makes it for use_fused_kernels."""
    patches.patch_forward_with_backends(model, True, "torch")
    return model


@cache
def own_head() -> type:
    """verl's FusedLinearForPPO, by its file: the name in its module is ours by now."""
    spec = importlib.util.spec_from_file_location("verls_own", functional.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FusedLinearForPPO


def ragged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def micro_batch(k: int, closed: tuple[int, ...] = (), seed: int = 5, **settings) -> TensorDict:
    """What verl's trainer hands to its engine, with a teacher of k tokens at every position.

    A token in the middle of the second response is not the student's own.
    """
    torch.manual_seed(seed)
    ids, logprobs, sequences, masks = [], [], [], []
    for i, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        sequences.append(torch.randint(VOCAB, (p + r,)))
        top = torch.randn(p + r, VOCAB).mul(2).log_softmax(-1).topk(k)
        ids.append(top.indices.int() if i not in closed else torch.full((p + r, k), -1).int())
        logprobs.append(top.values if i not in closed else torch.zeros(p + r, k))
        ids[-1][-1] = 0  # as a server fills the last position, which predicts nothing
        logprobs[-1][-1] = 0.0
        masks.append(torch.ones(r, dtype=torch.int64))
    masks[1][4] = 0
    cut = list(zip(sequences, PROMPTS, strict=True))
    tokens = dict(
        input_ids=ragged(sequences),
        position_ids=ragged([torch.arange(len(x)) for x in sequences]),
        prompts=ragged([x[:p] for x, p in cut]),
        responses=ragged([x[p:] for x, p in cut]),
        response_mask=ragged(masks),
        teacher_ids=ragged(ids),
        teacher_logprobs=ragged(logprobs),
        old_log_probs=ragged([-2.0 - torch.rand(len(x)) for x in masks]),
        advantages=ragged([torch.randn(len(x)) for x in masks]),
    )
    data = TensorDict(tokens, batch_size=[len(PROMPTS)])
    flags = dict(
        temperature=0.8,
        use_fused_kernels=True,
        use_remove_padding=True,
        calculate_entropy=True,
        distillation_use_topk=True,
        distillation_only=False,
        dp_size=1,
        batch_num_tokens=int(sum(x.sum() for x in masks)),
        global_batch_size=len(PROMPTS),
    )
    for name, x in (flags | settings).items():
        tensordict_utils.assign_non_tensor(data, **{name: x})
    return data


def actor(**settings) -> FSDPActorConfig:
    return FSDPActorConfig(strategy="fsdp2", rollout_n=1, use_dynamic_bsz=True, **settings)


def distilling(loss_mode: str, **settings) -> partial:
    """verl's own loss function, as its worker binds it."""
    how = dict(use_policy_gradient=False, log_prob_min_clamp=None, loss_max_clamp=None)
    loss = DistillationLossConfig(loss_mode=loss_mode, **how | settings)
    config = DistillationConfig(enabled=False, distillation_loss=loss)
    object.__setattr__(config, "enabled", True)  # without its check of servers and GPUs
    return partial(distillation_ppo_loss, config=actor(), distillation_config=config)


def rewarded(**settings) -> partial:
    return partial(ppo_loss, config=actor(**settings))


def step(model: torch.nn.Module, data: TensorDict, loss_function: partial) -> tuple[Tensor, dict]:
    """One forward_step of verl's engine: (loss, output)."""
    engine = object.__new__(fsdp.FSDPEngineWithLMHead)
    engine.module = model
    engine.use_ulysses_sp = engine.pad_to_length = False
    engine.ulysses_device_mesh = None
    engine._autocast_dtype = torch.float32
    engine._get_packed_pad_size = lambda length: 0
    engine.engine_config = SimpleNamespace(
        entropy_checkpointing=False, entropy_from_logits_with_chunking=False
    )
    engine.compute_entropy_from_logits = fsdp.verl_F.entropy_from_logits
    here = dict(get_device_id=lambda: "cpu", get_device_name=lambda: "cpu")
    with mock.patch.multiple(fsdp, **here):
        return engine.forward_step(data, loss_function=loss_function, forward_only=False)


def distilled_gradients(model: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Of a loss that is the divergence alone, so that no log-prob leads back to the weights."""
    data = micro_batch(k=4, seed=seed, distillation_only=True, calculate_entropy=False)
    step(model, data, distilling("kepo_jsd", use_task_rewards=False, topk=4))[0].backward()
    return {name: x.grad for name, x in model.named_parameters()}


def in_one_of_two(rank: int, folder: Path, tied: bool) -> None:
    """Leave the gradients that FSDP2 averages over two processes, each with a batch of its own."""
    use_kepo()
    where = (folder / "rendezvous").as_uri()
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    try:
        model = patched(tiny(tied=tied))
        for layer in (*model.model.layers, model):
            fully_shard(layer, reshard_after_forward=True)
        found = {name: x.full_tensor() for name, x in distilled_gradients(model, rank).items()}
        if rank == 0:
            torch.save(found, folder / "gradients.pt")
    finally:
        torch.distributed.destroy_process_group()
