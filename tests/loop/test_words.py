"""What the words of settings mean: in a YAML file, as flags and in Python, all the same."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kepo.config import PATHS, Config, load
from kepo.errors import KepoConfigError
from kepo.evaluation.report import Evaluation, evaluation
from kepo.flags import command_line

START = Config(student="s", teacher="t", train_modalities=("X",), gate_threshold=0.5)


def from_yaml(folder: Path, content: str | bytes) -> Config:
    path = folder / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(path)


def from_flags(*words: str) -> Config:
    [config] = command_line(START, args=list(words), prog="kepo train", description="")
    return config


# (setting, word, what it means). Where START is None the word itself must say so.
MEANS = [
    *(("lr", word, 1e-6) for word in ("1e-6", "1.0e-6", "1E-6", "0.000001", "1.e-6", "+1e-6")),
    *(("lr", word, 1e5) for word in ("1E5", "1e+5", "100_000", "1_00_000.0")),
    *(("lr", word, 0.5) for word in (".5", "+0.5", "00.5")),
    ("entropy_coef", "-1e-3", -1e-3),
    *(("steps", word, 1000) for word in ("1e3", "1000.0", "1_000", "01000", "0x3e8")),
    *(("teacher", word, None) for word in ("None", "none", "NONE", "null", "NULL", "~")),
    *(("gate_threshold", word, None) for word in ("None", "none", "null", "~")),
    *(("teacher_bits", word, None) for word in ("None", "~")),
    *(("train_modalities", word, None) for word in ("None", "none", "null", "~")),
    ("gate_reward", "none", None),
    ("sharding", "none", "none"),  # a choice of that setting
    ("run_dir", "2024-01-01", "2024-01-01"),
    ("run_dir", "no", "no"),
]


@pytest.mark.parametrize(("name", "word", "meaning"), MEANS)
def test_a_word_means_the_same_in_a_file_and_as_a_flag(tmp_path, name, word, meaning):
    for config in (
        from_yaml(tmp_path, f"{name}: {word}\n"),
        from_flags(f"--{name.replace('_', '-')}", word),
    ):
        found = getattr(config, name)
        assert found == meaning and type(found) is type(meaning)


def test_a_mapping_means_the_same_in_a_file_as_flags_and_in_python(tmp_path):
    pairs = (("CT", "http://a:1/v1?x=y"), ("MR scan", "folder"))
    text = "teachers:\n  CT: http://a:1/v1?x=y\n  'MR scan': folder\nteacher: null\n"
    words = ["--teachers", "CT=http://a:1/v1?x=y", "MR scan=folder"]
    given = (dict(pairs), list(pairs), ["=".join(pair) for pair in pairs], pairs)
    for config in (
        from_yaml(tmp_path, text),
        from_flags(*words),
        *(Config(teachers=one) for one in given),
    ):
        assert config.teachers == pairs
    assert Config().teachers == from_yaml(tmp_path, "teachers: {}\n").teachers == ()
    home = Config(teachers={"1": "~/model"}).teachers[0][1]
    assert home == str(Path.home() / "model")


@pytest.mark.parametrize(
    "value", ["x", 3, ["a"], {"a": ""}, {"": "a"}, {1: "x"}, [("a", "b", "c")], {"a": ["b"]}]
)
def test_what_is_no_mapping_is_refused(value):
    with pytest.raises(KepoConfigError, match=r"teachers=.*; expected a mapping, in YAML \{name"):
        Config(teachers=value)
    with pytest.raises(KepoConfigError, match="with a once"):
        Config(teachers=[("a", "b"), ("a", "c")])


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "yes", "Yes", "on", "ON"])
def test_booleans_are_yaml_s_words(tmp_path, word):
    assert from_yaml(tmp_path, f"mask_truncated: {word}\n").mask_truncated is True
    no = {"t": "false", "y": "no", "o": "off"}[word[0].lower()]
    spelt = no.upper() if word.isupper() else no.capitalize() if word[0].isupper() else no
    assert from_yaml(tmp_path, f"verify_images: {spelt}\n").verify_images is False


def test_lists_hold_what_their_setting_holds(tmp_path):
    config = from_yaml(
        tmp_path, "train_modalities: [NO, CT, 'None', \"7\"]\nreward_weights: [1e-1, 2, +.5e1]\n"
    )
    assert config.train_modalities == ("NO", "CT", "None", "7")  # NO is no boolean
    assert config.reward_weights == (0.1, 2.0, 5.0)
    assert from_flags("--reward-weights", "1e-1", "2").reward_weights == (0.1, 2.0)
    assert from_flags("--train-modalities", "None", "CT").train_modalities == ("None", "CT")


def test_an_empty_value_is_none_and_merge_keys_merge(tmp_path):
    config = from_yaml(tmp_path, "gate_reward:\n<<: {lr: 1e-3, steps: 7}\nsteps: 9\n")
    assert (config.gate_reward, config.lr, config.steps) == (None, 1e-3, 9)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_a_file_names_itself(tmp_path, encoding):
    assert from_yaml(tmp_path, "run_dir: été\n".encode(encoding)).run_dir == "été"


REFUSED = {
    "key twice": ("lr: 1\nsteps: 3\nlr: 2", "line 3, column 1: the key 'lr' is already in line 1"),
    "key twice, quoted": ("lr: 1\n'lr': 2", "line 2, column 1: the key 'lr' is already in line 1"),
    "key twice, merged": ("<<: {lr: 1, lr: 2}", "line 1.*the key 'lr' is already"),
    "two merges": ("<<: {lr: 1}\n<<: {lr: 2}", "line 2.*the key '<<' is already in line 1"),
    "quoted number": ("lr: '2e-6'", "lr='2e-6'; expected a number, without quotes"),
    "quoted whole number": ("steps: '7'", "steps='7'; expected a whole number, without quotes"),
    "quoted boolean": ("mask_truncated: 'yes'", "mask_truncated='yes'; .*without quotes"),
    "sexagesimal": ("steps: 1:30", "steps='1:30'; expected a whole number"),  # 90 to YAML 1.1
    "comma": ("lr: 0,5", "lr='0,5'; expected a number"),
    "other digits": ("steps: ٣", "steps='٣'; expected a whole number"),
    "not whole": ("steps: 15e-1", "steps=15e-1; expected a whole number"),
    "too large to be exact": ("steps: 1e30", "steps=1e30; expected a whole number"),
    "number for text": ("run_dir: 2024", 'run_dir=2024; expected text, quote it.*: "2024"'),
    "boolean for text": ("run_dir: true", "run_dir=true; expected text, quote it"),
    "None for text": ("student: None", "student=None; expected text, which cannot be None"),
    "null for text": ("student: ~", "student=~; expected text, which cannot be None"),
    "none for a path": ("run_dir: none", r"run_dir=none; expected a path, \./none"),
    "quoted None for a path": ("teacher: 'None'", r"teacher='None'; expected a path, \./None"),
    "None in a list": ("train_modalities: [None]", "train_modalities=.None.; .*quote it"),
    "no list": (
        "rewards: accuracy",
        r"rewards='accuracy'; expected a list of text, in YAML \[one, two\]",
    ),
    "empty path": ("eval_data: ''", "eval_data=''; expected a path, not an empty one"),
    "no such home": ("student: ~nobody-here/x", "~nobody-here is no user's home folder"),
    "variable": ("run_dir: ${SCRATCH}/x", r"\$\{SCRATCH\} is not expanded here"),
    "NUL": ('run_dir: "a\\0b"', "run_dir='a.x00b'; expected a path, without a NUL"),
    "a list": ("- a", "holds a list; expected `key: value` lines"),
    "a word": ("a", "holds one word; expected `key: value` lines"),
    "nothing": ("# lr: 1\n", "is empty"),
    "tab": ("lr: 1\n\tsteps: 2", "line 2, column 1: .*indent by spaces, not tabs"),
    "two documents": ("lr: 1\n---\nlr: 2", "line 2.*another document"),
    "unhashable key": ("[a, b]: 1", "line 1, column 1: found unhashable key"),
    "code": ("lr: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "deep": ("[" * 20_000, "nested too deeply"),
    "latin-1": ("run_dir: été".encode("latin-1"), "is not text in UTF-8: .* at byte 9"),
    "utf-16 without a mark": ("lr: 1".encode("utf-16-le"), "is not YAML: unacceptable character"),
    "too long": (b"#" * (2**20 + 1), "has 1048577 bytes; expected a few lines"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_file_cannot_mean_is_one_sentence(tmp_path, content, message):
    with pytest.raises(KepoConfigError, match=message) as caught:
        from_yaml(tmp_path, content)
    assert "\n" not in str(caught.value) and "c.yaml" in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_aliases_within_aliases_do_not_fill_the_error(tmp_path):
    bomb = "<<: &a {lr: [l, l, l, l, l, l, l]}\n" + "lr: &b [" + "x," * 9 + "]\n"
    bomb += "steps: [*b, *b, *b, [*b, *b, [*b, *b, [*b, *b]]]]\n"
    with pytest.raises(KepoConfigError) as caught:
        from_yaml(tmp_path, bomb)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_what_is_no_file_is_one_sentence(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # to open it would be to wait for ever
    for path, words in (
        (tmp_path, "is a folder"),
        (pipe, "is no regular file"),
        (tmp_path / "none.yaml", "cannot be read.*or a preset, one of .*grpo"),
        ("a\0b", "cannot be read"),
    ):
        with pytest.raises(KepoConfigError, match=words):
            load(path)


# ---- values from Python ----


def test_python_s_values_are_typed_as_a_file_s_words_are(tmp_path):
    config = Config(
        lr=np.float32(0.5),
        steps=np.int64(5),
        warmup_steps=2.0,
        student=tmp_path,
        rewards=["format"],
        reward_weights=[np.float64(2)],
    )
    assert (config.lr, config.steps, config.warmup_steps) == (0.5, 5, 2)
    assert all(type(x) is int for x in (config.steps, config.warmup_steps))
    assert type(config.lr) is float and type(config.reward_weights[0]) is float
    assert config.student == str(tmp_path) and config.rewards == ("format",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": "1e-6"}, "lr='1e-6'; expected a number, without quotes"),
        ({"steps": True}, "steps=True; expected a whole number"),
        ({"steps": math.inf}, "steps=inf; expected a whole number"),
        ({"mask_truncated": 1}, "mask_truncated=1; expected true or false"),
        ({"teacher": 5}, r"teacher=5; expected text, or None"),
        ({"rewards": "format"}, "rewards='format'; expected a list of text"),
    ],
)
def test_python_s_mistakes_are_named(settings, message):
    with pytest.raises(KepoConfigError, match=message):
        Config(**settings)


# ---- paths ----


@pytest.mark.parametrize("name", PATHS)
def test_home_is_expanded_in_every_path(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    there = str(tmp_path / "data")
    assert getattr(from_yaml(tmp_path, f"{name}: ~/data"), name) == there
    assert getattr(from_flags(f"--{name.replace('_', '-')}=~/data"), name) == there
    assert getattr(Config(**{name: "~/data"}), name) == there
    assert getattr(Config(**{name: "./~/data"}), name) == "./~/data"


def test_other_commands_know_home_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data" / "QA_information").mkdir(parents=True)
    for wrong in (dict(model="m", data="~/nothing"), dict(model="~/nothing", data="~/data")):
        with pytest.raises(Exception, match=str(tmp_path / "nothing")):
            evaluation(Evaluation(**wrong))
    done = subprocess.run(
        [sys.executable, "-m", "kepo", "data", "check", "~/nothing"],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert done.returncode == 1 and str(tmp_path / "nothing") in done.stderr
