"""Settings that cannot work are refused by name, before any model is touched."""

import dataclasses
from dataclasses import replace

import pytest

from kepo import train as train_module
from kepo.config import Config, check, from_mapping, load_yaml
from kepo.errors import KepoConfigError


@pytest.fixture
def good(tmp_path):
    (tmp_path / "data" / "QA_information").mkdir(parents=True)
    return Config(student="s", teacher="t", train_data=str(tmp_path / "data"))


REFUSED = {
    "more hinted than generations": ({"num_hinted": 9}, "num_hinted=9 .* num_generations=8"),
    "hints without teacher": (
        {"teacher": None, "gate_reward": None, "distill_coef": 0.0},
        "num_hinted=2 needs a teacher",
    ),
    "gate without teacher": (
        {"teacher": None, "num_hinted": 0, "distill_coef": 0.0},
        "gate_reward='accuracy' needs a teacher",
    ),
    "distillation without teacher": (
        {"teacher": None, "num_hinted": 0, "gate_reward": None},
        "distill_coef=1.0 needs a teacher",
    ),
    "gate on a missing reward": (
        {"rewards": ("format",), "reward_weights": (1.0,), "hint_reward": "format"},
        "gate_reward='accuracy'; expected one of format, total",
    ),
    "hints on a missing reward": ({"hint_reward": "length"}, "hint_reward='length'"),
    "unknown reward": ({"rewards": ("accuracy", "style")}, "rewards has 'style'"),
    "weights of another length": ({"reward_weights": (1.0,)}, "reward_weights has 1 values for 2"),
    "missing folder": ({"train_data": "/nowhere"}, "train_data='/nowhere'"),
    "missing eval folder": ({"eval_data": "/nowhere"}, "eval_data='/nowhere'"),
    "no student": ({"student": ""}, "student is not set"),
    "one generation": ({"num_generations": 1, "num_hinted": 0}, "num_generations=1"),
    "beta": ({"beta": 1.5}, "beta=1.5"),
    "temperature": ({"temperature": 0.0}, "temperature=0.0"),
    "nan": ({"lr": float("nan")}, "lr=nan"),
    "top_p": ({"top_p": 0.0}, "top_p=0.0"),
    "dtype": ({"dtype": "int8"}, "dtype='int8'"),
    "impl": ({"impl": "magic"}, "impl='magic'"),
    "reduction": ({"policy_reduction": "mean"}, "policy_reduction='mean'"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name_before_anything_loads(good, monkeypatch, settings, message):
    def no_model(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(train_module, "load_model", no_model)
    with pytest.raises(KepoConfigError, match=message):
        train_module.train(replace(good, **settings))


def test_good_settings_pass(good):
    check(good)
    check(replace(good, teacher=None, num_hinted=0, gate_reward=None, distill_coef=0.0))
    check(replace(good, num_hinted=8, gate_reward="total"))


def test_yaml_is_read_with_its_types(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "student: s\nlr: 1\nsteps: 5\nrewards: [format]\nreward_weights: [2]\nteacher: null\n"
    )
    config = load_yaml(path)
    assert (config.lr, config.steps, config.rewards, config.teacher) == (1.0, 5, ("format",), None)
    assert isinstance(config.lr, float) and config.reward_weights == (2.0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("studnet: s", r"unknown keys \['studnet'\]"),
        ("steps: many", "steps='many'; expected int"),
        ("steps: 1.5", "steps=1.5; expected int"),
        ("mask_truncated: 1", "mask_truncated=1; expected bool"),
        ("lr: true", "lr=True; expected float"),
        ("rewards: accuracy", r"rewards='accuracy'; expected tuple\[str, ...\]"),
        ("- a", "expected `key: value` lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_yaml_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(KepoConfigError, match=message):
        load_yaml(path)


def test_a_config_survives_its_own_record(good):
    import json

    record = json.loads(json.dumps(dataclasses.asdict(good)))
    assert from_mapping(record, "record") == good


def test_every_field_is_documented():
    import inspect
    import re

    source = inspect.getsource(Config)
    for field in dataclasses.fields(Config):
        assert re.search(rf'    {field.name}: .*\n    """', source), field.name
