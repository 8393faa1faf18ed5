"""The metrics of a step: TRL's names where they mean the same, ours under kepo/.

metrics.jsonl has one line per step or evaluation, completions.jsonl one per completion; both are
strict JSON, with null for a number that is not finite.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kepo.disk.durable import append_durably, as_json, make_folder, write_durably
from kepo.disk.files import read_own
from kepo.distributed.processes import is_rank0, on_rank0
from kepo.objective.batch import Batch, gates
from kepo.objective.totals import StepTotals
from kepo.rollout.explore import Exploration
from kepo.rollout.types import Rollout, total_rewards
from kepo.sections import ObjectiveConfig


def step_metrics(
    found: Exploration,
    data: Sequence[Rollout],
    batch: Batch,
    totals: StepTotals,
    config: ObjectiveConfig,
) -> dict[str, float]:
    """Return the log record of a step, without times and optimiser; docs/metrics.md explains it."""
    rollouts = [rollout for group in found.groups for rollout in group]
    values: dict[str, float] = {}
    if rollouts:  # not where the dataset answered every question
        rewards = total_rewards(found.groups, config)
        deviations = rewards.std(-1)
        values |= {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "frac_reward_zero_std": (deviations == 0).float().mean().item(),
        }
        for name in rollouts[0].rewards:
            given = [one for r in rollouts if (one := r.rewards[name]) is not None]
            if given:  # a reward may apply to no completion of a step
                values[f"rewards/{name}/mean"] = torch.tensor(given).mean().item()
            if len(given) > 1:
                values[f"rewards/{name}/std"] = torch.tensor(given).std().item()
    if config.sampler_correction != "none":
        values |= {
            "sampling/importance_sampling_ratio/mean": totals.ratio / max(1, totals.ratio_tokens),
            "sampling/importance_sampling_ratio/max": totals.ratio_max,
        }
    lengths = torch.tensor([len(r.completion_ids) for r in [*rollouts, *data]]).float()
    cut = [r.truncated for r in [*rollouts, *data]]
    told = [r.teacher_hint is not None for r in [*rollouts, *data]]
    iterations, updates = config.num_iterations, config.num_iterations * config.mini_batches
    tokens, teacher_tokens = totals.tokens // iterations, totals.teacher_tokens
    report, asked = found.report, max(1, found.asked)
    return values | {
        "entropy": totals.entropy / max(1, totals.tokens),
        "kl": totals.kl / max(1, totals.tokens),
        "clip_ratio/low_mean": totals.clipped_low / max(1, totals.tokens),
        "clip_ratio/high_mean": totals.clipped_high / max(1, totals.tokens),
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": sum(cut) / len(cut),
        "sampling/sampling_logp_difference/mean": totals.sampler_gap
        / max(1, totals.sampled_tokens),
        "sampling/sampling_logp_difference/max": totals.sampler_gap_max,
        "kepo/completion_tokens": tokens,
        "kepo/policy_loss": totals.policy_loss / updates,
        "kepo/distill_loss": totals.distill_loss / updates,
        "kepo/divergence": totals.divergence / max(1, totals.distilled_tokens),
        "kepo/distilled_tokens": totals.distilled_tokens // iterations,
        "kepo/gate_rate": batch.opened.float().mean().item(),
        "kepo/teacher_tokens": teacher_tokens,
        "kepo/teacher_skipped_frac": 1.0 - teacher_tokens / max(1, tokens),
        "kepo/teacher_requests": totals.teacher_requests,
        "kepo/teacher_retries": totals.teacher_retries,
        "kepo/sampled_completions": found.sampled,
        "kepo/data_completions": len(data),
        "kepo/resampled_groups": found.resampled,
        "kepo/hint_groups": report.groups,
        "kepo/hint_rate": report.groups / asked,
        "kepo/hints_written": report.written,
        "kepo/hint_retries": report.retried,
        "kepo/hint_tokens": report.hint_tokens,
        "kepo/hints_unusable": report.unhinted,
        "kepo/hint_attempts": report.attempts,
        "kepo/hint_accept_rate": report.successes / max(1, report.sampled),
        "kepo/hint_accepted": report.accepted,
        "kepo/rescue_rate": report.rescued / asked,
        "kepo/hinted_rate": batch.hinted.float().mean().item(),
        "kepo/teacher_hinted_rate": sum(told) / len(told),
    }


def step_times(
    found: Exploration, totals: StepTotals, *, after_sampling: float, whole: float
) -> dict[str, float]:
    """Return the seconds of a step's phases, their shares of the ``whole`` step, and the tokens of
    all ranks per second of the phases that work on them. A rate is left out where the step had no
    such tokens.

    after_sampling: seconds from the end of sampling to the end of the step, the teacher's included.
    """
    seconds = {
        "rollout": found.rollout_seconds,
        "hint": found.hint_seconds,
        "teacher": totals.teacher_seconds,
        "update": after_sampling - totals.teacher_seconds,
    }
    worked = {
        "sampled": (found.sampled_tokens, seconds["rollout"] + seconds["hint"]),
        "trained": (totals.tokens, seconds["update"]),
        "teacher": (totals.teacher_tokens, seconds["teacher"]),
    }
    shares = {name: value / whole for name, value in seconds.items()}
    return {
        **{f"time/{name}": value for name, value in seconds.items()},
        **{f"time/share/{name}": share for name, share in shares.items()},
        "time/share/other": max(0.0, 1.0 - sum(shares.values())),
        **{
            f"time/tokens_per_second/{name}": tokens / taken
            for name, (tokens, taken) in worked.items()
            if tokens and taken > 0
        },
        "step_time": whole,
    }


def peak_gb(device: torch.device) -> float:
    """Return the peak memory so far, in GB: allocated on a GPU, resident in the process on a
    CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def completion_records(
    rollouts: Sequence[Rollout], batch: Batch, config: ObjectiveConfig
) -> list[dict[str, Any]]:
    """Return one record per completion of a step, in the order of the batch."""
    gate = gates(rollouts, config) * batch.opened
    return [
        {
            "prompt": rollout.prompt.text,
            "images": [str(path) for path in rollout.prompt.images],
            "hint": rollout.hint,
            "teacher_hint": rollout.teacher_hint,
            "completion": rollout.text,
            "answer": rollout.example.answer,
            "rewards": rollout.rewards,
            "advantage": batch.advantages[place].item(),
            "gate": gate[place].item(),
            "truncated": rollout.truncated,
            "from_data": rollout.sampler_logprobs is None,
        }
        for place, rollout in enumerate(rollouts)
    ]


class StepLog:
    """A log that appends records; on resume, records of steps that will be run again are dropped
    first. Lines that are not records, as a power loss or a bad disk leaves them, are dropped and
    reported; it is also reported if what the log had at the checkpoint, by ``mark``, is no longer
    in it. Only rank 0 reads and writes."""

    def __init__(self, path: Path, resume_step: int, mark: Mapping[str, Any] | None = None):
        self.path = path
        self._content = hashlib.sha256()
        self._bytes = 0
        if not is_rank0():
            return
        make_folder(path.parent)
        content = b"" if resume_step < 0 or not path.exists() else read_own(path)
        if mark is not None:
            saved = content[: mark["bytes"]]
            if hashlib.sha256(saved).hexdigest() != mark["sha256"]:
                print(f"{path} has lost or changed lines since step {resume_step} was saved")
        kept = [record for record in _records(content, path) if record["step"] <= resume_step]
        text = "".join(as_json(record) + "\n" for record in kept)
        write_durably(path, text)
        self._add(text)

    @property
    def mark(self) -> dict[str, Any]:
        """The length and sha256 of the log, for a checkpoint to remember."""
        return {"bytes": self._bytes, "sha256": self._content.hexdigest()}

    def at(self, step: int) -> list[dict[str, Any]]:
        """Return the records of a step. All ranks call."""
        return on_rank0(lambda: [r for r in read_metrics(self.path) if r["step"] == step])

    def write(self, step: int, *records: dict[str, Any]) -> None:
        if is_rank0() and records:
            text = "\n".join(as_json({"step": step, **values}) for values in records)
            append_durably(self.path, text)
            self._add(text + "\n")

    def _add(self, text: str) -> None:
        content = text.encode()
        self._content.update(content)
        self._bytes += len(content)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all complete records of a log; other lines, cut short by a kill, are left out."""
    return _records(read_own(path)) if path.exists() else []


def last_metrics(run_dir: Path) -> dict[str, Any]:
    """Return what a run's log says of its last step, in one record; {} if it says nothing."""
    records = read_metrics(run_dir / "metrics.jsonl")
    last = max((record["step"] for record in records), default=None)
    found: dict[str, Any] = {}
    for record in records:
        if record["step"] == last:
            found |= record
    return found


def _records(content: bytes, named: Path | None = None) -> list[dict[str, Any]]:
    """Return the records of a log's lines; the numbers of other lines are printed, if ``named``.

    NaN and Infinity, in logs from before they were written as null, become None.
    """
    found, bad = [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line.decode("utf-8"), parse_constant=lambda name: None)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            found.append(record)
        else:
            bad.append(number)
    if bad and named is not None:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        print(f"{named}: damaged lines are dropped: {len(bad)} of them, number {shown}")
    return found
