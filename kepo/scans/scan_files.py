"""Write the miniature's pictures and questions in OmniMedVQA's layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from kepo.data.example import LETTERS
from kepo.scans.brain import read_brain
from kepo.scans.crops import cut, drawn
from kepo.scans.scan_questions import BRIGHTNESS, KINDS, MODALITIES, Places, kinds_in


def write_scans(root: str | Path, counts: dict[str, int], seed: int = 0) -> None:
    """Write ``root/SPLIT`` for each split in ``counts``, each a dataset for ``load_omnimedvqa``.

    counts: questions **per modality** by split, "train", "validation" or "test". No voxel is shown
    by two splits. The same arguments give the same files. Each record also holds ``rationale``,
    such as "T1, bright mark = white matter". Raises as `read_brain` does.
    """
    brain = read_brain()
    shown = {contrast: brain.shown(contrast) for contrast in BRIGHTNESS}
    for place, (split, count) in enumerate(counts.items()):
        places = Places(brain, split)
        for index, modality in enumerate(MODALITIES):
            # One generator per file: more questions in one file do not change another.
            rng = np.random.default_rng((seed, place, index))
            _write_modality(Path(root) / split, modality, count, places, shown, rng)


def _write_modality(
    root: Path,
    modality: str,
    count: int,
    places: Places,
    shown: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> None:
    contrast, plane = MODALITIES[modality]
    slug = modality.replace(" ", "_").replace("(", "").replace(")", "")
    images = Path("Images") / "scans" / slug
    (root / images).mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        kinds = kinds_in(plane)
        asked = KINDS[kinds[number % len(kinds)]](places, contrast, plane, rng)
        name = f"{number:05d}.png"
        drawn(cut(shown[contrast], plane, asked.middle), asked.marked).save(root / images / name)
        answer = asked.options[asked.right]
        records.append(
            {
                "dataset": "scans",
                "question_id": f"scans_{slug}_{number:05d}",
                "question_type": asked.kind,
                "question": asked.text,
                "gt_answer": answer,
                "image_path": (images / name).as_posix(),
                **{
                    f"option_{letter}": o for letter, o in zip(LETTERS, asked.options, strict=False)
                },
                "modality_type": modality,
                "rationale": f"{asked.because} = {answer}",
            }
        )
    target = root / "QA_information" / "scans" / f"{slug}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(records, indent=1), encoding="utf-8")
