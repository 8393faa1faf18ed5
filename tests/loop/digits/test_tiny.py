"""Model folders as they are released: names of weights, shards, settings; and tied heads."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES, pictures
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kepo.models.encoding import Prompt
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tinies):
    return tinies / request.param


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    return [Prompt("Which?", pictures(tmp_path_factory.mktemp("images"), (64, 32), (96, 64)))]


def states(vlm: VLM, asked) -> torch.Tensor:
    ids, mask = vlm.encode_completions(["<think>3 + 5</think>"])
    with torch.no_grad():
        return vlm.completion_hidden(vlm.encode(asked), ids, mask) @ vlm.head.weight.T


def names(file) -> list[str]:
    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def test_the_files_are_those_of_a_released_model(folder):
    found = {path.name for path in folder.iterdir()}
    assert found >= {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "preprocessor_config.json"),
    }
    settings = json.loads((folder / "generation_config.json").read_text())
    assert len(settings["eos_token_id"]) == 2 and settings["do_sample"]
    assert {"top_k", "top_p", "temperature", "repetition_penalty"} <= set(settings)
    older = folder.name == "qwen2.5"
    template = "chat_template" in json.loads((folder / "tokenizer_config.json").read_text())
    assert template == older and ("chat_template.jinja" in found) != older
    starts = {"lm_head", "model.layers", "visual.blocks"} if older else {"model.language_model"}
    weights = names(folder / "model.safetensors")
    assert all(any(name.startswith(start) for name in weights) for start in starts)
    assert ("lm_head.weight" in weights) == (folder.name != "qwen3-tied")


def test_a_tied_head_is_the_embedding_and_stays_it(tinies, tmp_path):
    vlm = VLM.load(tinies / "qwen3-tied")
    assert vlm.head.weight is vlm.model.get_input_embeddings().weight
    with torch.no_grad():
        vlm.head.weight[0] += 1
    vlm.save(tmp_path)
    again = VLM.load(tmp_path)
    assert again.head.weight is again.model.get_input_embeddings().weight
    assert torch.equal(again.head.weight, vlm.head.weight)
    apart = VLM.load(tinies / "qwen3")
    assert apart.head.weight is not apart.model.get_input_embeddings().weight
    assert not torch.equal(apart.head.weight, apart.model.get_input_embeddings().weight)


def test_weights_load_under_old_names_new_names_and_from_shards(folder, asked, tmp_path):
    vlm = VLM.load(folder)
    wanted = states(vlm, asked)
    for target in ("renamed", "shards"):
        shutil.copytree(folder, tmp_path / target)
        (tmp_path / target / "model.safetensors").unlink()
    renamed = {
        name.replace("visual.", "model.visual.", 1)
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.") and not name.startswith(("model.visual", "model.language"))
        else name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert set(renamed) <= set(vlm.model.state_dict())  # as the modules are called now
    save_file(renamed, tmp_path / "renamed" / "model.safetensors", {"format": "pt"})
    vlm.model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for target in ("renamed", "shards"):
        assert torch.equal(states(VLM.load(tmp_path / target), asked), wanted), target


def test_settings_of_the_language_model_may_stand_at_the_top(tinies, asked, tmp_path):
    """So they do in the released Qwen2.5-VL's config.json."""
    folder = tinies / "qwen2.5"
    shutil.copytree(folder, tmp_path / "flat")
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {k: x for k, x in text.items() if k not in ("model_type", "layer_types")} | config
    flat["rope_theta"] = rope["rope_theta"]
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat["torch_dtype"] = flat.pop("dtype")
    (tmp_path / "flat" / "config.json").write_text(json.dumps(flat))
    wanted = states(VLM.load(folder), asked)
    assert torch.equal(states(VLM.load(tmp_path / "flat"), asked), wanted)


def test_generate_heeds_only_the_end_tokens_of_the_models_own_settings(folder, asked, tmp_path):
    def sample(vlm, temperature):
        params = SamplingParams(n=3, max_tokens=12, temperature=temperature)
        return vlm.generate(vlm.encode(asked), params, seeds=range(3))

    shutil.copytree(folder, tmp_path / "odd")
    file = tmp_path / "odd" / "generation_config.json"
    given = json.loads(file.read_text())
    odd = dict(repetition_penalty=9.0, no_repeat_ngram_size=1, min_p=0.5, bad_words_ids=[[65]])
    odd |= dict(temperature=0.01, top_k=1, min_new_tokens=12, begin_suppress_tokens=[66])
    file.write_text(json.dumps(given | odd))
    (tmp_path / "none").mkdir()
    shutil.copytree(folder, tmp_path / "none", dirs_exist_ok=True)
    ends = json.dumps({"eos_token_id": given["eos_token_id"]})
    (tmp_path / "none" / "generation_config.json").write_text(ends)
    models = [VLM.load(path) for path in (folder, tmp_path / "odd", tmp_path / "none")]
    own = models[1].model.generation_config
    for temperature in (1.0, 0.0):
        plain, *others = [sample(vlm, temperature) for vlm in models]
        for other in others:
            assert all(map(torch.equal, plain, other))
    assert models[1].model.generation_config is own and own.no_repeat_ngram_size == 1
