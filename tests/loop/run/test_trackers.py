"""Trackers have what the logs have, each once, after a kill too; the real packages, read back."""

import html
import json
import math
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest
import toy_run
from PIL import Image
from places import ROOT
from tracker_files import TRACKERS, told_to

from kepo.run import open as opening
from kepo.run.metrics import read_metrics
from kepo.run.sinks.cells import SIDE, small, table_of
from kepo.run.sinks.telling import Sinks, numbers_of, open_sinks

KILLED = """
import os, signal, sys
import toy_run
import kepo.loop
data, run_dir, *trackers = sys.argv[1:]
save = kepo.loop.save
def die(run, step):
    save(run, step) if step < 4 else os.kill(os.getpid(), signal.SIGKILL)
kepo.loop.save = die
with toy_run.toys():
    toy_run.run(toy_run.config_of(data, run_dir, save_every=2, report_to=trackers))
"""
"""Steps 1 to 4, of which the checkpoint has two and trackers may have all."""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run with every tracker there is, killed in its fourth step, resumed and done."""
    there = [name for name in TRACKERS if find_spec(name)]
    if not there:
        pytest.skip("no tracker is installed")
    root = tmp_path_factory.mktemp("trackers")
    data, run_dir = toy_run.write_dataset(root / "data"), root / "run"
    places = {"TRACKIO_DIR": str(root / "trackio"), "WANDB_DATA_DIR": str(root / "wandb")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (places | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}).items():
            patch.setenv(name, value)
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
        done = subprocess.run(
            [sys.executable, "-c", KILLED, data, run_dir, *there],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert [r["step"] for r in read_metrics(run_dir / "metrics.jsonl")][-1] == 4
        with toy_run.toys():
            config = toy_run.config_of(data, run_dir, save_every=2, report_to=there)
            ended = toy_run.run(config)
        assert ended.sentence is None and "resuming after step 2" in ended.printed, ended
        assert "told no more" not in ended.printed
    return run_dir


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_run.write_dataset(tmp_path_factory.mktemp("own") / "data")


@pytest.fixture(params=TRACKERS)
def told(request, resumed):
    pytest.importorskip(request.param)
    return told_to(request.param, resumed)


def test_every_number_of_every_step_is_there_once(told, resumed):
    expected = {
        (record["step"], key): [pytest.approx(value, rel=1e-6)]  # TensorBoard's are float32
        for record in read_metrics(resumed / "metrics.jsonl")
        for key, value in numbers_of(record).items()
    }
    assert {step for step, _ in expected} == {0, 1, 2, 3, 4, 5}
    assert (0, "eval/CT") in expected and (5, "time/tokens_per_second/sampled") in expected
    assert told.numbers == expected


def test_every_step_has_one_table_and_its_pictures(told, resumed):
    records = [json.loads(x) for x in (resumed / "completions.jsonl").read_text().splitlines()]
    assert sorted(told.tables) == sorted(told.pictures) == [1, 2, 3, 4, 5]
    for step, tables in told.tables.items():
        # TensorBoard's own reader leaves out numbers and pictures of a step that was done again,
        # but not its text, of which its pages show the last; on a CPU both are the same.
        [table] = set(tables)
        mine = [record for record in records if record["step"] == step]
        assert len(mine) == 8
        for record in mine:
            assert f"{record['advantage']}"[:8] in table
        shown = {path for record in mine for path in record["images"]}
        colours = sorted(Image.open(path).getpixel((0, 0)) for path in shown)
        assert sorted(p.convert("RGB").getpixel((0, 0)) for p in told.pictures[step]) == colours


def test_the_settings_are_there(told):
    assert re.search('student"?: ?"toy"', told.config)


def test_a_tracker_that_is_named_later_gets_what_was_before(data, tmp_path):
    pytest.importorskip("tensorboard")
    run_dir = tmp_path / "run"
    with toy_run.toys():
        toy_run.run(toy_run.config_of(data, run_dir, steps=2))
        for steps in (3, 4):  # and only once
            toy_run.run(toy_run.config_of(data, run_dir, steps=steps, report_to=["tensorboard"]))
    told = told_to("tensorboard", run_dir)
    logged = read_metrics(run_dir / "metrics.jsonl")
    assert {*told.numbers} == {(r["step"], key) for r in logged for key in numbers_of(r)}
    assert {len(values) for values in told.numbers.values()} == {1}
    assert {step: len(tables) for step, tables in told.tables.items()} == dict.fromkeys(
        [1, 2, 3, 4], 1
    )


# ---- sinks of one's own ----


class Listener:
    """A sink that keeps what it is told."""

    def __init__(self, fails_at: int = 99):
        self.fails_at = fails_at
        self.heard, self.tables, self.closed = [], [], 0

    def scalars(self, step, values):
        if step == self.fails_at:
            raise ConnectionError("the server is gone\nand with it its reasons")
        self.heard.append((step, dict(values)))

    def completions(self, step, records):
        self.tables.append((step, [dict(record) for record in records]))

    def close(self):
        self.closed += 1


def test_a_sink_that_fails_is_named_once_and_the_others_hear_all(data, tmp_path):
    bad, good = Listener(fails_at=2), Listener()
    with toy_run.toys():
        ended = toy_run.run(toy_run.config_of(data, tmp_path / "run"), sinks=[bad, good])
    assert ended.sentence is None
    [line] = [line for line in ended.printed.splitlines() if "told no more" in line]
    assert line == (
        "sinks[0] is told no more: ConnectionError: the server is gone; the run goes on, and "
        "metrics.jsonl has everything"
    )
    assert {step for step, _ in bad.heard} == {0, 1} and bad.closed == 0 and good.closed == 1
    logged = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert good.heard == [(r["step"], numbers_of(r)) for r in logged]
    assert [(step, len(rows)) for step, rows in good.tables] == [(s, 8) for s in range(1, 6)]


def test_a_resumed_run_tells_a_sink_only_what_is_new_unless_it_asks_for_more(data, tmp_path):
    run_dir = tmp_path / "run"
    with toy_run.toys():
        toy_run.run(toy_run.config_of(data, run_dir, steps=3))
        plain, asking = Listener(), Listener()
        asking.lacks_after = 1
        toy_run.run(toy_run.config_of(data, run_dir, steps=4), sinks=[plain, asking])
    assert [step for step, _ in plain.heard] == [4, 4]
    logged = read_metrics(run_dir / "metrics.jsonl")
    assert asking.heard == [(r["step"], numbers_of(r)) for r in logged if r["step"] > 1]
    assert [step for step, _ in asking.tables] == [2, 3, 4]


def test_a_sink_is_closed_when_the_run_fails(data, tmp_path):
    sink = Listener()
    with toy_run.toys(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load_policy", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toy_run.run(toy_run.config_of(data, tmp_path / "run"), sinks=[sink])
    assert sink.closed == 1


def test_only_rank_0_tells(tmp_path, monkeypatch):
    monkeypatch.setattr("kepo.distributed.processes.rank", lambda: 1)
    sink = Listener()
    config = toy_run.config_of(tmp_path, tmp_path / "run", report_to=["tensorboard"])
    with open_sinks(config, -1, [sink]) as sinks:
        sinks.scalars(1, {"reward": 1.0})
    assert sink.heard == [] and not (tmp_path / "run").exists()


# ---- what is refused ----


@pytest.fixture
def no_models(monkeypatch):
    monkeypatch.setattr(opening, "load_models", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_refused_with_what_to_install(name, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    ended = toy_run.run(toy_run.config_of(data, tmp_path / "run", report_to=[name]))
    assert ended.sentence.startswith(f"error: report_to has '{name}', whose package cannot be")
    assert "pip install 'kepo[trackers]'" in ended.sentence and not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_refused_before_a_model_loads(
    data, tmp_path, monkeypatch, no_models
):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)

    def refuse(*_, **__):
        raise PermissionError("no key:\nlog in first")

    monkeypatch.setattr(tensorboard, "SummaryWriter", refuse)
    with toy_run.toys():
        ended = toy_run.run(toy_run.config_of(data, tmp_path / "r", report_to=["tensorboard"]))
    assert ended.sentence == (
        "error: report_to: tensorboard does not start: PermissionError: no key:; mend that, or "
        "leave it out"
    )


def test_an_object_that_is_no_sink_is_refused_before_a_model_loads(data, tmp_path, no_models):
    with toy_run.toys():
        ended = toy_run.run(toy_run.config_of(data, tmp_path / "run"), sinks=[Listener(), print])
    assert ended.sentence == (
        "error: sinks[1] is a builtin_function_or_method without scalars and completions; expected "
        "an object with scalars(step, values) and completions(step, records)"
    )


# ---- what they are told ----


def test_numbers_of_a_record():
    record = {"step": 3, "eval": {"CT": 0.5, "MR": 1.0}, "eval_items": {"CT": "10"}, "skipped": 0}
    record |= {"grad_norm": None, "reward": math.nan}
    assert numbers_of(record) == {"eval/CT": 0.5, "eval/MR": 1.0, "skipped": 0}


def test_a_table_has_a_column_for_each_reward_and_each_picture_once(tmp_path):
    Image.new("RGB", (4 * SIDE, SIDE), (9, 8, 7)).save(tmp_path / "wide.png")
    wide, gone = str(tmp_path / "wide.png"), str(tmp_path / "gone.png")
    table = table_of(
        [
            {"prompt": "p", "images": [wide, gone], "rewards": {"accuracy": 1.0}},
            {"prompt": "q", "images": [wide], "rewards": {"format": 0.5}},
            {"prompt": "r", "images": [], "rewards": {}},
        ]
    )
    assert table.columns == ["prompt", "rewards/accuracy", "rewards/format"]
    assert table.rows == [["p", 1.0, None], ["q", None, 0.5], ["r", None, None]]
    assert table.shown == [[wide, gone], [wide], []] and table.most_shown == 2
    assert [*table.pictures] == [wide] and table.pictures[wide].size == (SIDE, SIDE // 4)
    assert small(gone) is None


def test_text_is_shown_as_it_is_in_tensorboard():
    pytest.importorskip("tensorboard")
    from tensorboard.plugin_util import markdown_to_safe_html

    from kepo.run.sinks.to_tensorboard import as_plain

    text = "<think>a | *b* `c`\n# <script>x</script></think> [d](e) ![f](g) _h_ &amp;"
    shown = markdown_to_safe_html(f"| a | b |\n| --- | --- |\n| {as_plain(text)} | 1 |")
    assert shown.count("<td>") == 2
    for tag in ("script", "think", "img", "a ", "em", "code", "h1"):
        assert f"<{tag}" not in shown
    cell = shown.partition("<td>")[2].partition("</td>")[0].replace("<br>", "\n")
    assert html.unescape(cell) == text


def test_weights_and_biases_is_told_no_step_twice_when_it_can_append():
    """Online it has steps up to 6 of a run whose checkpoint is of step 4."""
    pytest.importorskip("wandb")
    from kepo.run.sinks.to_wandb import WeightsAndBiases

    logged = []

    class Online:
        step = 7

        def log(self, values, step):
            logged.append((step, values))

        def finish(self): ...

    sink = WeightsAndBiases.__new__(WeightsAndBiases)
    sink.run, sink.done, sink.first, sink.lacks_after = Online(), 6, 7, 6
    with Sinks({"wandb": sink}) as sinks:
        sinks.catch_up([{"step": s, "x": s} for s in range(1, 7)], [])
        sinks.scalars(6, {"eval": {"CT": 0.5}})  # a signal had put it off
        sinks.scalars(7, {"x": 7})
        sink.done = 4
        sinks.scalars(5, {"x": 5})
        sinks.scalars(8, {"x": 8})
    assert logged == [(7, {"eval/CT": 0.5}), (7, {"x": 7}), (8, {"x": 8})]
