"""The methods of the comparison: the differences between two runs, nothing else.

A method is named here, or spelled as one with changes: ``kepo@lr=0.0002,num_hinted=1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    changes |= {"none": {"gate_reward": None}, "wrong": {"gate_side": "wrong"}}.get(gate, {})
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
        "policy term alone, clip-higher, dynamic sampling, two passes",
        "dapo",
    ),
    "sft": Method("sft", {}, "the data's worked answers, nothing sampled", "sft"),
    "opd": Method("opd", {"beta": 0.5}, "JSD on every sample, no reward", "opd"),
    "opd_kl": Method("opd", {"beta": 1.0}, "KL(student‖teacher) on every sample", "opd_kl"),
    "gkd": Method("gkd", {}, "JSD, half on samples and half on worked answers", "gkd"),
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

OTHERS = {
    "kdpo_tau1": Method("kdpo_tau1", {}, "GRPO + JSD where accuracy + format >= 1"),
    "kepo_official": Method("kepo_official", {}, "kdpo_tau1 + hints with the answer, rarely"),
    "hints_only": Method(
        "kepo",
        {"distill_coef": 0.0, "gate_reward": None},
        "GRPO with hints, no distillation",
        "grpo",
    ),
    "first_error": Method(
        "first_error", {}, "GRPO + JSD up to the first token that the teacher finds unlikely"
    ),
    "after_error": Method("after_error", {}, "GRPO + JSD after that token"),
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

METHODS: dict[str, Method] = (
    MAIN | {name: _cell(*cell) for cell, name in FACTORIAL.items() if name not in MAIN} | OTHERS
)
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
    preset = read_layer(method.preset)
    shared = {**COMMON, **tuned}
    if preset.get("distill_coef") == 0.0:
        del shared["distill_coef"]
    if preset.get("teacher", "") is None:
        run = {**run, "teacher": None}
    return from_mapping({**preset, **shared, **run, **method.changes}, spelling)
