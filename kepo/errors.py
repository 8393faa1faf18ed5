"""The errors of the training loop, and the wrapper that ends a command with one sentence.

Each error is also a built-in one, so callers may catch either.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from kepo.terminal import any_terminal

P = ParamSpec("P")
T = TypeVar("T")


class KepoError(Exception):
    """Base class of every error that ``kepo`` raises on purpose."""


class KepoConfigError(KepoError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class KepoDataError(KepoError, ValueError):
    """A dataset on disk, or a record of it, is not what the loader needs."""


class KepoCheckpointError(KepoError, RuntimeError):
    """A model or training state on disk is missing, incomplete or of another kind."""


class KepoRewardError(KepoError, RuntimeError):
    """A reward function failed or returned something that is not a finite number."""


class KepoTeacherError(KepoError, RuntimeError):
    """A teacher that another process serves does not answer, or answers what cannot be right."""


class KepoPackageError(KepoError, ImportError):
    """A package that one of kepo's extras installs is missing."""


EXTRAS = {
    "train": {
        **{name: name for name in ("transformers", "tokenizers", "numpy", "safetensors")},
        **{"PIL": "pillow", "yaml": "pyyaml", "tqdm": "tqdm"},
        "matplotlib": "matplotlib",
    },
    "demo": {"sklearn": "scikit-learn"},
    "scans": {"nilearn": "nilearn"},
    "lora": {"peft": "peft"},
    "quant": {"bitsandbytes": "bitsandbytes", "accelerate": "accelerate"},
    "vllm": {"vllm": "vllm"},
    "hf": {"datasets": "datasets", "pyarrow": "pyarrow"},
    "report": {"jinja2": "jinja2", "plotly": "plotly"},
}
"""The packages of each extra in pyproject.toml that kepo imports: by the name that is imported, the
name that is installed."""


@contextlib.contextmanager
def packages_named(name: str) -> Iterator[None]:
    """Turn the error about a missing package that an extra installs into a KepoPackageError, one
    sentence. Other errors of imports, such as those of our own modules, pass unchanged.

    name: what needs the package, for the sentence.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        for extra, packages in EXTRAS.items():
            if package := packages.get(error.name or ""):
                raise KepoPackageError(
                    f"{name} needs {package}: pip install 'kepo[{extra}]'"
                ) from error
        raise


REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of your quota and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or use another file system",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "change its permissions, or choose another path",
    errno.EPERM: "change its permissions, or choose another path",
    errno.EEXIST: "a file is where a folder should be, or the reverse: move it, or choose another",
    errno.ENOTDIR: "a file is where a folder should be: move it, or choose another path",
    errno.EISDIR: "a folder is where a file should be: move it, or choose another path",
    errno.EIO: "its disk may be failing: restore or remove the file, or use another disk",
    errno.ESTALE: "the network file system lost it: mount it again",
    errno.ENOENT: "check the path; folders above a file that is written must be there",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
"""Advice for each error number that the operating system reports for a file."""


def disk_sentence(error: OSError) -> str:
    """Return one sentence that says what failed, where, and what to do about it."""
    if error.errno is None:  # a library's own text
        return str(error)
    names = [_shown(name) for name in (error.filename, error.filename2) if name is not None]
    where = " -> ".join(names) or "a file"
    remedy = REMEDIES.get(error.errno)
    said = error.strerror or os.strerror(error.errno)
    return f"{where} cannot be read or written: {said}{f'; {remedy}' if remedy else ''}"


def first_line(error: BaseException) -> str:
    """Return what an error says first, cut if it is long; its code may not even be able to say."""
    try:
        line = next(iter(str(error).strip().splitlines()), "no reason given")
    except Exception:
        return "no reason given"
    return line if len(line) <= 500 else f"{line[:450]} ... {line[-40:]}"


def line_of(error: BaseException) -> str:
    """Return the file and line in which an error was raised, by the file's own name."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}" if frames else ""


def _shown(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)


def command(main: Callable[P, T]) -> Callable[P, T]:
    """Wrap a command so that it prints on any terminal or none, and so that a KepoError, a
    KepoInputError of the kernels or an OSError ends the process with code 1 and one sentence, and
    Ctrl-C with code 130."""

    @functools.wraps(main)
    def ended(*arguments: P.args, **named: P.kwargs) -> T:
        any_terminal()
        try:
            try:
                return main(*arguments, **named)
            finally:
                sys.stdout.flush()  # else nobody would notice a full disk
        except KepoError as error:
            sys.exit(f"error: {error}")
        except ValueError as error:
            if not _is_of_kernels(error):
                raise
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        except OSError as error:
            _forget_output()
            # A reader such as `| head` has stopped reading: not worth a message.
            unread = isinstance(error, BrokenPipeError) and error.filename is None
            sys.exit(1 if unread else f"error: {disk_sentence(error)}")

    return ended


def _is_of_kernels(error: Exception) -> bool:
    """Return whether the error is kepo_kernels' KepoInputError. False if kepo_kernels has not been
    imported (importing it needs torch)."""
    kernels = sys.modules.get("kepo_kernels.errors")
    return kernels is not None and isinstance(error, kernels.KepoInputError)


def _forget_output() -> None:
    """Discard printed output that cannot be written, so that Python does not try again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
