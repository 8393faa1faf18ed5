"""Tiny models of transformers with every kind of head, and what plain PyTorch makes of them."""

import torch
import transformers
from torch import Tensor, nn

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    tie_word_embeddings=False,
)
# What a head is called here: a model of transformers, settings, and those of PEFT's LoraConfig.
KINDS = {
    "untied": ("Llama", {}, None),
    "tied": ("Llama", dict(tie_word_embeddings=True), None),
    "bias": ("Phi", {}, None),
    "softcap": ("Gemma2", dict(final_logit_softcapping=2.0), None),
    "scale": ("Cohere", dict(logit_scale=0.3), None),
    "divisor, tied": ("Granite", dict(logits_scaling=4.0, tie_word_embeddings=True), None),
    "adapted body": ("Llama", {}, dict(target_modules=["q_proj"])),
    "lora": ("Llama", {}, dict(target_modules=["q_proj", "lm_head"], lora_alpha=6)),
    "lora, softcap": ("Gemma2", dict(final_logit_softcapping=2.0), dict(target_modules="lm_head")),
    "lora, bias": ("Phi", {}, dict(target_modules=["lm_head"], lora_alpha=6)),
    "copy": ("Llama", {}, dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
}


def build(kind: str, seed: int = 3) -> nn.Module:
    """The model, every weight of it far from 0, in fp32."""
    name, settings, adapter = KINDS[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**SIZES | settings)
    ).eval()
    if adapter is not None:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.0, **adapter))
    for parameter in model.parameters():  # far enough for a cap to bend, and B of LoRA not 0
        nn.init.normal_(parameter, std=0.2)
    return model


def batch(sequences: int = 4, length: int = 6) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(1, SIZES["vocab_size"], (sequences, length), generator=made)
    return dict(
        ids=ids,
        targets=ids.roll(-1, 1),
        # Sequences of different lengths: halves of the batch have 11 and 5 tokens.
        weights=(torch.arange(length) < torch.tensor([6, 5, 4, 1])[:sequences, None]) / 16,
        upstream=torch.randn(2, sequences, length, generator=made),
    )


def plain_numbers(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of whole logits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q = logits.to(wide).log_softmax(-1)
    return log_q.gather(-1, targets[..., None])[..., 0], -(log_q.exp() * log_q).sum(-1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every gradient by the name of its parameter; where there is none, there is no entry."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor], least: float = 0.0) -> float:
    """The largest error over the largest value of each tensor, or over that share of the largest
    of all."""
    assert found.keys() == expected.keys()
    largest = {name: float(x.abs().max()) for name, x in expected.items()}
    assert all(largest.values()) or least, "a gradient of 0 shows nothing"
    floor = least * max(largest.values())
    return max(
        float((found[name] - x).abs().max()) / max(largest[name], floor)
        for name, x in expected.items()
    )
