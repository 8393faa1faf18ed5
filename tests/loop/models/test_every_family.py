"""Every family that is registered: it trains, resumes, is saved, adapted and planned alike."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from families import pictures
from same_run import assert_same_run, weights
from small import config_of, rigged
from toy import TASK

from kepo.data.images import locate
from kepo.data.run_data import load_data
from kepo.digits.tiny import build_tiny
from kepo.errors import KepoDataError
from kepo.loop import train
from kepo.models.adapters import with_adapters
from kepo.models.encoding import Prompt
from kepo.models.families.registry import FAMILIES
from kepo.models.reading import auto_class, read_model
from kepo.models.vlm import VLM
from kepo.planner.activations import inference, pixel_bytes, vision_training
from kepo.planner.memory import Prompts, Setup, phases
from kepo.planner.model_sizes import model_sizes
from kepo.planner.standing import Machine
from kepo.planner.trace import LiveBytes
from kepo.rollout.encodable import judge_of
from kepo.run.metrics import read_metrics

STEPS = 3
LR = 2e-4
SETTINGS = dict(steps=STEPS, prompts_per_step=3, lr=LR, seed=2, keep_checkpoints=STEPS + 1)
SETTINGS |= dict(log_completions_every=1)


@pytest.fixture(scope="module", params=FAMILIES)
def home(request, made, tmp_path_factory) -> Path:
    """A student and a teacher of one family, and questions."""
    root = tmp_path_factory.mktemp(request.param)
    for size in ("student", "teacher"):
        build_tiny(root / size, size=size, seed=1, family=request.param)
    (root / "data").symlink_to(made / "data")
    return root


@pytest.fixture(scope="module")
def family(home):
    return VLM.load(home / "student").family


@pytest.fixture(scope="module")
def told(family):
    """Questions as the family can be asked them: without pictures where it sees none."""
    with ExitStack() as stack:
        if family.pictures is None:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr("kepo.data.load.locate", lambda sources, root: ())
        yield


@pytest.fixture(scope="module")
def run(home, told) -> Path:
    """A run of three steps at a stretch."""
    with rigged():
        assert train(config_of(home, home / "one", **SETTINGS)).exit_code == 0
    return home / "one"


def test_it_trains(run, home):
    records = [r for r in read_metrics(run / "metrics.jsonl") if r.get("step")]
    assert [r["step"] for r in records] == [*range(1, STEPS + 1)]
    before = {n: p.detach() for n, p in VLM.load(home / "student").model.named_parameters()}
    after = VLM.load(run / "checkpoints" / f"step-{STEPS:08d}" / "policy").model
    moved = {n for n, p in after.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(before)  # head, body and, where there is one, vision tower


def test_it_resumes(run, home, told, capsys):
    config = config_of(home, home / "two", **SETTINGS)
    with rigged():
        assert train(replace(config, steps=1)).exit_code == 0
        assert train(config).exit_code == 0
    assert "resuming after step 1" in capsys.readouterr().out
    assert_same_run(run, home / "two")
    assert weights(run).keys() == weights(home / "two").keys()


def test_shared_prompts_change_nothing(run, home, told):
    with rigged():
        assert train(config_of(home, home / "rows", **SETTINGS, share_prompts=False)).exit_code == 0
    said = [
        [(r["step"], r["completion"], r["hint"]) for r in read_metrics(x / "completions.jsonl")]
        for x in (run, home / "rows")
    ]
    assert said[0] == said[1]
    mine, theirs = weights(run), weights(home / "rows")
    # Sums of another order: a small part of what AdamW moves an element in one step.
    assert all((mine[name] - theirs[name]).abs().max() <= LR / 4 for name in mine)


def test_what_was_saved_is_read_by_transformers_alone(run, home, told):
    folder = run / "checkpoints" / f"step-{STEPS:08d}" / "policy"
    ours = VLM.load(folder)
    theirs = auto_class(ours.model.config).from_pretrained(folder).eval()
    inputs, (ids, mask) = ours.encode([Prompt("Which?")]), ours.encode_completions(["3 + 5"])
    whole = torch.cat([inputs.input_ids, ids], 1)
    types = {"mm_token_type_ids": torch.zeros_like(whole)}
    given = types if "Qwen" in ours.family.name else {}
    with torch.no_grad():
        states = ours.completion_hidden(inputs, ids, mask)
        logits = theirs(input_ids=whole, **given).logits[:, inputs.input_ids.shape[1] - 1 : -1]
    torch.testing.assert_close(states @ ours.head.weight.T, logits, rtol=1e-5, atol=1e-6)


def test_adapters_are_in_the_language_model_alone(home, family):
    pytest.importorskip("peft")
    model = read_model(home / "student", torch.float32)
    with_adapters(model, 4, 4.0, seed=0)
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    seen = {id(p) for module in family.vision(model) for p in module.parameters()}
    assert adapted and all("lora_" in name for name in adapted)
    assert not any(id(p) in seen for p in model.parameters() if p.requires_grad)
    assert not model.get_output_embeddings().weight.requires_grad
    layers = len(family.decoder(model).layers)
    assert len(adapted) == 2 * 7 * layers  # q, k, v, o, gate, up and down, each with A and B


def test_its_memory_is_counted(home, family, tmp_path):
    config = config_of(home, tmp_path, **SETTINGS)
    found = phases(Setup(config, Machine(1, 2**34, "cpu"), Prompts(text_tokens=60)))
    names = {phase.name for phase in found}
    assert {"rollout", "hints", "scoring", "update", "optimiser"} <= names
    update = next(phase for phase in found if phase.name == "update")
    weight = sum(p.numel() for p in VLM.load(home / "student").model.parameters()) * 4
    assert update.held["weights"] == weight < update.total


@pytest.mark.parametrize("train", [True, False])
def test_the_planner_knows_what_its_pictures_take(home, family, tmp_path, train):
    """Storages of the vision tower at work on the CPU, counted as they come and go, and traced."""
    if family.pictures is None:
        pytest.skip("it sees no pictures")
    shown, size = pictures(tmp_path, *[(112, 112)] * 6), (112, 112)
    vlm, traced = VLM.load(home / "student"), model_sizes(str(home / "student"), "float32", "cpu")
    inputs = vlm.encode([Prompt("?", tuple(shown))])
    patches = vlm.encoder.image_tokens(*size) * traced.patches_per_token
    family.features(vlm.model, inputs)  # what is made once and kept is there
    with torch.set_grad_enabled(train), LiveBytes("cpu") as live:
        found = family.features(vlm.model, inputs)
        kept, forward = live.now, live.peak
    assert found is not None
    pixels = pixel_bytes(traced, len(shown), patches)
    assert pixels == pytest.approx(inputs.pixel_values.nbytes, rel=0.1)
    if train:
        planned = vision_training(traced, len(shown), patches, checkpointing=False)
        assert planned.kept - pixels == pytest.approx(kept, rel=0.2)
        assert planned.forward - pixels == pytest.approx(forward, rel=0.25)
    else:
        planned = inference(traced, 1, 1, len(shown), patches, packed=False)
        assert planned - pixels == pytest.approx(forward, rel=0.2)


def test_pictures_are_refused_at_the_start_by_what_sees_none(home, family, tmp_path, monkeypatch):
    if family.pictures is not None:
        pytest.skip("it sees pictures")
    monkeypatch.setattr("kepo.data.load.locate", locate)
    config = config_of(home, tmp_path, **SETTINGS)
    said = r"examples: the student sees no pictures, and \d+ of \d+ questions have some, first"
    with pytest.raises(KepoDataError, match=said):
        load_data(config, judge_of(config, TASK))
    with pytest.raises(KepoDataError, match=r"shows .*png, and the model sees no pictures"):
        VLM.load(home / "student").encode([Prompt("Which?", "a.png")])
