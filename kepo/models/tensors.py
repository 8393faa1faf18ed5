"""Checks that the weights of a model folder are all there, of the right shapes, finite, and its
own. Missing weights would otherwise be random numbers, different at every load."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kepo.errors import KepoCheckpointError
from kepo.models import weight_files

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTERS = "adapter_model.safetensors"


def check_files(path: str | Path, quantized: bool = False) -> None:
    """Raise KepoCheckpointError if a folder's safetensors are not exactly those that its index
    names, hold other tensors than it says, or cannot be weights (see `weight_files`).

    quantized: whether config.json says so; then tensors may be of any dtype. A Hub name is not
    checked: its files are not here yet.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    places = _indexed(folder)
    headers = {
        name: weight_files.header(folder / name)
        for name in (sorted(set(places.values())) if places is not None else [WHOLE])
    }
    if places is not None:
        _check_index(folder, places, headers)
    if not quantized:
        for name, header in headers.items():
            weight_files.check_weights(folder / name, header)


def _indexed(folder: Path) -> dict[str, str] | None:
    """Return every tensor's file as the index says; None where there is one file and no index."""
    whole, index = (folder / WHOLE).is_file(), folder / INDEX
    if not index.is_file():
        if not whole:
            raise _without(folder, WHOLE, f"or {INDEX} and the files it names")
        return None
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"].items())
        shards = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KepoCheckpointError(
            f"{index} cannot be read: {error!r}; expected weight_map, a file for every tensor"
        ) from error
    if whole and shards != [WHOLE]:
        raise KepoCheckpointError(
            f"{folder} has two sets of weights, {WHOLE} and {INDEX} with its {len(shards)} files; "
            "remove the one that is not the model's"
        )
    _check_shards(folder, shards)
    return places


def _check_shards(folder: Path, shards: list[str]) -> None:
    """Check that the files an index names are there, and are safetensors of the folder."""
    index = folder / INDEX
    if not shards:
        raise KepoCheckpointError(f"{index} names no file; copy the folder again")
    for name in shards:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise KepoCheckpointError(f"{index} names {name!r}; expected files of its own folder")
        if not name.endswith(".safetensors"):
            raise KepoCheckpointError(f"{index} names {name!r}; only *.safetensors are read")
    lacking = [name for name in shards if not (folder / name).is_file()]
    if lacking:
        raise KepoCheckpointError(
            f"{folder} lacks {len(lacking)} of the {len(shards)} files that {INDEX} names, first "
            f"{lacking[0]}; copy the folder again"
        )


def _check_index(folder: Path, places: dict[str, str], headers: dict[str, dict]) -> None:
    """Check that an index lists exactly the tensors in its files, each under the file it is in."""
    held: dict[str, list[str]] = {name: [] for name in places}
    for file, header in headers.items():
        for name in header:
            held.setdefault(name, []).append(file)
    wrong = sorted(name for name, files in held.items() if files != [places.get(name)])
    if wrong:
        name = wrong[0]
        said, found = places.get(name, "no file"), " and ".join(held[name]) or "no file"
        raise KepoCheckpointError(
            f"{folder}: {INDEX} and its files disagree on {len(wrong)} tensors, first {name}, "
            f"which it says is in {said} and which is in {found}; copy the folder again"
        )


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence the warning about a name of transformers that v6 drops. peft uses it, so a user could
    do nothing about the warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield


def with_saved_adapters(peft: Any, model: Any, folder: Path, **settings: Any) -> Any:
    """Return peft's wrapper around a model with the adapters that a folder holds, which are put
    into the model in place. Raises KepoCheckpointError if they are not in safetensors or do not
    fit."""
    if not (folder / ADAPTERS).is_file():
        raise _without(folder, ADAPTERS, "as peft writes it")
    try:
        with quiet_peft():
            wrapped = peft.PeftModel.from_pretrained(model, folder, **settings)
    except Exception as error:  # of broken files its readers raise anything
        said = " ".join(str(error).split())
        raise KepoCheckpointError(f"{folder}: its adapters cannot be loaded: {said}") from error
    _check_adapters(folder, wrapped)
    return wrapped


def check_loaded(path: str | Path, found: Mapping[str, Any]) -> None:
    """Raise KepoCheckpointError for what from_pretrained found amiss, its ``loading_info``: tensors
    that are missing, of another shape, or not the model's."""
    _refuse(path, "lacks", sorted(found["missing_keys"]), "of the model's tensors")
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        name, here, wanted = mismatched[0]
        raise KepoCheckpointError(
            f"{path}: {len(mismatched)} tensors have other shapes than config.json says, first "
            f"{name}: {tuple(here)}, expected {tuple(wanted)}; are its files of two models?"
        )
    _refuse(path, "has", sorted(found["unexpected_keys"]), "tensors that are not the model's")
    if found.get("error_msgs"):
        raise KepoCheckpointError(f"{path} cannot be loaded: {found['error_msgs'][0]}")


def check_values(path: str | Path, model: Any) -> None:
    """Raise KepoCheckpointError if a weight is not finite, or if the head is not the embedding
    though the config says it is. Reads every weight once."""
    named = [(n, x) for n, x in model.named_parameters() if x.is_floating_point() and x.numel()]
    broken = [name for name, x in named if not _is_finite(x)]
    if broken:
        raise KepoCheckpointError(
            f"{path}: {len(broken)} tensors have values that are not finite, first {broken[0]}; "
            "take an earlier checkpoint"
        )
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise KepoCheckpointError(
            f"{path}: config.json says tie_word_embeddings, but lm_head.weight is another matrix "
            "than the embedding; set it to false, or take lm_head.weight out"
        )


def _check_adapters(folder: Path, wrapped: Any) -> None:
    """Check that a folder's tensors are those of peft's wrapper, by name and shape, and finite."""
    from peft import get_peft_model_state_dict

    # Not the embeddings: peft looks for those on the Hub.
    wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    header = weight_files.header(folder / ADAPTERS)
    weight_files.check_weights(folder / ADAPTERS, header)
    here = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    other = [
        (name, here[name], tuple(wanted[name].shape))
        for name in here
        if name in wanted and here[name] != tuple(wanted[name].shape)
    ]
    check_loaded(
        folder,
        {
            "missing_keys": set(wanted) - set(here),
            "unexpected_keys": set(here) - set(wanted),
            "mismatched_keys": other,
        },
    )
    broken = sorted(name for name, x in wanted.items() if not _is_finite(x))
    _refuse(folder, "has", broken, "tensors with values that are not finite")


def _is_finite(values: torch.Tensor) -> bool:
    low, high = torch.aminmax(values.detach())  # NaN shows in both
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _refuse(path: str | Path, does: str, names: list[str], what: str) -> None:
    if names:
        raise KepoCheckpointError(
            f"{path} {does} {len(names)} {what}, first {names[0]}; copy the folder again, or give "
            "the one that the model was saved in"
        )


def _without(folder: Path, wanted: str, instead: str) -> KepoCheckpointError:
    pickles = _names(folder.glob("*.bin")) + _names(folder.glob("*.pt*"))
    if pickles:
        return KepoCheckpointError(
            f"{folder} has {pickles[0]} and no {wanted}; only safetensors are read, as a pickle "
            "can run code: convert it with save_pretrained where you trust it"
        )
    return KepoCheckpointError(f"{folder} has no {wanted}; expected it, {instead}")


def _names(files: Iterable[Path]) -> list[str]:
    return sorted(file.name for file in files)
