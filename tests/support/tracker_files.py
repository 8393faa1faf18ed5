"""What trackers have on disk, read back: TensorBoard's event file with its own reader, trackio's
SQLite store, and the log of an offline W&B run, whose records are W&B's protocol buffers."""

import io
import json
import re
import sqlite3
import struct
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from PIL import Image

TRACKERS = ("tensorboard", "wandb", "trackio")


class Told(NamedTuple):
    """What a tracker was told."""

    numbers: dict[tuple[int, str], list[float]]
    """Every value that it has of a step and key."""
    tables: dict[int, list[str]]
    """Of each step the tables, as text."""
    pictures: dict[int, list[Image.Image]]
    config: str


def told_to(name: str, run_dir: Path) -> Told:
    return {"tensorboard": _events, "wandb": _wandb, "trackio": _trackio}[name](run_dir)


def _events(run_dir: Path) -> Told:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {kind: 0 for kind in ("scalars", "images", "tensors")}
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance=everything).Reload()
    tags = events.Tags()
    numbers, tables, pictures = defaultdict(list), defaultdict(list), defaultdict(list)
    for key in tags["scalars"]:
        for event in events.Scalars(key):
            numbers[event.step, key].append(event.value)
    for event in events.Tensors("completions/text_summary"):
        tables[event.step].append(event.tensor_proto.string_val[0].decode())
    for key in tags["images"]:
        for event in events.Images(key):
            pictures[event.step].append(Image.open(io.BytesIO(event.encoded_image_string)))
    config = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    return Told(numbers, tables, pictures, config)


def _trackio(run_dir: Path) -> Told:
    import trackio.utils

    identity = (run_dir / "run_id").read_text().strip()
    store = sqlite3.connect(trackio.utils.TRACKIO_DIR / "kepo.db")
    of_run = ("WHERE run_name = ?", (f"{run_dir.name}-{identity}",))
    numbers, tables, pictures = defaultdict(list), defaultdict(list), defaultdict(list)
    for step, text in store.execute(f"SELECT step, metrics FROM metrics {of_run[0]}", of_run[1]):
        for key, value in json.loads(text).items():
            if key != "completions":
                numbers[step, key].append(value)
                continue
            assert value["_type"] == "trackio.table"
            tables[step].append(json.dumps(value["_value"]))
            files = {p["file_path"] for row in value["_value"] for p in row["pictures"]}
            pictures[step] += [Image.open(trackio.utils.MEDIA_DIR / file) for file in sorted(files)]
    [(config,)] = store.execute(f"SELECT config FROM configs {of_run[0]}", of_run[1])
    return Told(numbers, tables, pictures, config if isinstance(config, str) else config.decode())


def _wandb(run_dir: Path) -> Told:
    """Of the newest offline folder, the one to sync."""
    from wandb.proto import wandb_internal_pb2

    folder = (run_dir / "wandb" / "latest-run").resolve()
    [log] = folder.glob("*.wandb")
    numbers, tables, pictures = defaultdict(list), defaultdict(list), defaultdict(list)
    config = ""
    for content in _log_records(log.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        if record.WhichOneof("record_type") == "run":
            config = "\n".join(f"{x.key}: {x.value_json}" for x in record.run.config.update)
        if record.WhichOneof("record_type") != "history":
            continue
        values = {x.key or ".".join(x.nested_key): x.value_json for x in record.history.item}
        step = record.history.step.num
        for key, text in values.items():
            if not key.startswith(("_", "completions.", "pictures.")) and "{" not in text:
                numbers[step, key].append(json.loads(text))
        for file in re.findall(r'"(media/table/[^"]+)"', " ".join(values.values())):
            tables[step].append((folder / "files" / file).read_text())
        for file in re.findall(r'"(media/images/[^"]+)"', " ".join(values.values())):
            pictures[step].append(Image.open(folder / "files" / file))
    return Told(numbers, tables, pictures, config)


def _log_records(content: bytes, block: int = 2**15):
    """The records of a LevelDB log, which W&B begins with seven bytes of its own."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # the rest of a block, too short for a header
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""
