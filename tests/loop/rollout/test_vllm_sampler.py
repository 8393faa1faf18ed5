"""The vLLM sampler against a stand-in with vLLM's interface: what it asks, when, what it keeps."""

import os
import sys
from dataclasses import make_dataclass, replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from PIL import Image
from toy import ENV, example, question_prompt

pytest.importorskip("transformers")

from kepo.config import Config
from kepo.digits.tiny import build_tiny
from kepo.errors import KepoConfigError, KepoError
from kepo.models.encoding import Prompt
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM
from kepo.rollout import vllm as sampling
from kepo.rollout import vllm_platform
from kepo.rollout.rollouts import sample
from kepo.rollout.vllm import VllmSampler

PARAMS = SamplingParams(max_tokens=6, temperature=0.9, top_p=0.8)
OtherArgs = make_dataclass("OtherArgs", sorted(fake_vllm.ENGINE_SETTINGS - {"dtype", "seed"}))
WAKING = ["wake_up weights", "apply_model", "reset_prefix_cache", "reset_encoder_cache"]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny model's folder and its encoder."""
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, size="student", seed=0)
    return folder, VLM.load(folder)


@pytest.fixture
def images(tmp_path):
    for number, size in enumerate([(64, 32), (32, 32), (500, 400)]):
        Image.new("RGB", size, (40 * number, 0, 90)).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(3)]


@pytest.fixture
def made(student, monkeypatch):
    """A sampler over the stand-in, and the weights that it is given; see `answer`."""
    folder, vlm = student
    end = vlm.tokenizer.eos_token_id

    def answer(prompt, params, shift):
        """Tokens from the seed and the weights: 1 to 5 of them and the end, or cut at the limit."""
        seed = params.seed or 0
        tokens = [5 + (seed + shift + place) % 90 for place in range(1 + seed % 5)] + [end]
        cut = tokens[: params.max_tokens]
        numbers = [-(seed % 100) - place / 8 for place in range(len(cut))]
        return cut, numbers, "stop" if cut[-1] == end else "length"

    def expand(prompt, settings):
        """As the image processor of the folder resizes, with the sizes that the sampler gave."""
        processor = type(vlm.encoder.image_processor).from_pretrained(
            folder, **settings.get("mm_processor_kwargs", {})
        )
        ids, pictures = [], iter(prompt["multi_modal_data"]["image"])
        for token in prompt["prompt_token_ids"]:
            if token == vlm.encoder.image_token_id:
                grid = processor(images=[next(pictures)], return_tensors="pt")["image_grid_thw"]
                ids += [token] * (int(grid.prod()) // processor.merge_size**2)
            else:
                ids.append(token)
        return ids

    monkeypatch.setattr(fake_vllm.LLM, "answer", staticmethod(answer), raising=False)
    monkeypatch.setattr(fake_vllm.LLM, "expand", staticmethod(expand), raising=False)
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm)
    monkeypatch.setattr(sampling, "load_weights", lambda model, _, given: model.load_weights(given))
    present = {"shift": torch.tensor(3), "other": torch.ones(2)}

    def sampler(**settings):
        return VllmSampler(
            vlm.encoder,
            folder,
            **{
                "device": torch.device("cuda"),  # for which platform; nothing is put there
                "dtype": "bfloat16",
                "memory_share": 0.4,
                "never_sampled": vlm.never_sampled(),
                "weights": lambda: iter(present.items()),
                **settings,
            },
        )

    return SimpleNamespace(sampler=sampler, weights=present, end=end, vlm=vlm, answer=answer)


def tokens(sampled):
    return [row[keep].tolist() for row, keep in zip(sampled.ids, sampled.mask, strict=True)]


# ---- what is asked, what comes back ----


def test_completions_are_in_order_and_keep_their_ends_and_numbers(made, images):
    sampler = made.sampler()
    prompts = [Prompt("Which?", images[0]), Prompt("What is it?", images[1])]
    seeds = [11, 14, 2**62 + 10, 3]
    with sampler.ready():
        drawn = sampler.sample(prompts, replace(PARAMS, n=2), seeds)
    asked = sampler._llm.asked
    answers = [made.answer(None, params, 3) for _, params in asked]
    assert [params.seed for _, params in asked] == seeds
    sizes = [request["multi_modal_data"]["image"][0].size for request, _ in asked]
    assert sizes == [(64, 32)] * 2 + [(32, 32)] * 2  # those of a prompt in a row
    assert tokens(drawn) == [list(answer[0]) for answer in answers]
    assert {len(row) for row in tokens(drawn)} == {3, 6, 5}
    assert drawn.logprobs.dtype == torch.float32 and drawn.ids.dtype == torch.int64
    for row, (ids, numbers, _) in enumerate(answers):
        assert drawn.logprobs[row, : len(ids)].tolist() == numbers
        assert (drawn.ids[row, len(ids) :] == made.vlm.tokenizer.pad_token_id).all()
    assert (drawn.logprobs[~drawn.mask] == 0).all()


def test_a_prompt_has_one_placeholder_and_its_picture(made, images):
    sampler = made.sampler()
    prompts = [Prompt("Which?", path) for path in images]
    with sampler.ready():
        sampler.sample(prompts, PARAMS, seeds=[1, 2, 3])
    image = made.vlm.encoder.image_token_id
    for (request, _), prompt, path in zip(sampler._llm.asked, prompts, images, strict=True):
        assert request["prompt_token_ids"].count(image) == 1
        (picture,) = request["multi_modal_data"]["image"]
        assert picture.mode == "RGB" and picture.size == Image.open(path).size
        encoded = made.vlm.encode([prompt]).input_ids[0].tolist()
        assert [t for t in encoded if t != image] == [
            t for t in request["prompt_token_ids"] if t != image
        ]


def test_tokens_around_a_picture_are_vllms_own(images, tmp_path):
    """InternVL's template writes one token for a picture; the encoder and vLLM enclose it."""
    build_tiny(tmp_path, size="student", seed=0, family="internvl")
    vlm = VLM.load(tmp_path)
    how = dict(device=torch.device("cpu"), dtype="float32", memory_share=0.3, never_sampled=[])
    llm = fake_vllm.LLM(model="there")
    sampler = VllmSampler(vlm.encoder, tmp_path, **how, weights=dict, llm=llm)
    prompt = Prompt("Which?", images[:2])
    request, expanded = sampler._request(prompt)
    asked = vlm.tokenizer.decode(request["prompt_token_ids"])
    template = "user\n<IMG_CONTEXT>\n<IMG_CONTEXT>\nWhich?<|im_end|>"
    assert template in asked
    assert vlm.tokenizer.decode(expanded).count("<img><IMG_CONTEXT>") == 2


def test_the_law_is_the_one_asked_for(made, images):
    sampler = made.sampler()
    with sampler.ready():
        sampler.sample([Prompt("Which?", images[0])], PARAMS, seeds=[7])
    ((_, params),) = sampler._llm.asked
    assert (params.temperature, params.top_p, params.top_k) == (0.9, 0.8, 0)
    assert (params.n, params.max_tokens, params.logprobs) == (1, 6, 0)
    assert params.stop_token_ids == [made.end, made.vlm.tokenizer.pad_token_id]
    assert params.logit_bias == dict.fromkeys(made.vlm.never_sampled(), -100.0)
    assert sampler._llm.settings["logprobs_mode"] == "processed_logprobs"
    assert sampler._llm.settings["generation_config"] == "vllm"
    assert sampler._llm.settings["trust_remote_code"] is False
    assert sampler._llm.settings["load_format"] == "safetensors"
    assert sampler.collective is False


def test_greedy_reads_no_seed_and_says_zero(made, images):
    sampler = made.sampler()
    with sampler.ready():
        drawn = sampler.sample([Prompt("Which?", images[0])], replace(PARAMS, temperature=0.0))
    ((_, params),) = sampler._llm.asked
    assert params.temperature == 0 and params.seed is None and params.logprobs is None
    assert not drawn.logprobs.any() and tokens(drawn) == [[8, made.end]]


def test_without_seeds_they_come_from_the_global_generator(made, images):
    sampler = made.sampler()
    with sampler.ready():
        for _ in range(2):
            torch.manual_seed(0)
            sampler.sample([Prompt("Which?", images[0])] * 2, PARAMS)
    seeds = [params.seed for _, params in sampler._llm.asked]
    assert seeds[:2] == seeds[2:] and seeds[0] != seeds[1] and min(seeds) >= 0


def test_rollouts_keep_the_numbers_of_the_engine(made, images):
    config = Config(max_completion_length=4, sampling_temperature=0.7, rollout_batch=2)
    lengths = {path: made.vlm.encode([Prompt("", path)]).input_ids.shape[1] for path in images}
    images = sorted(images, key=lengths.get)  # the order in which they are asked
    asked = [example(f"q{place}", images=(path,)) for place, path in enumerate(images)]
    sampler = made.sampler()
    with sampler.ready():
        groups = sample(sampler, asked, ENV, config, num_generations=2, stream=("a", 1))
    assert sampler._llm.calls.count("generate") == 3
    for place, ((_, params), r) in enumerate(
        zip(sampler._llm.asked, (r for group in groups for r in group), strict=True)
    ):
        ids, numbers, _ = made.answer(None, params, 3)
        assert r.completion_ids.tolist() == ids and r.example is asked[place // 2]
        assert r.sampler_logprobs.tolist() == numbers
        assert r.truncated == (ids[-1] != made.end)
    shown = made.vlm.encode([Prompt(question_prompt(asked[0]), images[0])]).input_ids[0].tolist()
    assert fake_vllm.LLM.expand(sampler._llm.asked[0][0], sampler._llm.settings) == shown


# ---- weights, sleeping and waking ----


def test_weights_are_fresh_each_time_and_loaded_before_anything_is_sampled(made, images):
    sampler = made.sampler()
    prompts = [Prompt("Which?", images[0])]
    drawn = []
    for shift in (3, 40):
        made.weights["shift"] = torch.tensor(shift)
        with sampler.ready():
            made.weights["shift"] = torch.tensor(77)  # what changes later is for the next time
            drawn += tokens(sampler.sample(prompts, PARAMS, seeds=[0]))
    assert drawn == [[8, made.end], [45, made.end]]
    around = [*WAKING, "wake_up kv_cache", "generate", "sleep 2"]
    assert sampler._llm.calls == ["sleep 2", *around, *around]


def test_it_sleeps_again_whatever_happens(made):
    sampler = made.sampler()
    with pytest.raises(ZeroDivisionError), sampler.ready():
        1 / 0  # noqa: B018
    assert sampler._llm.calls[-1] == "sleep 2" and not sampler._llm.awake

    def broken():
        yield "shift", torch.tensor(1)
        raise OSError("gone")

    sampler = made.sampler(weights=broken)
    with pytest.raises(OSError, match="gone"), sampler.ready():
        pass
    assert sampler._llm.calls[-1] == "sleep 2"


def test_a_parameter_without_weights_is_named(made):
    del made.weights["other"]
    sampler = made.sampler()
    said = "nothing for 1 of vLLM's parameters, first other"
    with pytest.raises(KepoError, match=said), sampler.ready():
        pass


def test_asleep_it_does_not_sample(made, images):
    sampler = made.sampler()
    with sampler.ready():
        pass
    with pytest.raises(KepoError, match=r"asleep; call it within ready"):
        sampler.sample([Prompt("Which?", images[0])], PARAMS, seeds=[1])


def test_closed_the_engine_ends(made):
    sampler = made.sampler()
    sampler.close()
    assert sampler._llm.calls[-1] == "shutdown"


# ---- where it computes ----


def test_on_a_cpu_it_neither_sleeps_nor_wakes(made, images):
    sampler = made.sampler(device=torch.device("cpu"))
    assert "enable_sleep_mode" not in sampler._llm.settings
    assert sampler._llm.settings["enforce_eager"] is True
    with sampler.ready():
        sampler.sample([Prompt("Which?", images[0])], PARAMS, seeds=[1])
    assert sampler._llm.calls == [*WAKING[1:], "generate"]


@pytest.mark.parametrize(
    ("installed", "device"),
    [({"vllm": "0.32.0"}, "cuda"), ({"vllm": "0.32.0+cpu"}, "cpu"), ({}, "cpu")],
)
def test_a_build_tells_its_device(monkeypatch, installed, device):
    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(vllm_platform, "version", version)
    assert vllm_platform.built_for() == device


# ---- how it is started ----


def test_it_is_started_in_this_process_as_torchrun_would(made, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    llm = made.sampler()._llm
    assert llm.settings["distributed_executor_backend"] == "external_launcher"
    assert llm.settings["gpu_memory_utilization"] == 0.4 and llm.settings["dtype"] == "bfloat16"
    assert llm.settings["enable_sleep_mode"] and llm.settings["tensor_parallel_size"] == 1
    assert (llm.environment["RANK"], llm.environment["WORLD_SIZE"]) == ("0", "1")
    assert int(llm.environment["MASTER_PORT"]) > 0 and dict(os.environ) == before
    monkeypatch.setenv("RANK", "3")
    assert made.sampler()._llm.environment["RANK"] == "3" and os.environ["RANK"] == "3"


def test_an_llm_that_is_there_is_used(made):
    llm = fake_vllm.LLM(model="there")
    assert made.sampler(llm=llm)._llm is llm and llm.calls == ["sleep 2"]


def test_images_are_resized_as_the_encoder_does(made, student, images, monkeypatch):
    """The encoder's limits are not those of the folder: vLLM must be told them."""
    vlm = VLM.load(student[0])
    vlm.encoder.image_processor.size = {"shortest_edge": 1024, "longest_edge": 4096}
    prompts = [Prompt("Which?", images[2])]
    own = made.sampler()
    sampler = VllmSampler(
        vlm.encoder,
        student[0],
        device=torch.device("cuda"),
        dtype="float32",
        memory_share=0.3,
        never_sampled=[],
        weights=lambda: made.weights.items(),
    )
    with sampler.ready(), own.ready():
        sampler.sample(prompts, PARAMS, seeds=[1])
        own.sample(prompts, PARAMS, seeds=[1])
    lengths = [
        len(fake_vllm.LLM.expand(e._llm.asked[0][0], e._llm.settings)) for e in (sampler, own)
    ]
    assert lengths[0] < lengths[1]
    sampler._llm.settings.pop("mm_processor_kwargs")  # the fault
    with sampler.ready(), pytest.raises(KepoError, match=r"read a prompt as \d+ tokens"):
        sampler.sample(prompts, PARAMS, seeds=[1])


# ---- refusals ----


@pytest.mark.parametrize(
    ("prompts", "params", "seeds", "said"),
    [
        (1, {"temperature": 0.005}, [1], "temperature=0.005"),  # vLLM would take 0.01
        (1, {"temperature": 2.5}, [1], "temperature=2.5"),
        (1, {}, [1, 2], "seeds: 2 for 1 prompts"),
        (0, {}, [], "prompts is empty"),
    ],
)
def test_what_it_cannot_be_asked_is_refused(made, images, prompts, params, seeds, said):
    sampler = made.sampler()
    with sampler.ready(), pytest.raises(KepoConfigError, match=said):
        sampler.sample([Prompt("?", images[0])] * prompts, replace(PARAMS, **params), seeds)
    assert "generate" not in sampler._llm.calls


def test_an_engine_that_cannot_be_is_refused(made, monkeypatch):
    for settings, said in (
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"memory_share": 0.0}, "memory_share is 0.0"),
        ({"memory_share": 1.5}, "memory_share is 1.5"),
    ):
        with pytest.raises(KepoConfigError, match=said):
            made.sampler(**settings)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(KepoConfigError, match=r"pip install 'kepo\[vllm\]'"):
        made.sampler()


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (lambda m: m.delattr(fake_vllm.LLM, "apply_model"), r"LLM\.apply_model"),
        (lambda m: m.delattr(fake_vllm.LLM, "sleep"), r"LLM\.sleep"),
        (lambda m: m.setattr(fake_vllm, "EngineArgs", OtherArgs), r"EngineArgs\.dtype, EngineArgs"),
        (
            lambda m: m.setattr(fake_vllm, "SamplingParams", lambda seed, n: 0),
            r"SamplingParams\.detokenize, Samp",
        ),
    ],
    ids=["call", "call of a platform", "setting", "request"],
)
def test_another_interface_is_refused(made, monkeypatch, lost, said):
    lost(monkeypatch)
    with pytest.raises(KepoConfigError, match=rf"^sampler='vllm': vLLM 0\.0 .* has no {said}"):
        made.sampler()


def test_what_the_engine_refuses_is_one_sentence(made, monkeypatch):
    def refuse(llm, **settings):
        raise ValueError("1 validation error\n  no such dtype")

    monkeypatch.setattr(fake_vllm.LLM, "__init__", refuse)
    said = "vllm_memory=0.4: 1 validation error no such dtype$"
    with pytest.raises(KepoConfigError, match=said):
        made.sampler()


@pytest.mark.parametrize(
    "answer",
    [
        ([5, 6], [-1.0, -1.0], "length"),  # shorter than the limit: it ran out of room
        ([5, 6], [-1.0, -1.0], "stop"),  # without the end token
        ([5, 6], [-1.0, -1.0], "abort"),
    ],
)
def test_an_odd_end_is_an_error(made, images, monkeypatch, answer):
    sampler = made.sampler()
    monkeypatch.setattr(fake_vllm.LLM, "answer", staticmethod(lambda *_: answer))
    with sampler.ready(), pytest.raises(KepoError, match=f"after 2 tokens.*'{answer[2]}'"):
        sampler.sample([Prompt("Which?", images[0])], PARAMS, seeds=[1])


def test_every_end_token_is_an_end(made, images, monkeypatch):
    sampler = made.sampler()
    for end in made.vlm.encoder.end_ids:
        answer = ([5, 6, end], [-1.0, -1.0, -1.0], "stop")
        monkeypatch.setattr(fake_vllm.LLM, "answer", staticmethod(lambda *_, a=answer: a))
        with sampler.ready():
            drawn = sampler.sample([Prompt("Which?", images[0])], PARAMS, seeds=[1])
        assert tokens(drawn) == [[5, 6, end]]
    assert not set(made.vlm.encoder.end_ids) & set(sampler._biases)


@pytest.mark.parametrize("fault", ["shuffled", "one lost"])
def test_answers_to_other_prompts_are_an_error(made, images, monkeypatch, fault):
    whole = fake_vllm.LLM.generate
    change = (lambda out: out[::-1]) if fault == "shuffled" else (lambda out: out[1:])
    monkeypatch.setattr(fake_vllm.LLM, "generate", lambda *a, **k: change(whole(*a, **k)))
    sampler = made.sampler()
    with sampler.ready(), pytest.raises(KepoError, match=r"answers"):
        sampler.sample([Prompt("Which?", images[0]), Prompt("x", images[1])], PARAMS, seeds=[1, 2])
