"""Prompts as transformers' own processors would make them; torchvision there, missing or broken."""

import importlib
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES, pictures

from kepo.data.images import open_rgb
from kepo.models.encoding import Prompt
from kepo.models.families import processors
from kepo.models.vlm import VLM

THEIRS = {"qwen3": "qwen3_vl.Qwen3VLProcessor", "qwen2.5": "qwen2_5_vl.Qwen2_5_VLProcessor"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    sizes = (64, 32), (32, 32), (100, 70), (300, 280)  # the last two are resized
    return pictures(tmp_path_factory.mktemp("images"), *sizes)


def their_processor(vlm: VLM, name: str):
    """Transformers' own, around a stand-in for the video processor, which needs torchvision."""
    family, kind = THEIRS[name].split(".")
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")

    class Theirs(getattr(module, kind)):
        def check_argument_for_proper_class(self, name, argument):
            return type(argument)

    video = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    tokenizer = vlm.tokenizer
    return Theirs(
        vlm.encoder.image_processor, tokenizer, video, chat_template=tokenizer.chat_template
    )


@pytest.mark.parametrize("name", THEIRS)
def test_placeholders_are_expanded_as_by_transformers(tinies, shown, name):
    vlm = VLM.load(tinies / name)
    theirs = their_processor(vlm, name)
    a, b, c, d = shown
    for images in ([(a,), (b,), (d,)], [(a, b), (c,), (d, a, d)]):
        prompts = [Prompt(f"What {i}?\nA. 1", paths) for i, paths in enumerate(images)]
        content = [
            [{"type": "image"}] * len(p.images) + [dict(type="text", text=p.text)] for p in prompts
        ]
        texts = theirs.apply_chat_template(
            [[{"role": "user", "content": parts}] for parts in content],
            tokenize=False,
            add_generation_prompt=True,
        )
        wanted = theirs(
            text=texts,
            images=[[open_rgb(path) for path in p.images] for p in prompts],
            padding=True,
            return_tensors="pt",
        )
        inputs = vlm.encode(prompts)
        for field in ("input_ids", "attention_mask", "mm_token_type_ids"):
            assert torch.equal(getattr(inputs, field), wanted[field]), field
        places = [place for row in inputs.image_places for place in row]
        assert torch.equal(inputs.patches(places), wanted["pixel_values"])
        assert torch.equal(inputs.image_grid_thw[places], wanted["image_grid_thw"])


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_cut_whatever_the_tokenizer_asks_for(tinies, shown, name, tmp_path):
    """Half of an image's tokens gone would be an error at best."""
    shutil.copytree(tinies / name, tmp_path / name)
    settings = tmp_path / name / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    settings.write_text(json.dumps(content | {"model_max_length": 4, "truncation_side": "left"}))
    file = tmp_path / name / "tokenizer.json"
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncation": cut}))
    vlm, plain = VLM.load(tmp_path / name), VLM.load(tinies / name)
    assert len(vlm.tokenizer("a b c d e f g", truncation=True)["input_ids"]) == 4
    prompts = [Prompt("What is the sum of the two digits?", shown[:3])]
    assert torch.equal(vlm.encode(prompts).input_ids, plain.encode(prompts).input_ids)
    texts = ["<think>3 + 5 = 8</think><answer>C</answer>"]
    assert torch.equal(vlm.encode_completions(texts)[0], plain.encode_completions(texts)[0])


# ---- torchvision ----


@pytest.fixture
def unprobed(monkeypatch):
    """The probe as in a fresh process, what it does to sys.modules undone afterwards."""
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision")
    return processors.without_broken_torchvision.__wrapped__


def broken_torchvision(root):
    """As PyPI's build beside a CPU torch: it says it is there, and its import fails."""
    (root / "torchvision").mkdir()
    (root / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    metadata = root / "torchvision-0.99.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99\n")
    return root


def test_a_broken_torchvision_counts_as_missing(unprobed, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(broken_torchvision(tmp_path))
    assert importlib.util.find_spec("torchvision") is not None
    assert not unprobed()
    assert importlib.util.find_spec("torchvision") is None
    with pytest.raises(ImportError):
        import torchvision  # noqa: F401


def test_a_torchvision_that_works_is_used(unprobed, monkeypatch, tmp_path):
    folder = tmp_path / "torchvision" / "transforms" / "v2"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent, folder.parent.parent):
        (package / "__init__.py").write_text("")
    (folder / "functional.py").write_text("def resize(*arguments): return 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert unprobed() and "torchvision" in sys.modules


@pytest.mark.parametrize(
    "names",
    [
        {"Qwen2VLImageProcessor": "torchvision's", "Qwen2VLImageProcessorPil": "Pillow's"},
        {"Qwen2VLImageProcessorFast": "torchvision's", "Qwen2VLImageProcessor": "Pillow's"},
    ],
    ids=["since 5.4", "before"],
)
def test_processors_have_other_names_in_other_versions(names, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(**names))
    monkeypatch.setattr(processors, "without_broken_torchvision", lambda: True)
    assert processors.image_processor_class() == "torchvision's"
    assert processors.pillow_processor_class() == "Pillow's"
    monkeypatch.setattr(processors, "without_broken_torchvision", lambda: False)
    assert processors.image_processor_class() == "Pillow's"


@pytest.mark.slow
@pytest.mark.parametrize("name", THEIRS)
def test_models_load_beside_a_broken_torchvision(tinies, shown, name, tmp_path):
    """Transformers alone could not import one of them."""
    code = f"""
import sys
sys.path.insert(0, {str(broken_torchvision(tmp_path))!r})
from kepo.models.encoding import Prompt
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM
vlm = VLM.load({str(tinies / name)!r})
inputs = vlm.encode([Prompt("Which?", {str(shown[0])!r})])
print(vlm.generate(inputs, SamplingParams(max_tokens=2, temperature=0.0)).ids.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 2])" in done.stdout


@pytest.mark.skipif(
    not processors.without_broken_torchvision(), reason="there is no torchvision that works"
)
def test_both_processors_see_the_same(tinies, shown):
    folder = tinies / "qwen3"
    vlm, pillow = VLM.load(folder), VLM.load(folder)
    processor = processors.pillow_processor_class().from_pretrained(folder)
    pillow.encoder.pictures = replace(pillow.encoder.pictures, processor=processor)
    for path, near in zip(shown, (1e-6, 1e-6, 0.2, 0.2), strict=True):
        a, b = vlm.encode([Prompt("?", path)]), pillow.encode([Prompt("?", path)])
        assert torch.equal(a.input_ids, b.input_ids)
        torch.testing.assert_close(a.pixel_values, b.pixel_values, rtol=0, atol=near)
