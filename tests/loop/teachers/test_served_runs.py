"""Whole runs taught by a server: like a local teacher's, ended and resumed as it goes and comes."""

import dataclasses
import json
import math
import subprocess

import pytest
import several
import torch
from safetensors.torch import load_file
from served_model import Gone, serving
from several import run_all, torchrun
from small import config_of, rigged

from kepo.check import check
from kepo.errors import KepoCheckpointError, KepoConfigError, KepoTeacherError
from kepo.loop import train
from kepo.models.vlm import VLM
from kepo.run import milestones
from kepo.run.metrics import read_metrics
from kepo.teachers import transport

STEPS = 4
TIMES = ("time/", "step_time", "mem/")
SCORES = ("/v1/completions", "/inference/v1/generate")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(transport, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(milestones, "plot_curves", lambda *_, **__: None)


@pytest.fixture(scope="module")
def teacher(made):
    return VLM.load(made / "teacher")


@pytest.fixture
def server(teacher):
    with serving(teacher) as one:
        yield one


def settings_of(made, run_dir, url, **settings):
    """A run with hints and distillation on every completion, saved at its end only."""
    usual = dict(teacher=url, gate_reward=None, steps=STEPS, save_every=100, num_iterations=2)
    usual |= dict(teacher_retries=1, teacher_timeout=20.0, log_completions_every=1)
    return config_of(made, run_dir, **(usual | settings))


def run(config):
    with rigged():
        return train(config)


def ended(run_dir, step=STEPS):
    """Weights and moments, and the records without what is the machine's."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    tensors = load_file(folder / "policy" / "model.safetensors")
    tensors |= load_file(folder / "optimizer.safetensors")
    state = json.loads((folder / "state.json").read_text())
    records = [
        {key: x for key, x in record.items() if not key.startswith(TIMES)}
        for name in ("metrics.jsonl", "completions.jsonl")
        for record in read_metrics(run_dir / name)
    ]
    return tensors, records, state["hints"]


def assert_same(one, other):
    (tensors, records, hints), (others, theirs, known) = one, other
    assert tensors.keys() == others.keys()
    assert [n for n in tensors if not torch.equal(tensors[n], others[n])] == []
    assert records == theirs and hints == known


@pytest.fixture(scope="module")
def whole(made, teacher, tmp_path_factory):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, serving(teacher) as server:
        patch.setattr(milestones, "plot_curves", lambda *_, **__: None)
        assert run(settings_of(made, run_dir, server.url)).exit_code == 0
        asked = list(server.asked)
    return run_dir, asked


def test_a_server_teaches(whole):
    run_dir, asked = whole
    steps = [r for r in read_metrics(run_dir / "metrics.jsonl") if "reward" in r]
    assert len(steps) == STEPS
    for record in steps:
        assert record["kepo/divergence"] > 0 and record["kepo/distill_loss"] > 0
        assert record["kepo/teacher_requests"] >= 8 and record["kepo/teacher_retries"] == 0
        assert record["kepo/teacher_tokens"] > 0 and record["time/teacher"] > 0
    _, _, hints = ended(run_dir)
    assert any(hints.values())
    scored = [body for path, body in asked if path == "/inference/v1/generate"]
    # Two to see whether it sees; then one for each completion, however many iterations follow.
    assert len(scored) == 2 + 8 * STEPS
    assert {path for path, _ in asked} >= {"/v1/models", "/tokenize", "/v1/chat/completions"}


def test_hints_are_those_of_a_local_teacher(made, server, tmp_path):
    """The first step's: from there the two train on divergences that differ by the tail."""
    settings = dict(steps=1, hint_trigger="always", hint_retries=3)
    for name, teacher in (("served", server.url), ("local", str(made / "teacher"))):
        run(settings_of(made, tmp_path / name, teacher, **settings))
    served, local = (ended(tmp_path / name, 1)[2] for name in ("served", "local"))
    assert served == local and any(local.values())
    served, local = (
        [(r["completion"], r["hint"]) for r in read_metrics(tmp_path / name / "completions.jsonl")]
        for name in ("served", "local")
    )
    assert served == local


def dies(after, paths=SCORES):
    """A script of a server that is gone after so many answers to these paths."""
    left = [after]

    def script(path, body, answer):
        if path in paths:
            left[0] -= 1
        if left[0] < 0:
            raise Gone
        return answer()

    return script


@pytest.mark.parametrize(
    ("after", "paths", "step"),
    [(3 + 8 + 3, SCORES, 1), (1, ("/v1/chat/completions",), 0)],
    ids=["scoring in step 2", "a hint in step 1"],
)
def test_it_ends_with_its_checkpoint_and_resumed_goes_on(
    whole, made, teacher, tmp_path, after, paths, step
):
    with serving(teacher) as server:
        server.script = dies(after, paths)
        config = settings_of(made, tmp_path, server.url)
        words = rf"^teacher='{server.url}' does not answer /\S+: .* run the same command$"
        with pytest.raises(KepoTeacherError, match=words):
            run(config)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved[-1] == f"step-{step:08d}"
    with serving(teacher) as server:  # started again, at another port
        assert run(dataclasses.replace(config, teacher=server.url)).exit_code == 0
    assert_same(ended(tmp_path), ended(whole[0]))


@pytest.mark.parametrize("lie", ["nan", "short", "ids"])
def test_a_lie_in_the_middle_ends_it_with_its_checkpoint(made, teacher, server, tmp_path, lie):
    left = [3 + 8 + 1]

    def script(path, body, answer):
        code, said = answer()
        left[0] -= path in SCORES
        if path in SCORES and left[0] < 0:
            if lie == "short":
                del said["prompt_logprobs"][3:]
            for place in said["prompt_logprobs"][1:]:
                if lie == "nan":
                    place[min(place)]["logprob"] = math.nan
                if lie == "ids":
                    place["99999"] = {"logprob": -20.0}
        return code, said

    server.script = script
    with pytest.raises(KepoTeacherError, match=rf"^teacher='{server.url}' (gives|names)"):
        run(settings_of(made, tmp_path, server.url))
    assert (tmp_path / "checkpoints" / "step-00000001").is_dir()


def test_a_server_that_is_not_there_ends_it_before_a_model_is_read(made, teacher, tmp_path):
    with serving(teacher) as server:
        pass
    with pytest.raises(KepoTeacherError, match="does not answer /v1/models"):
        run(settings_of(made, tmp_path, server.url))
    assert not (tmp_path / "checkpoints").exists()


def test_another_model_at_a_resume_is_refused(whole, made, teacher, tmp_path, server):
    run(settings_of(made, tmp_path, server.url, steps=1))
    server.name = "other"
    with pytest.raises(KepoCheckpointError, match="teacher has other files"):
        run(settings_of(made, tmp_path, server.url, steps=2))
    server.name = "tiny"
    with pytest.raises(KepoConfigError, match='teacher: "a server\'s" -> '):
        run(settings_of(made, tmp_path, str(made / "teacher"), steps=2))


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(temperature=0.7), r"^temperature=0\.7 and teacher='http"),
        (dict(teacher_temperature=2.0), r"^teacher_temperature=2\.0 and"),
        (dict(teacher="http://nowhere"), None),
        (dict(teacher="http://host:x/v1"), "is no address"),
        (dict(teacher=None, teachers={"a": "http://:1"}), r"^teachers\.a='http://:1' is no"),
        (dict(teachers={"a": "http://b:1"}), "teachers are two answers"),
        (dict(teacher="htp://host:1/v1"), r"^teacher='htp://host:1/v1' is no folder"),
        (dict(teacher="127.0.0.1:8001/v1"), r"^teacher='127.* begins with http://"),
        (dict(teacher=None, teachers={"a": "HTTP://b"}), r"^teachers\.a='HTTP://b' is no"),
        (dict(teacher="folder", teacher_model="m"), r"^teacher_model='m'"),
        (dict(teacher_bits=8), r"^teacher_bits=8 says how a process holds"),
        (dict(teacher_placement="offload"), r"^teacher_placement='offload' says"),
        (
            dict(teacher=None, teachers={"a": "http://b:1", "b": "x"}, teacher_placement="fsdp2"),
            None,
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(made, tmp_path, settings, words):
    config = settings_of(made, tmp_path, "http://host:1/v1", **settings)
    if words is None:
        check(config)
        return
    with pytest.raises(KepoConfigError, match=words):
        check(config)


# ---- several processes ----


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_ask_for_their_own_and_end_together(whole, made, teacher, tmp_path):
    with serving(teacher) as server:
        config = settings_of(made, tmp_path / "two", server.url)
        run_all([config], tmp_path / "configs.json")
        scored = [path for path, _ in server.asked if path == "/inference/v1/generate"]
        assert len(scored) == 2 + 8 * STEPS  # each completion by one of them
    found, expected = (ended(one)[0] for one in (tmp_path / "two", whole[0]))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)

    with serving(teacher) as server:
        server.script = dies(3 + 8 + 5)
        config = settings_of(made, tmp_path / "gone", server.url)
        record = tmp_path / "configs.json"
        record.write_text(json.dumps([dataclasses.asdict(config)]))
        done = torchrun(several.__file__, record, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = done.communicate(timeout=200)
    assert done.returncode != 0
    assert f"teacher='{server.url}' does not answer /inference/v1/generate" in output
    assert "another process of this run has ended" not in output
    assert (tmp_path / "gone" / "checkpoints" / "step-00000001").is_dir()
