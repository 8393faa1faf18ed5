"""Where things are."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]

_IGNORED = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
IGNORED = {line.rstrip("/") for line in _IGNORED if line.endswith("/")}
"""The folders that git ignores, such as runs/, which is there once something was trained."""
