"""verl's FSDP engine without processes and GPUs: its own step, on a tiny model and one batch."""

from functools import partial

import torch
import transformers
import verl.workers.engine.fsdp.transformer_impl as fsdp
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation.losses import distillation_ppo_loss
from verl.utils import tensordict_utils
from verl.workers.config import DistillationConfig, DistillationLossConfig, FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

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


def patched(model: torch.nn.Module, backend: str = "torch") -> torch.nn.Module:
    """The model as verl makes it for use_fused_kernels."""
    import verl.models.transformers.monkey_patch as patches

    patches.patch_forward_with_backends(model, True, backend)
    return model


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


def step(monkeypatch, model: torch.nn.Module, data: TensorDict, loss_function: partial):
    """One forward_step of verl's engine: (loss, output)."""
    monkeypatch.setattr(fsdp, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(fsdp, "get_device_name", lambda: "cpu")
    engine = object.__new__(fsdp.FSDPEngineWithLMHead)
    engine.module = model
    engine.use_ulysses_sp = engine.pad_to_length = False
    engine._autocast_dtype = torch.float32
    engine.ulysses_device_mesh = None
    engine.engine_config = type("Engine", (), dict(entropy_checkpointing=False))()
    engine.engine_config.entropy_from_logits_with_chunking = False
    engine.compute_entropy_from_logits = fsdp.verl_F.entropy_from_logits
    engine._get_packed_pad_size = lambda length: 0
    return engine.forward_step(data, loss_function=loss_function, forward_only=False)
