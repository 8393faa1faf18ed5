"""Models held as the config says: with adapters, sharded, quantised; and what is saved of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import config_of

from kepo.digits.tiny import build_tiny
from kepo.distributed.processes import processes
from kepo.errors import KepoCheckpointError, KepoConfigError
from kepo.loop import train
from kepo.models.reading import blank_model
from kepo.models.vlm import VLM, Prompt
from kepo.run.open import load_models
from kepo.run.roles import load_policy, load_reference, load_teacher, use_liger_layers

CPU = torch.device("cpu")


@pytest.fixture
def prompt(made) -> Prompt:
    return Prompt("Which?", next((made / "data").rglob("*.png")))


def logits(vlm: VLM, prompt: Prompt) -> torch.Tensor:
    ids, mask = vlm.encode_completions(["3 + 5 = 8"])
    with torch.no_grad():
        states = vlm.run_wrapped(lambda: vlm.completion_hidden(vlm.encode([prompt]), ids, mask))
        return states @ vlm.head.weight.T


def trained(vlm: VLM) -> set[str]:
    return {name for name, p in vlm.model.named_parameters() if p.requires_grad}


# ---- adapters ----


@pytest.fixture(scope="module")
def adapted(made, tmp_path_factory) -> Path:
    """The folder of a run of two steps with adapters."""
    pytest.importorskip("peft")
    run_dir = tmp_path_factory.mktemp("adapted")
    settings = dict(steps=2, lora_rank=4, gate_reward=None, hint_trigger="never")
    assert train(config_of(made, run_dir, **settings)).exit_code == 0
    return run_dir


def test_new_adapters_change_nothing_and_are_all_that_trains(made, tmp_path, prompt):
    pytest.importorskip("peft")
    config = config_of(made, tmp_path, lora_rank=4, lora_alpha=8.0, seed=3)
    with_adapters, plain = load_policy(config, CPU), VLM.load(made / "student")
    assert torch.equal(logits(with_adapters, prompt), logits(plain, prompt))
    names = trained(with_adapters)
    assert names and all("lora_" in name and ".language_model.layers." in name for name in names)
    linear = {n for n in trained(plain) if ".language_model." in n and n.endswith("proj.weight")}
    assert len(names) == 2 * len(linear)
    again = load_policy(config, CPU).model.state_dict()
    assert all(torch.equal(x, again[n]) for n, x in with_adapters.model.state_dict().items())


def test_a_run_with_adapters_saves_what_peft_loads(made, adapted, prompt):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    policy = adapted / "checkpoints" / "step-00000002" / "policy"
    assert not list(policy.glob("model*.safetensors"))
    base = AutoModelForImageTextToText.from_pretrained(made / "student", dtype=torch.float32)
    theirs = VLM.load(made / "student")
    theirs.model = PeftModel.from_pretrained(base, policy).get_base_model().eval()
    config = config_of(made, adapted, lora_rank=4)
    ours = load_policy(config, CPU, policy)
    assert torch.equal(logits(ours, prompt), logits(theirs, prompt))
    assert not torch.equal(logits(ours, prompt), logits(VLM.load(made / "student"), prompt))
    assert trained(ours) == trained(load_policy(config, CPU))


def test_adapters_of_another_kind_are_refused(made, adapted, tmp_path):
    with pytest.raises(KepoCheckpointError, match=r"has no adapter_model\.safetensors"):
        load_policy(config_of(made, tmp_path, lora_rank=4), CPU, tmp_path)


def test_without_peft_it_is_said_how_to_get_it(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        KepoConfigError, match=r"lora_rank=4 needs peft; pip install 'kepo\[lora\]'"
    ):
        load_policy(config_of(made, tmp_path, lora_rank=4), CPU)


# ---- what is trained ----


def test_a_frozen_vision_tower_is_all_that_does_not_train(made, tmp_path):
    frozen = load_policy(config_of(made, tmp_path, freeze_vision=True), CPU)
    plain = load_policy(config_of(made, tmp_path), CPU)
    assert trained(plain) - trained(frozen) == {n for n in trained(plain) if ".visual." in n}


def test_checkpointing_keeps_less_for_backward_and_gives_the_same_gradients(made, tmp_path, prompt):
    """Bytes that autograd saves in a forward, and the gradients."""

    def forward(vlm: VLM) -> tuple[int, list[torch.Tensor]]:
        ids, mask = vlm.encode_completions(["3 + 5 = 8"])
        inputs, saved = vlm.encode([prompt]), []
        vlm.model.train()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(x.nbytes) or x, lambda x: x
        ):
            states = vlm.completion_hidden(inputs, ids, mask)
        states.square().sum().backward()
        return sum(saved), [p.grad for p in vlm.model.parameters() if p.grad is not None]

    whole, gradients = forward(load_policy(config_of(made, tmp_path), CPU))
    less, again = forward(load_policy(config_of(made, tmp_path, gradient_checkpointing=True), CPU))
    assert less < whole / 2
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_a_sharded_policy_computes_in_dtype_and_keeps_float32(made, tmp_path, prompt):
    config = config_of(made, tmp_path, sharding="fsdp2", dtype="bfloat16")
    with processes("cpu", alone=True) as device:
        policy = load_policy(config, device)
        assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
        found = logits(policy, prompt)
        assert found.dtype == torch.bfloat16
        policy.save(tmp_path / "saved")
    assert torch.equal(found, logits(VLM.load(made / "student", dtype="bfloat16"), prompt))
    saved = VLM.load(tmp_path / "saved").model.state_dict()
    assert all(
        torch.equal(x, saved[n]) for n, x in VLM.load(made / "student").model.state_dict().items()
    )


# ---- the teacher ----


@pytest.mark.parametrize("placement", ["copy", "fsdp2", "offload"])
def test_a_teacher_says_the_same_wherever_it_is(made, tmp_path, prompt, placement):
    with processes("cpu", alone=True) as device:
        teacher = load_teacher(config_of(made, tmp_path, teacher_placement=placement), device)
        assert not trained(teacher) and teacher.collective == (placement != "copy")
        assert torch.equal(logits(teacher, prompt), logits(VLM.load(made / "teacher"), prompt))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_teacher_is_near_and_its_head_is_as_it_was(made, tmp_path, prompt, bits):
    pytest.importorskip("bitsandbytes")
    teacher = load_teacher(config_of(made, tmp_path, teacher_bits=bits), CPU)
    whole = VLM.load(made / "teacher")
    assert not trained(teacher) and torch.equal(teacher.head.weight, whole.head.weight)
    found, wanted = logits(teacher, prompt), logits(whole, prompt)
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < {8: 0.1, 4: 0.5}[bits]


@pytest.fixture(scope="module")
def quantised(made, tmp_path_factory) -> Path:
    """The folder of a run of two steps with adapters on weights of 4 bits."""
    pytest.importorskip("bitsandbytes")
    run_dir = tmp_path_factory.mktemp("quantised")
    settings = dict(QUANTISED, steps=2, student_bits=4)
    assert train(config_of(made, run_dir, **settings)).exit_code == 0
    return run_dir


QUANTISED = dict(
    lora_rank=4, gate_reward=None, hint_trigger="never", keep_checkpoints=9, lr=1e-2, kl_coef=0.1
)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_student_trains_its_adapters_and_nothing_else(made, tmp_path, prompt, bits):
    pytest.importorskip("bitsandbytes")
    config = config_of(made, tmp_path, student_bits=bits, **QUANTISED)
    policy, whole = load_policy(config, CPU), VLM.load(made / "student")
    assert trained(policy) and all("lora_" in name for name in trained(policy))
    assert torch.equal(policy.head.weight, whole.head.weight)
    found, wanted = logits(policy, prompt), logits(whole, prompt)
    assert 0 < (found - wanted).norm() / wanted.norm() < {8: 0.1, 4: 0.9}[bits]
    if bits == 4:
        unpack_into(whole.model, policy.model)
        torch.testing.assert_close(found, logits(whole, prompt), rtol=1e-4, atol=1e-5)
    # Before it has learned anything the reference is the policy, quantised as it is.
    assert torch.equal(logits(load_reference(config, CPU), prompt), found)
    ids, mask = policy.encode_completions(["3 + 5 = 8"])
    policy.model.train()
    states = policy.completion_hidden(policy.encode([prompt]), ids, mask)
    states.square().sum().backward()
    named = dict(policy.model.named_parameters())
    grads = {name: named[name].grad for name in trained(policy)}
    # New adapters are a product with a zero factor, so only that factor has a gradient.
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert all(grads[name].any() for name in grads if "lora_B" in name)


def unpack_into(whole: torch.nn.Module, quantised: torch.nn.Module) -> None:
    """Give a model the weights of 4 bits of another as the numbers that they stand for."""
    from bitsandbytes.functional import dequantize_4bit

    linear = dict(whole.named_modules())
    packed = [
        (name.removesuffix(".base_layer"), module.weight)
        for name, module in quantised.named_modules()
        if type(module).__name__ == "Linear4bit" and hasattr(module.weight, "quant_state")
    ]
    assert len({name for name, _ in packed}) > 10
    with torch.no_grad():
        for name, weight in packed:
            linear[name].weight.copy_(dequantize_4bit(weight.data, weight.quant_state))


def test_a_quantised_run_learns_saves_and_resumes_to_the_bit(made, quantised, tmp_path):
    from safetensors.torch import load_file

    def adapters(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
        folder = run_dir / "checkpoints" / f"step-{step:08d}" / "policy"
        return load_file(folder / "adapter_model.safetensors")

    for steps in (1, 2):
        settings = dict(QUANTISED, steps=steps, student_bits=4)
        assert train(config_of(made, tmp_path, **settings)).exit_code == 0
    whole, parts = adapters(quantised, 2), adapters(tmp_path, 2)
    assert all(torch.equal(x, parts[name]) for name, x in whole.items())
    assert any((x - adapters(quantised, 0)[name]).abs().max() > 1e-3 for name, x in whole.items())


def test_the_reference_is_frozen(made, tmp_path):
    assert not trained(load_reference(config_of(made, tmp_path, kl_coef=0.1), CPU))


# ---- from disk ----


def test_a_blank_model_has_the_shape_of_the_one_on_disk(made):
    blank = blank_model(made / "student", torch.float32)
    real = VLM.load(made / "student").model
    for mine, theirs in ((blank.named_parameters, real.named_parameters),
                         (blank.named_buffers, real.named_buffers)):  # fmt: skip
        shapes = [{n: (x.shape, x.dtype, x.device) for n, x in f()} for f in (mine, theirs)]
        assert shapes[0] == shapes[1]


LIGER = """
import sys
from kepo.errors import KepoConfigError
from kepo.run.roles import use_liger_layers
try:
    use_liger_layers(sys.argv[1])
except KepoConfigError as error:
    assert "do not fit together" in str(error), error
    print("refused")
else:
    from kepo.models.vlm import VLM
    kinds = {type(module).__name__ for module in VLM.load(sys.argv[1]).model.modules()}
    assert any(kind.startswith("Liger") for kind in kinds), kinds
    print("built")
"""


@pytest.mark.slow
def test_liger_builds_the_layers_or_says_what_does_not_fit(made):
    """In a process of its own: it changes transformers."""
    pytest.importorskip("liger_kernel")
    done = subprocess.run(
        [sys.executable, "-c", LIGER, str(made / "student")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("refused", "built")


def test_liger_without_the_family_is_refused(made, tmp_path):
    pytest.importorskip("liger_kernel")
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(KepoConfigError, match="liger-kernel has none for 'bert'"):
        use_liger_layers(str(tmp_path))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_whose_prompts_cannot_be_shared_has_rows_and_is_named(made, tmp_path, role, capsys):
    """By the layers that a token sees the prompt through, too: a sliding window is a setting of the
    model's, not of the run."""
    for size in ("student", "teacher"):
        build_tiny(tmp_path / size, size=size, seed=0, family="qwen2_5_vl")
    file = tmp_path / role / "config.json"
    config = json.loads(file.read_text())
    config["text_config"] |= dict(use_sliding_window=True, sliding_window=8, layer_types=None)
    config["text_config"] |= dict(max_window_layers=1)
    file.write_text(json.dumps(config))
    settings = dict(student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"))
    models = load_models(config_of(made, tmp_path, kl_coef=0.1, **settings), CPU, None)
    found = {"student": models.policy, "teacher": models.teacher}
    assert {name for name, vlm in found.items() if not vlm.share_prompts} == {role}
    assert models.ref.share_prompts == (role == "teacher")
    said = [line for line in capsys.readouterr().out.splitlines() if "share_prompts" in line]
    assert len(said) == 1 and role in said[0] and "sliding_attention" in said[0]
    load_models(config_of(made, tmp_path, share_prompts=False, **settings), CPU, None)
    assert "share_prompts" not in capsys.readouterr().out
