"""The work a run does at some of its steps: evaluating, saving, and at the end drawing curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kepo.distributed.processes import Stopped, is_rank0
from kepo.errors import KepoTeacherError
from kepo.evaluation.answers import by_question_type, greedy_scores, means
from kepo.run.card import model_card
from kepo.run.checkpoint import save_checkpoint
from kepo.run.curves import plot_curves
from kepo.run.open import Run


def begin(run: Run) -> None:
    """Evaluate a new run and save it as step 0; a resumed run makes up for the evaluation of its
    last step, if a signal ended it before that."""
    config, done = run.config, run.done
    if not run.resumed:
        measure(run, 0)
        save(run, 0)
    elif is_measured(done, config.steps, config.eval_every) and not any(
        "eval" in record for record in run.log.at(done)
    ):
        measure(run, done)
    run.stop.agree()


def is_measured(step: int, steps: int, eval_every: int) -> bool:
    """Return whether the policy is evaluated after a step: at both ends, and every
    ``eval_every``."""
    return step in (0, steps) or bool(eval_every and step % eval_every == 0)


def measure(run: Run, step: int) -> None:
    """Log the policy's greedy accuracy, if there is anything to evaluate on and no signal comes."""
    if not run.data.eval:
        return
    config, sampler = run.config, run.models.sampler
    try:
        with sampler.ready():
            scores = greedy_scores(
                sampler,
                run.data.eval,
                run.env.task,
                max_tokens=config.max_completion_length,
                batch_size=config.eval_batch,
                stop=run.stop.noted,
            )
    except Stopped:
        return  # a resumed run begins with it
    values = {"eval": means(scores), "eval_items": as_digits(scores)}
    if len(types := by_question_type(run.data.eval, scores)) > 1:
        values["eval_types"] = means(types)
    run.write(step, values)


def as_digits(scores: dict[str, list[float]]) -> dict[str, str]:
    """Return the 0 and 1 of each question as one string per modality."""
    return {name: "".join(str(round(x)) for x in values) for name, values in scores.items()}


def save(run: Run, step: int) -> None:
    """Write the checkpoint of a step, from which the run can resume."""
    state = {"step": step, "config": dataclasses.asdict(run.config), "hints": run.hints}
    state["logs"] = {log.path.name: log.mark for log in (run.log, run.completions)}
    state |= {"inputs": run.inputs, "device": str(run.device)}
    run.newest = save_checkpoint(
        run.folder / "checkpoints",
        step,
        lambda folder: write_policy(run, step, folder),
        run.parameters,
        run.optimizer,
        state,
        run.config.keep_checkpoints,
    )


@contextmanager
def saved_if_the_teacher_goes(run: Run, step: int) -> Iterator[None]:
    """Save the run as it is after ``step`` if a server does not answer within the block, which
    changes nothing but the hints that are known. All ranks meet its error."""
    hints = dict(run.hints)
    try:
        yield
    except KepoTeacherError:
        run.hints.clear()
        run.hints.update(hints)
        if run.newest is None or run.newest.name != f"step-{step:08d}":
            save(run, step)
        raise


def write_policy(run: Run, step: int, folder: Path) -> None:
    """Write the policy with its model card. All ranks call."""
    run.models.policy.save(folder)
    if is_rank0():
        card = model_card(run.config, step, run.data.record)
        (folder / "README.md").write_text(card, encoding="utf-8")


def draw_curves(run: Run) -> None:
    """Draw curves.png from the metrics; one training modality is shown apart from the others."""
    if is_rank0():
        modalities = run.config.train_modalities or ()
        source = modalities[0] if len(modalities) == 1 else None
        plot_curves(run.log.path, run.folder / "curves.png", source=source)
