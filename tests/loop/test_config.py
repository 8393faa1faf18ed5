"""Settings that cannot work are refused by name, before any model is touched."""

import dataclasses
import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from small import config_of

from kepo.check import check
from kepo.config import Config, from_mapping, load, presets
from kepo.errors import KepoConfigError
from kepo.loop import train
from kepo.models.device import known_device
from kepo.run import open as opening


@pytest.fixture
def good(tmp_path):
    (tmp_path / "data" / "QA_information").mkdir(parents=True)
    return Config(student="s", teacher="t", train_data=str(tmp_path / "data"))


REFUSED = {
    "more hinted than generations": ({"num_hinted": 9}, "num_hinted=9 .* num_generations=8"),
    "hints without teacher": (
        {"teacher": None, "gate_reward": None, "distill_coef": 0.0},
        "hint_trigger='failed' needs a teacher",
    ),
    "gate without teacher": (
        {"teacher": None, "hint_trigger": "never", "distill_coef": 0.0},
        "gate_reward='accuracy' needs a teacher",
    ),
    "distillation without teacher": (
        {"teacher": None, "hint_trigger": "never", "gate_reward": None},
        "distill_coef=1.0 needs a teacher",
    ),
    "gate on a missing reward": (
        {"rewards": ("format",), "reward_weights": (1.0,), "hint_reward": "format"},
        "gate_reward='accuracy'; expected one of format, total",
    ),
    "acceptance on a missing reward": ({"accept_reward": "length"}, "accept_reward='length'"),
    "hints on a missing reward": ({"hint_reward": "length"}, "hint_reward='length'"),
    "unknown reward": ({"rewards": ("accuracy", "style")}, "rewards has 'style'"),
    "weights of another length": ({"reward_weights": (1.0,)}, "reward_weights has 1 values for 2"),
    "missing folder": ({"train_data": "/nowhere"}, "train_data='/nowhere'"),
    "missing eval folder": ({"eval_data": "/nowhere"}, "eval_data='/nowhere'"),
    "no student": ({"student": ""}, "student is not set"),
    "no patience": (
        {"rank_timeout_minutes": 0.0},
        r"rank_timeout_minutes=0.0; expected a number in \(0, 1000000\]",
    ),
    "changed inputs": ({"changed_inputs": "ask"}, "changed_inputs='ask'; expected one of refuse"),
    "one generation": ({"num_generations": 1, "hint_trigger": "never"}, "num_generations=1"),
    "beta": ({"beta": 1.5}, "beta=1.5"),
    "temperature": ({"temperature": 0.0}, "temperature=0.0"),
    "nan": ({"lr": float("nan")}, "lr=nan"),
    "top_p": ({"top_p": 0.0}, "top_p=0.0"),
    "dtype": ({"dtype": "int8"}, "dtype='int8'"),
    "trained in 16 bits": ({"dtype": "bfloat16"}, "set sharding: fsdp2"),
    "quantised and sharded": (
        {"teacher_bits": 4, "teacher_placement": "fsdp2"},
        "a quantised teacher is a copy",
    ),
    "quantised weights cannot be trained": (
        {"student_bits": 4},
        "student_bits=4 needs adapters to train, .* set lora_rank",
    ),
    "a quantised student that is sharded": (
        {"student_bits": 4, "lora_rank": 4, "sharding": "fsdp2"},
        "student_bits=4 and sharding='fsdp2': a quantised student is a copy",
    ),
    "adapters in vllm": ({"sampler": "vllm", "lora_rank": 4}, "not adapters"),
    "half precision without scaling": ({"dtype": "float16"}, "dtype='float16'"),
    "a question that does not fit": ({"rollout_batch": 3}, "rollout_batch=3 is less than"),
    "flash attention in float32": (
        {"attn_implementation": "flash_attention_2"},
        "computes in 16 bits",
    ),
    **{
        f"device {name}": (
            {"device": name},
            f"device='{name}'; expected auto, cpu, cuda or cuda:<number>",
        )
        for name in ("banana", "mps", "meta", "", "xpu:0")
    },
    "lr beyond float32": ({"lr": 1e300}, r"lr=1e\+300; expected at most 1e\+30"),
    "decay beyond float32": ({"weight_decay": 1e39}, r"weight_decay=1e\+39; expected at most"),
    "endless patience": ({"rank_timeout_minutes": 1e30}, "rank_timeout_minutes=1e"),
    "weights of rewards": (
        {"reward_weights": (1.0, 1e300)},
        r"reward_weights=.*at most 1e\+30",
    ),
    "no CUDA": ({"device": "cuda"}, "sees no CUDA device"),
    "too hot for vllm": (
        {"sampler": "vllm", "sampling_temperature": 3.0},
        r"sampling_temperature=3.0; sampler='vllm' takes",
    ),
    "no vllm, or of GPUs": (
        {"sampler": "vllm"},
        "sampler='vllm'( needs the package vllm|: the vLLM that is installed is built for cuda)",
    ),
    "liger without CUDA": ({"liger_layers": True}, "liger_layers=True needs device: cuda"),
    "sharding": ({"sharding": "zero3"}, "sharding='zero3'"),
    "bits": ({"teacher_bits": 2}, "teacher_bits=2"),
    "impl": ({"impl": "magic"}, "impl='magic'"),
    "trigger": ({"hint_trigger": "sometimes"}, "hint_trigger='sometimes'"),
    "correction": ({"hinted_correction": "cut"}, "hinted_correction='cut'"),
    "correction of a ratio that is not there": (
        {"hinted_correction": "clip", "policy_loss": "reinforce"},
        "hinted_correction='clip' is about the policy ratio",
    ),
    "cap": ({"hinted_cap": 0.0}, "hinted_cap=0.0"),
    "gamma": ({"hinted_gamma": -0.1}, "hinted_gamma=-0.1"),
    "accept_threshold": ({"accept_threshold": float("inf")}, "accept_threshold=inf"),
    "no hinted": ({"num_hinted": 0}, "num_hinted=0"),
    "scale": ({"scale_rewards": "step"}, "scale_rewards='step'"),
    "estimator": ({"kl_estimator": "k4"}, "kl_estimator='k4'; expected one of k1, k2, k3"),
    "delta of another loss": (
        {"delta": 4.0, "policy_loss": "cispo"},
        "delta=4.0 bounds the ratio of policy_loss: clip",
    ),
    "delta within the clip": ({"delta": 1.2}, r"delta=1.2; expected more than 1 \+ epsilon_high"),
    "hints for a teacher that does not teach": (
        {"hint_for": "teacher", "distill_coef": 0.0},
        "hint_for='teacher' shows hints to a teacher that nothing is distilled from",
    ),
    "the other side of a soft gate": (
        {"gate_side": "wrong", "gate_threshold": None},
        "gate_side='wrong' needs a gate_threshold",
    ),
    "logits narrower than states": (
        {"logits_dtype": "bfloat16"},
        "logits_dtype='bfloat16' needs dtype: bfloat16",
    ),
    "tolerance": ({"grad_tol": 1.0}, "grad_tol=1.0"),
    "data_fraction": ({"data_fraction": 1.1}, "data_fraction=1.1"),
    "iterations": ({"num_iterations": 0}, "num_iterations=0"),
    "dynamic sampling": ({"dynamic_sampling": -1}, "dynamic_sampling=-1"),
    "dynamic sampling on a missing reward": (
        {"dynamic_sampling": 1, "dynamic_reward": "length"},
        "dynamic_reward='length'; expected one of accuracy, format, total",
    ),
    "data_weight": ({"data_weight": -0.5}, "data_weight=-0.5"),
    "overlong": ({"overlong_buffer": -1}, "overlong_buffer=-1"),
    "overlong throughout": (
        {"overlong_buffer": 129},
        "overlong_buffer=129 is more than max_completion_length=128",
    ),
    "distillation by completion length": (
        {"distill_reduction": "dr_grpo"},
        "distill_reduction='dr_grpo'",
    ),
    "a constant that ends elsewhere": (
        {"lr_schedule": "constant", "lr_end": 0.1},
        "lr_end=0.1 is not reached with lr_schedule='constant'",
    ),
    "schedule": ({"lr_schedule": "polynomial"}, "lr_schedule='polynomial'; expected one of"),
    "reduction": ({"policy_reduction": "mean"}, "policy_reduction='mean'"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name_before_anything_loads(good, monkeypatch, settings, message):
    def no_model(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(opening, "load_policy", no_model)
    with pytest.raises(KepoConfigError, match=message):
        train(replace(good, **settings))


def test_a_vllm_for_other_devices_is_named(good, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr("kepo.check.built_for", lambda: "cuda")
    with pytest.raises(KepoConfigError, match=r"sampler='vllm': .* is built for cuda, .* 'cpu'"):
        check(replace(good, sampler="vllm", device="cpu"))


@pytest.mark.parametrize(
    ("settings", "package", "extra"),
    [
        ({"lora_rank": 4}, "peft", "lora"),
        ({"teacher_bits": 8}, "bitsandbytes", "quant"),
        ({"optimizer": "adamw_8bit"}, "bitsandbytes", "quant"),
        ({"student_bits": 4, "lora_rank": 4}, "bitsandbytes", "quant"),
        ({"student_bits": 8, "lora_rank": 4}, "accelerate", "quant"),
        ({"teacher_bits": 4}, "accelerate", "quant"),
    ],
)
def test_a_package_that_is_missing_is_named(good, monkeypatch, settings, package, extra):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else find(name, *rest) or object(),
    )
    with pytest.raises(KepoConfigError, match=rf"{package}; pip install 'kepo\[{extra}\]'"):
        check(replace(good, **settings))


@pytest.mark.parametrize("there", [False, True])
def test_auto_is_a_gpu_where_there_is_one(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert Config().device == "auto"
    assert known_device("auto") == torch.device("cuda" if there else "cpu")


def test_a_run_says_and_records_what_auto_became(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = config_of(made, tmp_path, "grpo", steps=1, device="auto")
    assert train(config).exit_code == 0
    assert "device: auto is cpu\n" in capsys.readouterr().out
    state = json.loads((tmp_path / "checkpoints/step-00000001/state.json").read_text())
    assert state["device"] == "cpu" and state["config"]["device"] == "auto"


def test_one_device_for_several_processes_is_refused(good, monkeypatch):
    check(replace(good, device="cpu:0"))
    as_torchrun = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500")
    for name, value in as_torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KepoConfigError, match="set device: cpu, of which each takes its own"):
        check(replace(good, device="cpu:0"))


def test_good_settings_pass(good):
    check(good)
    check(replace(good, teacher=None, hint_trigger="never", gate_reward=None, distill_coef=0.0))
    check(replace(good, num_hinted=8, gate_reward="total"))
    check(replace(good, num_hinted=9, hint_trigger="never"))  # it is not read then
    check(replace(good, gate_reward="total", gate_threshold=None, accept_reward="total"))


def test_yaml_is_read_with_its_types(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "student: s\nlr: 1\nsteps: 5\nrewards: [format]\nreward_weights: [2]\nteacher: null\n"
    )
    config = load(path)
    assert (config.lr, config.steps, config.rewards, config.teacher) == (1.0, 5, ("format",), None)
    assert isinstance(config.lr, float) and config.reward_weights == (2.0,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("studnet: s", r"unknown keys \['studnet'\]"),
        ("steps: many", "steps='many'; expected a whole number"),
        ("steps: 1.5", "steps=1.5; expected a whole number"),
        ("mask_truncated: 1", "mask_truncated=1; expected true or false"),
        ("lr: .inf", "lr=.inf; expected a number > 0, and finite"),
        ("kd_coef: 1", "kd_coef: it is called distill_coef here"),
        ("lr: true", "lr=true; expected a number"),
        ("rewards: accuracy", "rewards='accuracy'; expected a list of text"),
        ("- a", "expected `key: value` lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_yaml_mistakes_are_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(KepoConfigError, match=message):
        load(path)


# ---- layers and presets ----


def test_later_layers_override_earlier_ones(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("student: s\nlr: 0.5\nsteps: 7\n")
    second.write_text("lr: 0.25\n")
    assert load(first, second) == Config(student="s", lr=0.25, steps=7)
    assert load(second, first).lr == 0.5
    assert load() == Config()
    # A preset's name stands for its file, before or after the user's own.
    assert load(first, "dr_grpo").policy_reduction == "dr_grpo"
    second.write_text("policy_reduction: sum\n")
    assert load("dr_grpo", second).policy_reduction == "sum"


def test_a_list_of_rewards_that_is_replaced_is_said(tmp_path, capsys, monkeypatch):
    own = tmp_path / "own.yaml"
    own.write_text("rewards: [accuracy, mine.py:concise]\nreward_weights: [1, 0.2]\n")
    assert load(own, "dapo").rewards == ("accuracy", "format", "overlong")
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        f"rewards: dapo replaces accuracy, mine.py:concise, which {own} gives, by accuracy, "
        "format, overlong: the later file or preset counts, and a flag over all\n"
    )
    assert load("dapo", own).reward_weights == (1.0, 0.2)
    assert f"rewards: {own} replaces accuracy, format, overlong, which dapo gives" in (
        capsys.readouterr().err
    )
    for layers in ((own,), ("dapo",), ("dapo", "grpo"), (own, own), ("dapo", "dapo")):
        load(*layers)
    monkeypatch.setenv("RANK", "1")
    load(own, "dapo")
    assert capsys.readouterr().err == ""


def test_weights_of_one_each_are_of_however_many_rewards(tmp_path, capsys):
    own = tmp_path / "own.yaml"
    own.write_text("rewards: [accuracy, mine.py:concise]\n")
    assert load("dapo", own).reward_weights == (1.0, 1.0)
    own.write_text("rewards: [mine.py:concise]\n")
    assert load("dapo", own).reward_weights == (1.0,)
    assert load(own, "dapo").reward_weights == (1.0, 1.0, 1.0)
    weighted = tmp_path / "weighted.yaml"
    weighted.write_text("rewards: [accuracy, format]\nreward_weights: [1, 0.5]\n")
    own.write_text("rewards: [accuracy, mine.py:concise]\n")
    assert load(weighted, own).reward_weights == (1.0, 0.5)  # the later file says nothing of them


def test_a_mistake_is_blamed_on_its_layer(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("stepz: 1")
    with pytest.raises(KepoConfigError, match=r"wrong\.yaml: unknown keys \['stepz'\]"):
        load("grpo", wrong, "opd")
    with pytest.raises(KepoConfigError, match=r"krpo cannot be read.*a preset, one of .*grpo"):
        load("krpo")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr: 0", "lr=0; expected a number > 0"),
        ("gate_threshold: .inf", "gate_threshold=.inf; expected a finite number"),
        ("eval_limit: 0", "eval_limit=0; expected a number >= 1"),
        ("reward_weights: [1, .nan]", "reward_weights=.*; expected a list, each of it a finite"),
        ("sharding: zero3", "sharding='zero3'; expected one of none, fsdp2"),
        ("teacher_bits: 2", "teacher_bits=2; expected one of None, 8, 4"),
        ("teacher_bits: '4'", "teacher_bits='4'; expected one of None, 8, 4, without quotes"),
    ],
)
def test_what_one_setting_cannot_be_is_refused_where_it_enters(tmp_path, line, message):
    (tmp_path / "wrong.yaml").write_text(line)
    with pytest.raises(KepoConfigError, match=rf"wrong\.yaml: {message}"):
        load("grpo", tmp_path / "wrong.yaml")


def test_a_teacher_that_nothing_asks_is_not_read():
    config = Config(teacher="t")
    assert config.taught_by == {"teacher": "t"}
    assert replace(config, distill_coef=0.0).taught_by == {"teacher": "t"}  # its hints
    assert replace(config, hint_trigger="never").taught_by == {"teacher": "t"}
    assert replace(config, distill_coef=0.0, hint_trigger="never").taught_by == {}
    assert Config().taught_by == {}


def test_the_methods_of_the_comparison_are_presets():
    assert set(presets()) >= {
        *("sft", "grpo", "dr_grpo", "dapo", "gkd", "opd", "kdpo_tau0", "kdpo_tau1"),
        *("kepo_official", "kepo", "sod"),
    }


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_a_few_lines_that_pass_the_check(good, name):
    lines = presets()[name].read_text().splitlines()
    said = [line for line in lines if line.startswith("# ")]
    assert lines[: len(said)] == said and 1 <= len(said) <= 6 and len(lines) <= len(said) + 12
    config = load(name)
    own = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
    # What the user supplies. Presets without a teacher say so; the others take the user's.
    own |= {"student": "s", "train_data": good.train_data}
    if "teacher: null" not in lines:
        own["teacher"] = "t"
    check(from_mapping(own, name))


def test_a_config_survives_its_own_record(good):
    import json

    record = json.loads(json.dumps(dataclasses.asdict(good)))
    assert from_mapping(record, "record") == good


def test_every_field_is_documented():
    import inspect
    import re

    source = "".join(inspect.getsource(kind) for kind in Config.__mro__[:-1])
    for field in dataclasses.fields(Config):
        assert re.search(rf'    {field.name}: .*\n    """', source), field.name


def test_a_workspace_is_enough_to_the_byte(made, tmp_path):
    """As the loss counts it, from two config.json; with the teacher's head where it distils."""
    for layers in (("grpo",), ("kepo",)):
        config = config_of(made, tmp_path, *layers, workspace_bytes=1)
        with pytest.raises(KepoConfigError, match=r"takes [0-9]+ bytes") as refused:
            train(config)
        least = int(str(refused.value).split("takes ")[1].split()[0])
        check(replace(config, workspace_bytes=least))
        with pytest.raises(KepoConfigError, match="too little"):
            check(replace(config, workspace_bytes=least - 1))
    assert not list(tmp_path.iterdir())
