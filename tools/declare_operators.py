"""Lets PyPI's torchvision import beside torch's build for CPUs, in the environment that runs this.

    .venv/vllm/bin/python tools/declare_operators.py

PyPI has torchvision for CUDA alone. Beside torch's build for CPUs its library does not load, and
the whole package fails to import, because it registers shapes of two operators of that library by
name. vLLM imports it to resize pictures, which those operators have no part in: here they are
declared, without code, in the installed file that registers them. Where torchvision imports,
nothing is done.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

DECLARED = """
for _operator in ("nms", "qnms"):  # declared by tools/declare_operators.py; they have no code here
    torch.library.define(
        f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
"""
AFTER = "import torchvision.extension  # noqa: F401\n"


def imports() -> bool:
    """Tell whether a fresh process can import torchvision."""
    return subprocess.run([sys.executable, "-c", "import torchvision"]).returncode == 0


def main() -> int:
    if imports():
        return 0
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        print("torchvision is not installed here")
        return 1
    file = Path(found.origin).with_name("_meta_registrations.py")
    text = file.read_text(encoding="utf-8")
    if AFTER not in text or DECLARED in text:
        print(f"{file} is not as torchvision 0.28 has it; expected the line {AFTER!r}")
        return 1
    file.write_text(text.replace(AFTER, AFTER + DECLARED), encoding="utf-8")
    return 0 if imports() else 1


if __name__ == "__main__":
    sys.exit(main())
