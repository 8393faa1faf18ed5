"""Fork safety: children of a process that has computed these losses compute with one thread.

The threads of torch's matrix products do not survive a fork, and the first parallel operation of
the child, torch's own as well, would wait for them for ever. One thread waits for nobody. Processes
that want more are to be spawned. What forked before it called a loss is left alone.
"""

import os

import torch

_threads_used = False


def in_use() -> None:
    """Record that torch computes in this process, with as many threads as it has."""
    global _threads_used
    _threads_used = _threads_used or torch.get_num_threads() > 1


def _one_thread() -> None:
    if _threads_used:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread)
