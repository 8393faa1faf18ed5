"""`import kepo` and `kepo.train` from Python: in notebooks, threads, loops, and more than once."""

import asyncio
import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from places import SUPPORT
from safetensors.torch import load_file
from small import config_of, rigged

import kepo
from kepo.data.layouts import from_python
from kepo.data.load import load_examples
from kepo.errors import KepoConfigError, KepoDataError
from kepo.run.metrics import read_metrics

NAMES = ("train", "evaluate", "Config", "load", "Example", "Rollout", "Task", "Result")


def run_python(code: str, *words: str) -> str:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([os.getcwd(), str(SUPPORT)]))
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_importing_takes_no_torch_until_it_is_used():
    found = run_python(
        "import sys, kepo\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
        "kepo.load('grpo'), kepo.Config(), kepo.Task(), kepo.Example('q', 'Why?', 'so')\n"
        "print('torch' in sys.modules)\n"
        "kepo.train\n"
        "print('torch' in sys.modules)\n"
    )
    assert found.split() == ["False", "False", "False", "True"]


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_the_api_are_there(name):
    assert name in dir(kepo) and callable(getattr(kepo, name))


# ---- questions from Python ----


def short(made, run_dir, **settings):
    return config_of(made, run_dir, "grpo", **{"steps": 2, "save_every": 2, **settings})


def weights(result: kepo.Result) -> dict[str, torch.Tensor]:
    return load_file(result.checkpoint / "model.safetensors")


def same(left: kepo.Result, right: kepo.Result) -> bool:
    mine, others = weights(left), weights(right)
    return mine.keys() == others.keys() and all(torch.equal(x, others[n]) for n, x in mine.items())


def test_a_run_says_what_has_become_of_it(made, tmp_path):
    with rigged():
        found = kepo.train(short(made, tmp_path, eval_data=str(made / "data" / "test")))
    assert found.exit_code == 0 and found.folder == tmp_path
    assert found.checkpoint == tmp_path / "checkpoints" / "step-00000002" / "policy"
    assert weights(found)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert found.metrics["step"] == 2
    assert found.metrics["reward"] == next(r["reward"] for r in records[::-1] if "reward" in r)
    assert found.metrics["eval"] == next(r["eval"] for r in records[::-1] if "eval" in r)
    # Nothing is left to do, and it says the same.
    with rigged():
        assert kepo.train(short(made, tmp_path, eval_data=str(made / "data" / "test"))) == found


def test_a_list_of_examples_trains_as_the_dataset_does(made, tmp_path):
    config = short(made, tmp_path / "disk")
    examples, _ = load_examples(config.train_data, modalities=config.train_modalities)
    without = dataclasses.replace(config, train_data="", run_dir=str(tmp_path / "list"))
    with rigged():
        from_disk, from_list = kepo.train(config), kepo.train(without, data=examples)
    assert same(from_disk, from_list)
    assert from_disk.metrics["reward"] == from_list.metrics["reward"]
    record = json.loads((tmp_path / "list" / "data.json").read_text())["train"]
    assert record["layout"] == "list from Python" and record["questions"] == len(examples)
    # Resumed with other questions it is refused, as from disk.
    others = [dataclasses.replace(examples[0], question="Another?"), *examples[1:]]
    longer = dataclasses.replace(without, steps=3)
    with rigged(), pytest.raises(KepoDataError, match="train_data has a question that is new"):
        kepo.train(longer, data=others)
    with rigged():
        assert kepo.train(longer, data=examples).metrics["step"] == 3


def test_records_are_read_as_a_file_of_them_is(tmp_path, monkeypatch):
    monkeypatch.setenv("KEPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 9, 9)).save(tmp_path / f"{number}.png")
    records = [
        dict(question="What?", options=["one", "two"], answer="two", image="0.png", level=3),
        dict(prompt="Six times seven?", solution="... \\boxed{42}", images=["1.png", "2.png"]),
        dict(messages=[dict(role="user", content="And?")], answer=7, id="named"),
        dict(question="No answer"),
        dict(question="No picture", answer="x", image="nowhere.png"),
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found, report = load_examples(records)
    on_disk, of_file = load_examples(tmp_path / "data.jsonl")
    named = [dataclasses.replace(e, id=f"data[{n}]") for n, e in enumerate(on_disk[:2])]
    assert found == [*named, on_disk[2]]
    assert found[0].answer == "B" and found[0].columns["level"] == 3
    assert report.counts() == of_file.counts() == {"answer": 1, "image missing": 1}
    assert [str(p).split(":")[0] for p in report.problems] == ["data[3]", "data[4]"]
    # Pictures as Pillow and as bytes have them, and examples, which are records too.
    picture = Image.open(tmp_path / "1.png")
    held = [records[0] | {"image": picture}, dict(records[1], images=[picture, b"no picture"])]
    [first, second], _ = load_examples(held)
    assert Image.open(first.images[0]).getpixel((0, 0)) == (60, 9, 9)
    assert first.columns["level"] == 3 and second.images[1].read_bytes() == b"no picture"
    again, _ = load_examples(found)
    assert again == found
    asked = kepo.Example("a", "And now?", "7", earlier=(("system", "Be brief."),))
    assert load_examples([asked])[0] == [asked]


def test_an_image_root_is_not_left(tmp_path):
    (tmp_path / "in").mkdir()
    for folder in (tmp_path, tmp_path / "in"):
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    names = ("a.png", "../a.png", str(tmp_path / "a.png"))
    records = [dict(question=name, answer="x", image=name) for name in names]
    kept, report = load_examples(records, image_root=tmp_path / "in")
    assert [e.images for e in kept] == [((tmp_path / "in" / "a.png").resolve(),)]
    assert report.counts() == {"image outside": 2}
    assert len(load_examples(records[2:])[0]) == 1


@pytest.mark.parametrize(
    "data, sentence",
    [
        ("data.jsonl", "data is 'data.jsonl'; expected a list of kepo.Example"),
        ({"question": "What?"}, r"data is \{'question': 'What\?'\}; expected a list"),
        (7, "data is 7; expected a list"),
        ([], "0 of 0 questions"),
        (["What?"], "data\\[0\\]: is a str; expected an object"),
        ([kepo.Example("q", "What?", "C", options=("a", "b"))], "the answer 'C' equals 0 of"),
        ([kepo.Example("q", " ", "A")], "question=' '; expected a non-empty string"),
    ],
)
def test_other_data_is_refused(made, tmp_path, data, sentence):
    config = short(made, tmp_path, train_data="", train_modalities=None)
    with pytest.raises(KepoDataError, match=sentence):
        kepo.train(config, data=data)


def test_data_has_one_source(made, tmp_path):
    with pytest.raises(KepoConfigError, match="data is given, and so is train_data='/"):
        kepo.train(short(made, tmp_path), data=[])
    with pytest.raises(KepoConfigError, match="train_data is not set"):
        kepo.train(short(made, tmp_path, train_data=""))
    with pytest.raises(KepoDataError, match=r"<data> is not there"):  # a run of a list, without it
        kepo.train(short(made, tmp_path, train_data=from_python.NAME))


# ---- in a process that goes on ----

ONCE = """
import json, sys
from small import run_rigged
assert run_rigged(json.loads(sys.argv[1])) == 0
"""


@pytest.mark.slow
def test_twice_in_a_process_gives_the_bits_of_two(made, tmp_path):
    """And leaves nothing behind: no model, no handler, no stream, no thread."""

    def settings(name):
        of = {"one": dict(seed=1), "other": dict(seed=2, kl_coef=0.1, policy_loss="cispo")}
        return of[name]

    before = (
        {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
        (sys.stdout, sys.stderr),
        threading.enumerate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )
    together = {}
    for name in ("one", "other"):
        with rigged():
            together[name] = kepo.train(short(made, tmp_path / name, **settings(name)))
        gc.collect()
        alive = [x for x in gc.get_objects() if type(x).__name__ in ("VLM", "Run", "AdamW")]
        assert alive == []
    assert before == (
        {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
        (sys.stdout, sys.stderr),
        threading.enumerate(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )
    for name, mine in together.items():
        config = short(made, tmp_path / f"{name} apart", **settings(name))
        run_python(ONCE, json.dumps(dataclasses.asdict(config)))
        apart = Path(config.run_dir) / "checkpoints" / "step-00000002" / "policy"
        assert same(mine, dataclasses.replace(mine, checkpoint=apart)), name
    assert not same(*together.values())


def test_in_a_thread_and_in_a_running_loop(made, tmp_path):
    async def brief(completions, **columns):
        await asyncio.sleep(0)
        return [1.0 / (1 + len(text)) for text in completions]

    def trained(name):
        config = short(made, tmp_path / name, gate_reward=None)
        with rigged():
            return kepo.train(config, rewards=[brief, "accuracy"])

    async def notebook():
        return trained("loop")

    plain, in_loop = trained("plain"), asyncio.run(notebook())
    found = []
    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: found.append(trained("thread")))
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGINT) is handler
        thread.join(0.05)
    assert same(plain, in_loop) and same(plain, *found)
    assert 0 < plain.metrics["rewards/brief/mean"] < 1


def test_a_file_that_was_edited_is_read_again(made, tmp_path):
    """As one does between two cells."""
    file = tmp_path / "mine.py"
    config = short(made, tmp_path / "run", gate_reward=None, reward_weights=(1.0,), steps=1)
    rewards = [f"{file}:mine"]
    for value in (0.25, 0.75):
        file.write_text(
            f"def mine(completions, **columns):\n    return [{value} for _ in completions]\n"
        )
        config = dataclasses.replace(config, run_dir=str(tmp_path / str(value)))
        with rigged():
            assert kepo.train(config, rewards=rewards).metrics["reward"] == value


def test_an_error_is_an_exception_and_leaves_nothing_behind(made, tmp_path):
    def fails(completions, **columns):
        raise ZeroDivisionError("of mine")

    streams, handler = (sys.stdout, sys.stderr), signal.getsignal(signal.SIGINT)
    with pytest.raises(kepo.errors.KepoRewardError, match="'fails' raised ZeroDivisionError"):
        kepo.train(short(made, tmp_path, gate_reward=None), rewards=[fails])
    assert (sys.stdout, sys.stderr) == streams and signal.getsignal(signal.SIGINT) is handler
    # The folder is free again.
    with rigged():
        assert kepo.train(short(made, tmp_path / "again")).exit_code == 0


def test_a_file_is_no_config():
    with pytest.raises(KepoConfigError, match=r"^train: expected a kepo.Config, not 'own.yaml'"):
        kepo.train("own.yaml")
