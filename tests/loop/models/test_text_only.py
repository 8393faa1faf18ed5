"""Causal language models of several makers: what was sampled is what is scored, and packed."""

import functools
import json

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from small import config_of
from test_packing import LENGTHS, PROMPT_OF, both_ways, equal

from kepo.digits.tiny import build_tokenizer
from kepo.errors import KepoCheckpointError
from kepo.models.encoding import Prompt
from kepo.models.families.text_only import finish_tiny
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM
from kepo.planner.model_sizes import model_sizes
from kepo.run.open import load_models
from kepo_kernels import fused_linear_logprobs

WINDOW = dict(sliding_window=6)
MAKERS = {
    "Qwen3": {},
    "Llama": {},
    "SmolLM3": {},
    "Granite": dict(logits_scaling=3.0, embedding_multiplier=2.0),
    "Cohere": dict(logit_scale=0.4),
    "Phi": {},
    "Gemma2": dict(final_logit_softcapping=3.0, **WINDOW),
    "Mistral": WINDOW,
}
"""transformers' name of each, and what makes it differ from the others."""


def build(folder, maker: str, **settings) -> None:
    tokenizer = build_tokenizer()
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    size |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    ids = dict(bos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    config = getattr(transformers, f"{maker}Config")(
        vocab_size=len(tokenizer), **size, **ids, eos_token_id=tokenizer.eos_token_id, **settings
    )
    torch.manual_seed(4)
    model = getattr(transformers, f"{maker}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    finish_tiny(folder, tokenizer)


@pytest.fixture(scope="module", params=MAKERS)
def vlm(request, tmp_path_factory) -> VLM:
    folder = tmp_path_factory.mktemp(request.param)
    build(folder, request.param, **MAKERS[request.param])
    return VLM.load(folder)


PROMPTS = [Prompt("Which?"), Prompt("What is the sum of the two digits?"), Prompt("3 + 5")]


def test_what_was_sampled_is_what_is_scored(vlm):
    inputs, params = vlm.encode(PROMPTS), SamplingParams(n=3, max_tokens=20, temperature=1.0)
    ids, mask, logprobs = vlm.generate(inputs, params, seeds=range(9))
    with torch.no_grad():
        states = vlm.completion_hidden(inputs.repeat(3), ids, mask)
        scored = fused_linear_logprobs(states, vlm.head, ids, completion_mask=mask)
    # Sampled without the tokens that are never sampled: the rest of the law is larger by them.
    logits = vlm.model(**vlm_inputs(vlm, inputs.repeat(3), ids, mask)).logits
    own = logits[:, inputs.input_ids.shape[1] - 1 : -1].float()
    whole = own.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(scored[mask], whole[mask], rtol=1e-4, atol=2e-5)
    own[..., vlm.never_sampled()] = -torch.inf
    law = own.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(logprobs[mask], law[mask], rtol=1e-4, atol=2e-5)


def vlm_inputs(vlm, inputs, ids, mask):
    followed = inputs.followed_by(ids, mask)
    positions = (followed.attention_mask.cumsum(-1) - 1).clamp(min=0)
    return dict(
        input_ids=followed.input_ids,
        attention_mask=followed.attention_mask,
        position_ids=positions,
    )


def test_packed_rows_are_rows_or_are_refused(vlm):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (len(LENGTHS), max(LENGTHS)), generator=generator)
    completions = ids, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    assert len(PROMPT_OF) == len(ids)
    same = equal(*both_ways(vlm, PROMPTS, completions))
    if "sliding_window" in MAKERS[type(vlm.model).__name__.removesuffix("ForCausalLM")]:
        assert "has layers of sliding_attention" in vlm.why_not_packed and not same
    else:
        assert vlm.why_not_packed is None and same


def test_a_run_says_at_its_start_that_rows_are_not_packed(made, tmp_path, capsys):
    build(tmp_path / "mistral", "Mistral", **WINDOW)
    config = config_of(
        made, tmp_path, "grpo", student=str(tmp_path / "mistral"), share_prompts=True
    )
    models = load_models(config, torch.device("cpu"), None)
    assert not models.policy.share_prompts
    said = "as mistral has layers of sliding_attention, which take masks of their own"
    assert said in capsys.readouterr().out
    student = model_sizes(config.student, "float32", "cpu")
    assert not student.shares_prompts(config)


@pytest.mark.parametrize(
    "maker, says",
    [
        ("Mamba", "forward of MambaForCausalLM takes no position_ids"),
        ("GPT2", "GPT2LMHeadModel keeps its layers elsewhere; expected a transformer"),
        ("Bloom", "forward of BloomForCausalLM takes no position_ids"),
    ],
)
def test_what_cannot_be_told_positions_is_refused(maker, says, tmp_path):
    tokenizer = build_tokenizer()
    small = dict(hidden_size=16, num_hidden_layers=1, n_head=2, state_size=4)
    small |= dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    small |= dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    config = getattr(transformers, f"{maker}Config")(**small)
    kind = "GPT2LMHeadModel" if maker == "GPT2" else f"{maker}ForCausalLM"
    model = getattr(transformers, kind)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    finish_tiny(tmp_path, tokenizer)
    with pytest.raises(KepoCheckpointError, match=says):
        VLM.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("maker", ["Llama", "Cohere", "Phi", "Gemma2"])
def test_logits_that_the_head_does_not_make_are_refused(maker, dtype, tmp_path, monkeypatch):
    """Here a factor that no setting names."""
    build(tmp_path, maker, **MAKERS[maker])
    VLM.load(tmp_path, dtype=dtype)
    kind = getattr(transformers, f"{maker}ForCausalLM")
    forward = kind.forward

    @functools.wraps(forward)
    def louder(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    monkeypatch.setattr(kind, "forward", louder)
    with pytest.raises(KepoCheckpointError, match=f"forward of {maker}ForCausalLM does more to"):
        VLM.load(tmp_path, dtype=dtype)


def test_a_template_that_takes_no_text_is_refused(tmp_path):
    build(tmp_path, "Llama")
    file = tmp_path / "chat_template.jinja"
    file.write_text("{% for m in messages %}hello{% endfor %}")
    with pytest.raises(KepoCheckpointError, match="a message with text the chat template makes no"):
        VLM.load(tmp_path)


def test_a_model_that_sees_in_another_way_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    says = r"is a model of type 'llava' that sees pictures .*; expected one of qwen3_vl.* causal"
    with pytest.raises(KepoCheckpointError, match=says):
        VLM.load(tmp_path)
