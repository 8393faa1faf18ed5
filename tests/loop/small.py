"""Settings of the smallest run that has every part."""

from dataclasses import replace
from pathlib import Path

from kepo.config import Config, load


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
        prompts_per_step=2,
        num_generations=4,
        micro_batch=3,
        max_completion_length=8,
        lr=1e-3,
        save_every=1,
    )
    return replace(base, **{**small, **settings})
