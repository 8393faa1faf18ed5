"""Readable training of vision-language models with KEPO: GRPO, gated distillation, hints.

import kepo
kepo.train(kepo.load("recipe.yaml", "dr_grpo"))
"""

import sys
from typing import TYPE_CHECKING

if sys.version_info < (3, 11):  # pip installs the package there, for kepo_kernels
    _WORDS = (
        "kepo, the training loop, needs Python 3.11 or newer, and this is "
        f"{sys.version.split()[0]}; use a newer one (kepo_kernels, the losses, run on 3.10 too)"
    )
    # So it is while `python -m kepo` looks for the module; or this is the installed command.
    if sys.argv[:1] == ["-m"] or sys.argv[0].endswith(("/kepo", "\\kepo.exe")):
        sys.exit(f"error: {_WORDS}")
    raise ImportError(_WORDS)

if TYPE_CHECKING:
    from kepo.config import Config as Config
    from kepo.config import load as load
    from kepo.data.example import Example as Example
    from kepo.evaluation.report import evaluate as evaluate
    from kepo.evaluation.scores import Scores as Scores
    from kepo.loop import Result as Result
    from kepo.loop import train as train
    from kepo.rollout.types import Rollout as Rollout
    from kepo.tasks.task import Task as Task

_HOME = {
    "Config": "kepo.config",
    "load": "kepo.config",
    "Example": "kepo.data.example",
    "evaluate": "kepo.evaluation.report",
    "Scores": "kepo.evaluation.scores",
    "train": "kepo.loop",
    "Result": "kepo.loop",
    "Rollout": "kepo.rollout.types",
    "Task": "kepo.tasks.task",
}


def __getattr__(name: str) -> object:
    """Import a public name on first access, so that `kepo --help` does not need torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'kepo' has no attribute {name!r}")
    from importlib import import_module

    from kepo.errors import packages_named

    with packages_named(f"kepo.{name}"):
        return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
