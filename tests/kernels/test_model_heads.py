"""`head_of`: the losses with it are those of the model's own logits, in value and gradients."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from kepo_kernels import Head, KepoInputError, fused_linear_logprobs, head_of, heads

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
)
KINDS = {
    "plain": ("Llama", {}, {}),
    "qwen3": ("Qwen3", {}, {}),
    "tied": ("Llama", dict(tie_word_embeddings=True), {}),
    "scale of Cohere": ("Cohere", dict(logit_scale=0.3), dict(logit_scale=0.3)),
    "scale of Cohere2": ("Cohere2", dict(logit_scale=2.5), dict(logit_scale=2.5)),
    "divisor of Granite": ("Granite", dict(logits_scaling=4.0), dict(logit_scale=0.25)),
    "softcap of Gemma2": (
        "Gemma2",
        dict(final_logit_softcapping=2.0),
        dict(softcap=2.0),
    ),
    "softcap of Gemma3": (
        "Gemma3",
        dict(final_logit_softcapping=1.5),
        dict(softcap=1.5),
    ),
    "bias of Phi": ("Phi", {}, dict(bias=True)),
    "no softcap": ("Gemma2", dict(final_logit_softcapping=None), {}),
}
if hasattr(transformers, "MiniCPM3ForCausalLM"):
    KINDS["divisor of MiniCPM"] = (
        "MiniCPM3",
        dict(
            dim_model_base=8,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            num_key_value_heads=4,
        ),
        dict(logit_scale=0.25),
    )


def build(kind: str):
    name, settings, _ = KINDS[kind]
    text = "Text" if name == "Gemma3" else ""
    config = getattr(transformers, f"{name}{text}Config")(**SIZES | settings)
    torch.manual_seed(3)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far enough for a cap to bend
    return model


def both(model, head: Head) -> list[tuple[torch.Tensor, ...]]:
    """Log-probabilities and gradients: of the model's own logits, and of the states and a head."""
    ids = torch.arange(1, 13).view(2, 6)
    upstream = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    trained = [x for x in model.parameters() if x.requires_grad]
    logits = model(input_ids=ids).logits.float()
    whole = logits.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    ours = fused_linear_logprobs(hidden, head, ids)
    return [
        (found.detach(), *gradients((found * upstream).sum(), trained)) for found in (whole, ours)
    ]


def gradients(loss: torch.Tensor, trained: list) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, trained, materialize_grads=True)  # a bias left out has none


def equal(whole, ours) -> bool:
    largest = max(x.abs().max() for x in whole[1:])
    scales = [whole[0].abs().max(), *[largest] * (len(whole) - 1)]
    pairs = zip(whole, ours, scales, strict=True)
    return all((a - b).abs().max() <= 2e-5 * scale for a, b, scale in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_models_own_logits(kind):
    model = build(kind)
    head = head_of(model)
    wanted = KINDS[kind][2]
    assert head.softcap == wanted.get("softcap")
    assert head.logit_scale == pytest.approx(wanted.get("logit_scale", 1.0))
    assert (head.bias is not None) == wanted.get("bias", False)
    assert equal(*both(model, head))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2]])
def test_a_head_without_what_the_model_does_is_seen(kind):
    model = build(kind)
    assert not equal(*both(model, Head(head_of(model).weight)))


def test_a_divisor_taken_for_a_factor_is_seen(monkeypatch):
    monkeypatch.setattr(heads, "DIVIDES", ())
    with pytest.raises(KepoInputError, match="GraniteForCausalLM does more to the logits of"):
        head_of(build("divisor of Granite"))


def test_a_setting_that_the_forward_does_not_read_is_no_cap():
    """Gemma 3's image-text model has its text model's softcap in its config, and leaves it out."""
    text = dict(**SIZES, final_logit_softcapping=2.0)
    vision = dict(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=60
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    assert config.get_text_config().final_logit_softcapping == 2.0
    assert head_of(model).softcap is None
    assert equal(*both_texts(model))


def both_texts(model):
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad = False
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.requires_grad = False
    return both(model, head_of(model))


def test_peft_and_ddp_are_looked_into():
    peft = pytest.importorskip("peft")
    model = build("scale of Cohere")
    wrapper = torch.nn.Module()
    wrapper.module = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert head_of(wrapper).logit_scale == 0.3


def test_an_unknown_setting_is_refused():
    class Odd(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * self.config.secret_logits_scale
            return out

    model = Odd(transformers.LlamaConfig(**SIZES))
    with pytest.raises(KepoInputError, match="forward of Odd reads secret_logits_scale, which may"):
        head_of(model)


def test_a_head_that_is_no_linear_layer_is_refused():
    model = build("plain")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(KepoInputError, match="LM head is a Sequential, which may do more than mul"):
        head_of(model)


def test_a_bias_is_the_same_in_the_head_and_beside_it():
    model = build("bias of Phi")
    head = head_of(model)
    hidden, ids = torch.randn(5, 32), torch.arange(5)
    inside = fused_linear_logprobs(hidden, head, ids)
    assert torch.equal(inside, fused_linear_logprobs(hidden, head.weight, ids, bias=head.bias))
    with pytest.raises(KepoInputError, match=r"bias is given beside lm_head\.bias; expected"):
        fused_linear_logprobs(hidden, head, ids, bias=head.bias)


def test_states_that_are_not_finite_are_no_other_states():
    """A rank that waits for its weights has whatever was in memory."""
    model = build("plain")
    for parameter in model.base_model.parameters():
        parameter.data.fill_(torch.nan)
    assert head_of(model).softcap is None
