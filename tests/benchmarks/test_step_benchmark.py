"""The benchmark of whole steps against TRL, once in small, and that it notices what is not one."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from toy import TASK

from benchmarks.loop import on_disk, processes, step, table, variants
from benchmarks.loop.on_disk import NEVER, Sizes, read_sizes, write
from benchmarks.loop.orders import Shared, reward_of
from kepo.data.load import load_examples
from kepo.models.vlm import VLM
from kepo.rollout.prompts import prompt_of

SMALL = ["--student", "64,1", "--vocab", "2048", "--length", "6", "--generations", "3"]
SMALL += ["--prompts", "2", "--micro-batch", "3", "--rounds", "1", "--prompt", "70"]
HAS_TRL = all(importlib.util.find_spec(name) for name in ("trl", "datasets", "accelerate"))
NEEDS_TRL = pytest.mark.skipif(not HAS_TRL, reason="TRL or its datasets are not installed")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def run(tmp_path, *words):
    """Exit status and rows."""
    results = tmp_path / "deep" / "r.csv"
    status = step.main([*SMALL, *words, "--csv", str(results)])
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == table.COLUMNS
    assert all(row["commit"] and row["torch"] == torch.__version__ for row in rows)
    return status, {(row["prompt_tokens"], row["variant"]): row for row in rows}


def small(**changed):
    sizes = dict(student=(64, 1), teacher=None, vocab=2048, prompt=70, prompts=3, generations=2)
    sizes |= dict(length=5, picture=2, micro_batch=2, device="cpu", seed=0)
    return Sizes(**(sizes | changed))


# ---- what is measured ----


def check_row(row, teacher):
    have = {name: float(row[name]) for name in table.COLUMNS if row[name] and name in NUMBERS}
    assert not row["note"] and have["seconds"] > 0 and have["rounds"] == 1
    assert have["tokens_per_second"] == pytest.approx(36 / have["seconds"], rel=1e-3)
    parts = sum(have[f"{part}_seconds"] for part in ("rollout", "teacher", "rest"))
    assert parts == pytest.approx(have["seconds"], rel=1e-2)
    assert have["above_mib"] == pytest.approx(have["peak_mib"] - have["held_mib"], abs=0.2)
    assert have["above_mib"] >= 0 and have["gradient_gap"] <= 1e-5
    assert (have["loss"] > 1e-3) == teacher  # the policy term alone is 0 up to rounding
    return have


NUMBERS = {"tokens_per_second", "rounds", "peak_mib", "held_mib", "above_mib", "loss"}
NUMBERS |= {"seconds", "rollout_seconds", "teacher_seconds", "rest_seconds"}
NUMBERS |= {"gradient_gap", "x_seconds"}


@pytest.mark.slow
def test_ours_alone(tmp_path, monkeypatch, capsys):
    """Without TRL its rows say so, and the picture has what was measured."""
    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    picture = tmp_path / "p.png"
    status, rows = run(tmp_path, "--teacher", "64,2", "--plot", str(picture))
    assert status == 0 and picture.stat().st_size > 10_000
    ours = check_row(rows["70", "shared"], teacher=True)
    assert ours["x_seconds"] == 1 and ours["teacher_seconds"] > 0
    check_row(rows["70", "rows"], teacher=True)
    for name in ("trl", "trl-kepo", "trl-liger"):
        row = rows["70", name]
        missing = "not installed: trl" in row["note"]
        assert not row["seconds"] and missing == (name != "trl-liger")
    assert "tokens/s" in capsys.readouterr().out


@NEEDS_TRL
@pytest.mark.slow
@pytest.mark.parametrize("teacher", [[], ["--teacher", "64,2"]])
def test_trl_has_our_loss_and_gradients(teacher, tmp_path):
    status, rows = run(tmp_path, "--variants", "rows", "trl", "trl-kepo", *teacher)
    assert status == 0
    for name in ("rows", "trl", "trl-kepo"):
        check_row(rows["70", name], bool(teacher))


# ---- what it is measured on ----


def test_prompts_and_completions_have_the_lengths_that_were_asked_for(tmp_path):
    sizes = small(prompt=131, picture=5)
    write(tmp_path, sizes)
    assert read_sizes(tmp_path) == sizes
    policy = VLM.load(tmp_path / "student")
    examples, _ = load_examples(tmp_path / "data")
    shown = policy.encode([prompt_of(TASK, example) for example in examples])
    assert shown.input_ids.shape == (3, 131) and bool(shown.attention_mask.all())
    assert shown.mm_token_type_ids.sum(-1).tolist() == [25] * 3
    assert len({tuple(ids) for ids in shown.input_ids.tolist()}) == 3
    text = torch.arange(27).view(3, 9)
    states = policy.completion_hidden(shown, text, torch.ones(3, 9).bool())
    logits = (states @ policy.head.weight.T).detach()
    never = policy.head.weight[:, 0] == NEVER
    assert set(never.nonzero().squeeze(-1).tolist()) >= {
        *policy.encoder.end_ids,
        *policy.never_sampled(),
    }
    assert len(policy.head.weight) == 2048 and int(never.sum()) < 100
    assert logits[..., never].softmax(-1).isfinite().all()
    assert float(logits.softmax(-1)[..., never].max()) == 0


@pytest.mark.slow
def test_a_step_speaks_real_words_as_it_speaks_made_up_ones(qwen3, tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "filled", lambda *_: qwen3)
    sizes = small(vocab=151_936, prompt=131)
    write(tmp_path, sizes)
    policy = VLM.load(tmp_path / "student")
    examples, _ = load_examples(tmp_path / "data")
    assert policy.encoder.lengths([prompt_of(TASK, example) for example in examples]) == [131] * 3
    never = (policy.head.weight[:, 0] == NEVER).nonzero().squeeze(-1).tolist()
    assert {*never} == policy.encoder.control_ids | {*range(151_669, 151_936)}
    process = processes.Process(tmp_path, "rows", 0)
    try:
        found = process.step()
        assert found["sampled"] == found["trained"] == sizes.tokens
    finally:
        process._process.kill()


def test_a_prompt_that_is_too_short_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--prompt 20: expected at least"):
        write(tmp_path, small(prompt=20))


def test_shared_completions_come_back_by_their_prompt(tmp_path):
    first = Shared(tmp_path)
    assert first.sampled is None
    for prompt, completion in (([1, 2], [3]), ([4], [5]), ([1, 2], [6])):
        first.keep(prompt, completion)
    second = Shared(tmp_path)
    assert second.take([[4], [1, 2], [1, 2]]) == [[5], [3], [6]]
    with pytest.raises(KeyError):
        second.take([[7]])


def test_a_reward_that_differs_between_texts():
    assert 0 <= reward_of("a") < 1 and len({reward_of(str(n)) for n in range(100)}) > 90


# ---- what goes wrong ----

FAKE = """
import json, shutil, sys
folder, name, part = sys.argv[1:4]
shutil.copyfile("GRADIENTS", f"{folder}/gradients-{name}.{part}.pt")
for number, line in enumerate(sys.stdin):
    if number == ENDS:
        sys.exit("planted: it ends")
    print(json.dumps(dict(seconds=SECONDS, rollout_seconds=0.25, teacher_seconds=0.0, loss=LOSS,
        sampled=36, trained=TRAINED, peak_mib=3.0, held_mib=1.0)), flush=True)
"""


def fakes(tmp_path, monkeypatch, *words, **of):
    """Workers that say what they are told to, by variant, in place of trainers."""
    usual = dict(GRADIENT=2.0, ENDS=-1, SECONDS=1.0, LOSS=0.5, TRAINED=36)
    for name in ("rows", "trl"):
        told = usual | of.get(name, {})
        told["GRADIENTS"] = tmp_path / f"{name}.pt"  # a worker without torch starts at once
        torch.save({"w": torch.tensor([1.0, told.pop("GRADIENT")])}, told["GRADIENTS"])
        text = FAKE
        for word, value in told.items():
            text = text.replace(word, str(value))
        (tmp_path / f"{name}.py").write_text(text)
    dispatch = tmp_path / "worker.py"
    dispatch.write_text(
        "import runpy, sys\n"
        f"runpy.run_path({str(tmp_path)!r} + '/' + sys.argv[2] + '.py', run_name='__main__')\n"
    )
    monkeypatch.setattr(processes, "WORKER", dispatch)
    monkeypatch.setattr(variants, "find_spec", lambda name: True)
    return run(tmp_path, "--variants", "rows", "trl", "--rounds", "2", *words)


def test_times_and_memory_of_equals(tmp_path, monkeypatch):
    prompts = ("70", "90")
    status, rows = fakes(tmp_path, monkeypatch, "--prompt", *prompts, trl=dict(SECONDS=3.0))
    assert status == 0 and len(rows) == 4
    for prompt in prompts:
        mine, its = rows[prompt, "rows"], rows[prompt, "trl"]
        assert float(its["x_seconds"]) == 3 and float(its["seconds"]) == 3
        assert float(mine["tokens_per_second"]) == 36 and float(mine["rest_seconds"]) == 0.75
        assert float(mine["above_mib"]) == 2 and mine["rounds"] == "2"


@pytest.mark.parametrize(
    "fault, words",
    [
        (dict(GRADIENT=2.001), "trl has the loss 0.5 and gradients off by"),
        (dict(LOSS=0.501), "trl has the loss 0.501"),
        (dict(TRAINED=35), "sampled 36 tokens and trained on 35; expected 36"),
        (dict(ENDS=0), "trl.0 has ended: planted: it ends"),
        (dict(ENDS=1), "planted: it ends"),
        (dict(ENDS=3), "planted: it ends"),
    ],
)
def test_a_rival_that_does_something_else_is_out(fault, words, tmp_path, monkeypatch):
    status, rows = fakes(tmp_path, monkeypatch, trl=fault)
    row = rows["70", "trl"]
    assert status == 1 and words in row["note"] and not row["seconds"]
    assert rows["70", "rows"]["seconds"] == "1" and rows["70", "rows"]["rounds"] == "2"


def test_of_two_trainers_times_and_gradients_add_up(tmp_path, monkeypatch):
    for part, gradient in enumerate(([1.0, 0.0], [0.0, 2.0])):
        torch.save({"w": torch.tensor(gradient)}, tmp_path / f"gradients-trl.{part}.pt")
    torch.save({"w": torch.tensor([1.0, 2.0])}, tmp_path / "gradients-rows.0.pt")
    made = dict(sampled=10, trained=10, rollout_seconds=0.25, teacher_seconds=0.0, held_mib=1.0)
    found = {
        "rows.0": dict(made, seconds=2.0, loss=0.75, peak_mib=4.0),
        "trl.0": dict(made, seconds=1.0, loss=0.5, peak_mib=3.0),
        "trl.1": dict(made, seconds=1.5, loss=0.25, peak_mib=5.0),
    }

    class Fake:
        def __init__(self, folder, name, part):
            self.gradients = folder / f"gradients-{name}.{part}.pt"
            self.step = lambda watched=False: found[f"{name}.{part}"]

    monkeypatch.setattr(processes, "Process", Fake)
    sizes = small(teacher=(64, 2), prompts=1)
    mine, its = (processes.Contender(tmp_path, name, sizes) for name in ("rows", "trl"))
    mine.start()
    assert its.start()["seconds"] == 2.5 and its.first["peak_mib"] == 5
    its.compare(mine, 1e-6)
    assert its.gap == 0


@pytest.mark.slow
def test_worker_answers_on_its_own_output_whatever_is_printed(tmp_path):
    """A worker of ours takes a step when asked, and ends by itself where nothing more is asked."""
    sizes = small()
    write(tmp_path, sizes)
    process = processes.Process(tmp_path, "rows", 0)
    try:
        found = process.step(watched=True)
        assert found["sampled"] == found["trained"] == sizes.tokens and found["held_mib"] > 0
        process._process.stdin.close()
        assert process._process.wait(60) == 0
        log = tmp_path / "run-rows.0" / "metrics.jsonl"
        assert [json.loads(line)["step"] for line in Path(log).read_text().splitlines()] == [1]
    finally:
        process._process.kill()


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--student", "64"], "HIDDEN,LAYERS"),
        (["--student", "Qwen/Qwen3-VL-2B-Instruct"], "HIDDEN,LAYERS"),
        (["--teacher", "100,2"], "multiple of 64"),
        (["--vocab", "100"], "at least 1088"),
        (["--generations", "1"], "at least 2"),
        (["--rounds", "0"], "--rounds 0"),
        (["--micro-batch", "5"], "a divisor of the 16 completions"),
        (["--picture", "1"], "--picture 1: expected at least 2"),
        pytest.param(["--device", "cuda"], "no CUDA device", marks=NO_GPU),
    ],
)
def test_bad_arguments_are_refused(arguments, word, capsys):
    with pytest.raises(SystemExit) as stop:
        step.main(arguments)
    assert stop.value.code == 2 and word in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        step.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in out for name in variants.VARIANTS)
