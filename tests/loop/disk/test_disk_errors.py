"""A disk that refuses, whatever the command: one sentence that says where and what, exit code 1."""

import errno
import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import toy_run

from kepo.disk import durable
from kepo.errors import REMEDIES, KepoDataError, command, disk_sentence
from kepo.evaluation import report
from kepo.evaluation.scores import Scores
from kepo.planner import plot
from kepo_kernels.compute.chunks import chunking

RUN = ("--student", "s", "--train-data", "{data}", "--teacher", "None", "--hint-trigger", "never")
GRPO = ("--gate-reward", "None", "--distill-coef", "0.0")
PLANNED = ("--student", "Qwen3-VL-2B-Instruct", "--gpus", "1", "--gpu-gb", "80")
ONE_RUN = ("--methods", "grpo@lr=1e-4", "--seeds", "1")
COMMANDS = {
    "train": ("kepo", "train", *RUN, *GRPO, "--run-dir", "{here}/x"),
    "demo": ("kepo", "demo", "--root", "{here}/x"),
    "compare": ("experiments.compare", *ONE_RUN, "--root", "{here}/x", "--out", "{here}/y"),
    "evaluate": ("kepo", "evaluate", "m", "d", "--json", "{here}/x.json"),
    "plan": ("kepo", "plan", "grpo", *PLANNED, "--plot", "{here}/x.png"),
    "data": ("kepo", "data", "check", "{here}/x"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_run.write_dataset(tmp_path_factory.mktemp("made") / "data")


def run(monkeypatch, name: str, folder: Path, data: Path) -> str:
    """The sentence that a command ends with, whose paths are in ``folder``."""
    words = [word.format(here=folder, data=data) for word in COMMANDS[name]]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the module is imported already
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    assert isinstance(end.value.code, str), "it prints nothing, or ends with 0"  # else exit code 1
    return end.value.code


@pytest.fixture
def canned(monkeypatch):
    """An evaluation without a model, and a picture without matplotlib."""
    monkeypatch.setattr(plot, "plot_plan", lambda _, __, to: durable.write_durably(to, "x"))
    numbers = dict(questions=1, right=1, unparsed=0, accuracy=1.0, low=0.2, high=1.0, chance=0.5)
    numbers["rewards"] = {}
    result = Scores(
        settings={},
        data={"bad_records": {}},
        overall=numbers,
        macro_mean={"accuracy": 1.0, "chance": float("nan")},
        modalities={"CT": numbers},
        question_types={"x": numbers},
        cells=[{"modality": "CT", "question_type": "x", **numbers}],
        answers=[],
    )
    monkeypatch.setattr(report, "evaluation", lambda settings: result)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_in_a_sentence(name, code, tmp_path, data, monkeypatch, canned):
    calls = {"data": ["stat"], "plan": ["replace"], "evaluate": ["replace"]}.get(name, ["mkdir"])

    def refusing(real):
        def refuse(path, *arguments, **named):
            if isinstance(path, (str, Path)) and str(path).startswith(f"{tmp_path}/"):
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *arguments, **named)

        return refuse

    for call in calls:
        monkeypatch.setattr(os, call, refusing(getattr(os, call)))
    sentence = run(monkeypatch, name, tmp_path, data)
    monkeypatch.undo()
    assert sentence.startswith("error: ") and "\n" not in sentence
    assert str(tmp_path) in sentence and os.strerror(code) in sentence
    assert REMEDIES[code] in sentence and ".tmp-" not in sentence
    assert list(tmp_path.iterdir()) == []  # nothing half


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_in_the_place_of_a_folder(name, tmp_path, data, monkeypatch, canned):
    file = tmp_path / "file"
    file.write_text("mine")
    sentence = run(monkeypatch, name, file, data)
    assert sentence.startswith("error: ") and str(file) in sentence and "\n" not in sentence
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name, place", [("plan", "x.png"), ("evaluate", "x.json")])
def test_a_folder_in_the_place_of_a_file(name, place, tmp_path, data, monkeypatch, canned):
    (tmp_path / place).mkdir()
    sentence = run(monkeypatch, name, tmp_path, data)
    assert sentence.startswith("error: ") and place in sentence
    assert list((tmp_path / place).iterdir()) == []


def test_what_every_disk_may_say_is_worded():
    for code in (*REMEDIES, errno.ENOTEMPTY):
        error = OSError(code, os.strerror(code), "/a/path")
        assert "/a/path cannot be read or written: " + os.strerror(code) in disk_sentence(error)
    assert "a -> b" in disk_sentence(OSError(errno.EIO, "x", "a", None, b"b"))
    assert disk_sentence(OSError("a library's own words")) == "a library's own words"
    assert disk_sentence(OSError(errno.EIO, "x", 7)).startswith("7 cannot")


def test_an_error_of_ours_and_a_result_pass(capsys):
    def refuse():
        raise KepoDataError("no data")

    with pytest.raises(SystemExit, match="error: no data"):
        command(refuse)()
    with pytest.raises(SystemExit, match="error: chunking: rows=-1"):
        command(lambda: chunking(-1, 2, 3))()
    with pytest.raises(ValueError, match="not ours"):
        command(lambda: int("not ours"))()
    assert command(lambda number: number + 1)(1) == 2
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        command(lambda: 1 / 0)()


SPEAK = """
from kepo.errors import command
command(lambda: print("word " * {}))()
"""


@pytest.mark.parametrize("count", [1, 100_000])  # what a buffer keeps to the end, and what not
def test_output_that_nobody_takes_is_no_traceback(count, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    words = [sys.executable, "-c", SPEAK.format(count)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in done.stderr
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
