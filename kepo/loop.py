"""The training loop, top to bottom: sample, rescue, score, gate, one fused loss, one optimiser
step.

    python -m kepo train recipe.yaml --lr 1e-5        # flags override the file; see --help
    python -m kepo train recipe.yaml dr_grpo          # and so does a preset, or another file
    torchrun --nproc-per-node=8 -m kepo train recipe.yaml

The same command after a crash, a kill or Ctrl-C goes on from the last checkpoint; on a CPU to the
same bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from kepo.check import check
from kepo.config import MAY_CHANGE_ON_RESUME, Config, from_mapping, load
from kepo.data.identity import changed_questions, inputs_of
from kepo.data.run_data import load_data, write_record
from kepo.distributed.processes import (
    Stopped,
    all_gather,
    is_rank0,
    on_rank0,
    refusals_told,
    world_size,
)
from kepo.distributed.sharding import own_gradients, whole_tensor
from kepo.errors import KepoConfigError, KepoError
from kepo.evaluation.greedy import by_question_type, evaluate, means
from kepo.models.conventions import check_same_opening
from kepo.models.reading import own_progress_only
from kepo.models.vlm import VLM
from kepo.objective.batch import collate
from kepo.objective.step import StepTotals, kepo_step
from kepo.rollout.encodable import judge_of
from kepo.rollout.explore import explore
from kepo.rollout.hints import Hints
from kepo.rollout.questions import draw, from_data
from kepo.rollout.rollouts import demonstrations
from kepo.run import checkpoint
from kepo.run.agreement import joined, same_images
from kepo.run.card import model_card
from kepo.run.curves import plot_curves
from kepo.run.lock import exclusive
from kepo.run.manifest import as_saved
from kepo.run.metrics import StepLog, completion_records, peak_gb, step_metrics
from kepo.run.optimizer_state import load_optimizer
from kepo.run.roles import load_policy, load_reference, load_sampler, load_teacher
from kepo.run.signals import StopRequest, lasting_output
from kepo.terminal import any_terminal
from kepo.words import command_line


def train(config: Config) -> int:
    """Run (or resume) the training that ``config`` describes; returns the exit code.

    0 when all steps are done, 128 and its number when a signal ended it after saving: 130 for
    Ctrl-C, 143 for SIGTERM.
    Writes checkpoints, metrics.jsonl, data.json and curves.png under ``config.run_dir``. Every
    process of torchrun calls it; all see the whole of a step but for the micro-batches, of which
    each has its share (kepo.distributed.processes).
    """
    any_terminal()
    with refusals_told():
        check(config)
    own_progress_only()
    run_dir = Path(config.run_dir)
    checkpoints = run_dir / "checkpoints"
    with (
        lasting_output(),
        joined(config) as device,
        StopRequest() as stop,
        exclusive(run_dir),
    ):
        data = on_rank0(lambda: load_data(config, judge_of(config)))
        same_images(data)
        examples = data.train
        say(data.summary)
        stop.agree()
        if stop:  # reading the images may have taken long
            return stop.exit_code
        inputs = on_rank0(lambda: inputs_of(config, data.identity))
        resume = on_rank0(lambda: checkpoint.latest_checkpoint(checkpoints))
        done = 0
        if resume is not None:
            state = checkpoint.load_state(resume)
            refuse_other_config(config, state["config"], resume)
            done = state["step"]
            changed = on_rank0(lambda: changed_questions(config, state, inputs, data.by_setting))
        # A checkpoint with digests has been compared with them.
        by_ids = resume is not None and "inputs" not in state
        on_rank0(lambda: write_record(data, run_dir, resuming=by_ids))
        saved = on_rank0(lambda: as_saved(resume)) if resume else None
        policy = load_policy(config, device, saved / "policy" if saved else None)
        teacher = load_teacher(config, device) if config.distils or config.hints else None
        ref = load_reference(config, device)
        check_same_tokens(policy, teacher)
        if config.distils:
            check_same_opening(policy.encoder, teacher.encoder)
        sampler = load_sampler(config, policy)
        parameters = {n: p for n, p in policy.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=config.lr, weight_decay=config.weight_decay
        )
        if resume is not None:
            load_optimizer(saved, parameters, optimizer)
            say(f"resuming after step {done} from {resume}")
        hints: Hints = {}
        if resume is not None:  # what is known of a question that has changed is no longer true
            hints = {name: hint for name, hint in state["hints"].items() if name not in changed}
        resume_step = done if resume is not None else -1
        marks = state.get("logs", {}) if resume is not None else {}
        log, completions = (
            StepLog(run_dir / name, resume_step, marks.get(name))
            for name in ("metrics.jsonl", "completions.jsonl")
        )

        def save(step: int) -> None:
            def write_policy(folder: Path) -> None:
                policy.save(folder)
                if is_rank0():
                    card = model_card(config, step, data.record)
                    (folder / "README.md").write_text(card, encoding="utf-8")

            state = {"step": step, "config": dataclasses.asdict(config), "hints": hints}
            state["logs"] = {one.path.name: one.mark for one in (log, completions)}
            state["inputs"] = inputs
            checkpoint.save_checkpoint(
                checkpoints,
                step,
                write_policy,
                parameters,
                optimizer,
                state,
                config.keep_checkpoints,
            )

        def measure(step: int) -> None:
            if data.eval:
                try:
                    with sampler.ready():
                        scores = evaluate(
                            sampler,
                            data.eval,
                            max_new_tokens=config.max_completion_length,
                            batch_size=config.eval_batch,
                            stop=stop.noted,
                        )
                except Stopped:
                    return  # a resumed run begins with it
                values = {"eval": means(scores), "eval_items": as_digits(scores)}
                if len(types := by_question_type(data.eval, scores)) > 1:
                    values["eval_types"] = means(types)
                log.write(step, values)

        def is_measured(step: int) -> bool:
            return step in (0, config.steps) or bool(
                config.eval_every and step % config.eval_every == 0
            )

        stop.agree()
        if stop:  # nothing has been trained yet
            return stop.exit_code
        if resume is None:
            measure(0)
            save(0)
        elif is_measured(done) and not any("eval" in record for record in log.at(done)):
            measure(done)  # a signal ended the run before it could
        stop.agree()
        skipped = 0
        bar = tqdm(
            range(done, config.steps),
            initial=done,
            total=config.steps,
            desc="kepo",
            disable=not is_rank0(),
        )
        for step in (number + 1 for number in bar):
            if stop:
                break
            started = time.perf_counter()
            questions = draw(examples, config, step)
            own = len(questions) - from_data(config, step)
            given = demonstrations(policy.encoder, questions[own:], config)
            with sampler.ready():
                found = explore(questions[:own], sampler, teacher, config, hints, examples, step)
            explored = time.perf_counter()

            batch = collate(found.groups, config, given)
            micros = batch.own_micros(config.micro_batch)
            totals = StepTotals()
            for group in optimizer.param_groups:
                group["lr"] = config.lr * lr_share(step, config)
            for _ in range(config.num_iterations):
                policy.model.train()
                for place, micro in enumerate(micros):
                    work = partial(kepo_step, policy, teacher, ref, micro, config, totals)
                    with own_gradients(policy.wrapper, last=place == len(micros) - 1):
                        loss, logprobs = policy.run_wrapped(work)
                        # Gradients are averaged over processes; the loss's weights are of the sum.
                        (loss * world_size()).backward()
                    if micro.old_logprobs is None and config.num_iterations > 1:
                        micros[place] = replace(micro, old_logprobs=logprobs)
                policy.model.eval()
                norm = whole_tensor(
                    torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
                )
                if torch.isfinite(norm):
                    optimizer.step()
                    skipped = 0
                else:
                    skipped += 1
                    say(f"step {step}: gradient norm is {norm.item()}; the step is skipped")
                # A rollout needs their memory (DDP keeps its buckets).
                optimizer.zero_grad(set_to_none=True)
            ended = time.perf_counter()

            totals = totals.of_all()
            values = step_metrics(found, given, batch, totals, config)
            values |= {
                "grad_norm": norm.item(),
                "learning_rate": optimizer.param_groups[0]["lr"],
                "skipped": skipped,
                "time/rollout": found.rollout_seconds,
                "time/hint": found.hint_seconds,
                "time/teacher": totals.teacher_seconds,
                "time/update": ended - explored - totals.teacher_seconds,
                "step_time": ended - started,
                "mem/peak_gb": max(all_gather(peak_gb(device))),
            }
            log.write(step, values)
            rollouts = [rollout for group in found.groups for rollout in group] + given
            every = config.log_completions_every
            if every and (step == 1 or step % every == 0):
                completions.write(step, *completion_records(rollouts, batch))
            bar.set_postfix(
                reward=f"{values.get('reward', math.nan):.2f}",
                gate=f"{values['kepo/gate_rate']:.2f}",
                rescue=f"{values['kepo/rescue_rate']:.2f}",
                refresh=False,
            )
            if skipped > config.max_skipped_steps:
                ids = [example.id for example in questions]
                raise KepoError(
                    f"{skipped} steps in a row had no finite gradient; questions: {ids}"
                )
            stop.agree()
            if not stop and is_measured(step):
                measure(step)
                stop.agree()  # an evaluation may be long
            if stop or step == config.steps or step % config.save_every == 0:
                save(step)
        if is_rank0():
            plot_curves(log.path, run_dir / "curves.png", source=source_of(config))
        return stop.exit_code


def say(text: str) -> None:
    """A line on the terminal, from one process, beside the bar."""
    if is_rank0():
        tqdm.write(text)


def lr_share(step: int, config: Config) -> float:
    """Share of ``lr`` at a step: a rise over ``warmup_steps``, then a line from 1 to ``lr_end``."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    passed = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 1.0 - (1.0 - config.lr_end) * passed


def as_digits(scores: dict[str, list[float]]) -> dict[str, str]:
    """The 0 and 1 of each question, in a string per modality."""
    return {name: "".join(str(round(x)) for x in values) for name, values in scores.items()}


def source_of(config: Config) -> str | None:
    """The one training modality, if it is one."""
    single = config.train_modalities is not None and len(config.train_modalities) == 1
    return config.train_modalities[0] if single else None


def check_same_tokens(policy: VLM, teacher: VLM | None) -> None:
    """A token id must mean the same to both models: completions pass between them as ids."""
    if teacher is None:
        return
    mine, theirs = policy.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    differing = sorted(token for token in mine if theirs.get(token) != mine[token])
    if differing:
        raise KepoConfigError(
            f"student and teacher tokenizers disagree on {len(differing)} tokens, first "
            f"{differing[0]!r}: {mine[differing[0]]} and {theirs.get(differing[0])}; distillation "
            "needs models that share a tokenizer"
        )


def refuse_other_config(config: Config, saved: dict, folder: Path) -> None:
    """A run is resumed with the settings it was started with."""
    before, now = dataclasses.asdict(from_mapping(saved, str(folder))), dataclasses.asdict(config)
    # A longer run is the same run, unless its length is what the learning rate goes by.
    may_change = MAY_CHANGE_ON_RESUME | ({"steps"} if config.lr_end == 1.0 else set())
    changed = [
        f"{name}: {before[name]!r} -> {now[name]!r}"
        for name in now
        if before[name] != now[name] and name not in may_change
    ]
    if changed:
        raise KepoConfigError(
            f"{folder} was made with other settings ({'; '.join(changed)}); use another run_dir, "
            "or the old settings"
        )


def main(arguments: Sequence[str]) -> int:
    """``kepo train``: recipes and presets, each over the one before it, then flags."""
    layers = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    with refusals_told():
        config = command_line(
            Config,
            prog="kepo train",
            args=arguments[len(layers) :],
            default=load(*layers),
            description=__doc__,
        )
    return train(config)
