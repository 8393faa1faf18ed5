"""The smallest run that has every part: its settings, and rewards that an untrained model earns."""

import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kepo.config import Config, from_mapping, load
from kepo.loop import train
from kepo.tasks.multiple_choice import MultipleChoice


def config_of(made: Path, run_dir: Path, *layers: str, **settings: object) -> Config:
    """The layers, over which come the models and data in ``made``, small sizes and ``settings``."""
    base = load(*layers)
    small = dict(
        student=str(made / "student"),
        teacher=str(made / "teacher")
        if base.hint_trigger != "never" or base.distill_coef
        else None,
        train_data=str(made / "data" / "train"),
        train_modalities=("scanned",),
        run_dir=str(run_dir),
        device="cpu",
        prompts_per_step=2,
        num_generations=4,
        micro_batch=3,
        max_completion_length=8,
        overlong_buffer=min(8, base.overlong_buffer),
        lr=1e-3,
        save_every=1,
    )
    return replace(base, **{**small, **settings})


@contextmanager
def rigged():
    """An untrained model neither answers nor writes hints: one text in four is right, one in three
    no hint.

    One thread, so that the bits are the same in whichever process.
    """
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MultipleChoice,
            "is_right",
            lambda task, text, example: zlib.crc32(text.encode()) % 4 == 1,
        )
        patch.setattr(
            MultipleChoice,
            "hint_of",
            lambda task, text: text[:9] or None if zlib.crc32(text.encode()) % 3 else None,
        )
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


def run_rigged(settings: dict) -> int:
    """Train with a recorded config; returns the exit code."""
    with rigged():
        return train(from_mapping(settings, "record")).exit_code
