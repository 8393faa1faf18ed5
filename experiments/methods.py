"""The settings and methods of the comparison: the differences between two runs, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kepo.config import Config, from_mapping, read_layer
from kepo.digits.demo import DIGITS_RUN


@dataclass(frozen=True)
class Setting:
    """The start that every method has, and the means it is given; equal for all methods."""

    about: str
    """One sentence about the setting, for the report."""
    warmup_steps: int
    """Supervised steps of the student, on the first rendering."""
    warmup_question_types: tuple[str, ...] | None
    """Types of the questions in these steps; None = all. The hints in them are about all types."""
    hint_fraction: float
    """Share of supervised answers that are about hints."""
    common: Mapping[str, Any]
    """Settings of the run that override a method's preset."""


_COMMON = DIGITS_RUN | dict(num_hinted=2, max_attempts=3, sampling_temperature=1.0, top_p=1.0)

SETTINGS = {
    "cliff": Setting(
        about="The student has never seen the digits 6 to 9 in its warm-up, which leaves it "
        "failing every sample of a third of its questions or more.",
        warmup_steps=300,
        warmup_question_types=("Small digits",),
        hint_fraction=0.5,
        common=_COMMON,
    ),
    "mild": Setting(
        about="The student has seen all digits in a short warm-up, and is right on some sample of "
        "most questions.",
        warmup_steps=240,
        warmup_question_types=None,
        hint_fraction=0.4,
        common=_COMMON,
    ),
}


@dataclass(frozen=True)
class Method:
    """A method, as a preset and the method's changes to it."""

    preset: str
    changes: Mapping[str, Any]
    about: str


def _kepo(about: str, **changes: Any) -> Method:
    return Method("kepo", changes, about)


MAIN = {
    "grpo": Method("grpo", {}, "policy term alone"),
    "opd": Method("opd", {}, "KL(student‖teacher) on every sample, no reward"),
    "kdpo_tau1": Method("kdpo_tau1", {}, "GRPO + JSD where accuracy + format >= 1"),
    "kepo_official": Method("kepo_official", {}, "kdpo_tau1 + hints with the answer, rarely"),
    "kepo": _kepo("GRPO + JSD where right + hints where all samples failed"),
}

ABLATIONS = {
    "kdpo_tau0": Method("kdpo_tau0", {}, "GRPO + JSD on every sample, no hints"),
    "gate_only": _kepo("kepo without hints", hint_trigger="never"),
    "hints_only": _kepo("kepo without distillation", distill_coef=0.0, gate_reward=None),
    "no_gate": _kepo("kepo, distilling on every sample", gate_reward=None),
    "gate_total": _kepo("kepo, gate on accuracy + format >= 1", gate_reward="total"),
    "k1": _kepo("kepo, one success per failed group", num_hinted=1),
    "one_attempt": _kepo("kepo, one round of hinted samples", max_attempts=1),
    "beta0": _kepo("kepo with KL(teacher‖student)", beta=0.0),
    "beta1": _kepo("kepo with KL(student‖teacher)", beta=1.0),
    "truncated": _kepo("kepo, hinted tokens by their ratio", hinted_correction="truncate"),
    "shaped": _kepo("kepo, hinted tokens by policy shaping", hinted_correction="shape"),
}

METHODS = MAIN | ABLATIONS


def config_of(setting: Setting, method: Method, **run: Any) -> Config:
    """Return the config of a method's run in a setting: the preset, the method's changes, what all
    share, then ``run``."""
    values = read_layer(method.preset)
    own = {**values, **method.changes}
    common = {name: x for name, x in setting.common.items() if name not in method.changes}
    if own.get("distill_coef") == 0.0:
        common.pop("distill_coef", None)
    if own.get("teacher", "") is None:
        run = {**run, "teacher": None}
    return from_mapping({**own, **common, **run}, method.preset)
