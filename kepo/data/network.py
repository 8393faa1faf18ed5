"""Whether the Hub can be reached, found out in seconds: its library alone tries for half a minute,
once for each file."""

from __future__ import annotations

import contextlib
import re
import threading
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
"""A pattern for ``name`` or ``owner/name``."""
WAIT = 5.0
"""The seconds in which the Hub must answer."""
_ours = threading.Event()
"""Set while the library is offline because of us, and not as the user has set it."""


def look_for_hub(name: str | Path) -> None:
    """Ask the Hub whether it is there, unless ``name`` is a path or no name that it could have. If
    it does not answer, let its library, and so transformers and datasets, read from their caches
    alone, until it answers again."""
    if Path(name).exists() or not HUB_NAME.fullmatch(str(name)):
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not _ours.is_set():
        return
    constants.HF_HUB_OFFLINE = False  # else it would not ask
    if answers():
        _ours.clear()
    else:
        _ours.set()
        constants.HF_HUB_OFFLINE = True


def answers() -> bool:
    """Return whether the Hub answers within WAIT, to look up its name included."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    said: list[object] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # of whatever its client is
            said.append(get_session().head(constants.ENDPOINT, timeout=WAIT))

    thread = threading.Thread(target=ask, daemon=True, name="look for the Hub")
    thread.start()
    thread.join(WAIT)
    return bool(said)
