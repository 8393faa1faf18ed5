"""Opening a run: its data and models are read, and its state from the last checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kepo.config import AS_BEFORE, MAY_CHANGE_ON_RESUME, RENAMED, Config, from_mapping
from kepo.data.example import Example
from kepo.data.identity import changed_questions, inputs_of
from kepo.data.run_data import RunData, load_data, write_record
from kepo.distributed.processes import is_rank0, on_rank0
from kepo.errors import KepoConfigError
from kepo.models.conventions import check_same_opening
from kepo.models.encoding import Prompt
from kepo.models.vlm import VLM
from kepo.objective.optimizers import optimizer_of
from kepo.rollout.encodable import judge_of
from kepo.rollout.hints import Hints
from kepo.rollout.models import Models
from kepo.rollout.prompts import prompt_of
from kepo.run import checkpoint
from kepo.run.agreement import same_images
from kepo.run.manifest import as_saved
from kepo.run.metrics import StepLog, read_metrics
from kepo.run.optimizer_state import Parameters, load_optimizer
from kepo.run.progress import say
from kepo.run.roles import load_policy, load_reference, load_sampler, load_teachers
from kepo.run.signals import StopRequest
from kepo.run.sinks.telling import Sink, Sinks, open_sinks
from kepo.sections import TeacherConfig
from kepo.tasks.environment import Environment, environment_of
from kepo.tasks.task import Task
from kepo.teachers.first_words import offer_of
from kepo.teachers.served import ServedTeacher
from kepo.teachers.several import each_of, place_of
from kepo.teachers.transport import Server


@dataclass
class Run:
    """The objects and values that the steps of a run read and change."""

    config: Config
    device: torch.device
    stop: StopRequest
    data: RunData
    inputs: dict[str, Any]
    """Digests of the teacher and the questions, for checkpoints to remember."""
    env: Environment
    """The task and the rewards."""
    models: Models
    parameters: Parameters
    """The parameters of the policy that are trained, by name."""
    optimizer: torch.optim.Optimizer
    hints: Hints
    log: StepLog
    completions: StepLog
    sinks: Sinks
    done: int
    """The number of steps that were done before."""
    newest: Path | None
    """The newest checkpoint."""
    resumed: bool
    """True if the run resumes from a checkpoint, which may be that of step 0."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Log the numbers of a step or an evaluation, and tell the sinks."""
        self.log.write(step, values)
        self.sinks.scalars(step, values)

    def write_completions(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Log the completions of a step, and tell the sinks."""
        self.completions.write(step, *records)
        self.sinks.completions(step, records)


@dataclass(frozen=True)
class Saved:
    """The checkpoint that a run resumes from."""

    folder: Path
    state: dict[str, Any]
    changed: set[str]
    """Ids of questions that were different when the checkpoint was written."""

    @property
    def hints(self) -> Hints:
        """The saved hints, without those of questions that have changed."""
        known = self.state["hints"].items()
        return {name: hint for name, hint in known if name not in self.changed}


def open_run(
    config: Config,
    device: torch.device,
    stop: StopRequest,
    env: Environment | None = None,
    own: Sequence[Any] | None = None,
    sinks: Sequence[Sink] = (),
) -> Run | None:
    """Open a new run, or the one in ``config.run_dir`` as its last checkpoint has it.

    env: the task and the rewards; None means those that the config names. own: the questions in the
    place of ``train_data``, if they came as an argument. sinks: the user's own, beside those of
    ``config.report_to``. The run holds them all, and whoever trains it closes them: ``with
    run.sinks``.

    Returns None if a signal asked to stop in the meantime: nothing has been trained then. All ranks
    call it, within the lock on the folder.
    """
    folder = Path(config.run_dir)
    env = environment_of(config) if env is None else env
    if config.device == "auto":
        say(f"device: auto is {device.type}")
    data = on_rank0(lambda: load_data(config, judge_of(config, env.task), own))
    same_images(data)
    say(data.summary)
    stop.agree()
    if stop:  # reading the images may have taken long
        return None
    served = dict(config.taught_by.items() - config.local_teachers.items())
    inputs = on_rank0(
        lambda: inputs_of(config.read_again, data.identity | offers_of(served, config), env.code)
    )
    saved = last_saved(config, data, inputs)
    # A checkpoint with digests has been compared with them.
    by_ids = saved is not None and "inputs" not in saved.state
    on_rank0(lambda: write_record(data, folder, resuming=by_ids))
    with ExitStack() as if_not_opened:
        told = open_sinks(config, saved.state["step"] if saved else -1, sinks)
        if_not_opened.enter_context(told)
        run = _with_models(config, device, stop, env, data, inputs, saved, told)
        if run is not None:
            if_not_opened.pop_all()
        return run


def _with_models(
    config: Config,
    device: torch.device,
    stop: StopRequest,
    env: Environment,
    data: RunData,
    inputs: dict[str, Any],
    saved: Saved | None,
    sinks: Sinks,
) -> Run | None:
    """Load the models, the optimiser's state and the logs; tell the sinks what they lack of the
    latter. Returns None if a signal asked to stop."""
    folder = Path(config.run_dir)
    files = on_rank0(lambda: as_saved(saved.folder)) if saved else None
    if device.type == "cuda":  # or an earlier run of this process would be in this one's peak
        torch.cuda.reset_peak_memory_stats(device)
    shown = first_pictures(data.train, env.task, config) if config.taught_by else []
    models = load_models(config, device, files / "policy" if files else None, shown)
    named = models.policy.model.named_parameters()
    parameters = {name: p for name, p in named if p.requires_grad}
    optimizer = optimizer_of(parameters.values(), config)
    done, marks = 0, {}
    if saved is not None and files is not None:
        done, marks = saved.state["step"], saved.state.get("logs", {})
        load_optimizer(files, parameters, optimizer)
        say(f"resuming after step {done} from {saved.folder}")
    log, completions = (
        StepLog(folder / name, done if saved else -1, marks.get(name))
        for name in ("metrics.jsonl", "completions.jsonl")
    )
    stop.agree()
    if stop:
        return None
    if is_rank0():
        sinks.catch_up(read_metrics(log.path), read_metrics(completions.path))
    return Run(
        config=config,
        device=device,
        stop=stop,
        data=data,
        inputs=inputs,
        env=env,
        models=models,
        parameters=parameters,
        optimizer=optimizer,
        hints=saved.hints if saved else {},
        log=log,
        completions=completions,
        sinks=sinks,
        done=done,
        newest=saved.folder if saved else None,
        resumed=saved is not None,
    )


def last_saved(config: Config, data: RunData, inputs: dict[str, Any]) -> Saved | None:
    """Return the newest complete checkpoint of the run; None if it has none.

    Raises KepoConfigError if it was made with other settings, KepoDataError or KepoCheckpointError
    if with other questions or another teacher.
    """
    root = Path(config.run_dir) / "checkpoints"
    folder = on_rank0(lambda: checkpoint.latest_checkpoint(root))
    if folder is None:
        return None
    state = checkpoint.load_state(folder)
    refuse_other_config(config, state["config"], folder)
    changed = on_rank0(lambda: changed_questions(config, state, inputs, data.by_setting))
    return Saved(folder, state, changed)


def offers_of(served: Mapping[str, str], config: TeacherConfig) -> dict[str, dict[str, str]]:
    """Return the models of the teachers behind servers, whose addresses are given, by setting: a
    resumed run must find the same, at whatever address."""
    asked = {which: Server(which, url, config) for which, url in served.items()}
    return {which: {offer_of(one, config).model: "served"} for which, one in asked.items()}


def first_pictures(
    examples: Sequence[Example], task: Task, config: TeacherConfig
) -> list[Prompt | None]:
    """Return for each teacher the first question with pictures that it is asked, or None."""
    found: list[Prompt | None] = [None] * len(config.teacher_paths)
    for example in examples:
        place = place_of(example, config)
        if example.images and found[place] is None:
            found[place] = prompt_of(task, example)
    return found


def load_models(
    config: Config,
    device: torch.device,
    saved: Path | None,
    shown: Sequence[Prompt | None] = (),
) -> Models:
    """Load all models of a run; the policy from ``saved``, a checkpoint's policy folder, if given.

    shown: for each teacher a question with pictures that it will be asked, or None. Raises
    KepoConfigError if student and teacher do not fit each other.
    """
    policy = load_policy(config, device, saved, seed=config.seed)
    teachers = load_teachers(config, config.taught_by, device, policy, shown, config.distils)
    local = [one for one in each_of(teachers) if not isinstance(one, ServedTeacher)]
    ref = load_reference(config, device) if config.kl_coef else None
    if config.share_prompts:
        say_what_is_not_shared(policy, local)
    for teacher in local:
        check_same_tokens(policy, teacher)
        if config.distils:
            check_same_opening(policy.encoder, teacher.encoder)
    return Models(policy, teachers, ref, load_sampler(config, policy))


def say_what_is_not_shared(student: VLM, teachers: Sequence[VLM]) -> None:
    """Say which models compute a prompt again for each completion, although ``share_prompts`` is
    on; the reference is the student's own start."""
    for role, model in [("student", student), *(("teacher", one) for one in teachers)]:
        if model.why_not_packed is not None:
            say(
                f"share_prompts: the {role} computes a prompt again for each completion, as "
                f"{model.why_not_packed} (it needs sdpa or eager, and full attention in all layers)"
            )


def check_same_tokens(policy: VLM, teacher: VLM) -> None:
    """Check that a token id means the same to both models: completions pass between them as ids."""
    mine, theirs = policy.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    differing = sorted(token for token in mine if theirs.get(token) != mine[token])
    if differing:
        raise KepoConfigError(
            f"student and teacher tokenizers disagree on {len(differing)} tokens, first "
            f"{differing[0]!r}: {mine[differing[0]]} and {theirs.get(differing[0])}; distillation "
            "needs models that share a tokenizer"
        )


def refuse_other_config(config: Config, saved: dict, folder: Path) -> None:
    """Raise KepoConfigError if a run is resumed with other settings than it was started with, among
    those that the version which started it knew, or whose defaults are what it did."""
    known = {RENAMED.get(name, name) for name in saved} | AS_BEFORE
    before, now = from_mapping(saved, str(folder)).compared, config.compared
    # A longer run is the same run, unless its length is what the learning rate goes by.
    may_change = MAY_CHANGE_ON_RESUME | ({"steps"} if config.decay[0] == "constant" else set())
    changed = [
        f"{name}: {before[name]!r} -> {now[name]!r}"
        for name in now
        if name in known - may_change and before[name] != now[name]
    ]
    if changed:
        raise KepoConfigError(
            f"{folder} was made with other settings ({'; '.join(changed)}); use another run_dir, "
            "or the old settings"
        )
