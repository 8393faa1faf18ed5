"""Models whose files do not fit together, or that do what cannot be obeyed: refused when loaded."""

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from folders import change_json, change_template, change_text_config
from small import config_of

from kepo.errors import KepoCheckpointError, KepoConfigError
from kepo.models.conventions import without_dropout
from kepo.models.encoding import Prompt
from kepo.models.vlm import VLM
from kepo.planner.model_sizes import model_sizes
from kepo.run.roles import load_policy

CPU = torch.device("cpu")
NAN = float("nan")
SAID = "<think>3 + 5 = 8</think><answer>C</answer>"


@pytest.fixture
def folder(tinies, tmp_path) -> Path:
    return Path(shutil.copytree(tinies / "qwen3", tmp_path / "model"))


def test_a_tokenizer_longer_than_the_head_is_refused(folder):
    vlm = VLM.load(folder)
    rows = vlm.head.weight.shape[0]
    spare = rows - len(vlm.tokenizer)
    vlm.tokenizer.add_tokens([f"[new {number}]" for number in range(spare)])
    vlm.tokenizer.save_pretrained(folder)
    VLM.load(folder)  # as many as there are rows
    vlm.tokenizer.add_tokens(["[one more]"])
    vlm.tokenizer.save_pretrained(folder)
    with pytest.raises(
        KepoCheckpointError, match=rf"ids up to {rows} \('\[one more\]'\), the model's head {rows}"
    ):
        VLM.load(folder)


@pytest.mark.parametrize(
    "file, settings, says",
    [
        ("preprocessor_config.json", dict(patch_size=14), "patch_size=14, the vision tower"),
        ("preprocessor_config.json", dict(merge_size=1), "merge_size=1, the vision tower"),
        ("preprocessor_config.json", dict(do_resize=False), "do_resize=false; expected true"),
        (
            "preprocessor_config.json",
            dict(image_processor_type="CLIPImageProcessor"),
            "names the image processor CLIPImageProcessor",
        ),
        (
            "preprocessor_config.json",
            dict(size={"shortest_edge": 0, "longest_edge": 0}),
            "shortest_edge=0 and longest_edge=0; expected 0 < shortest_edge <= longest_edge",
        ),
        (
            "preprocessor_config.json",
            dict(size={"shortest_edge": 2048, "longest_edge": 1024}),
            "shortest_edge=2048 and longest_edge=1024; expected",
        ),
        ("preprocessor_config.json", dict(size={"height": 64, "width": 64}), "shortest_edge=None"),
        (
            "preprocessor_config.json",
            dict(image_mean=[0.1, 0.1]),
            "image_mean=.0.1, 0.1.; expected",
        ),
        ("preprocessor_config.json", dict(image_mean="x"), "image_mean='x'; expected"),
        ("preprocessor_config.json", dict(image_std=[0, 0, 0]), "image_std=.0, 0, 0.; expected"),
        ("preprocessor_config.json", dict(image_std=[1, 1, -1]), "image_std=.1, 1, -1.; expected"),
        ("preprocessor_config.json", dict(image_std=[NAN] * 3), "image_std=.nan, nan, nan.; expec"),
        ("preprocessor_config.json", dict(image_std=None), "image_std=None; expected"),
        ("preprocessor_config.json", dict(rescale_factor=0), "rescale_factor=0; expected"),
        ("config.json", dict(image_token_id=65), "makes 0 image placeholders"),
    ],
)
def test_files_of_different_models_are_refused(folder, file, settings, says):
    change_json(folder / file, **settings)
    with pytest.raises(KepoCheckpointError, match=says):
        VLM.load(folder)


def test_a_softcap_that_the_forward_leaves_out_is_none(folder):
    change_text_config(folder, final_logit_softcapping=30.0)
    assert VLM.load(folder).head.softcap is None


def test_positions_that_depend_on_the_length_are_refused(folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    rope = text["rope_parameters"] | {"rope_type": "dynamic", "factor": 2.0}
    change_text_config(folder, rope_parameters=rope)
    with pytest.raises(KepoCheckpointError, match="rope_type='dynamic' turns positions"):
        VLM.load(folder)


@pytest.mark.parametrize(
    "template, says",
    [
        ("{{ nothing.there }}", "fails on a message"),
        ("{% for message in messages %}hello{% endfor %}", "makes no text"),
        (
            "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}",
            "makes 0 image placeholders",
        ),
    ],
)
def test_a_template_must_show_the_question_and_its_image(folder, template, says):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(KepoCheckpointError, match=says):
        VLM.load(folder)


@pytest.mark.parametrize("change", ["e", "upper", "forceescape", "replace('\\n', ' ')", "tojson"])
def test_a_template_that_changes_the_text_is_refused(folder, change):
    change_template(folder, "part.text", f"part.text | {change}")
    with pytest.raises(KepoCheckpointError, match="makes no text as it was written; expected the"):
        VLM.load(folder)


@pytest.mark.parametrize(
    "says",
    [
        "{{ range(100) | random }}",
        "{{ [7] | random }}",  # the same at every call, but by chance
        "{{ [[1, 2]] | map('random') | list }}",
        "{{ lipsum(1) }}",
    ],
)
def test_a_template_that_draws_at_random_is_refused(folder, says):
    change_template(folder, "{%- for message", says + "{%- for message")
    state = random.getstate()
    with pytest.raises(KepoCheckpointError, match=r"draws at random \(\|random, lipsum\)"):
        VLM.load(folder)
    assert random.getstate() == state


def test_a_template_that_counts_its_calls_is_refused(folder, monkeypatch):
    """Whatever it is that makes another prompt of the same message."""
    from transformers import PreTrainedTokenizerBase

    calls, real = itertools.count(), PreTrainedTokenizerBase.apply_chat_template
    monkeypatch.setattr(
        PreTrainedTokenizerBase,
        "apply_chat_template",
        lambda *args, **settings: f"{real(*args, **settings)}{next(calls)}",
    )
    with pytest.raises(KepoCheckpointError, match="makes two prompts of one message"):
        VLM.load(folder)


def test_a_template_that_says_what_day_it_is_is_refused(folder):
    change_template(folder, "{%- for message", "{{ strftime_now('%d %b %Y') }}{%- for message")
    with pytest.raises(KepoCheckpointError, match="writes the current date"):
        VLM.load(folder)


# ---- dropout ----


def test_dropout_of_the_config_is_not_trained_with_and_stays_in_the_config(
    folder, made, tmp_path, capsys
):
    change_text_config(folder, attention_dropout=0.5)
    policy = load_policy(config_of(made, tmp_path, student=str(folder)), CPU)
    assert "trained without its dropout (attention_dropout=0.5)" in capsys.readouterr().out
    inputs, (ids, mask) = policy.encode([Prompt("Which?")]), policy.encode_completions([SAID])
    with torch.no_grad():
        sampled_by = policy.completion_hidden(inputs, ids, mask)
        policy.model.train()
        trained = policy.completion_hidden(inputs, ids, mask)
    assert torch.equal(sampled_by, trained)
    policy.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["text_config"]["attention_dropout"] == 0.5


def test_dropout_is_found_in_layers_and_in_settings():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_dropout = 0.1
            self.resid = torch.nn.Dropout(0.2)
            self.whole = torch.nn.Dropout(0.0)

    module = torch.nn.Sequential(Attention(), torch.nn.Linear(2, 2))
    assert without_dropout(module) == ["attention_dropout=0.1", "dropout=0.2"]
    assert without_dropout(module) == []
    assert module[0].attention_dropout == 0.0 and module[0].resid.p == 0.0


@pytest.mark.parametrize("attention", ["foo", "flex_attention"])
def test_attention_that_the_model_cannot_be_computed_with_is_named(made, tmp_path, attention):
    """The setting is, and not the model's files: they are as they should be."""
    config = config_of(made, tmp_path, attn_implementation=attention)
    with pytest.raises(KepoConfigError, match=f"^attn_implementation='{attention}'.*sdpa, eager"):
        load_policy(config, CPU)
    with pytest.raises(KepoConfigError, match=f"^attn_implementation='{attention}'.*sdpa, eager"):
        model_sizes(str(made / "student"), "float32", attention=attention, device="cpu")
