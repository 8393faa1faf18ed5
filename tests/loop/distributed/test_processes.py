"""Several processes do what one does: the same losses, the same weights, and resumption."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from same_run import CLOSE, STEPS, WARM, assert_same_run, assert_same_weights, weights
from several import run_all, torchrun
from small import config_of, run_rigged

from kepo.digits.tiny import build_tiny
from kepo.run.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.processes]

# Everything at once: hints, exchanged questions, the dataset's answers, two iterations, a penalty,
# and gates that are open in one process and closed in the other.
WHOLE = dict(
    steps=STEPS,
    prompts_per_step=3,
    num_iterations=2,
    data_fraction=0.4,
    dynamic_sampling=1,
    max_attempts=3,
    hinted_correction="truncate",
    kl_coef=0.1,
    micro_batch=2,
    **WARM,
    seed=2,
    log_completions_every=1,
    keep_checkpoints=STEPS + 1,
)
HELD = {
    "ddp": {},
    "fsdp2": dict(sharding="fsdp2"),
    "everything sharded": dict(
        sharding="fsdp2",
        teacher_placement="fsdp2",
        rollout_gather=False,
        gradient_checkpointing=True,
    ),
    "offloaded teacher": dict(teacher_placement="offload"),
    "a row for each completion": dict(share_prompts=False),
    "sharded, a row for each": dict(sharding="fsdp2", share_prompts=False, micro_tokens=150),
}


@pytest.fixture(scope="module")
def runs(made, tmp_path_factory):
    """The same run in one process and in two, once for every way to hold the models."""
    root = tmp_path_factory.mktemp("processes")
    configs = {
        name: config_of(made, root / name, **WHOLE, **held, eval_data=str(made / "data" / "test"))
        for name, held in {"one": {}, **HELD}.items()
    }
    assert run_rigged(dataclasses.asdict(configs["one"])) == 0
    run_all([configs[name] for name in HELD], root / "configs.json")
    return root


@pytest.mark.parametrize("name", HELD)
def test_two_processes_are_one_run(runs, name):
    assert_same_run(runs / "one", runs / name)


def test_the_run_had_every_part(runs):
    steps = [r for r in read_metrics(runs / "one" / "metrics.jsonl") if "reward" in r]
    assert any(r["kepo/hint_accepted"] for r in steps) and any(
        r["kepo/distill_loss"] for r in steps
    )
    assert any(r["kepo/hint_retries"] for r in steps)
    assert any(0 < r["kepo/teacher_skipped_frac"] < 1 for r in steps)
    assert any(r["kl"] > 0 for r in steps) and any(r["kepo/data_completions"] for r in steps)
    first, last = weights(runs / "one", 0), weights(runs / "one")
    moved = [name for name in first if (first[name] - last[name]).abs().max() > 10 * CLOSE]
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= set(moved)
    assert len(moved) > len(first) / 2  # else equality says little


def test_a_fault_in_sharing_the_loss_would_be_seen(runs):
    """The tolerance is far below what a loss that is off by the number of processes does."""
    steps = [r for r in read_metrics(runs / "one" / "metrics.jsonl") if "reward" in r]
    assert all(r["grad_norm"] > 100 * CLOSE for r in steps)


def test_mini_batches_are_one_run_in_two_processes(made, tmp_path):
    """A mini-batch of one question leaves a rank with nothing but a completion without loss."""
    data = str(made / "data" / "test")
    configs = {
        name: config_of(made, tmp_path / name, **WHOLE, **held, mini_batches=3, eval_data=data)
        for name, held in {"one": {}, "ddp": {}, "fsdp2": dict(sharding="fsdp2")}.items()
    }
    assert run_rigged(dataclasses.asdict(configs["one"])) == 0
    run_all([configs["ddp"], configs["fsdp2"]], tmp_path / "configs.json")
    for name in ("ddp", "fsdp2"):
        assert_same_run(tmp_path / "one", tmp_path / name)


METHODS = {
    "the teacher sees hints": dict(
        hint_for="teacher", hint_trigger="always", distill_tokens="first_error", data_weight=0.5
    ),
    "ratios to hinted laws": dict(
        hinted_correction="clip", distill_tokens="after_error", gate_side="wrong"
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_the_teacher_leaves_out_and_sees_is_one_run_in_two_processes(made, tmp_path, method):
    """A completion of which nothing is left to distil on may leave a rank without any."""
    held = {name: HELD[name] for name in ("ddp", "everything sharded")}
    settings = WHOLE | METHODS[method] | dict(error_threshold=0.002)
    configs = {
        name: config_of(made, tmp_path / name, **settings, **own)
        for name, own in {"one": {}, **held}.items()
    }
    assert run_rigged(dataclasses.asdict(configs["one"])) == 0
    run_all([configs[name] for name in held], tmp_path / "configs.json")
    for name in held:
        assert_same_run(tmp_path / "one", tmp_path / name)
    steps = [r for r in read_metrics(tmp_path / "one" / "metrics.jsonl") if "reward" in r]
    assert any(0 < r["kepo/distilled_tokens"] < r["kepo/teacher_tokens"] for r in steps)
    told, taken = (sum(r[f"kepo/{k}_rate"] for r in steps) for k in ("teacher_hinted", "hinted"))
    assert (told > 0) == (method == "the teacher sees hints") != (taken > 0)


@pytest.fixture(scope="module")
def text_alone(tmp_path_factory):
    """A student and a teacher without pictures, and questions."""
    root = tmp_path_factory.mktemp("text")
    for size in ("student", "teacher"):
        build_tiny(root / size, size=size, seed=1, family="text_only")
    records = [
        {"question": f"What is {n} + {n}?", "options": ["1", str(2 * n)], "answer": str(2 * n)}
        for n in range(2, 10)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (root / "questions.jsonl").write_text(lines)
    return root


def test_a_text_only_model_is_one_run_in_two_processes(text_alone, tmp_path):
    settings = WHOLE | dict(train_data=str(text_alone / "questions.jsonl"), data_fraction=0.0)
    settings |= dict(train_modalities=None)
    held = {name: HELD[name] for name in ("ddp", "fsdp2", "everything sharded")}
    configs = {
        name: config_of(text_alone, tmp_path / name, **settings, **own)
        for name, own in {"one": {}, **held}.items()
    }
    assert run_rigged(dataclasses.asdict(configs["one"])) == 0
    run_all([configs[name] for name in held], tmp_path / "configs.json")
    for name in held:
        assert_same_run(tmp_path / "one", tmp_path / name)
    first, last = weights(tmp_path / "one", 0), weights(tmp_path / "one")
    assert all((first[name] - last[name]).abs().max() > 10 * CLOSE for name in first)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_student_is_one_run_in_two_processes(made, tmp_path, bits):
    """Every process reads it and quantises it by itself; the adapters are what they share."""
    pytest.importorskip("bitsandbytes")
    settings = WHOLE | dict(student_bits=bits, lora_rank=4, gate_reward=None)
    configs = [config_of(made, tmp_path / name, **settings) for name in ("one", "two")]
    assert run_rigged(dataclasses.asdict(configs[0])) == 0
    run_all(configs[1:], tmp_path / "configs.json")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    first, last = weights(tmp_path / "one", 0), weights(tmp_path / "one")
    assert all((first[name] - last[name]).abs().max() > 10 * CLOSE for name in first)


# ---- resumption ----

RECIPE = dict(
    teacher_placement="fsdp2", sharding="fsdp2", gate_reward=None, hint_trigger="never", steps=8
)


def recipe(made, folder: Path, **settings) -> Path:
    folder.mkdir(exist_ok=True)
    config = config_of(made, folder / "run", **{**RECIPE, **settings})
    file = folder / "recipe.yaml"
    record = json.loads(json.dumps(dataclasses.asdict(config)))
    file.write_text(yaml.safe_dump(record))
    return file


def start(file: Path, *flags: str, **settings) -> subprocess.Popen:
    """The command a user types, in a process group of its own."""
    return torchrun(
        *("-m", "kepo", "train", file, *flags),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **settings,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output[-6000:]
    return output


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(4000):
        if any(r["step"] >= step for r in read_metrics(folder / "run" / "metrics.jsonl")):
            return
        assert process.poll() is None, "the run ended early"
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached")


@pytest.fixture(scope="module")
def uninterrupted(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(start(recipe(made, folder)))
    return folder


def files_of(folder: Path, step: int) -> dict[str, dict]:
    checkpoint = folder / "run" / "checkpoints" / f"step-{step:08d}"
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: facts for name, facts in files.items() if name.endswith(".safetensors")}


def test_a_run_killed_in_both_processes_goes_on_to_the_same_bits(made, uninterrupted, tmp_path):
    file = recipe(made, tmp_path)
    process = start(file)
    wait_for_step(tmp_path, 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    output = finish(start(file))
    assert "resuming after step" in output
    ours, theirs = files_of(tmp_path, 8), files_of(uninterrupted, 8)
    assert ours == theirs
    assert {"optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"} < set(
        ours
    )


def test_sigterm_to_torchrun_saves_and_ends_both(made, uninterrupted, tmp_path):
    file = recipe(made, tmp_path, save_every=100)
    process = start(file)
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "stopping after this step" in output
    saved = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert len(saved) == 2 and saved[0] == "step-00000000", saved
    finish(start(file))
    assert files_of(tmp_path, 8) == files_of(uninterrupted, 8)


def test_another_number_of_processes_takes_the_run_up(made, uninterrupted, tmp_path):
    """Two sharded, then one alone, then two with copies: as if uninterrupted, rounding apart."""
    finish(start(recipe(made, tmp_path), "--steps", "3"))
    alone = ("--steps", "5", "--sharding", "none", "--teacher-placement", "copy")
    finish(start(recipe(made, tmp_path), *alone, processes=1))
    finish(start(recipe(made, tmp_path, sharding="none")))
    assert_same_weights(uninterrupted / "run", tmp_path / "run", 8)


def test_two_nodes_are_two_process_groups_of_the_same_run(made, uninterrupted, tmp_path):
    """`torchrun --nnodes 2`, both nodes here: one process each, met over the network."""
    file = recipe(made, tmp_path)
    port = 29500 + os.getpid() % 1000
    nodes = [
        torchrun(
            "--nnodes=2",
            f"--node-rank={rank}",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
            *("-m", "kepo", "train", file),
            processes=1,
            standalone=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    for node in nodes:
        finish(node)
    assert files_of(tmp_path, 8) == files_of(uninterrupted, 8)
