"""Model folders that lack something, hold something else, or bring code."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from folders import change_json, change_text_config, change_weights
from safetensors.torch import load_file, save_file
from small import config_of

from kepo.errors import KepoCheckpointError, KepoConfigError
from kepo.models.encoding import Prompt
from kepo.models.reading import blank_model, read_model
from kepo.models.vlm import VLM
from kepo.run.roles import load_policy, load_teacher

CPU = torch.device("cpu")
UP = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def folder(tinies, tmp_path) -> Path:
    return Path(shutil.copytree(tinies / "qwen3", tmp_path / "model"))


def in_shards(folder: Path) -> Path:
    """The same weights in two files with an index, which is returned."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(where.values()):
        part = {name: x for name, x in tensors.items() if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def refused(folder: Path) -> str:
    """What every way to load a student, its checkpoint or a teacher says of the folder."""
    config = config_of(folder.parent, folder.parent, student=str(folder), teacher=str(folder))
    said = set()
    for way in (
        lambda: VLM.load(folder),  # as python -m kepo evaluate does
        lambda: load_policy(config, CPU),
        lambda: load_policy(config, CPU, folder),
        lambda: load_teacher(config, CPU),
    ):
        with pytest.raises(KepoCheckpointError) as caught:
            way()
        said.add(str(caught.value))
    (text,) = said
    assert str(folder) in text and "\n" not in text
    return text


# ---- tensors ----


def test_missing_tensors_are_counted_and_the_first_is_named(folder):
    gone = []

    def edit(tensors):
        gone.extend(sorted(name for name in tensors if ".layers.1." in name))
        for name in gone:
            del tensors[name]

    change_weights(folder / "model.safetensors", edit)
    text = refused(folder)
    assert f"lacks {len(gone)} of the model's tensors, first {gone[0]}" in text and len(gone) > 5


def test_tensors_that_are_not_the_models_are_refused(folder):
    change_weights(
        folder / "model.safetensors", lambda tensors: tensors.update(stray=torch.ones(2))
    )
    assert "has 1 tensors that are not the model's, first stray" in refused(folder)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(folder):
    change_weights(
        folder / "model.safetensors", lambda tensors: tensors.update({UP: torch.ones(2, 2)})
    )
    assert f"1 tensors have other shapes than config.json says, first {UP}: (2, 2)" in refused(
        folder
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, value):
    change_weights(folder / "model.safetensors", lambda tensors: tensors[UP][3].fill_(value))
    assert f"1 tensors have values that are not finite, first {UP}" in refused(folder)


def test_a_head_of_its_own_beside_a_config_that_ties_it_is_refused(tinies, folder):
    change_json(folder / "config.json", tie_word_embeddings=True)
    assert "config.json says tie_word_embeddings, but lm_head.weight is another" in refused(folder)
    tied = VLM.load(tinies / "qwen3-tied")
    assert tied.head.weight is tied.model.get_input_embeddings().weight


def test_a_tied_model_whose_config_forgot_it_lacks_its_head(tinies, tmp_path):
    folder = Path(shutil.copytree(tinies / "qwen3-tied", tmp_path / "model"))
    change_text_config(folder, tie_word_embeddings=False)
    change_json(folder / "config.json", tie_word_embeddings=False)
    assert "lacks 1 of the model's tensors, first lm_head.weight" in refused(folder)


# ---- files ----


def test_shards_are_read_as_one_file_is(tinies, folder):
    in_shards(folder)
    whole, parts = VLM.load(tinies / "qwen3").model, VLM.load(folder).model
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda index: index.with_name("model-1.safetensors").unlink(), "lacks 1 of the 2 files"),
        (lambda index: index.write_text("{"), "cannot be read"),
        (lambda index: index.write_text("[]"), "cannot be read"),
        (lambda index: index.write_text('{"weight_map": {"a": "../model-1.safetensors"}}'), "own"),
        (lambda index: index.write_text('{"weight_map": {"a": "x.bin"}}'), "only .*safetensors"),
        (
            lambda index: change_weights(index.with_name("model-1.safetensors"), dict.popitem),
            "disagree on 1 tensors, first .* in model-1.safetensors and which is in no file",
        ),
        (lambda index: index.write_text('{"weight_map": {}}'), "names no file"),
    ],
)
def test_an_index_must_name_what_is_there(folder, spoil, says):
    spoil(in_shards(folder))
    with pytest.raises(KepoCheckpointError, match=says):
        VLM.load(folder)
    refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 1000, -64])
def test_a_cut_file_is_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors cannot be read" in refused(folder)


def in_other_shard(folder: Path, zeros: bool) -> str:
    """Puts the first tensor of a shard into the other too, or there alone; returns its name."""
    index = in_shards(folder)
    ours, theirs = (load_file(index.with_name(f"model-{number}.safetensors")) for number in (0, 1))
    name = min(ours)
    theirs[name] = torch.zeros_like(ours[name]) if zeros else ours.pop(name)
    for number, tensors in enumerate((ours, theirs)):
        file = index.with_name(f"model-{number}.safetensors")
        save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("twice", [True, False])
def test_a_tensor_is_in_the_one_shard_that_the_index_names(folder, twice):
    """Of two under one name it would be chance which is loaded."""
    name = in_other_shard(folder, zeros=twice)
    found = "model-0.safetensors and model-1.safetensors" if twice else "model-1.safetensors"
    text = refused(folder)
    assert f"disagree on 1 tensors, first {name}, which it says is in model-0.safetensors" in text
    assert f"and which is in {found}; copy the folder again" in text


@pytest.mark.parametrize("ghost", [True, False])
def test_an_index_names_every_tensor_and_no_other(folder, ghost):
    index = in_shards(folder)
    content = json.loads(index.read_text())
    if ghost:
        content["weight_map"]["ghost"] = "model-1.safetensors"
    else:
        del content["weight_map"][UP]
    index.write_text(json.dumps(content))
    text = refused(folder)
    assert f"disagree on 1 tensors, first {'ghost' if ghost else UP}, which it says is" in text
    assert ("and which is in no file" in text) == ghost == ("says is in no file" not in text)


def test_two_sets_of_weights_are_refused(tinies, folder):
    in_shards(folder)
    shutil.copy(tinies / "qwen3" / "model.safetensors", folder)
    text = refused(folder)
    assert "two sets of weights, model.safetensors and model.safetensors.index.json" in text


def test_an_index_of_one_file_is_no_second_set(folder):
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    VLM.load(folder)


@pytest.mark.parametrize(
    "dtype, called", [("int8", "I8"), ("int64", "I64"), ("bool", "BOOL"), ("float8_e4m3fn", "F8_")]
)
def test_weights_of_other_dtypes_are_not_cast_in_silence(folder, dtype, called):
    kind = getattr(torch, dtype)
    change_weights(folder / "model.safetensors", lambda x: x.update({UP: x[UP].to(kind)}))
    assert f"1 tensors of other dtypes than float64, float32, bfloat16, float16, first {UP}: " in (
        text := refused(folder)
    )
    assert f"{UP}: {called}" in text


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_every_float_dtype_are_read(folder, kind):
    change_weights(
        folder / "model.safetensors",
        lambda tensors: tensors.update({name: x.to(kind) for name, x in tensors.items()}),
    )
    VLM.load(folder)


def test_a_download_that_had_its_room_and_stopped_is_refused(folder):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size // 2)
        opened.write(bytes(size - size // 2))
    assert "nothing but zeros in" in refused(folder) and "copy it again" in refused(folder)


def test_a_hole_in_a_file_is_refused(folder):
    """As of a download in parts, of which one has not come."""
    gone = [f"model.language_model.layers.1.mlp.{part}_proj.weight" for part in ("down", "gate")]
    change_weights(folder / "model.safetensors", lambda x: [x[name].zero_() for name in gone])
    assert f"zeros in 2 neighbouring weights, {gone[0]} to {gone[1]}, as" in refused(folder)


def test_zeros_that_may_be_meant_are_read(folder):
    """Blocks that were put in do nothing at first, by the last matrix of each half; biases too."""

    def edit(tensors):
        for name, x in tensors.items():
            if name.endswith(("bias", "o_proj.weight", "down_proj.weight")):
                x.zero_()

    change_weights(folder / "model.safetensors", edit)
    VLM.load(folder)


def test_without_weights_it_says_so(folder):
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors; expected it, or model.safetensors.index.json" in refused(
        folder
    )


def test_only_safetensors_are_read(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "has pytorch_model.bin and no model.safetensors; only safetensors are" in refused(folder)


def test_weights_of_another_name_are_not_read(folder):
    torch.save({}, folder / "adapter_model.bin")
    change_json(folder / "config.json", transformers_weights="adapter_model.bin")
    assert "transformers_weights='adapter_model.bin'; expected it left out" in refused(folder)


# ---- code ----


def test_code_of_a_model_is_not_run_and_not_asked_about(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\n"
        "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast\n"
        "class Config(PretrainedConfig):\n    model_type = 'own'\n"
        "class Model(PreTrainedModel):\n    pass\n"
        "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    change_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]},
    )
    parts = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}
    change_json(folder / "config.json", auto_map=parts)
    VLM.load(folder)  # transformers knows the type, so the folder's code is not needed
    change_json(folder / "config.json", model_type="own")
    assert "brings code of its own (auto_map), which is never run here" in refused(folder)
    assert not ran.exists()


def test_a_config_that_is_nonsense_is_refused(folder):
    for odd in ({"hidden_size": "wide"}, {"num_attention_heads": 0}):
        change_text_config(folder, **odd)
        assert "cannot load a model" in refused(folder)


# ---- adapters ----


@pytest.fixture
def adapters(tinies, tmp_path) -> Path:
    """Saved adapters that change something, of a student in `tinies`."""
    pytest.importorskip("peft")
    policy = load_policy(adapted_config(tinies, tmp_path), CPU)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    policy.save(tmp_path / "adapters")
    return tmp_path / "adapters"


def adapted_config(tinies: Path, run_dir: Path):
    return config_of(tinies, run_dir, student=str(tinies / "qwen3"), lora_rank=2)


def test_saved_adapters_are_loaded_with_the_model_they_belong_to(tinies, adapters, tmp_path):
    inputs = VLM.load(tinies / "qwen3").encode([Prompt("Which?")])

    def states(vlm):
        ids, mask = vlm.encode_completions(["3 + 5"])
        with torch.no_grad():
            return vlm.completion_hidden(inputs, ids, mask)

    alone = states(VLM.load(adapters))
    assert torch.equal(alone, states(load_policy(adapted_config(tinies, tmp_path), CPU, adapters)))
    assert not torch.equal(alone, states(VLM.load(tinies / "qwen3")))


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda tensors: tensors.pop(min(tensors)), "lacks 1 of the model's tensors, first base_"),
        (lambda tensors: tensors.update(stray=torch.ones(1)), "has 1 tensors that are not"),
        (lambda tensors: tensors.update({min(tensors): torch.ones(3, 3)}), "cannot be loaded"),
        (lambda tensors: tensors[min(tensors)].fill_(float("nan")), "not finite"),
        (lambda tensors: [x.zero_() for x in tensors.values()], "nothing but zeros in 21 neighb"),
        (
            lambda tensors: tensors.update({min(tensors): tensors[min(tensors)].to(torch.int8)}),
            "1 tensors of other dtypes",
        ),
    ],
)
def test_adapters_must_be_whole_too(tinies, adapters, tmp_path, edit, says):
    change_weights(adapters / "adapter_model.safetensors", edit)
    for load in (
        lambda: VLM.load(adapters),
        lambda: load_policy(adapted_config(tinies, tmp_path), CPU, adapters),
    ):
        with pytest.raises(KepoCheckpointError, match=says):
            load()


def test_adapters_that_have_learnt_nothing_yet_are_read(adapters):
    change_weights(
        adapters / "adapter_model.safetensors",
        lambda tensors: [x.zero_() for name, x in tensors.items() if "lora_B" in name],
    )
    VLM.load(adapters)


def test_adapters_in_a_pickle_are_not_read(tinies, adapters, tmp_path):
    tensors = load_file(adapters / "adapter_model.safetensors")
    (adapters / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapters / "adapter_model.bin")
    for load in (
        lambda: VLM.load(adapters),
        lambda: load_policy(adapted_config(tinies, tmp_path), CPU, adapters),
    ):
        with pytest.raises(KepoCheckpointError, match=r"has adapter_model\.bin and no adapter_"):
            load()


def test_adapters_of_nobody_or_of_adapters_are_refused(adapters):
    for base in (None, 3, str(adapters)):
        change_json(adapters / "adapter_config.json", base_model_name_or_path=base)
        with pytest.raises(KepoCheckpointError, match=f"base_model_name_or_path={base!r}; expect"):
            VLM.load(adapters)


def test_a_blank_model_has_room_for_the_adapters(adapters):
    blank, real = (f(adapters, torch.bfloat16) for f in (blank_model, read_model))
    shapes = [
        {name: (x.shape, x.dtype) for name, x in model.named_parameters()}
        for model in (blank, real)
    ]
    assert shapes[0] == shapes[1] and any("lora_" in name for name in shapes[0])


def test_adapters_are_no_student(adapters, tinies, tmp_path):
    with pytest.raises(KepoConfigError, match="holds adapters and not a whole model; merge them"):
        load_policy(config_of(tinies, tmp_path, student=str(adapters)), CPU)
