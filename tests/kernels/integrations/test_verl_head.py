"""Our head in the place of verl's: the same log-probabilities, entropies and gradients."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("verl")

import torch
import verl.utils.experimental.torch_functional as functional
from checks import assert_close_to_oracle
from places import ROOT
from verl_engine import own_head, patched, tiny

from kepo_kernels import KepoInputError
from kepo_kernels.integrations.verl import KepoFusedLinear, known_releases, use_kepo

use_kepo()

THEIRS = own_head()
SHAPES = [((37,), 24, 101), ((1, 53), 40, 257), ((3, 11), 17, 64)]
UPSTREAM = {"log_probs": (1, 0), "entropy": (0, 1), "both": (1, 1)}


def inputs(lead, width, vocab, dtype):
    torch.manual_seed(1)
    hidden = torch.randn(*lead, width).to(dtype)
    weight = (torch.randn(vocab, width) * 3 / width**0.5).to(dtype)
    return hidden, weight, torch.randint(vocab, lead), torch.randn(2, *lead)


def plain(hidden, weight, ids, temperature):
    """What verl computes without a fused head, from whole logits."""
    log_q = (hidden @ weight.t() / temperature).log_softmax(-1)
    return log_q.gather(-1, ids[..., None]).squeeze(-1), -(log_q.exp() * log_q).sum(-1)


def numbers(function, hidden, weight, ids, temperature, upstream):
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = function(*leaves, ids, temperature)
    used = [(x, u.to(x.dtype)) for x, u in zip(found, upstream, strict=True) if u.any()]
    torch.autograd.backward(*zip(*used, strict=True))
    names = "log_probs", "entropy", "dX", "dW"
    return dict(zip(names, (*found, *(x.grad for x in leaves)), strict=True))


@pytest.mark.parametrize("given", UPSTREAM)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_that_of_whole_logits_and_of_verls_own(shape, temperature, given):
    hidden, weight, ids, upstream = inputs(*shape, torch.float32)
    upstream = [x * on for x, on in zip(upstream, UPSTREAM[given], strict=True)]
    call = ids, temperature, upstream
    oracle = numbers(plain, hidden.double(), weight.double(), *call)
    ours = numbers(KepoFusedLinear(), hidden, weight, *call)
    theirs = numbers(THEIRS(), hidden, weight, *call)
    for name, x in ours.items():
        assert_close_to_oracle(x, oracle[name], name=name)
        assert (x - theirs[name]).norm() <= 5e-6 * theirs[name].norm(), name


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_gives_exact_numbers_and_gradients_rounded_once(shape, temperature, monkeypatch):
    """With logits in float32, as on a GPU; their default on a CPU is bfloat16."""
    monkeypatch.setattr(KepoFusedLinear, "engine", dict(logits_dtype=torch.float32))
    hidden, weight, ids, upstream = inputs(*shape, torch.bfloat16)
    call = ids, temperature, upstream.bfloat16().double()
    oracle = numbers(plain, hidden.double(), weight.double(), *call)
    theirs = numbers(THEIRS(), hidden, weight, *call)
    for name, x in numbers(KepoFusedLinear(), hidden, weight, *call).items():
        assert x.dtype == (torch.bfloat16 if name in ("dX", "dW") else torch.float32)
        assert_close_to_oracle(x, oracle[name], name=name)
        error, of_theirs = ((y.double() - oracle[name]).norm() for y in (x, theirs[name]))
        assert error <= 0.5 * of_theirs


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama"])
def test_a_model_patched_by_verl_runs_it(kind, tied, monkeypatch):
    model, ids = patched(tiny(kind, tied)), torch.randint(61, (2, 13))
    found = []
    for head in (KepoFusedLinear, THEIRS):
        monkeypatch.setattr(functional, "FusedLinearForPPO", head)
        output = model(ids, temperature=0.9, return_dict=True)
        (output.log_probs.sum() + 0.3 * output.entropy.sum()).backward()
        grads = [x.grad.clone() for x in model.parameters()]
        model.zero_grad()
        found.append([output.log_probs, output.entropy, *grads])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_vision_model_patched_by_verl_runs_it(monkeypatch):
    import transformers

    text = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    text |= dict(rope_parameters=dict(rope_type="default", mrope_section=[2, 1, 1]))
    vision = dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=32)
    vision |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    parent = transformers.Qwen3VLForConditionalGeneration
    model = patched(type("Here", (parent,), {})(config).eval())
    ids, found = torch.randint(50, (1, 9)), []
    for head in (KepoFusedLinear, THEIRS):
        monkeypatch.setattr(functional, "FusedLinearForPPO", head)
        output = model(input_ids=ids, temperature=0.9, return_dict=True)
        output.log_probs.sum().backward()
        found.append([output.log_probs, model.lm_head.weight.grad.clone()])
        model.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_verls_plugin_mechanism_installs_it():
    code = (
        "import verl.utils.experimental.torch_functional as f\n"
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn\n"
        "from verl.trainer.distillation.losses import get_distillation_loss_settings as settings\n"
        "get_policy_loss_fn('kepo_sequence_sapo')\n"
        "print(f.FusedLinearForPPO.__name__, settings('kepo_jsd').use_topk)\n"
    )
    loading = os.environ | {"VERL_USE_EXTERNAL_MODULES": "kepo_kernels.integrations.verl.plugin"}
    loading["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=loading, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["KepoFusedLinear True"], done.stderr


def test_its_calls_have_the_settings_that_were_given(monkeypatch):
    monkeypatch.setattr(KepoFusedLinear, "engine", {})
    use_kepo(impl="torch", chunk_rows=3)
    use_kepo()  # as verl's plug-in may do later
    assert KepoFusedLinear.engine["chunk_rows"] == 3
    hidden, weight, ids, _ = inputs((7,), 8, 11, torch.float32)
    found = KepoFusedLinear()(hidden, weight, ids)[0]
    torch.testing.assert_close(found, plain(hidden, weight, ids, 1.0)[0])
    with pytest.raises(KepoInputError, match="use_kepo: unexpected argument 'chunks'"):
        use_kepo(chunks=3)


@pytest.mark.parametrize("found", ["0.9.0", "0.8.0", "0.10.0", "1.0"])
def test_other_releases_are_refused(found, monkeypatch):
    known_releases.refuse_unknown_releases()
    monkeypatch.setattr(known_releases, "version", lambda name: found)
    with pytest.raises(ImportError, match=rf"needs verl>=0.9.1,<0.10, and verl {found} is"):
        known_releases.refuse_unknown_releases()
