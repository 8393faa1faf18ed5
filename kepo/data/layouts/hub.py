"""Datasets by their name on the Hub, ``owner/name``, or in the cache of ``datasets`` when offline.

``owner/name:split`` names a split, ``owner/name/config:split`` a configuration too, as in
``openai/gsm8k/main:train``.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kepo.data.layouts.arrow import dataset_table, required, rows_of
from kepo.data.network import look_for_hub
from kepo.disk.files import ends
from kepo.errors import KepoDataError

NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?::([\w.\[\]%:-]+))?", re.ASCII)


def is_name(path: Path) -> bool:
    """Return whether this is a name as the Hub has them, and no path that is there.

    Raises KepoDataError if the library that would look it up is missing.
    """
    name = str(path)
    if not NAME.fullmatch(name) or ends(name, ".json", ".jsonl", ".parquet") or path.exists():
        return False
    if importlib.util.find_spec("datasets") is None:
        raise KepoDataError(
            f"{name} is not there; to read it as the name of a dataset on the Hub: pip install "
            "'kepo[hf]'"
        )
    return True


def rows(name: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(where, record)``; ``images`` of a record is a function."""
    datasets = required("datasets", name)
    match = NAME.fullmatch(str(name))
    assert match is not None, "is_name has been asked"
    repository, config, split = match.groups()
    look_for_hub(repository)
    try:
        found = datasets.load_dataset(repository, config, split=split)
    except Exception as error:  # no network, no such dataset, no such split, a broken file
        raise KepoDataError(
            f"{name} is not there, and cannot be read as the name of a dataset on the Hub, "
            f"owner/name:split or owner/name/config:split: {type(error).__name__}: {error}"
        ) from error
    if isinstance(found, dict):
        if len(found) != 1:
            whole = repository if config is None else f"{repository}/{config}"
            raise KepoDataError(
                f"{name} holds the splits {[*found]}; give one, as in {whole}:{next(iter(found))}"
            )
        [(split, found)] = found.items()
    yield from rows_of(dataset_table(found, str(name), str(split)))


def cache(name: Path) -> Path:
    """Return the folder below which ``datasets`` keeps what it fetches, pictures among it."""
    return Path(required("datasets", name).config.HF_CACHE_HOME).expanduser()
