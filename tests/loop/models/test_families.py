"""Families that see, tied and untied, from disk: one process, copies, shares; and back."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from same_run import CLOSE, STEPS, WARM, assert_same_run, weights
from several import run_all
from small import config_of, run_rigged

pytestmark = [pytest.mark.slow, pytest.mark.processes]

FAMILIES = {
    "qwen3_vl untied": dict(family="qwen3_vl", tied=False),
    "qwen3_vl tied": dict(family="qwen3_vl", tied=True),
    "qwen2_5_vl untied": dict(family="qwen2_5_vl", tied=False),
    "internvl tied": dict(family="internvl", tied=True),
}
HELD = {"ddp": {}, "fsdp2": dict(sharding="fsdp2", teacher_placement="fsdp2")}
SETTINGS = dict(
    steps=STEPS,
    prompts_per_step=3,
    **WARM,
    seed=2,
    log_completions_every=1,
    keep_checkpoints=STEPS + 1,
)


@pytest.fixture(scope="module")
def runs(made, tmp_path_factory):
    from kepo.digits.tiny import build_tiny

    root = tmp_path_factory.mktemp("families")
    shared = []
    for name, family in FAMILIES.items():
        home = root / name
        for size in ("student", "teacher"):
            build_tiny(home / size, size=size, seed=1, **family)
        (home / "data").symlink_to(made / "data")
        configs = {
            held: config_of(home, home / held, **SETTINGS, **settings)
            for held, settings in {"one": {}, "rows": dict(share_prompts=False), **HELD}.items()
        }
        for held in ("one", "rows"):
            assert run_rigged(dataclasses.asdict(configs[held])) == 0
        shared += [configs[held] for held in HELD]
    run_all(shared, root / "configs.json")
    return root


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_are_one_run(runs, name, held):
    assert_same_run(runs / name / "one", runs / name / held)
    names = set(weights(runs / name / held))
    assert ("lm_head.weight" in names) != FAMILIES[name]["tied"]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_that_are_shared_change_nothing(runs, name):
    assert_same_run(runs / name / "one", runs / name / "rows")


@pytest.mark.parametrize("name", FAMILIES)
def test_head_and_body_have_moved(runs, name):
    before = load_file(runs / name / "student" / "model.safetensors")
    after = weights(runs / name / "one")
    assert before.keys() == after.keys()  # Qwen2.5-VL's stay those of its released layout
    heads = ("embed_tokens.weight",) if FAMILIES[name]["tied"] else ("lm_head.weight",)
    for ending in (*heads, "layers.0.mlp.down_proj.weight"):
        (parameter,) = [key for key in after if key.endswith(ending)]
        assert (after[parameter] - before[parameter]).abs().max() > 10 * CLOSE


@pytest.mark.parametrize("held", ["one", *HELD])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_saved_is_the_model_that_was_trained(runs, name, held, made):
    """`from_pretrained`, with nothing of ours, gives the logits that we resume with."""
    from transformers import AutoModelForImageTextToText

    from kepo.models.encoding import Prompt
    from kepo.models.vlm import VLM

    policy = runs / name / held / "checkpoints" / f"step-{STEPS:08d}" / "policy"
    ours = VLM.load(policy)
    inputs = ours.encode([Prompt("Which?", next((made / "data").rglob("*.png")))])
    theirs = AutoModelForImageTextToText.from_pretrained(policy).eval()
    assert theirs.dtype == torch.float32 and type(theirs).__name__ == type(ours.model).__name__
    ids, mask = ours.encode_completions(["3 + 5 = 8"])
    of_qwen = dict(
        mm_token_type_ids=torch.cat([inputs.mm_token_type_ids, torch.zeros_like(ids)], 1),
        image_grid_thw=inputs.image_grid_thw,
    )
    with torch.no_grad():
        states = ours.completion_hidden(inputs, ids, mask)
        logits = theirs(
            input_ids=torch.cat([inputs.input_ids, ids], 1),
            attention_mask=torch.ones(1, inputs.input_ids.shape[1] + ids.shape[1]).long(),
            pixel_values=inputs.pixel_values,
            **(of_qwen if name.startswith("qwen") else {}),
        ).logits[:, inputs.input_ids.shape[1] - 1 : -1]
    assert torch.equal(states @ ours.head.weight.T, logits)
    tied = FAMILIES[name]["tied"]
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) == tied
