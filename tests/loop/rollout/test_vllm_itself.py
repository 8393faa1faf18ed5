"""The vLLM sampler over vLLM itself, on a CPU: `make vllm-test` has an environment with it.

KEPO_VLLM_RESULTS names a file for the numbers.
"""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

import vllm
import vllm_models
from families import pictures

from benchmarks.stamp import installed, stamp
from kepo.errors import KepoConfigError, KepoError
from kepo.models.encoding import Prompt
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM
from kepo.rollout.vllm import VllmSampler

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
KINDS = {
    "Qwen3-VL": {},
    "Qwen3-VL, tied": dict(tied=True),
    "Qwen2.5-VL": dict(family="qwen2_5_vl"),
    "InternVL": dict(family="internvl"),
    "text only": dict(family="text_only"),
    "text only, tied": dict(family="text_only", tied=True),
}
ROUNDING = 2e-5  # nat; both compute in float32, in another order
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
HOT = SamplingParams(max_tokens=24, temperature=1.0, n=4)
COMPARED: dict[str, dict[str, float]] = {}


def sampler_of(vlm: VLM, folder: Path, **settings) -> VllmSampler:
    usual = dict(device=vlm.device, dtype="float32", memory_share=0.15, weights=vlm.weights)
    usual["never_sampled"] = vlm.never_sampled()
    return VllmSampler(vlm.encoder, folder, **(usual | settings))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Pictures that are kept as they are, made larger and made smaller."""
    sizes = ((64, 32), (96, 160), (20, 20), (500, 400))
    return pictures(tmp_path_factory.mktemp("shown"), *sizes)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory, shown):
    """A policy, its sampler, and prompts with one picture, two or none."""
    folder = vllm_models.build(tmp_path_factory.mktemp("tiny") / "student", **KINDS[request.param])
    vlm = VLM.load(folder)
    asked = [Prompt("Which digit is it?", path) for path in shown]
    asked += [Prompt("Which is larger?", shown[:2]), Prompt("And here?", shown[2:])]
    if vlm.encoder.pictures is None:
        asked = [Prompt(prompt.text) for prompt in asked]
    asked.append(Prompt("What is 3 + 5?"))
    sampler = sampler_of(vlm, folder)
    yield SimpleNamespace(name=request.param, vlm=vlm, sampler=sampler, prompts=asked)
    sampler.close()


@pytest.fixture(scope="module", autouse=True)
def numbers():
    """At the end, the file of the results."""
    yield
    if file := os.environ.get("KEPO_VLLM_RESULTS"):
        about = {name: str(value) for name, value in stamp().items() if value != "not installed"}
        about |= {name: installed(name) for name in ("transformers", "torchvision")}
        lines = [f"vLLM {vllm.__version__} on a CPU, float32, against the sampler of transformers"]
        lines += [", ".join(f"{name} {value}" for name, value in about.items()), ""]
        for kind, found in COMPARED.items():
            lines += [f"{kind}:", *(f"  {what}: {value:.3g}" for what, value in found.items())]
        Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def noted(made, what: str, value: float) -> None:
    COMPARED.setdefault(made.name, {})[what] = value


def tokens(sampled) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(sampled.ids, sampled.mask, strict=True)]


def compare(made, params: SamplingParams, seeds: range) -> tuple[float, int]:
    """Sample and compare with the policy; returns the largest difference and the tokens."""
    drawn = made.sampler.sample(made.prompts, params, seeds)
    far = vllm_models.apart(made.vlm, made.prompts, params, drawn)
    return far, int(drawn.mask.sum())


# ---- the same model ----


def test_greedy_tokens_are_those_of_transformers(made):
    with made.sampler.ready():
        drawn = made.sampler.sample(made.prompts, GREEDY)
    assert tokens(drawn) == tokens(made.vlm.sample(made.prompts, GREEDY))
    assert len({tuple(row) for row in tokens(drawn)}) > 1, "all prompts give the same tokens"
    noted(made, "greedy tokens, all equal", int(drawn.mask.sum()))


@pytest.mark.parametrize("change", [{}, dict(temperature=0.7, top_p=0.8), dict(temperature=1.5)])
def test_its_numbers_are_those_of_the_policy(made, change):
    params = replace(HOT, **change)
    with made.sampler.ready():
        far, count = compare(made, params, range(4 * len(made.prompts)))
    at = f"temperature {params.temperature}, top_p {params.top_p}"
    noted(made, f"{at}: tokens compared", count)
    noted(made, f"{at}: largest difference of log-probabilities, nat", far)
    assert count > 500 and far < ROUNDING


def test_a_picture_is_seen(made):
    if made.vlm.encoder.pictures is None:
        pytest.skip("it sees none")
    one, other = (made.prompts[place] for place in (0, 1))
    with made.sampler.ready():
        said = tokens(made.sampler.sample([one, replace(one, images=other.images)], GREEDY))
    assert said[0] != said[1]


# ---- weights ----


@torch.no_grad()
def shift(model: torch.nn.Module, by: float) -> None:
    """Move every weight of a model, or of a part of it."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter += by * torch.randn(parameter.shape, generator=generator)


def test_an_update_is_heard(made):
    with made.sampler.ready():
        before = made.sampler.sample(made.prompts, GREEDY)
    shift(made.vlm.model, 0.02)
    try:
        with made.sampler.ready():
            after = made.sampler.sample(made.prompts, GREEDY)
            far, count = compare(made, HOT, range(4 * len(made.prompts)))
        assert tokens(after) == tokens(made.vlm.sample(made.prompts, GREEDY)) != tokens(before)
    finally:
        shift(made.vlm.model, -0.02)
    noted(made, "after an update of all weights: tokens compared", count)
    noted(made, "after an update of all weights: largest difference, nat", far)
    assert far < ROUNDING
    with made.sampler.ready():
        assert tokens(made.sampler.sample(made.prompts, GREEDY)) == tokens(before)


def test_an_update_of_the_vision_tower_alone_is_heard(made):
    """vLLM keeps what it has computed of pictures and of the beginnings of prompts."""
    parts = made.vlm.family.vision(made.vlm.model)
    if not parts:
        pytest.skip("it has none")
    with made.sampler.ready():
        before = made.sampler.sample(made.prompts, GREEDY)
    shift(parts[0], 0.2)
    try:
        with made.sampler.ready():
            after = made.sampler.sample(made.prompts, GREEDY)
        assert tokens(after) == tokens(made.vlm.sample(made.prompts, GREEDY)) != tokens(before)
    finally:
        shift(parts[0], -0.2)


def test_a_parameter_that_gets_no_weights_is_named(made, monkeypatch):
    lost = [name for name, _ in made.vlm.weights() if "layers.1.input_layernorm" in name]
    kept = [pair for pair in made.vlm.weights() if pair[0] not in lost]
    monkeypatch.setattr(made.sampler, "_weights", lambda: iter(kept))
    said = r"nothing for 1 of .*layers.1.input_layernorm.weight"
    with pytest.raises(KepoError, match=said), made.sampler.ready():
        pass
    monkeypatch.undo()
    with made.sampler.ready():
        assert made.sampler.sample(made.prompts, GREEDY).mask.any()


# ---- seeds ----


def test_a_seed_gives_the_same_tokens_beside_others(made):
    prompts, params = made.prompts, replace(HOT, n=1)
    seeds = list(range(len(prompts)))
    with made.sampler.ready():
        first = tokens(made.sampler.sample(prompts, params, seeds))
        again = tokens(made.sampler.sample(prompts, params, seeds))
        turned = tokens(made.sampler.sample(prompts[::-1], params, seeds[::-1]))[::-1]
        alone = tokens(made.sampler.sample(prompts[1:2], params, seeds[1:2]))
        others = tokens(made.sampler.sample(prompts, params, [seed + 100 for seed in seeds]))
    assert first == again == turned and alone == first[1:2]
    assert all(one != other for one, other in zip(first, others, strict=True))


# ---- refusals ----


def test_what_vllm_refuses_is_one_sentence(tmp_path):
    folder = vllm_models.build(tmp_path / "student", family="text_only")
    said = r"^sampler='vllm' with \S+: vLLM .* and vllm_memory=0.001: Available memory .*\.$"
    with pytest.raises(KepoConfigError, match=said):
        sampler_of(VLM.load(folder), folder, memory_share=0.001)
