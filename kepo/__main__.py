"""The `kepo` command: ``kepo train`` and its other subcommands.

kepo train recipe.yaml --lr 2e-6                        # or python -m kepo train ...
torchrun --nproc-per-node=8 -m kepo train recipe.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from kepo.errors import command, packages_named

COMMANDS = {
    "train": ("kepo.loop", "train a model with a recipe, a preset, flags"),
    "evaluate": ("kepo.evaluation.report", "measure a saved model on a dataset"),
    "plan": ("kepo.planner.plan", "say what a run would hold on a GPU, without one"),
    "data": ("kepo.data.check_command", "`data check`: say what is wrong with datasets on disk"),
    "demo": ("kepo.digits.demo", "train a tiny model on scanned digits, from nothing"),
}
USAGE = f"usage: kepo {{{','.join(COMMANDS)}}} ... (each has --help)"


@command
def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run the command named by the first argument with the remaining ones. None means the process's
    own arguments.

    Returns the exit code. A KepoError or OSError ends the process with one sentence and code 1.
    """
    name, *others = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(f"{USAGE}\n")
        for known, (_, does) in COMMANDS.items():
            print(f"  kepo {known:10}{does}")
        return 0
    if name not in COMMANDS:
        print(f"{USAGE}\nerror: there is no command {name!r}", file=sys.stderr)
        return 2
    with packages_named(f"kepo {name}"):
        return import_module(COMMANDS[name][0]).main(others)


if __name__ == "__main__":
    sys.exit(main())
