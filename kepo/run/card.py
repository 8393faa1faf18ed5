"""The README.md of a saved policy: Hugging Face's model card, from what the run knows of itself."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kepo.config import MAY_CHANGE_ON_RESUME, TOTAL, Config
from kepo.errors import KepoConfigError, KepoDataError
from kepo.sections import DataConfig, ModelsConfig, ObjectiveConfig
from kepo.words import is_address
from kepo_kernels import __version__

PAPER = "https://arxiv.org/abs/2602.00400"
ELSEWHERE = frozenset(
    {"student", "teacher", "teachers", "teacher_model", "train_data", "eval_data", "image_root"}
    | {"train_modalities", "train_question_types", "rewards", "reward_weights"}
)
"""Settings that the card states in words, or that concern only the machine of the run."""


def model_card(config: Config, step: int, data: Mapping[str, Any]) -> str:
    """Return the card of a policy after ``step`` optimiser steps on ``data``, a `RunData.record`.

    A card may be published with the model, so it gives only the last name of a local folder, and
    `base_model` in its front matter only for a name on the Hub. It names no `datasets`: the
    contents of a folder need not be what the Hub has under some name. Reads no file, and looks at
    the disk only to see whether a model is there. Raises KepoConfigError for a negative step or no
    student, KepoDataError for data without "train".
    """
    if step < 0:
        raise KepoConfigError(f"model_card: step is {step}; expected a number >= 0")
    if not config.student:
        raise KepoConfigError("model_card: config.student is not set; expected a folder or name")
    if "train" not in data:
        raise KepoDataError(
            f"model_card: data has {sorted(data)}; expected a RunData.record, with 'train'"
        )
    tags = ["kepo", "vision-language"]
    if config.data_fraction < 1 and config.policy_coef > 0:
        tags.append("reinforcement-learning")
    if config.distils:
        tags.append("distillation")
    method = _policy_and_rewards(config)
    if config.distils:
        method.append(_distillation(config))
    if config.rescues:
        where = "where every sample fails" if config.hint_trigger == "failed" else "for every group"
        what = {
            "student": "hints of the teacher",
            "teacher": "the teacher sees a hint, and failures are distilled on",
            "nobody": "samples again, without hints",
        }[config.hint_for]
        method.append(f"- {what}: {where}")
    parts = [
        front_matter(config, tags),
        f"# {_name(config.student)}, {step} steps of post-training\n",
        _what(config, _names(config.taught_by, config.teacher_model), step, config.steps),
        "**Research only. Not for clinical use:** nobody has tested this model for diagnosis, for "
        "treatment or for anything else that a patient could depend on.\n",
        "## Data\n",
        *_data(config, data),
        "## Method\n",
        *method,
        *_other_settings(changed_settings(dataclasses.asdict(config))),
        "## Use\n",
        _use(config),
    ]
    return "\n".join(parts)


def merged_card(card: str, config: ModelsConfig) -> str:
    """Return the card of a checkpoint as that of a plain model: with adapters merged, if it has
    any."""
    if config.lora_rank == 0:
        return card
    held = f"LoRA adapters of rank {config.lora_rank}"
    for before, now in (
        ("base_model_relation: adapter", "base_model_relation: finetune"),
        ("library_name: peft", "library_name: transformers"),
        (f"{held} for", f"{held}, merged into the weights of"),
        (_use(config), _use(replace(config, lora_rank=0))),
    ):
        card = card.replace(before, now, 1)
    return card


def front_matter(config: ModelsConfig, tags: list[str]) -> str:
    """Return the YAML between two lines of dashes that the Hub reads."""
    import yaml

    adapters = config.lora_rank > 0
    values: dict[str, Any] = {}
    if _on_hub(config.student):
        values["base_model"] = config.student
        values["base_model_relation"] = "adapter" if adapters else "finetune"
    values["library_name"] = "peft" if adapters else "transformers"
    values["pipeline_tag"] = "image-text-to-text"
    values["tags"] = tags
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n"


def _names(teachers: Mapping[str, str], name: str | None) -> list[str]:
    """Return what the teachers are; of those behind servers not the addresses. name: that of the
    model on a server, if it is known."""
    served = "a model on a server" if name is None else f"{_link(name)} on a server"
    return [served if is_address(path) else _link(path) for path in teachers.values()]


def _what(config: ModelsConfig, teachers: Sequence[str], step: int, steps: int) -> str:
    held = f"LoRA adapters of rank {config.lora_rank} for" if config.lora_rank else "The weights of"
    role = "teacher" if len(teachers) == 1 else "teachers"
    taught = f", with {' and '.join(teachers)} as {role}" if teachers else ""
    return (
        f"{held} {_link(config.student)}{taught}, at step {step} of {steps} of a run of "
        f"kepo {__version__} ([KEPO]({PAPER}): group-relative policy optimisation, distillation "
        "gated by the quality of each completion, hints where every sample fails).\n"
    )


def _data(config: DataConfig, data: Mapping[str, Any]) -> list[str]:
    train = data["train"]
    lines = [f"- trained on {_counts(train)}"]
    for name, chosen in (
        ("modalities", config.train_modalities),
        ("types of question", config.train_question_types),
    ):
        if chosen is not None:
            lines.append(f"- of these {name} only: {', '.join(chosen)}")
    if "eval" in data:
        lines.append(f"- evaluated on {_counts(data['eval'])}")
    shared = data.get("shared")
    if shared is not None:
        lines.append(
            f"- images in both, compared by {shared['compared']}: {shared['images']}, with "
            f"{shared['eval_questions']} of the evaluation's questions about them"
        )
    return [*lines, ""]


def _counts(record: Mapping[str, Any]) -> str:
    found = (
        f"{record['questions']} questions of `{_name(record['path'])}` ({record['layout']}, "
        f"{record['records']} records"
    )
    bad = record["bad_records"]
    if bad:
        kinds = ", ".join(f"{kind} {count}" for kind, count in bad.items())
        found += f", of which {sum(bad.values())} left out as bad: {kinds}"
    return found + ")"


def _policy_and_rewards(config: ObjectiveConfig) -> list[str]:
    lines = []
    if config.policy_coef > 0:
        term = "cross-entropy on the dataset's solutions"
        if config.data_fraction < 1:
            term = f"`{config.policy_loss}` on {config.num_generations} completions per question"
        lines.append(f"- policy term: {term}")
    pairs = zip(config.rewards, config.reward_weights, strict=True)
    return [*lines, "- reward: " + " + ".join(f"{weight:g} {name}" for name, weight in pairs)]


def _distillation(config: ObjectiveConfig) -> str:
    gate = "of every completion"
    if config.gate_reward is not None:
        name = "total reward" if config.gate_reward == TOTAL else config.gate_reward
        least = config.gate_threshold
        gate = f"weighted by {name}" if least is None else f"where {name} is at least {least:g}"
    term = f"divergence with beta {config.beta:g} times {config.distill_coef:g}"
    return f"- distillation: {term}, {gate}"


def _other_settings(changed: Mapping[str, Any]) -> list[str]:
    if not changed:
        return ["- every other setting has its default", ""]
    import yaml

    text = yaml.safe_dump(dict(changed), sort_keys=False, allow_unicode=True)
    return ["\nSettings that differ from the defaults:\n", f"```yaml\n{text}```\n"]


def changed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the method that differ from their defaults, as YAML knows them."""
    found = {}
    for field in dataclasses.fields(Config):
        value = settings[field.name]
        if field.name in ELSEWHERE | MAY_CHANGE_ON_RESUME or value == field.default:
            continue
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def _use(config: ModelsConfig) -> str:
    if config.lora_rank:
        load = (
            "from peft import PeftModel\nfrom transformers import AutoModelForImageTextToText\n\n"
            f'base = AutoModelForImageTextToText.from_pretrained("{_shown(config.student)}")\n'
            'model = PeftModel.from_pretrained(base, "this folder")\n'
        )
    else:
        load = (
            "from transformers import AutoModelForImageTextToText\n\n"
            'model = AutoModelForImageTextToText.from_pretrained("this folder")\n'
        )
    return (
        "It was asked multiple-choice questions about images, and answers\n"
        "`<think>...</think><answer>B</answer>`.\n\n"
        f"```python\n{load}```\n"
    )


def _on_hub(model: str) -> bool:
    """Return whether a name is ``owner/name`` as the Hub allows it, and no folder here."""
    allowed = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model, re.ASCII)
    return allowed is not None and not Path(model).exists()


def _link(model: str) -> str:
    if _on_hub(model):
        return f"[{model}](https://huggingface.co/{model})"
    return f"`{_name(model)}`"


def _shown(model: str) -> str:
    return model if _on_hub(model) else _name(model)


def _name(path: str) -> str:
    """Return the last name of a path."""
    return Path(path).name or path
