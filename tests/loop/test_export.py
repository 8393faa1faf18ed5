"""`kepo export`: a plain model with the adapters merged, that says what the policy says."""

import shutil

import pytest
import torch
from small import config_of, rigged

import kepo
from kepo.__main__ import main
from kepo.data.identity import model_identity
from kepo.errors import KepoCheckpointError, KepoConfigError
from kepo.export import export_model
from kepo.models.vlm import VLM, Prompt


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """Runs, by their number of ranks: adapters, and whole weights."""
    pytest.importorskip("peft")
    found = {}
    with rigged():
        for rank in (4, 0):
            folder = tmp_path_factory.mktemp(f"rank-{rank}")
            # Of its own, so that a test may change it.
            student = shutil.copytree(made / "student", folder / "student")
            settings = dict(student=str(student), lora_rank=rank, steps=2, lr=1e-2)
            found[rank] = kepo.train(config_of(made, folder / "run", "grpo", **settings))
    return found


@pytest.fixture
def prompt(made) -> Prompt:
    return Prompt("Which?", next((made / "data").rglob("*.png")))


def logits(vlm: VLM, prompt: Prompt) -> torch.Tensor:
    ids, mask = vlm.encode_completions(["3 + 5 = 8"])
    with torch.no_grad():
        return vlm.completion_hidden(vlm.encode([prompt]), ids, mask) @ vlm.head.weight.T


@pytest.mark.parametrize("rank", [4, 0])
def test_it_says_what_the_policy_says(run, prompt, tmp_path, rank, capsys):
    from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig

    policy = VLM.load(run[rank].checkpoint)
    before = VLM.load(run[rank].folder.parent / "student")
    out = tmp_path / "plain"
    main(["export", str(run[rank].folder), str(out)])
    assert capsys.readouterr().out == f"{out}: qwen3_vl of {run[rank].checkpoint.parent}\n"
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert {"preprocessor_config.json", "generation_config.json"} <= names
    assert not any("adapter" in name or name == "manifest.json" for name in names)
    model, found = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("lora" in name for name, _ in model.named_parameters())
    plain = VLM.load(out)
    assert all(torch.equal(x, plain.model.state_dict()[n]) for n, x in model.state_dict().items())
    expected, started = logits(policy, prompt), logits(before, prompt)
    assert torch.allclose(logits(plain, prompt), expected, rtol=0, atol=1e-5)
    assert (started - expected).abs().max() > 1e-3  # it is another model than the student
    assert AutoTokenizer.from_pretrained(out).get_vocab() == policy.tokenizer.get_vocab()
    ends = GenerationConfig.from_pretrained(out).eos_token_id
    assert ends == GenerationConfig.from_pretrained(before.model.name_or_path).eos_token_id
    assert kepo.evaluate(out, [dict(question="Why?", options=["a", "b"], answer="A")])


def test_the_card_is_that_of_a_plain_model(run, tmp_path):
    for rank, result in run.items():
        export_model(result.checkpoint, tmp_path / str(rank))
    adapted, whole = ((tmp_path / name / "README.md").read_text() for name in "40")
    assert "library_name: peft" in (run[4].checkpoint / "README.md").read_text()
    assert "peft" not in adapted.lower() and "library_name: transformers" in adapted
    assert "LoRA adapters of rank 4, merged into the weights of `student`" in adapted
    assert adapted.split("## Use")[1] == whole.split("## Use")[1]
    assert whole == (run[0].checkpoint / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_16_bits(run, prompt, tmp_path, dtype):
    export_model(run[4].folder, tmp_path / "plain", dtype)
    plain = VLM.load(tmp_path / "plain", dtype=dtype)
    assert plain.model.config.dtype == getattr(torch, dtype)
    exact = tmp_path / "exact"
    export_model(run[4].folder, exact)
    there, here = VLM.load(exact).model.state_dict(), plain.model.state_dict()
    # Rounded once, after the merge.
    assert all(torch.equal(x.to(here[n].dtype), here[n]) for n, x in there.items())


def test_a_checkpoint_of_a_run_or_its_policy(run, tmp_path):
    newest = run[0].checkpoint.parent
    older = next(p for p in newest.parent.iterdir() if p != newest)
    given = {newest: newest, newest / "policy": newest, older: older}
    for number, (path, checkpoint) in enumerate(given.items()):
        assert export_model(path, tmp_path / str(number)) == checkpoint
    files = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(3)]
    assert files[0] == files[1] != files[2]


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(KepoConfigError, match=r"out='.*full' has files in it"):
        export_model(run[0].folder, tmp_path / "full")
    with pytest.raises(KepoConfigError, match=r"out='.*mine' is a file or a link"):
        export_model(run[0].folder, tmp_path / "full" / "mine")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    export_model(run[0].folder, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_changed_base_is_refused(run, tmp_path):
    base = run[4].folder.parent / "student"
    file = base / "model.safetensors"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-4] + b"\0\0\0\1")
        with pytest.raises(
            KepoCheckpointError, match=r"student, which has changed since: model\.s"
        ):
            export_model(run[4].folder, tmp_path / "out")
    finally:
        file.write_bytes(whole)
    assert not (tmp_path / "out").exists()
    assert model_identity(str(base)) == model_identity(str(base))
    export_model(run[4].folder, tmp_path / "out")


def test_what_is_no_checkpoint_is_said(run, tmp_path):
    with pytest.raises(KepoCheckpointError, match=f"{tmp_path} is no checkpoint and has none"):
        export_model(tmp_path, tmp_path / "out")
    damaged = shutil.copytree(run[0].checkpoint.parent, tmp_path / "step-00000002")
    (damaged / "policy" / "config.json").write_text("{}")
    with pytest.raises(KepoCheckpointError, match=f"{damaged} is damaged: "):
        export_model(damaged, tmp_path / "out")
    with pytest.raises(SystemExit, match=r"error: .*nowhere is no checkpoint"):
        main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")])
