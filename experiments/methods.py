"""The methods of the comparison: the differences between two runs, nothing else.

A method is named here, or spelled as one with changes: ``kepo@lr=0.0002,num_hinted=1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from experiments.settings import COMMON
from kepo.config import Config, from_mapping, read_layer
from kepo.errors import KepoConfigError
from kepo.words import Word

Chosen = Mapping[str, Mapping[str, Any]]
"""Learning rate and coefficient of methods by name, as chosen on the validation split."""


@dataclass(frozen=True)
class Method:
    """A method, as a preset and the method's changes to it."""

    preset: str
    changes: Mapping[str, Any]
    about: str
    tuned_as: str = "kepo"
    """The method whose learning rate and coefficient it takes."""


def _kepo(about: str, **changes: Any) -> Method:
    return Method("kepo", changes, about)


def _cell(policy: bool, gate: str, hints: bool) -> Method:
    """Return a cell of the factorial, in which only these three things differ."""
    changes: dict[str, Any] = {} if policy else {"policy_coef": 0.0}
    gates: dict[str, dict[str, Any]] = {
        "none": {"gate_reward": None},
        "right": {},
        "wrong": {"gate_side": "wrong"},
    }
    changes |= gates[gate]
    changes |= {} if hints else {"hint_trigger": "never"}
    parts = ("policy, " if policy else "no policy term, ") + GATES[gate]
    return Method("kepo", changes, parts + (", hints" if hints else ", no hints"))


GATES = {
    "none": "JSD on every sample",
    "right": "JSD where right",
    "wrong": "JSD where wrong",
}

MAIN = {
    "grpo": Method("grpo", {}, "policy term alone", "grpo"),
    "dapo": Method(
        "dapo",
        {"rewards": ("accuracy", "format"), "reward_weights": (1.0, 1.0), "overlong_buffer": 0},
        "policy term alone, clip-higher, groups of equal accuracy exchanged, two passes",
        "dapo",
    ),
    "sft": Method("sft", {}, "the data's worked answers, nothing sampled", "sft"),
    "opd": Method("opd_jsd", {}, "JSD on every sample, no reward", "opd"),
    "opd_kl": Method("opd", {}, "KL(student‖teacher) on every sample, no reward", "opd_kl"),
    "gkd": Method("gkd", {}, "JSD, half of it on worked answers, no reward", "gkd"),
    "kepo": Method("kepo", {}, "GRPO + JSD where right + hints where all samples failed"),
}

FACTORIAL: dict[tuple[bool, str, bool], str] = {
    (True, "right", True): "kepo",
    (True, "right", False): "gate_only",
    (True, "none", True): "no_gate",
    (True, "none", False): "kdpo_tau0",
    (True, "wrong", True): "wrong_gate",
    (True, "wrong", False): "wrong_gate_only",
    (False, "right", True): "jsd_right_hints",
    (False, "right", False): "jsd_right",
    (False, "none", True): "jsd_hints",
    (False, "none", False): "jsd",
    (False, "wrong", True): "jsd_wrong_hints",
    (False, "wrong", False): "jsd_wrong",
}
"""The name of each cell: policy term, gate, hints. All have the learning rate and the coefficient
of `kepo`; `jsd` is `opd` with these."""

NEW = {
    "first_error": Method(
        "first_error", {}, "GRPO + JSD up to the first token that the teacher finds unlikely"
    ),
    "first_error_hints": Method(
        "first_error", {"hint_trigger": "failed"}, "the same with KEPO's hints"
    ),
    "after_error": Method("after_error", {}, "GRPO + JSD after that token"),
    "privileged": Method(
        "privileged", {}, "kepo, failed groups distilled from the teacher that sees the hint"
    ),
    "guide": Method("guide", {}, "GRPO with hints, their ratio inside the clip", "grpo"),
    "kepo_guide": _kepo(
        "kepo, the ratio of hinted tokens inside the clip", hinted_correction="clip"
    ),
}
"""Methods that nobody has published with KEPO; one of them is chosen for a test."""

OTHERS = {
    "kdpo_tau1": Method("kdpo_tau1", {}, "GRPO + JSD where accuracy + format >= 1"),
    "kepo_official": Method("kepo_official", {}, "kdpo_tau1 + hints with the answer, rarely"),
    "hints_only": Method(
        "kepo",
        {"distill_coef": 0.0, "gate_reward": None},
        "GRPO with hints, no distillation",
        "grpo",
    ),
    "retry": Method("retry", {}, "kepo, its further attempts without the hint"),
    "shuffled_hints": _kepo(
        "kepo, hints about other digits", task="experiments.controls:OtherDigits"
    ),
    "leaking_hints": _kepo(
        "kepo, hints with the answer, no filter",
        hint_gives_answer=True,
        hint_with_answer=True,
        leak_filter=False,
    ),
}

_CELLS = {name: _cell(*cell) for cell, name in FACTORIAL.items() if name not in MAIN}
METHODS: dict[str, Method] = MAIN | _CELLS | NEW | OTHERS
TUNED = tuple(MAIN)
"""The methods that a learning rate is chosen for, each by itself."""


def method_of(spelling: str) -> Method:
    """Return the method of a name, or of ``name@setting=value,setting=value``."""
    name, at, changes = spelling.partition("@")
    pairs = [change.partition("=") for change in changes.split(",")] if at else []
    if name not in METHODS or not all(sign and value for _, sign, value in pairs):
        raise KepoConfigError(
            f"methods has {spelling!r}; expected one of {', '.join(METHODS)}, or one with changes, "
            "like kepo@lr=2e-4,num_hinted=1"
        )
    method = METHODS[name]
    new = {setting: Word(value) for setting, _, value in pairs}
    return Method(method.preset, {**method.changes, **new}, method.about, method.tuned_as)


def is_grid_point(spelling: str) -> bool:
    """Return whether a spelling gives the learning rate itself, so that nothing chosen applies."""
    return "lr" in method_of(spelling).changes


@cache
def _preset(name: str) -> dict[str, Any]:
    return read_layer(name)


def config_of(spelling: str, chosen: Chosen, **run: Any) -> Config:
    """Return the config of a method's run: its preset, what all share, what was chosen for it,
    ``run``, then its own changes.

    Raises KepoConfigError if nothing was chosen for it, and it gives no learning rate.
    """
    method = method_of(spelling)
    tuned: Mapping[str, Any] = {}
    if not is_grid_point(spelling):
        if method.tuned_as not in chosen:
            raise KepoConfigError(
                f"methods has {spelling!r}, but no learning rate was chosen for "
                f"{method.tuned_as!r}; run the block `tune` and `python -m experiments.choose`, or "
                "give it as in kepo@lr=2e-4"
            )
        tuned = chosen[method.tuned_as]
    preset = _preset(method.preset)
    shared = {**COMMON, **tuned}
    if preset.get("distill_coef") == 0.0:
        del shared["distill_coef"]
    if preset.get("teacher", "") is None:
        run = {**run, "teacher": None}
    return from_mapping({**preset, **shared, **run, **method.changes}, spelling)
