"""Forty records in OmniMedVQA's layout: the quirks of the real files, and what can go wrong."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

GOOD = 30
PROBLEMS = {
    "field": 1,
    "options": 1,
    "answer": 1,
    "duplicate id": 2,
    "image outside": 2,
    "image missing": 1,
    "image unreadable": 2,
}
QUIRKS = {
    "modality in place of modality_type": 1,
    "no option_C": 4,
    "no option_D": 10,
    "answer spelt otherwise than its option": 3,
}
"""Of records that parse, wherever their image is."""
MODALITIES = ("CT(Computed Tomography)", "MR (Mag-netic Resonance Imaging)", "X-Ray")
TYPES = ("Anatomy Identification", "Disease Diagnosis")


def write_quirks(root: Path) -> Path:
    """Write the dataset; returns its root. Three files, 40 records, two questions an image."""
    records = [_record(root, number) for number in range(40)]
    _change(records)
    folder = root / "QA_information"
    for name, part in (
        ("Open-access/Chest CT Scan", records[:15]),
        ("Open-access/MIAS", records[15:30]),
        ("Restricted-access/Other", records[30:]),
    ):
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        # A byte-order mark, as some editors leave it.
        file.write_text(json.dumps(part), encoding="utf-8-sig" if "MIAS" in name else "utf-8")
    (root / "Images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, cut short")
    whole = (root / "Images" / "0.png").read_bytes()
    (root / "Images" / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (4, 4)).save(root.parent / "outside.png")
    return root


def _record(root: Path, number: int) -> dict[str, str]:
    image = root / "Images" / f"{number // 2}.png"
    if not image.exists():
        image.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(image)
    options = ["Lung", "Heart", "Liver", "Brain"]
    return {
        "dataset": "quirks",
        "question_id": f"quirks_{number:02}",
        "question_type": TYPES[number % 2],
        "question": "What does this image show?",
        "gt_answer": options[number % 2],
        "image_path": f"Images/{number // 2}.png",
        **dict(zip(("option_A", "option_B", "option_C", "option_D"), options, strict=True)),
        "modality_type": MODALITIES[number % 3],
    }


def _change(records: list[dict[str, str]]) -> None:
    records[0]["modality"] = records[0].pop("modality_type")
    for number in range(1, 11):  # ten records without D, of which four lack C too
        del records[number]["option_D"]
        if number <= 4:
            del records[number]["option_C"]
    records[11]["gt_answer"] = "heart."
    records[12]["gt_answer"] = " LUNG "
    records[13]["gt_answer"] = "Heart."
    bad = iter(range(20, 40, 2))
    records[next(bad)].pop("question_type")
    records[next(bad)].pop("option_B")
    records[next(bad)]["option_C"] = "lung"  # equals the answer, as option_A does
    records[next(bad)]["question_id"] = "quirks_28"  # and so both are left out
    records[next(bad)]["question"] = "What is shown?"
    records[next(bad)]["image_path"] = "Images/../../outside.png"
    records[next(bad)]["image_path"] = "/etc/hostname"
    records[next(bad)]["image_path"] = "Images/nowhere.png"
    records[next(bad)]["image_path"] = "Images/broken.png"
    records[next(bad)]["image_path"] = "Images/half.png"


def write_good(root: Path, target: Path) -> Path:
    """Copy the dataset without its bad records: what is changed in it is what must be found."""
    shutil.copytree(root, target)
    good = {f"quirks_{n:02}" for n in range(1, 40) if n < 20 or n % 2}
    for file in (target / "QA_information").rglob("*.json"):
        records = json.loads(file.read_text(encoding="utf-8-sig"))
        file.write_text(json.dumps([r for r in records if r["question_id"] in good]))
    return target


def first_file(root: Path) -> Path:
    return root / "QA_information" / "Open-access" / "Chest CT Scan.json"


def plant(root: Path, place: int, **changes: str) -> None:
    """Change fields of one record of the first file, which must hold good records."""
    records = json.loads(first_file(root).read_text())
    records[place] |= changes
    first_file(root).write_text(json.dumps(records))


assert Counter(PROBLEMS).total() == 40 - GOOD
