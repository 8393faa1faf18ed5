"""The model card of a saved policy: what it says is what the run was, and the Hub can read it."""

from dataclasses import asdict, replace

import pytest
import yaml

from kepo.config import Config, from_mapping, load, presets
from kepo.errors import KepoConfigError, KepoDataError
from kepo.run.card import changed_settings, model_card
from kepo_kernels import __version__

CONFIG = Config(
    student="Qwen/Qwen3-VL-2B-Instruct",
    teacher="/home/someone/models/big-teacher",
    train_data="/home/someone/data/OmniMedVQA",
    train_modalities=("CT(Computed Tomography)",),
    eval_data="/home/someone/data/test",
    image_root="/home/someone",
    run_dir="/home/someone/runs/7",
    steps=400,
    lr=2e-6,
    rewards=("accuracy", "format"),
    reward_weights=(1.0, 0.5),
    micro_batch=8,
)
TRAIN = {
    "path": "/home/someone/data/OmniMedVQA",
    "layout": "OmniMedVQA",
    "records": 40,
    "questions": 28,
    "bad_records": {"field": 1, "image missing": 2},
    "first_problems": ["/home/someone/secret.json[3]: ..."],
    "quirks": {},
    "ids_sha256": "0" * 64,
}
DATA = {
    "train": TRAIN,
    "eval": TRAIN | {"path": "/home/someone/data/test", "questions": 9, "bad_records": {}},
    "shared": {"images": 3, "eval_questions": 5, "compared": "contents"},
}


def front(card):
    opening, text, body = card.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(text), body


def test_a_server_s_address_is_not_published():
    url = "http://10.0.0.7:8001/v1"
    served = replace(CONFIG, teacher=url)
    named = replace(served, teacher_model="Qwen/Qwen3-VL-8B-Instruct")
    two = replace(CONFIG, teacher=None, teachers={"CT": url, "MR": "/home/someone/models/other"})
    for config, words in (
        (served, ", with a model on a server as teacher,"),
        (named, "(https://huggingface.co/Qwen/Qwen3-VL-8B-Instruct) on a server as teacher,"),
        (two, ", with a model on a server and `other` as teachers,"),
    ):
        card = model_card(config, 250, DATA)
        assert words in card and "10.0.0.7" not in card


def test_what_the_card_says():
    matter, body = front(model_card(CONFIG, 250, DATA))
    assert matter == {
        "base_model": "Qwen/Qwen3-VL-2B-Instruct",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["kepo", "vision-language", "reinforcement-learning", "distillation"],
    }
    for words in (
        "[Qwen/Qwen3-VL-2B-Instruct](https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct)",
        "`big-teacher` as teacher",
        f"step 250 of 400 of a run of kepo {__version__}",
        "https://arxiv.org/abs/2602.00400",
        "Research only. Not for clinical use",
        "trained on 28 questions of `OmniMedVQA` (OmniMedVQA, 40 records, of which 3 left out as "
        "bad: field 1, image missing 2)",
        "of these modalities only: CT(Computed Tomography)",
        "evaluated on 9 questions of `test` (OmniMedVQA, 40 records)",
        "compared by contents: 3, with 5 of",
        "reward: 1 accuracy + 0.5 format",
        "beta 0.5 times 1, where accuracy is at least 1",
        "hints of the teacher: where every sample fails",
        "```yaml\nsteps: 400\nlr: 2.0e-06\n```",
    ):
        assert words in body, words


def test_a_card_tells_nothing_of_the_machine():
    card = model_card(replace(CONFIG, student="/home/someone/models/student"), 1, DATA)
    assert "someone" not in card and "# student, 1 steps" in card
    assert "base_model" not in front(card)[0]


def test_a_folder_that_looks_like_a_hub_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = replace(CONFIG, student="models/student")
    assert front(model_card(here, 1, DATA))[0]["base_model"] == "models/student"
    (tmp_path / "models" / "student").mkdir(parents=True)
    card = model_card(here, 1, DATA)
    assert "base_model" not in front(card)[0] and "huggingface.co/models" not in card


def test_adapters_belong_to_peft():
    matter, body = front(model_card(replace(CONFIG, lora_rank=16), 1, DATA))
    assert matter["library_name"] == "peft" and matter["base_model_relation"] == "adapter"
    assert "LoRA adapters of rank 16" in body and "PeftModel.from_pretrained" in body


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_method_has_its_card(name):
    """And the settings it shows make the same method over the defaults."""
    config = replace(load(name), student="a/b", teacher=None if "grpo" in name else "c/d")
    card = model_card(config, 0, {"train": TRAIN})
    shown = front(card)[1].partition("```yaml\n")[2].partition("```")[0]
    again = from_mapping(yaml.safe_load(shown) or {}, "card")
    assert changed_settings(asdict(config)) == changed_settings(asdict(again))
    assert ("as teacher" in card) == (config.distils or config.hints)
    assert ("distillation:" in card) == config.distils == ("distillation" in front(card)[0]["tags"])
    assert ("cross-entropy" in card) == (name == "sft")


@pytest.mark.parametrize(
    "gate, words",
    [
        (dict(gate_reward=None), "of every completion"),
        (dict(gate_threshold=None), "weighted by accuracy"),
        (dict(gate_reward="total", gate_threshold=0.5), "where total reward is at least 0.5"),
    ],
)
def test_the_gate_in_words(gate, words):
    assert words in model_card(replace(CONFIG, **gate), 1, DATA)


def test_what_makes_no_card_is_refused():
    with pytest.raises(KepoConfigError, match="step is -1"):
        model_card(CONFIG, -1, DATA)
    with pytest.raises(KepoConfigError, match=r"config\.student is not set"):
        model_card(Config(), 1, DATA)
    with pytest.raises(KepoDataError, match=r"data has \['eval'\]"):
        model_card(CONFIG, 1, {"eval": TRAIN})


def test_the_hub_reads_it():
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(model_card(CONFIG, 1, DATA))
    assert card.data.base_model == CONFIG.student and card.data.library_name == "transformers"
    assert card.data.tags[0] == "kepo" and card.text.lstrip().startswith("# Qwen3-VL-2B-Instruct")
