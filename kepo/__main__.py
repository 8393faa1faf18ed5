"""The `kepo` command: ``kepo train`` and its other subcommands.

kepo train recipe.yaml --lr 2e-6                        # or python -m kepo train ...
torchrun --nproc-per-node=8 -m kepo train recipe.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from kepo.errors import command, packages_named
from kepo.flags import refuse
from kepo.words import guesses

COMMANDS = {
    "train": ("kepo.loop", "train a model with a recipe, a preset, flags"),
    "evaluate": ("kepo.evaluation.report", "measure a saved model on a dataset"),
    "plan": ("kepo.planner.plan", "tell the GPU memory that a run takes, without a GPU"),
    "export": ("kepo.export", "write what a run has trained as a plain model, adapters merged"),
    "report": ("kepo.report.command", "write an HTML page about a run, or about several"),
    "data": ("kepo.rollout.check_command", "check the datasets on disk: kepo data check PATH"),
    "demo": (
        "kepo.demonstrations",
        "train a tiny model on scanned digits, or --scans: on a brain",
    ),
}
HELP = ("-h", "--help", "help")
USAGE = f"usage: kepo {{{','.join(COMMANDS)}}} ... | --version (each has --help)"


@command
def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the command named by the first argument with the remaining ones. None means the process's
    own arguments.

    Returns the exit code. A wrong command line ends the process with code 2, and a KepoError or
    OSError with code 1; both print one sentence.
    """
    name, *others = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in HELP and others:
        name, others = others[0], ["--help", *others[1:]]
    if name in HELP:
        print(f"{USAGE}\n")
        for known, (_, does) in COMMANDS.items():
            print(f"  kepo {known:10}{does}")
        return 0
    if name == "--version":
        print(f"kepo {import_module('kepo_kernels').__version__}")
        return 0
    if name not in COMMANDS:
        refuse(f"kepo has no command {name!r}; {guesses(name, COMMANDS)} (kepo --help lists all)")
    with packages_named(f"kepo {name}"):
        return import_module(COMMANDS[name][0]).main(others)


if __name__ == "__main__":
    sys.exit(main())
