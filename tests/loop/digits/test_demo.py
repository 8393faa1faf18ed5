"""The demonstration, a few steps long: it ends with its table, is kept, and is not mixed up."""

import json
from dataclasses import replace

import pytest

from kepo.digits.dataset import MODALITIES
from kepo.digits.demo import SOURCE, Demo, run
from kepo.errors import KepoConfigError
from kepo.miniature.stages import cached, known_teacher
from kepo.run import milestones

SMALL = Demo(
    train_questions=8,
    test_questions=1,
    teacher_steps=1,
    warmup_steps=1,
    supervised_batch=4,
    steps=1,
)


def test_demo_from_nothing_to_table_and_again(tmp_path, capsys, monkeypatch, draw_curves):
    monkeypatch.setattr(milestones, "plot_curves", draw_curves)
    demo = replace(SMALL, root=str(tmp_path))
    assert run(demo) == 0
    first = capsys.readouterr().out
    assert f"{SOURCE}  (trained on)" in first and "mean of the seven unseen" in first
    table = json.loads((tmp_path / "accuracy.json").read_text())
    assert all(set(table[column]) == set(MODALITIES) for column in ("before", "after", "teacher"))
    assert (tmp_path / "curves.png").exists()

    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert run(demo) == 0  # everything is there: nothing is made, the table is printed again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == made
    assert first.partition("greedy")[2].partition("curves")[0] in capsys.readouterr().out

    with pytest.raises(KepoConfigError, match=r"teacher was made with .*'teacher_steps': 1"):
        run(replace(demo, teacher_steps=2))


@pytest.mark.parametrize(
    "settings",
    [
        *({"steps": x} for x in (-1, 0)),
        *({"lr": x} for x in (float("nan"), 0.0, 1e300)),
        *({"supervised_lr": x} for x in (float("inf"), -1.0)),
        *({"hint_fraction": x} for x in (float("nan"), 1.5)),
        *({name: 0} for name in ("train_questions", "test_questions", "teacher_steps")),
        *({name: 0} for name in ("warmup_steps", "supervised_batch")),
        {"seed": -1},
    ],
    ids=str,
)
def test_settings_are_refused_before_the_first_stage(tmp_path, settings):
    (name,) = settings
    with pytest.raises(KepoConfigError, match=f"{name.removeprefix('supervised_l')}="):
        run(replace(SMALL, root=str(tmp_path / "new"), **settings))
    assert not (tmp_path / "new").exists()


def test_what_is_in_the_way_of_the_table_is_said_before_the_first_stage(tmp_path):
    (tmp_path / "accuracy.json").mkdir()
    with pytest.raises(OSError, match=r"accuracy\.json: it is a folder"):
        run(replace(SMALL, root=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["accuracy.json"]


def test_a_stage_that_fails_leaves_nothing_and_a_damaged_one_is_made_again(tmp_path, capsys):
    def broken(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    def whole(folder):
        (folder / "file").write_text("right")

    target = tmp_path / "stage"
    with pytest.raises(RuntimeError, match="no"):
        cached(target, {}, broken)
    assert list(tmp_path.iterdir()) == []
    cached(target, {}, whole)
    (target / "file").write_text("wrong")
    cached(target, {}, whole)
    assert (target / "file").read_text() == "right"
    assert "is damaged" in capsys.readouterr().out


def test_a_folder_that_was_not_made_here_is_not_replaced(tmp_path):
    """As of `--root .` beside a user's own folder named data."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("years of work")
    with pytest.raises(KepoConfigError, match=r"data is in the way: it has no made_with.json"):
        cached(tmp_path / "data", {}, lambda folder: None)
    assert (tmp_path / "data" / "mine").read_text() == "years of work"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"after": {"CT": 1.0}}', '{"after": 1}'])
def test_a_torn_table_is_made_again(tmp_path, content):
    (tmp_path / "accuracy.json").write_text(content)
    assert known_teacher(tmp_path / "accuracy.json", {"CT": 1.0}) is None


def test_a_whole_table_is_used_for_its_run_alone(tmp_path):
    table = tmp_path / "accuracy.json"
    assert known_teacher(table, {"CT": 1.0}) is None
    table.write_text('{"after": {"CT": 1.0}, "teacher": {"CT": 0.5}}')
    assert known_teacher(table, {"CT": 1.0}) == {"CT": 0.5}
    assert known_teacher(table, {"CT": 0.9}) is None
