"""Plan a run before it starts: does it fit its GPUs, what does each phase of a step hold, and how
much more would fit?

    kepo plan recipe.yaml --gpus 8 --gpu-gb 80     # flags as of kepo train, too
    kepo plan recipes/8x80gb_8b.yaml --plot a.png  # the machine is in the name
    kepo plan --table recipes/*.yaml               # a line for each

GB are 2^30 bytes, as nvidia-smi counts; a plan may use 97 % of a GPU's. The exit code is 1 if the
run does not fit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from kepo.check import check_settings
from kepo.config import RECIPES, load, presets
from kepo.errors import KepoConfigError
from kepo.flags import command_line, refuse
from kepo.planner.memory import Phase, Prompts, Setup, peak, phases, student_of, teachers_of
from kepo.planner.standing import GIB, ITEMS, Machine, completions_per_process
from kepo.sections import TeacherConfig
from kepo.words import is_address

MOST_GB = 10**6
"""The most GB of memory that a GPU may be said to have."""
MOST_TOKENS, TOKENS_STEP = 2**17, 16
"""The longest completion that is tried, in tokens, and the step between lengths."""


class Plan(NamedTuple):
    """The memory of a run's phases, and the largest settings that fit."""

    setup: Setup
    phases: list[Phase]
    micro_batch: int
    """The largest micro_batch that fits with all other settings unchanged. 0 means that none
    fits."""
    max_completion_length: int
    """The longest max_completion_length that fits, likewise, a multiple of TOKENS_STEP. 0 means
    that none fits. No longer than the student has positions for."""

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.peak.total <= self.setup.machine.offered


def plan(setup: Setup) -> Plan:
    """Return the phases of a run, and the largest settings with which it still fits.

    Raises KepoConfigError for settings that train refuses.
    """
    config, machine = setup.config, setup.machine
    if not config.student:
        raise KepoConfigError("student is not set; give a folder, a Hub name or a known model")
    for name, value in (("gpus", machine.gpus), ("gpu_gb", machine.gpu_bytes / GIB)):
        if value <= 0:
            raise KepoConfigError(f"{name} is {value}; expected a number > 0")
    check_settings(config)
    room = _room(setup)
    if config.max_completion_length > room:
        raise KepoConfigError(
            f"max_completion_length={config.max_completion_length}: the student has positions for "
            f"{max(0, room)} tokens after such a prompt (max_position_embeddings); expected at "
            "most that many, or shorter prompts"
        )

    def fits(**change: int) -> bool:
        after = _peak_after(setup, change)
        return after is not None and after <= machine.offered

    return Plan(
        setup,
        phases(setup),
        largest(lambda n: fits(micro_batch=n), completions_per_process(config, machine)),
        TOKENS_STEP
        * largest(lambda n: fits(max_completion_length=n * TOKENS_STEP), room // TOKENS_STEP),
    )


def _room(setup: Setup) -> int:
    """Return for how many tokens after a prompt the student has positions, MOST_TOKENS at most."""
    student = student_of(setup.config, setup.machine)
    positions = getattr(student.text, "max_position_embeddings", None)
    longest = MOST_TOKENS if positions is None else positions - setup.prompts.length(student)
    return min(MOST_TOKENS, longest)


def _peak_after(setup: Setup, change: Mapping[str, Any]) -> int | None:
    """Return the run's peak in bytes after a change of settings; None if train refuses them."""
    try:
        changed = replace(setup.config, **change)
        check_settings(changed)
        return peak(setup._replace(config=changed)).total
    except KepoConfigError:
        return None


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to ``most`` that fits; 0 if none does.

    A number below one that fits is taken to fit too. ``most`` is tried first: a step in one
    micro-batch has no gradients of earlier ones.
    """
    if fits(most):
        return most
    low, high = 0, 1  # low fits, or is 0
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)  # high does not fit, or may not be tried
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Change(NamedTuple):
    """A change of settings that takes less memory, and the run's peak with it, in bytes."""

    setting: str
    peak: int


def advice(setup: Setup) -> list[Change]:
    """Return single changes of settings that lower the peak, the most effective first."""
    config, machine = setup.config, setup.machine
    now = peak(setup).total
    share = completions_per_process(config, machine)

    def half(name: str, most: int | None = None, least: int = 1) -> dict:
        value = getattr(config, name)
        return {name: max(least, min(value, value if most is None else most) // 2)}

    changes: list[dict] = [
        dict(gradient_checkpointing=True),
        half("micro_batch", share),
        half("rollout_batch", share, config.num_generations),
        half("eval_batch"),
        half("max_completion_length"),
        dict(freeze_vision=True),
        dict(lora_rank=16),
        *([dict(student_bits=bits) for bits in (8, 4)] if config.lora_rank else []),
        dict(rollout_gather=False),
        dict(workspace_bytes=2**29),
        dict(share_prompts=True),
        dict(scores_on="host"),
        dict(optimizer="adamw_8bit"),
    ]
    limits = ("rollout_tokens", "micro_tokens", "max_pixels")
    changes += [half(name) for name in limits if getattr(config, name) is not None]
    if config.sampler == "vllm":
        changes.append(dict(vllm_memory=config.vllm_memory / 2))
    if machine.gpus > 1 or config.dtype != "float32":
        changes.append(dict(sharding="fsdp2"))
    if config.local_teachers:
        changes += [dict(teacher_bits=bits, teacher_placement="copy") for bits in (8, 4)]
        changes.append(dict(teacher_bits=None, teacher_placement="offload"))
        if machine.gpus > 1:
            changes.append(dict(teacher_bits=None, teacher_placement="fsdp2"))
    found = []
    for change in changes:
        new = {name: value for name, value in change.items() if getattr(config, name) != value}
        after = _peak_after(setup, new)
        if after is not None and after < 0.995 * now:
            settings = ", ".join(f"{name}: {_yaml(value)}" for name, value in new.items())
            found.append(Change(settings, after))
    return sorted(found, key=lambda change: change.peak)


def _yaml(value: object) -> str:
    words: dict[object, str] = {None: "null", True: "true", False: "false"}
    return words.get(value, str(value))


# ---- in words ----


def report(found: Plan) -> str:
    """Return the plan as the text that the command prints."""
    config, machine, prompts = found.setup
    student, teachers = student_of(config, machine), teachers_of(found.setup)
    sizes = ", ".join(f"{one.counts.total / 1e9:.2f}" for one in teachers)
    names = [item for item in ITEMS if any(phase.held[item] for phase in found.phases)]
    width = max(len(phase.name) for phase in found.phases)
    lines = [
        f"{_model(config.student)} of {student.counts.total / 1e9:.2f} B parameters, "
        f"{student.counts.trained / 1e9:.3g} B trained"
        + (f"; {_teachers(config)} of {sizes} B" if teachers else ""),
        f"{machine.gpus} x {machine.gpu_bytes / GIB:.0f} GB; prompts of {prompts.text_tokens} "
        f"tokens and {prompts.images} x {prompts.image(student)} of images, completions of "
        f"{config.max_completion_length}",
        "",
        "  ".join(["GB per GPU".ljust(width), *names, "total"]),
    ]
    for phase in found.phases:
        cells = [f"{phase.held[name] / GIB:.1f}".rjust(len(name)) for name in names]
        total = f"{phase.total / GIB:.1f}".rjust(5)
        lines.append("  ".join([phase.name.ljust(width), *cells, total]) + f"  ({phase.moment})")
    share = completions_per_process(config, machine)
    lines += [
        "",
        f"peak: {found.peak.name}, {found.peak.total / GIB:.1f} of {machine.offered / GIB:.1f} "
        f"GB: {'fits' if found.fits else 'does not fit'}",
        f"largest micro_batch that fits: {found.micro_batch} (a process has {share} in a step)",
        f"largest max_completion_length that fits: {found.max_completion_length}",
    ]
    if not found.fits:
        lines += ["", "what would change it, each alone:"]
        for change in advice(found.setup):
            saved = (found.peak.total - change.peak) / GIB
            verdict = "fits" if change.peak <= machine.offered else "does not fit yet"
            lines.append(
                f"  {change.setting}: {saved:.1f} GB less, {change.peak / GIB:.1f}: {verdict}"
            )
    return "\n".join(lines)


COLUMNS = (
    "recipe",
    "GPUs",
    "student",
    "trained",
    "teacher",
    "peak",
    "GB per GPU",
    "fits",
    "largest micro_batch",
    "largest max_completion_length",
)


def table(paths: Sequence[str | Path]) -> str:
    """Return a Markdown table of the plans, with a row for each recipe.

    Raises KepoConfigError for a recipe whose name does not tell its machine.
    """
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    for path in map(Path, paths):
        machine = machine_of(path)
        if machine is None:
            raise KepoConfigError(
                f"{path}: its name does not say on what it runs; expected one that begins like "
                "8x80gb_"
            )
        config = load(path)
        found = plan(Setup(config, machine))
        rows.append(
            [
                path.stem,
                f"{machine.gpus} x {machine.gpu_bytes // GIB} GB",
                _model(config.student),
                f"LoRA {config.lora_rank}" if config.lora_rank else "all weights",
                _teacher(config),
                found.peak.name,
                f"{found.peak.total / GIB:.0f}",
                "yes" if found.fits else "no",
                f"{found.micro_batch} of {completions_per_process(config, machine)}",
                str(found.max_completion_length),
            ]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _teachers(config: TeacherConfig) -> str:
    """Return the names of the teachers that the processes hold."""
    paths = config.teacher_paths.values()
    return ", ".join(_model(path) for path in paths if not is_address(path))


def _teacher(config: TeacherConfig) -> str:
    if not _teachers(config):
        return "on a server" if config.taught else "–"
    how = "sharded" if config.teacher_placement == "fsdp2" else config.teacher_placement
    bits = f"{config.teacher_bits} bits" if config.teacher_bits else how
    return f"{_teachers(config)}, {bits}"


def _model(name: str | None) -> str:
    return Path(name or "").name


def machine_of(path: Path) -> Machine | None:
    """Return the machine in a recipe's name, which begins like 8x80gb_; None if it does not."""
    found = re.match(r"(\d+)x(\d+)gb_", path.name)
    return Machine(int(found[1]), int(found[2]) * GIB) if found else None


# ---- the command ----


@dataclass(frozen=True)
class Arguments:
    """The machine and the prompts that the run is planned for."""

    gpus: int | None = None
    """Number of GPUs, with a process for each. None means as a recipe's name says."""
    gpu_gb: float | None = None
    """Memory of a GPU in GB. None means as a recipe's name says."""
    prompt_tokens: int = Prompts.text_tokens
    """Tokens of a prompt, without those of its images."""
    image_tokens: int | None = None
    """Tokens of an image. None means those of 384 x 384 pixels, within min_pixels and
    max_pixels."""
    prompt_images: int = 1
    """Images of a prompt."""
    plot: str | None = None
    """Draw the phases to this file. None disables it."""
    table: bool = False
    """Print a Markdown table with a row for each recipe, whose names tell their machines. It takes
    no other flags."""


def _bytes(gpu_gb: float) -> int:
    if not 0 < gpu_gb <= MOST_GB:  # this refuses nan, too
        raise KepoConfigError(f"gpu_gb is {gpu_gb}; expected a number in (0, {MOST_GB}]")
    return int(gpu_gb * GIB)


def main(arguments: Sequence[str]) -> int:
    """Run ``kepo plan`` with recipes and presets, then flags; or with --table and recipes.

    Returns the exit code: 0 if the run fits, else 1; 0 after a table.
    """
    if "--table" in arguments and not {"-h", "--help"} & {*arguments}:
        recipes = [word for word in arguments if word != "--table"]
        if not recipes or any(word.startswith("-") for word in recipes):
            refuse(f"--table has {recipes or 'nothing'}; expected kepo plan --table RECIPE ...")
        print(table(recipes))
        return 0
    layers = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    given, config = command_line(
        Arguments,
        load(*layers),
        prog="kepo plan",
        usage=RECIPES,
        args=arguments[len(layers) :],
        description=f"{__doc__}\nPresets: {', '.join(presets())}.",
    )
    found = plan(Setup(config, _machine(given, layers), _prompts(given)))
    print(report(found))
    if given.plot is not None:
        from kepo.planner.plot import plot_plan

        plot_plan(found.phases, found.setup.machine, Path(given.plot))
    return 0 if found.fits else 1


def _machine(given: Arguments, layers: Sequence[str]) -> Machine:
    """Return the machine that the flags give, else the name of the last recipe that tells one."""
    gpu_bytes = None if given.gpu_gb is None else _bytes(given.gpu_gb)
    if given.gpus is not None and given.gpus < 1:
        raise KepoConfigError(f"gpus is {given.gpus}; expected a number >= 1")
    named = next(filter(None, (machine_of(Path(layer)) for layer in reversed(layers))), None)
    gpus = named.gpus if named and given.gpus is None else given.gpus
    gpu_bytes = named.gpu_bytes if named and gpu_bytes is None else gpu_bytes
    if gpus is None or gpu_bytes is None:
        name = "gpus" if gpus is None else "gpu_gb"
        raise KepoConfigError(
            f"{name} is not set; give --gpus and --gpu-gb, or a recipe whose name begins like "
            "8x80gb_"
        )
    return Machine(gpus, gpu_bytes)


def _prompts(given: Arguments) -> Prompts:
    for name in ("prompt_tokens", "image_tokens", "prompt_images"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise KepoConfigError(f"{name} is {value}; expected a number >= 1")
    return Prompts(given.prompt_tokens, given.image_tokens, given.prompt_images)
