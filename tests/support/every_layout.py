"""One dataset in every layout whose records have fields of their own: a new layout is one line of
WRITERS, and gets all tests of `test_every_layout.py`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from kepo.data.example import LETTERS

HUB_NAME = "toy/set"
"""The name of the dataset on the Hub, which is only in the cache of ``datasets``."""
Writer = Callable[[Path, list[dict]], Path]


def plain(number: int, **changes) -> dict:
    """A good record in neutral words; None leaves a field out."""
    fields = {
        "question_id": f"q{number}",
        "question": f"What is {number}?",
        "options": ["Lung", "Heart", "Liver"],
        "answer": "Heart",
        "image": "Images/x.png",
        "modality": "CT",
        "question_type": "Anatomy",
    }
    return {key: value for key, value in {**fields, **changes}.items() if value is not None}


def write(layout: str, root: Path, records: list[dict]) -> Path:
    """Write the records in that layout, with their pictures under root/Images; returns what is
    loaded, with ``image_root=root``."""
    (root / "Images").mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").resize((40, 30)).save(root / "Images" / "x.png")
    return WRITERS[layout](root, records)


def _json(root: Path, records: list[dict], name: str = "set/part.json") -> Path:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records))
    return file.parent


def _lines(root: Path, records: list[dict]) -> Path:
    file = root / "set" / "part.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file.parent


def _omnimedvqa(root: Path, records: list[dict]) -> Path:
    names = {"answer": "gt_answer", "image": "image_path"}
    found = []
    for record in records:
        record = {names.get(key, key): value for key, value in record.items()}
        options = record.pop("options")
        found.append(record | {f"option_{a}": o for a, o in zip(LETTERS, options, strict=False)})
    _json(root, found, "QA_information/Open-access/part.json")
    return root


def _parquet(root: Path, records: list[dict]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = root / "set" / "part.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(_even(records)), file, row_group_size=2)
    return file.parent


def _saved(root: Path, records: list[dict]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(_even(records)).save_to_disk(root / "set")
    return root / "set"


def _hub(root: Path, records: list[dict]) -> Path:
    """Leave the dataset where ``datasets`` keeps what it has fetched from the Hub."""
    datasets = pytest.importorskip("datasets")
    place = Path(datasets.config.HF_DATASETS_CACHE)
    assert "pytest" in str(place), "use the fixture offline"
    file = root / "hub.parquet"
    datasets.Dataset.from_list(_even(records)).to_parquet(str(file))
    datasets.load_dataset("parquet", data_files=str(file), cache_dir=str(root / "built"))
    (info,) = (root / "built").rglob("dataset_info.json")
    to = place / HUB_NAME.replace("/", "___") / "default" / "0.0.0" / "0123456789abcdef"
    shutil.copytree(info.parent, to)
    facts = json.loads(info.read_text()) | {"builder_name": "set", "dataset_name": "set"}
    (to / "dataset_info.json").write_text(json.dumps(facts))
    (arrow,) = to.glob("*.arrow")
    os.rename(arrow, to / "set-train.arrow")
    return Path(HUB_NAME)


def _even(records: list[dict]) -> list[dict]:
    """Give all records the same columns, as tables have them."""
    names = dict.fromkeys(name for record in records for name in record)
    return [{name: record.get(name) for name in names} for record in records]


WRITERS: dict[str, Writer] = {
    "OmniMedVQA": _omnimedvqa,
    "JSON lines": _lines,
    "JSON list": _json,
    "Parquet": _parquet,
    "datasets folder": _saved,
    "Hub dataset": _hub,
}
NEW = tuple(name for name in WRITERS if name != "OmniMedVQA")
"""Those of the common schema."""
TABLES = ("Parquet", "datasets folder", "Hub dataset")
"""Those that cannot hold half a character or a key twice."""


def offline(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep what ``datasets`` and the images' cache write below a folder, and the network away."""
    monkeypatch.setenv("KEPO_CACHE", str(folder / "kepo"))
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        return
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(folder / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
