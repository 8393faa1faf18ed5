"""The medical miniature: its brain, its questions, and splits that share nothing."""

import csv
import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from places import ROOT

pytest.importorskip("nilearn")
pytest.importorskip("transformers")

from kepo.__main__ import main
from kepo.data.images import looks_of
from kepo.data.load import load_omnimedvqa
from kepo.evaluation.statistics import students_t
from kepo.miniature.tiny_models import texts_about
from kepo.miniature.warm_up import TASK, worked_hint
from kepo.scans.brain import SIMULATED, TISSUES, read_brain, spin_echo
from kepo.scans.crops import BANDS, COLUMN, CROP, PLANES, ROW, cut, spans
from kepo.scans.scan_files import write_scans
from kepo.scans.scan_questions import (
    BRIGHTNESS,
    KINDS,
    MODALITIES,
    SEEN,
    SOURCE,
    WITH_EDGE,
    Places,
    kinds_in,
    runs,
)
from kepo.scans.study import Scans, build, by_cell, of_modality, run, unseen

COUNTS = {"train": 8, "validation": 8, "test": 8}


@pytest.fixture(scope="module")
def brain():
    return read_brain()


@pytest.fixture(scope="module")
def places(brain):
    return {split: Places(brain, split) for split in BANDS}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scans")
    write_scans(root, COUNTS)
    return root


# ---- the brain


def test_the_two_sides_mirror_each_other(brain):
    for volume in (brain.t1, brain.grey, brain.white):
        assert (volume == volume[::-1]).all() and volume.any()


@pytest.mark.parametrize(
    ("contrast", "tissue", "signal"),
    [
        ("PD", "fluid", 1.0 * (1 - math.exp(-3000 / 4500)) * math.exp(-20 / 2200)),
        ("T2", "grey matter", 0.86 * (1 - math.exp(-4000 / 950)) * math.exp(-100 / 100)),
        (
            *("FLAIR", "white matter"),
            0.77 * (1 - 2 * math.exp(-2500 / 600) + math.exp(-9000 / 600)) * math.exp(-120 / 80),
        ),
    ],
)
def test_simulated_signals_are_those_of_the_spin_echo_equation(contrast, tissue, signal):
    assert spin_echo(TISSUES[tissue], SIMULATED[contrast]) == pytest.approx(signal)


@pytest.mark.parametrize("contrast", BRIGHTNESS)
def test_pure_tissue_is_as_bright_as_the_worked_answers_say(brain, contrast):
    shown = brain.shown(contrast)
    grey = [np.median(shown[brain.share(tissue) > 230]) for tissue in TISSUES]
    ranks = [("dark", "middle", "bright")[rank] for rank in np.argsort(np.argsort(grey))]
    assert tuple(ranks) == BRIGHTNESS[contrast]
    assert max(grey) - min(grey) > 130 and not shown[~brain.inside].any()


# ---- where pieces lie


def shown_by(band: range) -> tuple[int, int]:
    """The first and the last place, from back to front, that a piece of the band may show."""
    seen = set()
    for plane in PLANES:
        for y in (band.start, band.stop - 1):
            along = spans(plane, (80, y, 90)).get(1, slice(y, y + 1))
            seen |= {along.start, along.stop - 1}
    return min(seen), max(seen)


def test_no_two_splits_share_a_voxel():
    of_split = {band: split for split, bands in BANDS.items() for band in bands}
    assert len(of_split) == sum(map(len, BANDS.values())) and {*of_split.values()} == {*BANDS}
    for behind, before in pairwise(sorted(of_split, key=lambda band: band.start)):
        assert of_split[behind] != of_split[before], "they lie between each other"
        assert before.start - behind.stop >= CROP, "the guard band"
        assert shown_by(behind)[1] < shown_by(before)[0], f"{behind} and {before}"


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_a_piece_shows_its_place_where_the_frame_is(brain, plane):
    middle = (80, 110, 90)
    marked = np.zeros(brain.t1.shape, np.uint8)
    marked[middle] = 1
    assert np.argwhere(cut(marked, plane, middle)).tolist() == [[ROW, COLUMN]]
    assert all(span.stop - span.start == CROP for span in spans(plane, middle).values())


def test_up_is_up_and_right_is_right(brain):
    height = np.broadcast_to(np.arange(brain.t1.shape[2]), brain.t1.shape)
    piece = cut(height, "coronal", (80, 110, 90))
    assert (np.diff(piece, axis=0) == -1).all()
    across = np.broadcast_to(np.arange(brain.t1.shape[0])[:, None, None], brain.t1.shape)
    assert (np.diff(cut(across, "axial", (80, 110, 90)), axis=1) == 1).all()


@pytest.mark.parametrize("split", BANDS)
def test_answers_are_true_of_the_place(brain, places, split):
    rng = np.random.default_rng(0)
    shares = np.stack([brain.share(tissue) for tissue in TISSUES])
    for contrast, plane in MODALITIES.values():
        for kind in kinds_in(plane):
            for _ in range(4):
                asked = KINDS[kind](places[split], contrast, plane, rng)
                x, y, z = asked.middle
                assert any(y in band for band in BANDS[split])
                shown = cut(brain.inside, plane, asked.middle).mean()
                assert SEEN <= shown <= (1.0 if kind == "Tissue" else WITH_EDGE)
                if kind == "Tissue":
                    assert shares[:, x, y, z].argmax() == asked.right
                elif kind == "Plane":
                    assert asked.options[asked.right] == plane
                    assert runs(cut(brain.inside, plane, asked.middle)) == plane
                elif kind == "Side":
                    assert asked.right == (x > 98)
                else:
                    assert asked.right == (z < 80)


def test_outlines_run_upright_level_or_slanting():
    brain = np.zeros((CROP, CROP), bool)
    brain[:, CROP // 3 :] = True
    assert runs(brain) == runs(brain[:, ::-1]) == "axial"
    assert runs(brain.T) == runs(brain.T[::-1]) == "sagittal"
    assert runs(np.tri(CROP, dtype=bool)) == runs(np.tri(CROP, dtype=bool)[::-1]) == "coronal"


# ---- the files


def test_the_loader_reads_what_the_check_finds_nothing_wrong_with(data, capsys):
    code = main(["data", "check", str(data / "train"), "--against", str(data / "test")])
    out = capsys.readouterr().out
    assert code == 0 and "nothing is wrong" in out and "pictures that come out" not in out
    assert "0 images are in both by content, 0 by path; 0 of its questions are about them" in out
    examples = load_omnimedvqa(data / "train")
    assert Counter(e.modality for e in examples) == dict.fromkeys(MODALITIES, 8)
    simulated = [name for name, (contrast, _) in MODALITIES.items() if contrast != "T1"]
    assert all("(simulated)" in name for name in simulated) and len(simulated) == 3
    assert all(Image.open(e.images[0]).size == (96, 96) for e in examples)


def test_the_same_seed_gives_the_same_pictures_and_the_check_reports_them(data, tmp_path, capsys):
    write_scans(tmp_path, {"train": 8})
    seen = [
        {look.digest for look in looks_of((root / "train").rglob("*.png")).values()}
        for root in (data, tmp_path)
    ]
    assert seen[0] == seen[1] and len(seen[0]) == 48
    assert main(["data", "check", str(data / "train"), "--against", str(tmp_path / "train")]) == 1
    assert "48 images are in both by content" in capsys.readouterr().out


def test_hints_name_no_option_and_every_word_is_known(data, tmp_path):
    examples = load_omnimedvqa(data / "train")
    for example in examples:
        assert not TASK.gives_away(worked_hint(example), example), example.rationale
    build(tmp_path, data, "student", seed=0)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    said = [tokenizer(TASK.worked_answer(example)).input_ids for example in examples]
    assert max(map(len, said)) <= 24
    assert texts_about(examples[:1])[2] == examples[0].rationale


# ---- the whole


def test_means_count_modalities_and_types_alike(data):
    asked = load_omnimedvqa(data / "test")
    items = {name: [1.0] * 8 for name in MODALITIES}
    items["T1 coronal"] = [0.0] * 8
    column = by_cell(asked, items)
    assert len(column) == 23 and of_modality(column, SOURCE) == 1
    assert unseen(column) == pytest.approx(4 / 5)


@pytest.mark.slow
def test_study_from_nothing_to_table(tmp_path, capsys):
    tiny = dict(train_questions=8, test_questions=4, teacher_steps=1, warmup_steps=1, steps=1)
    study = Scans(root=str(tmp_path), supervised_batch=4, **tiny)
    assert run(study) == 0
    out = capsys.readouterr().out
    assert f"{SOURCE}  (trained on)" in out and "mean of the five unseen" in out
    assert "simulated; one average brain" in out
    table = json.loads((tmp_path / "accuracy.json").read_text())
    assert set(table) == {"before", "after", "teacher"} and len(table["after"]) == 23


def test_the_settings_are_those_of_the_pilot_that_gained_most():
    with (ROOT / "benchmarks/results/scans_pilots_2026-11-28.csv").open(encoding="utf-8") as file:
        rows = {(row["pilot"], row["moment"]): row for row in csv.DictReader(file)}
    gain = {
        pilot: float(rows[pilot, "after"]["unseen"]) - float(rows[pilot, "before"]["unseen"])
        for pilot, _ in rows
    }
    best = max(gain, key=lambda pilot: gain[pilot])
    before, after = (rows[best, moment] for moment in ("before", "after"))
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name in ("unseen", "T1 coronal", "T1 sagittal"):
        assert f"from {float(before[name]):.3f} to {float(after[name]):.3f}" in page
    assert len(gain) == 5 and f"of pilot {best}" in page
    study = Scans()
    chosen = tuple(float(after[name]) for name in ("teacher_steps", "warmup_steps", "lr"))
    assert chosen == (study.teacher_steps, study.warmup_steps, study.lr)


def test_the_command_chooses_the_brain(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["demo", "--scans", "--help"])
    assert "one average brain" in capsys.readouterr().out


def test_the_verdict_is_a_t_interval_over_seeds(tmp_path):
    from experiments.scans import _write, draw, lines

    cells = {f"{name}: Tissue": 0.5 for name in MODALITIES}
    found = {
        seed: {"before": cells, "teacher": cells, "after": {name: 0.5 + gain for name in cells}}
        for seed, gain in ((1, 0.1), (2, 0.2), (3, 0.3))
    }
    gains = [unseen(one["after"]) - unseen(one["before"]) for one in found.values()]
    interval = students_t(gains)
    assert interval.mean == pytest.approx(0.2)
    assert interval.low == pytest.approx(0.2 - 4.303 * 0.1 / 3**0.5, abs=1e-3)
    assert lines(found, interval)[-1].endswith("not told from 0")
    assert "above 0" in lines(found, students_t([0.2, 0.2, 0.21]))[-1]
    draw(found, interval, tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (880, 396)
    _write(tmp_path / "x.csv", found)
    rows = (tmp_path / "x.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * 6 and rows[1] == "1,T1 axial,Tissue,0.5000,0.6000,0.5000"


def test_the_pages_say_what_the_test_found():
    from experiments.scans import gained, page, read, verdict

    found = read(ROOT / "benchmarks/results/scans_test.csv")
    assert list(found) == [1, 2, 3]
    assert page(found) in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert verdict(gained(found)) in (ROOT / "README.md").read_text(encoding="utf-8")
