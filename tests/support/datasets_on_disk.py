"""Small datasets on disk: in OmniMedVQA's layout, and Med-R1's split files."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image


def record(**changes) -> dict:
    fields = {
        "dataset": "toy",
        "question_id": "q0",
        "question_type": "Diagnosis",
        "question": "What is {this}?",
        "gt_answer": "A cyst.",
        "image_path": "Images/x.png",
        "option_A": "Nothing",
        "option_B": "a  CYST",
        "option_C": "A tumour",
        "modality_type": "CT",
    }
    return {key: value for key, value in {**fields, **changes}.items() if value is not None}


def dataset(root: Path, *records: dict, name: str = "a.json") -> Path:
    (root / "Images").mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 4), 77).save(root / "Images" / "x.png")
    file = root / "QA_information" / "Open-access" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(records)))
    return root


ROW = {
    "image": "Images/x.png",
    "problem": "What is it? A)CT, B)X-ray",
    "solution": "<answer> B </answer>",
}


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (6, 4), grey).save(buffer, "PNG")
    return buffer.getvalue()


def split_file(root, name, *rows):
    (root / "Images").mkdir(parents=True, exist_ok=True)
    (root / "Images" / "x.png").write_bytes(png(77))
    file = root / "Splits" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(rows)))
    return file
