"""Processes that would not train the same run do not start; each says what differs, and whose."""

import dataclasses
import json
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from places import SUPPORT
from several import bare
from small import config_of

from kepo.config import Config
from kepo.data.identity import sha256
from kepo.data.run_data import load_data
from kepo.errors import KepoConfigError, KepoDataError
from kepo.run import agreement
from kepo.run.agreement import read_by_each, refuse_different, same_images, software


@pytest.fixture
def others(monkeypatch):
    """Stand-ins for the other processes: `others(what they say)`; this one is the first."""

    def say(*theirs):
        monkeypatch.setattr(agreement, "all_gather", lambda mine: [mine, *theirs])
        monkeypatch.setattr(agreement, "world_size", lambda: 1 + len(theirs))

    return say


def test_the_error_names_each_setting_and_whose_value_is_whose(others):
    same = {"lr": "0.1", "seed": "1"}
    others(same, same | {"lr": "0.5"}, same)
    with pytest.raises(KepoConfigError) as error:
        refuse_different("settings", {"lr": 0.1, "seed": 1})
    assert "differ in settings: lr: 0.1 on ranks 0-1, 3, 0.5 on rank 2; start" in str(error.value)
    assert "seed" not in str(error.value)
    others(same | {"new": "'x'"})
    with pytest.raises(KepoConfigError, match="new: nothing on rank 0, 'x' on rank 1"):
        refuse_different("settings", {"lr": 0.1, "seed": 1})
    many = {f"file {n}": n for n in range(20)}
    others({name: "0" for name in many})
    with pytest.raises(KepoConfigError, match="file 8: 8 on rank 0, 0 on rank 1; and 11 more"):
        refuse_different("files", many)
    others(same)
    refuse_different("settings", {"lr": 0.1, "seed": 1})


def test_the_code_of_this_package_is_compared_not_its_version_alone(monkeypatch, tmp_path):
    here = software()
    assert here["torch"] and here["source of kepo"] != here["source of kepo_kernels"]
    package = tmp_path / "kepo"
    source = Path(agreement.__file__).parents[1]
    shutil.copytree(source, package)
    shutil.copytree(source.with_name("kepo_kernels"), tmp_path / "kepo_kernels")
    monkeypatch.setattr(agreement, "__file__", str(package / "run" / "agreement.py"))
    assert software() == here
    rewards = package / "tasks" / "rewards.py"
    rewards.write_text(rewards.read_text() + "\n# other\n")
    assert software()["source of kepo"] != here["source of kepo"]


def test_files_that_every_process_reads_are_compared(made, tmp_path):
    for name in ("student", "teacher"):
        shutil.copytree(made / name, tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("student", "teacher")}
    here = read_by_each(models)
    assert {"student/tokenizer.json", "teacher/config.json"} <= here.keys()
    assert not any(name.endswith("safetensors") for name in here)  # the first one's are sent
    template = tmp_path / "teacher" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    other = read_by_each(models)
    assert {name for name in here if here[name] != other[name]} == {"teacher/chat_template.jinja"}
    plain = models | {"teacher": None}
    assert all(name.startswith("student/") for name in read_by_each(plain))
    # A quantised teacher is read by all.
    before = read_by_each(models, whole={"teacher"})
    weights = tmp_path / "teacher" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = read_by_each(models, whole={"teacher"})
    assert {n for n in before if before[n] != after[n]} == {"teacher/model.safetensors"}
    assert read_by_each({"student": str(tmp_path / "none")}) == {}  # whoever reads it says so


def test_image_files_of_another_node_are_compared(made, tmp_path, others):
    shutil.copytree(made / "data" / "train", tmp_path / "data")
    data = load_data(config_of(made, tmp_path / "run", train_data=str(tmp_path / "data")))
    paths = list(dict.fromkeys(path for e in data.train for path in e.images))
    theirs = agreement._seen(paths)
    others(("node1", None), ("node2", theirs))
    same_images(data)
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[:-1] + b"x")  # of one size
    with pytest.raises(KepoDataError, match=rf"^rank 2, on node2: 1 of {len(paths)} images"):
        same_images(data)
    paths[0].write_bytes(content)
    lost = [*theirs[:-1], "missing: No such file or directory"]
    others(("node2", lost))
    with pytest.raises(KepoDataError, match=f"first {paths[-1]}"):
        same_images(data)


def test_files_of_rewards_and_task_are_the_same_on_all_ranks(others, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(agreement, "processes", lambda *a, **s: nullcontext(torch.device("cpu")))
    monkeypatch.setattr(agreement, "world_size", lambda: 2)
    monkeypatch.setattr(agreement, "refuse_different", lambda what, mine: seen.update({what: mine}))
    monkeypatch.setattr(agreement, "read_by_each", lambda *arguments: {})
    files = [tmp_path / "mine.py", tmp_path / "task.py"]
    for file in files:
        file.write_text(f"# {file.name}")
    code = {"rewards": [f"{files[0]}:one", f"{files[0]}:two"], "task": [f"{files[1]}:Mine"]}
    with agreement.agreeing_ranks(Config(), code):
        assert seen["files of rewards and task"] == {str(file): sha256(file) for file in files}


def test_the_time_limit_is_the_setting(monkeypatch):
    given = {}

    @contextmanager
    def processes(device, **settings):
        given.update(settings, device=device)
        yield device

    monkeypatch.setattr(agreement, "processes", processes)
    with agreement.agreeing_ranks(Config(rank_timeout_minutes=0.5)) as device:
        assert device == "cpu"
    assert given == {"device": "cpu", "alone": False, "timeout": 30.0}
    assert Config().rank_timeout_minutes == 15.0


@pytest.mark.slow
@pytest.mark.processes
def test_four_ways_to_differ_are_four_clear_ends(made, tmp_path, capsys):
    """In two processes; how many seconds each took is printed."""
    for name in ("train", "test"):
        shutil.copytree(made / "data" / name, tmp_path / name)
    base = config_of(made, tmp_path / "run", "grpo", teacher=None, lr=2e-4, seed=1, steps=1)
    ways = {
        "lr": {"lr": 5e-3},
        "seed": {"seed": 2},
        "train_data": {"train_data": str(tmp_path / "test")},
        "teacher": {"teacher": str(made / "teacher")},
    }
    whole = dataclasses.asdict(base)
    pairs = [[whole, whole | other] for other in ways.values()]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    script = SUPPORT / "apart.py"
    for process in bare(script, tmp_path / "pairs.json", tmp_path / "ends"):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output[-4000:]
    for rank in (0, 1):
        ends = json.loads((tmp_path / f"ends.{rank}").read_text())
        for (name, other), (end, seconds) in zip(ways.items(), ends, strict=True):
            theirs = f"{name}: {whole[name]!r} on rank 0, {other[name]!r} on rank 1"
            assert end == (f"ranks differ in settings: {theirs}; start all of them with the same")
            with capsys.disabled():
                print(f"\nrank {rank}, another {name}: ended after {seconds:.2f} s")


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("kind", ["setting", "file", "flag"])
def test_one_that_cannot_start_ends_the_other_in_its_words(made, tmp_path, kind, wrong):
    """Bare processes: nobody but themselves would end them."""
    flags = dict(student=made / "student", train_data=made / "data" / "train", run_dir=tmp_path)
    words = [x for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", value)]
    first, last, said = {
        "setting": (
            ("grpo", "grpo"),
            ("--lr=1e-3", "--hint-trigger=always"),
            "hint_trigger='always' needs a teacher",
        ),
        "file": (("grpo", "none.yaml"), ("--lr=1e-3",) * 2, "none.yaml cannot be read"),
        "flag": (("grpo", "grpo"), ("--lr=1e-3", "--nope"), "its command line cannot be read"),
    }[kind]
    turn = (lambda pair: pair) if wrong else (lambda pair: pair[::-1])
    started = bare("-m", "kepo", "train", turn(first), *words, turn(last))
    ended = [(*process.communicate(timeout=60), process.returncode) for process in started]
    output, _, code = ended[1 - wrong]
    assert code == 1 and output.count("error: ") == 1 and "Warning" not in output, output
    assert f"rank {1 - wrong} ends, as another cannot start: rank {wrong}: {said}" in output
    output, _, code = ended[wrong]
    assert code == (2 if kind == "flag" else 1) and "Traceback" not in output
    assert said in output or kind == "flag"


@pytest.mark.slow
@pytest.mark.processes
def test_the_command_ends_with_that_sentence_and_code_1(made, tmp_path):
    flags = dict(student=made / "student", train_data=made / "data" / "train", run_dir=tmp_path)
    words = [x for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", value)]
    started = bare("-m", "kepo", "train", "grpo", *words, "--lr", ("2e-4", "5e-3"))
    for process in started:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 1
        assert output.count("error: ") == 1 and "Traceback" not in output, output
        assert "Warning" not in output, output  # torch has one for groups that have no default
        assert "lr: 0.0002 on rank 0, 0.005 on rank 1" in output
