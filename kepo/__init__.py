"""Readable training of vision-language models with KEPO: GRPO, gated distillation, hints."""

import sys

if sys.version_info < (3, 11):  # pip installs the package there, for kepo_kernels
    _WORDS = (
        "kepo, the training loop, needs Python 3.11 or newer, and this is "
        f"{sys.version.split()[0]}; use a newer one (kepo_kernels, the losses, run on 3.10 too)"
    )
    if sys.argv[:1] == ["-m"]:  # so it is while `python -m kepo.train` looks for the module
        sys.exit(f"error: {_WORDS}")
    raise ImportError(_WORDS)
