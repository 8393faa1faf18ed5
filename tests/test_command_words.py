"""What the commands print: help pages that fit, and one sentence for a wrong command line."""

import itertools
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from places import ROOT

pytest.importorskip("transformers")

from experiments.compare import main as compare
from kepo import help as help_pages
from kepo.__main__ import main
from kepo.config import Config, load, presets
from kepo.errors import KepoConfigError
from kepo.flags import command_line
from kepo.help import flags_of, page

COMMANDS = (
    *("kepo train", "kepo plan", "kepo evaluate", "kepo export", "kepo data check", "kepo report"),
    "kepo demo",
)


def told(capsys, *words: str) -> tuple[int, str]:
    """The exit code and the sentence of a command that is given wrong words."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    error = capsys.readouterr().err
    if isinstance(ended.value.code, str):  # what Python prints, with code 1
        return 1, ended.value.code
    return ended.value.code, error


# ---- help ----


def help_of(capsys, monkeypatch, command: str, columns: int) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        if command == "compare":
            monkeypatch.setattr(sys, "argv", ["compare", "--help"])  # it has no other way
            compare()
        main([*command.split()[1:], "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", [*COMMANDS, "compare"])
def test_help_fits_the_terminal(capsys, monkeypatch, command, columns):
    lines = help_of(capsys, monkeypatch, command, columns)
    assert [line for line in lines if len(line) > columns] == []
    text = "\n".join(lines)
    assert "``" not in text and "python -m kepo" not in text.replace("-m kepo train recipe", "")
    assert not re.search(r"(None|\b0) =", text)  # one style: `None means`, `0 disables`


def test_a_paragraph_that_did_not_wrap_would_be_seen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(help_pages, "_paragraph", lambda text, width: " ".join(text.split()))
    assert max(map(len, page("x", "many words " * 30, []).splitlines())) > 80


def test_texts_of_flags_fill_their_lines(capsys, monkeypatch):
    """The line breaks of the docstrings are gone: no line could take the next one's first word."""
    lines = help_of(capsys, monkeypatch, "kepo train", 80)
    begins = re.compile(r" {26}(\S+)")
    for line, after in itertools.pairwise(lines):
        if (word := begins.match(after)) and len(line) > 26 and not line.startswith("  --"):
            assert len(line) + 1 + len(word[1]) > 80, line


@pytest.mark.parametrize("command", ["kepo train", "kepo plan"])
def test_help_tells_of_recipes_presets_and_sections(capsys, monkeypatch, command):
    lines = help_of(capsys, monkeypatch, command, 80)
    assert lines[0] == f"usage: {command} [RECIPE | PRESET ...] [OPTIONS]"
    text = " ".join(" ".join(lines).split())
    assert f"Presets: {', '.join(presets())}." in text
    headings = [line.partition(":")[0] for line in lines if re.match(r"[A-Z]\w+: ", line)]
    sections = ["Data", "Pictures", "Teacher", "Models", "Task", "Sampling", "Reward", "Objective"]
    assert headings[headings.index("Data") :] == [*sections, "Hint", "Optimizer", "Run"]
    assert text.index("Optimizer:") < text.index("--lr FLOAT") < text.index("Run:")
    assert ("--table" in text.partition("Options")[0]) == (command == "kepo plan")


def test_help_has_every_setting_and_the_default_of_a_layer(capsys):
    text = " ".join(page("x", "", flags_of(load("dr_grpo"))).split())
    for flag in flags_of(Config):
        assert f" {flag.word} " in text or f" {flag.word}, --no-" in text
    assert "(default: dr_grpo)" in text and "(default: sequence_mean)" not in text


@pytest.mark.parametrize(
    ("words", "has", "lacks"),
    [
        (["lr"], ["--lr FLOAT", "--lr-end"], ["--steps", "--train-data", "Presets"]),
        (["pictures"], ["--min-pixels", "--max-pixels"], ["--lr FLOAT", "Presets"]),
        (
            ["--teacher-top-k"],
            ["Print"],
            [],
        ),  # a flag after --help is no word of it: the whole page
        (["Hinted-cap"], ["--hinted-cap"], ["--hint-trigger"]),
    ],
)
def test_help_about_some_words(capsys, words, has, lacks):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help", *words])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith("usage: kepo train")
    assert all(text in shown for text in has) and not any(text in shown for text in lacks)


def test_help_about_nothing_that_is_there(capsys):
    error = (
        "error: --help lrr: no section of kepo train is called that, and no option has it in its "
        "name\n"
    )
    assert told(capsys, "train", "--help", "lrr") == (2, error)


def test_version_and_help_are_commands(capsys):
    import kepo_kernels

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kepo {kepo_kernels.__version__}\n"
    assert main(["help"]) == 0
    listed = capsys.readouterr().out
    assert main(["--help"]) == 0 and capsys.readouterr().out == listed
    with pytest.raises(SystemExit):
        main(["help", "demo"])
    assert capsys.readouterr().out.startswith("usage: kepo demo")
    with pytest.raises(SystemExit):
        main(["--help", "train", "pictures"])
    assert "--min-pixels" in capsys.readouterr().out


# ---- flags ----


@dataclass(frozen=True)
class Made:
    """Settings."""

    place: str
    """Place."""
    numbers: tuple[float, ...] = ()
    """Numbers."""
    share: float | None = 1.0
    """Share."""
    quick: bool = True
    """Quick."""


def made(*words: str) -> Made:
    [found] = command_line(Made, prog="made", description="", args=words)
    return found


def test_flags_are_read_in_every_spelling():
    assert made("here") == Made("here")
    words = ("--numbers", "-1e-3", "2", "-.5", "--share=-2", "here", "--no-quick")
    assert made(*words) == Made("here", (-0.001, 2.0, -0.5), -2.0, False)
    assert made("--share", "none", "-7") == Made("-7", share=None)
    assert made("a=b", "--no_quick", "--quick") == Made("a=b")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "PLACE not given; expected made [OPTIONS]"),
        (["a", "b"], "'b' is out of place; expected made [OPTIONS], flags last"),
        (["a", "--shrae", "3"], "--shrae is not an option of made; did you mean --share? "),
        (["a", "--max-steps", "3"], "--max-steps is not an option of made; the nearest are "),
        (["a", "--share"], "--share has no value; expected --share None|FLOAT"),
        (["a", "--share", "--quick"], "--share has no value"),
        (["a", "--share", "x"], "--share='x'; expected a number, or None"),
        (["a", "--numbers", "1", "x"], "--numbers='1 x'; expected a list, each of it a number"),
        (["a", "--quick=no"], "--quick takes no value"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_code_2(capsys, words, sentence):
    with pytest.raises(SystemExit) as ended:
        made(*words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {sentence}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ("train --steps 3 grpo", 2, r"'grpo' is out of place; .*\[RECIPE .*, flags last"),
        ("train --lr 0", 2, "--lr=0; expected a number > 0"),
        ("train --run-dir none", 2, "run_dir='none'; expected a path"),
        ("train nowhere.yaml", 1, "nowhere.yaml cannot be read: No such file or directory; exp"),
        ("data chekc", 2, "kepo data has 'chekc'; expected kepo data check PATH"),
        ("data check . --against /nowhere", 1, "/nowhere is not there|. has none of the layouts"),
        ("plan --table", 2, "--table has nothing; expected kepo plan --table RECIPE"),
        ("plan --gpus 0", 1, "gpus is 0; expected a number >= 1"),
        ("plan grpo --gpu-gb -3", 1, "gpu_gb is -3.0; expected a number in"),
        ("plan grpo --gpus 1", 1, "gpu_gb is not set; give --gpus and --gpu-gb"),
        ("evaluate no-model no-data", 1, "no-data is not there; expected"),
        ("trian", 2, r"kepo has no command 'trian'; did you mean train\?"),
    ],
)
def test_each_command_says_what_is_wrong_in_one_sentence(capsys, words, code, sentence):
    found, error = told(capsys, *words.split())
    assert found == code and re.match(f"error: ({sentence})", error), error
    assert error.count("\n") == (code == 2)


# ---- keys of recipes ----


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("max_new_tokens: 9", r"max_new_tokens: it is called max_completion_length here \(kepo"),
        ("studnet: /a", r"unknown keys \['studnet'\]; studnet: did you mean student\?"),
        ("engine: vllm", r"unknown keys \['engine'\]; engine is now called sampler "),
        ("sampling: {seed: 3}", "sampling is a block, but recipes are flat"),
        ("qqq: 1", r"qqq: the nearest are \w+, \w+, \w+ \(kepo train --help lists all\)$"),
    ],
)
def test_an_unknown_key_gets_a_guess_and_no_wall(tmp_path, line, words):
    (tmp_path / "a.yaml").write_text(line)
    with pytest.raises(KepoConfigError, match=words) as refused:
        load(tmp_path / "a.yaml")
    assert len(str(refused.value)) < 200 + len(str(tmp_path))


def test_an_empty_recipe_name_is_no_folder():
    with pytest.raises(KepoConfigError, match="layer is an empty name; expected a YAML file"):
        load("")


# ---- a reader that stops ----


@pytest.mark.parametrize("module", ["kepo", "kepo_kernels"])
def test_a_reader_that_has_stopped_is_no_traceback(module):
    printing = subprocess.Popen(
        [sys.executable, "-m", module], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    printing.stdout.close()  # before anything is printed
    assert printing.stderr.read() == b"" and printing.wait() == 1
