"""What the page says of a run, of two, of half a one, and of one whose texts are hostile."""

import base64
import io
import json
import re
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytest.importorskip("plotly")

import tomllib
from html_page import PAYLOAD, Page, hostile_run, rewrite
from PIL import Image
from places import ROOT, SUPPORT
from toy import example

from kepo.__main__ import main
from kepo.config import Config
from kepo.data.run_data import asked
from kepo.errors import KepoConfigError
from kepo.evaluation.statistics import wilson
from kepo.planner.memory import Setup, phases
from kepo.planner.standing import GIB, Machine
from kepo.report.collect import collect, number
from kepo.report.command import ReportFlags, write_report
from kepo.report.completions import browsed, small, spread
from kepo.report.figures import MOST_POINTS, panels
from kepo.report.page import for_script
from kepo.report.planned import memory
from kepo.run.checkpoint import latest_checkpoint, load_state
from kepo.run.metrics import read_metrics

OLD = SUPPORT / "run_of_b15bcbb" / "run"


@pytest.fixture(scope="module")
def page(page_file):
    return Page(page_file)


@pytest.fixture
def copy(ended, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(ended, tmp_path / "run")


def written(*runs, **settings):
    out = runs[0].parent / "page.html"
    return Page(write_report(runs, ReportFlags(out=str(out), **settings)))


# ---- what it says of a run ----


def test_curves_are_those_of_the_log(ended, page):
    steps = [record for record in read_metrics(ended / "metrics.jsonl") if "reward" in record]
    for title, name, key in (
        ("Reward", "reward", "reward"),
        ("Reward", "accuracy", "rewards/accuracy/mean"),
        ("Loss", "distill loss", "kepo/distill_loss"),
        ("Gate", "gate rate", "kepo/gate_rate"),
        ("Hints", "rescue rate", "kepo/rescue_rate"),
        ("Seconds of a step", "rollout", "time/rollout"),
        ("Memory", "mem/peak gb", "mem/peak_gb"),
    ):
        found = page.series(title, name)
        assert found["x"] == [1, 2, 3]
        assert found["y"] == pytest.approx([record[key] for record in steps], rel=1e-4), key
    speed = [record["kepo/completion_tokens"] / record["step_time"] for record in steps]
    assert page.series("Tokens per second", "whole step")["y"] == pytest.approx(speed, 1e-4)


def test_every_number_of_the_log_is_drawn_once(ended, page):
    keys = {key for record in read_metrics(ended / "metrics.jsonl") for key in record}
    drawn = [s["key"] for kind in ("main", "others") for p in page.data["curves"][kind]
             for s in p["series"] if p["title"] != "Accuracy"]  # fmt: skip
    assert sorted(drawn) == sorted(keys - {"step", "eval", "eval_items", "eval_types"} | {
        "whole step"
    })  # fmt: skip


def test_accuracy_has_intervals_and_chance(ended, page):
    first, *_, last = [r for r in read_metrics(ended / "metrics.jsonl") if "eval" in r]
    [by_modality, by_type] = page.data["accuracy"]
    asked = json.loads((ended / "data.json").read_text())["eval"]
    assert len(by_modality["rows"]) == 9 and by_modality["rows"][-1]["mean"]
    for row in by_modality["rows"][:-1]:
        [cell], count = row["cells"], len(last["eval_items"][row["name"]])
        for place, record in (("before", first), ("after", last)):
            right = record["eval_items"][row["name"]].count("1")
            assert cell[place] == pytest.approx([*wilson(right, count)])
        assert row["chance"] == 0.25 and row["questions"] == count
    assert [row["name"] for row in by_type["rows"][:-1]] == [*last["eval_types"]]
    for row in by_type["rows"][:-1]:
        facts = asked["question_types"][row["name"]]
        assert (row["questions"], row["chance"]) == (facts["questions"], 0.25)
        share = last["eval_types"][row["name"]]
        right = round(share * facts["questions"])
        assert row["cells"][0]["after"] == pytest.approx([*wilson(right, facts["questions"])])


def test_questions_without_options_have_no_chance():
    two, four = example("a"), example("b", options=("1", "2", "3", "4"))
    by = asked([two, four, example("c", options=(), modality="MRI")], lambda one: one.modality)
    assert by == {
        "CT": {"questions": 2, "chance": (1 / 2 + 1 / 4) / 2},
        "MRI": {"questions": 1, "chance": None},
    }


def test_mended_and_broken_questions_are_counted(copy):
    def change(record):
        if "eval" in record:
            record["eval"] = {"CT": 0.5}
            record["eval_items"] = {"CT": "0011" if record["step"] == 0 else "1101"}

    rewrite(copy / "metrics.jsonl", change)
    [row] = written(copy).data["accuracy"][0]["rows"]
    assert (row["cells"][0]["mended"], row["cells"][0]["broken"]) == (2, 1)


def test_completions_are_those_of_the_log_with_their_pictures(ended, page):
    logged = read_metrics(ended / "completions.jsonl")
    assert len(page.completions) == len(logged) == 24
    told = sorted(
        (item["text"], item["gate"], item["hint"] or "", item["right"]) for item in page.completions
    )
    assert told == sorted(
        (r["completion"], r["gate"], r["hint"] or "", r["rewards"]["accuracy"] == 1) for r in logged
    )
    assert any(item["hint"] for item in page.completions)  # so there is something to filter
    assert {item["right"] for item in page.completions} == {True, False}
    browser = page.data["browser"]
    for group in browser["groups"]:
        [image] = group["images"]
        kind, content = browser["pictures"][image["place"]].split(";base64,")
        assert kind in ("data:image/png", "data:image/jpeg")
        decoded = Image.open(io.BytesIO(base64.b64decode(content)))
        assert decoded.size == (image["width"], image["height"])
        assert image["name"].endswith(".png")
    steps = [group["step"] for group in browser["groups"]]
    assert steps == sorted(steps, reverse=True)


def test_memory_stands_beside_the_plan(ended, page):
    config = Config(**load_state(latest_checkpoint(ended / "checkpoints"))["config"])
    planned = phases(Setup(config, Machine(1, 80 * GIB, "cpu")))
    [run] = page.data["runs"]
    assert [one["name"] for one in run["memory"]["phases"]] == [one.name for one in planned]
    assert [one["total"] for one in run["memory"]["phases"]] == pytest.approx(
        [one.total / GIB for one in planned]
    )
    peak = max(r.get("mem/peak_gb", 0) for r in read_metrics(ended / "metrics.jsonl"))
    assert run["memory"]["measured"]["peak"] == pytest.approx(peak * 1e9 / GIB)


def test_a_plan_that_cannot_be_made_is_said(copy):
    shutil.rmtree(copy / "checkpoints" / "step-00000002", ignore_errors=True)
    state = copy / "checkpoints" / "step-00000003" / "state.json"
    values = json.loads(state.read_text())
    values["config"] |= {"device": "cuda", "student": str(copy / "gone")}
    state.write_text(json.dumps(values))
    [run] = collect([copy])
    assert re.match("The plan cannot be made here: .*gone", memory(run)["why"])
    values["config"] |= {"sampler": "vllm"}
    state.write_text(json.dumps(values))
    [run] = collect([copy])
    assert memory(run)["why"].startswith("vLLM takes")


def test_the_page_says_data_and_settings(ended, page):
    assert "48 questions of 48 records" not in page.words
    assert "6 questions of 48 records" in page.words
    assert "No record was left out as bad." in page.words
    assert re.search(r"num_generations 4 8", page.words)
    assert "student student, taught by teacher, trained on scanned" in page.words
    assert "What is missing" not in page.text


def test_data_left_out_is_named_with_its_reason(copy):
    values = json.loads((copy / "data.json").read_text())
    values["train"] |= {
        "bad_records": {"answer": 21, "image missing": 2},
        "first_problems": [f"a.json[{n}]: gt_answer is no option" for n in range(20)],
        "quirks": {"no option_D": 4},
    }
    values["shared"] = {"images": 3, "eval_questions": 5, "compared": "contents"}
    (copy / "data.json").write_text(json.dumps(values))
    words = written(copy).words
    assert "Left out as bad: 23" in words and "image missing 2" in words
    assert "The first 20, by name a.json[0]: gt_answer is no option" in words
    assert "no option_D: 4" in words
    assert "3 pictures are trained on and evaluated on, compared by content: 5 of" in words


def test_keys_of_an_earlier_version_are_drawn():
    [run] = collect([OLD])
    drawn = panels([run])
    [loss] = [panel for panel in drawn["main"] if panel["title"] == "Loss"]
    assert [series["name"] for series in loss["series"]] == ["policy loss", "distill loss"]
    assert [v for v in loss["series"][1]["y"]] == [0.0] * len(run.steps)
    assert all(s["key"] != "kepo/kd_loss" for kind in drawn.values() for p in kind
               for s in p["series"])  # fmt: skip
    assert run.config["sampler"] == "transformers"  # it was `engine`


def test_rates_and_shares_of_time_have_panels_of_their_own():
    [run] = collect([OLD])
    for record in run.steps:
        record |= {"time/tokens_per_second/sampled": 9.0, "time/share/update": 0.5}
    found = {panel["title"]: panel["series"] for panel in panels([run])["main"]}
    assert [s["name"] for s in found["Tokens per second"]] == ["whole step", "sampled"]
    assert [s["name"] for s in found["Shares of a step's time"]] == ["update"]
    names = ["step time", "rollout", "hint", "teacher", "update"]
    assert [s["name"] for s in found["Seconds of a step"]] == names


def test_long_curves_are_means_of_stretches():
    [run] = collect([OLD])
    run.steps[:] = [{"step": n, "reward": float(n), "loss": None} for n in range(1, 3001)]
    [reward] = panels([run])["main"][1:] if run.evaluations else panels([run])["main"]
    [series] = reward["series"]
    assert series["each"] == 2 and len(series["x"]) == 1500 <= MOST_POINTS
    assert (series["x"][0], series["y"][0]) == (2, 1.5)


# ---- two runs ----


def test_two_runs_lie_over_each_other(ended, tmp_path):
    other = shutil.copytree(ended, tmp_path / "b" / "run")
    rewrite(other / "metrics.jsonl", lambda r: "reward" in r and r.update(reward=r["reward"] + 1))
    state = other / "checkpoints" / "step-00000003" / "state.json"
    state.write_text(state.read_text().replace('"lr": 1e-06', '"lr": 0.5'))
    page = written(tmp_path / "b" / "run", ended)
    assert [run["name"] for run in page.data["runs"]] == ["b/run", f"{ended.parent.name}/run"]
    panel = page.panel("Reward: reward")
    mine, theirs = panel["series"]
    assert (mine["run"], theirs["run"]) == (0, 1)
    assert mine["y"] == pytest.approx([y + 1 for y in theirs["y"]], rel=1e-4)
    assert len(page.panel("Accuracy")["series"]) == 2  # the means only
    for row in page.data["accuracy"][0]["rows"]:
        assert len(row["cells"]) == 2 and row["cells"][0] == row["cells"][1]
    assert "lr 0.5 1e-06 1e-06" in page.words
    assert {group["run"] for group in page.data["browser"]["groups"]} == {0, 1}


# ---- half a run, or none ----


def with_a_torn_log_alone(run):
    shutil.rmtree(run)
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "ev')


def torn(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')


def without_steps(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n")


def killed(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n")


def strange(run):
    """What is JSON, and of no type that is expected."""
    rewrite(run / "metrics.jsonl", lambda r: r.update(reward="high", eval=[1], grad_norm=10**400))
    rewrite(run / "completions.jsonl", lambda r: r.update(rewards=3, images="x", hint=7, answer=[]))
    (run / "data.json").write_text('{"train": 3, "eval": {"modalities": [], "quirks": {"a": "b"}}}')
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text('{"config": {"steps": "many", "lr": {}, "unheard_of": [1, null]}}')
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text('{"world_size": "x"}')


@pytest.mark.parametrize(
    ("spoil", "sentences"),
    [
        (with_a_torn_log_alone, ["completions.jsonl is not there.",
                 "data.json is not there.", "No checkpoint can be read", "No optimiser step",
                 "No evaluation is recorded"]),
        (torn, ["metrics.jsonl has damaged lines, which are left out: 1."]),
        (without_steps, ["No optimiser step is recorded", "Only step 0 was evaluated"]),
        (killed, ["The run stopped after step 2 of 3, or is still going."]),
        (lambda run: (run / "data.json").write_text('{"tr'), ["data.json cannot be read: "]),
        (lambda run: (run / "data.json").write_text("[]"), ["data.json holds no JSON object."]),
        (lambda run: shutil.rmtree(run / "checkpoints"), ["the settings are not known."]),
        (lambda run: (run / "completions.jsonl").write_bytes(b"\xff\n"), ["completions.jsonl has"]),
        (strange, ["No evaluation is recorded"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(copy, spoil, sentences):
    spoil(copy)
    page = written(copy)
    assert "What is missing" in page.text
    for sentence in sentences:
        assert sentence in page.words


def test_pictures_that_are_gone_have_their_names_said(copy):
    rewrite(
        copy / "completions.jsonl", lambda r: r.update(images=["/gone/a.png", "\0", "/dev/zero"])
    )
    page = written(copy)
    images = page.data["browser"]["groups"][0]["images"]
    assert [image["name"] for image in images] == ["a.png", "\0", "zero"]
    assert all("place" not in image and image["why"] for image in images)
    assert "3 pictures cannot be read on this machine" in page.words


# ---- limits ----


def test_completions_beyond_the_limit_are_said_to_be_left_out(ended, tmp_path):
    run = shutil.copytree(ended, tmp_path / "run")
    page = written(run, completions=16)
    assert {group["step"] for group in page.data["browser"]["groups"]} == {1, 3}
    assert "run: 16 of 24 logged completions are here, of 2 steps spread over" in page.words
    assert len(written(run, completions=5).completions) == 5
    assert written(run, completions=0).completions == []


def test_steps_are_spread_with_first_and_last():
    records = [{"step": step} for step in range(10) for _ in range(4)]
    kept = [record["step"] for record in spread(records, 16)]
    assert sorted({*kept}) == [0, 3, 6, 9] and len(kept) == 16
    assert spread(records, 40) == records


def test_pictures_stop_at_the_limit_and_the_page_says_so(ended, tmp_path):
    run = shutil.copytree(ended, tmp_path / "run")
    page = written(run, picture_mb=0.002)
    pictures = page.data["browser"]["pictures"]
    assert 0 < sum(map(len, pictures)) <= 2000
    assert re.search(r"\d of 6 pictures are left out: the page holds at most 0.002 MB", page.words)
    assert written(run, picture_mb=0).data["browser"]["pictures"] == []


def test_a_large_picture_becomes_a_small_one(tmp_path):
    Image.effect_noise((2000, 1000), 90).save(tmp_path / "a.png")
    uri, size = small(tmp_path / "a.png")
    assert size == (320, 160) and len(uri) < 60_000 < (tmp_path / "a.png").stat().st_size


def test_a_long_text_is_cut_and_says_so(copy):
    rewrite(copy / "completions.jsonl", lambda r: r.update(completion="x" * 20_007))
    [run] = collect([copy])
    item = browsed([run], 10, 0)["groups"][0]["items"][0]
    assert item["text"].endswith("xx [and 7 more characters]")


# ---- hostile text ----


def test_hostile_text_is_text(ended, tmp_path):
    page = written(hostile_run(ended, tmp_path))
    assert "xss" not in page.tags and page.tags.count("script") == 3
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(PAYLOAD) > 12  # it is read as it was written
    group = page.data["browser"]["groups"][0]
    assert {group["prompt"], group["answer"], group["items"][0]["hint"]} == {PAYLOAD}
    assert PAYLOAD in group["items"][0]["rewards"]


def test_markup_that_is_not_escaped_would_be_seen(ended, tmp_path, monkeypatch):
    import kepo.report.page as made

    run = hostile_run(ended, tmp_path)
    with monkeypatch.context() as patch:
        import jinja2

        of = jinja2.Environment
        patch.setattr(jinja2, "Environment", lambda **kw: of(**kw | {"autoescape": False}))
        assert "xss" in written(run).tags
    monkeypatch.setattr(made, "for_script", lambda value: json.dumps(value))
    with pytest.raises(ValueError):  # the element of the data has ended in the middle
        assert written(run).data


def test_data_for_the_script_cannot_end_it():
    text = for_script({PAYLOAD: PAYLOAD})
    assert not set("<>&\u2028\u2029") & {*text} and json.loads(text) == {PAYLOAD: PAYLOAD}


def test_the_policy_allows_no_address_and_no_other_script(page):
    [policy] = [v for tag, name, v in page.attributes if name == "content" and "default-src" in v]
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2
    assert not re.search(r"https?:|script-src[^;]*unsafe|\*", policy)


# ---- the command ----


def test_the_command_writes_into_the_first_run(copy, capsys):
    assert main(["report", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert re.fullmatch(rf"{re.escape(str(copy))}/report.html \(\d+\.\d MB\)\n", printed)
    assert Page(copy / "report.html").data["runs"][0]["name"] == "run"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere"], "nowhere is not there; expected the run_dir of a run"),
        (["EMPTY"], "{} has none of metrics.jsonl, completions.jsonl, data.json, checkpoints; exp"),
        (["RUN", "--out", "no/folder/a.html"], "out='no/folder/a.html' cannot be written"),
        (["RUN", "--completions", "-1"], "completions=-1; expected a number >= 0"),
        (["RUN", "--picture-mb", "-1"], "picture_mb=-1.0; expected a number in"),
    ],
)
def test_a_wrong_command_is_one_sentence(ended, tmp_path, words, sentence):
    folders = {"RUN": str(ended), "EMPTY": str(tmp_path)}
    with pytest.raises(SystemExit) as refused:
        main(["report", *(folders.get(word, word) for word in words)])
    assert str(refused.value.code).startswith(f"error: {sentence.format(tmp_path)}")


def test_no_run_is_refused():
    with pytest.raises(KepoConfigError, match="runs is empty"):
        write_report([])
    with pytest.raises(SystemExit) as refused:
        main(["report"])
    assert refused.value.code == 2


@pytest.mark.parametrize("value", [True, None, "1", float("nan"), 10**400, [1]])
def test_what_is_no_number_is_none(value):
    assert number(value) is None and number(2) == 2.0


# ---- its files ----


def test_the_wheel_holds_the_files_of_the_page():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["kepo"]
    packed = {path for pattern in patterns for path in (ROOT / "kepo").glob(pattern)}
    files = {p for p in (ROOT / "kepo" / "report").iterdir() if p.is_file() and p.suffix != ".py"}
    assert files and files <= packed


PAIRS = [
    *(("text", "card"), ("text", "page"), ("soft", "card"), ("soft", "page"), ("accent", "card")),
    *(("accent", "page"), ("card", "accent"), ("good", "good-card"), ("bad", "bad-card")),
    *(("warn", "warn-card"), ("text", "hint-card"), ("soft", "hint-card"), ("text", "warn-card")),
]


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1])
def test_colours_have_contrast(scheme):
    """Of text 4.5, of curves 3, as WCAG 2.2 asks (1.4.3 and 1.4.11)."""
    style = (ROOT / "kepo" / "report" / "page.css").read_text(encoding="utf-8")
    block = re.findall(r":root \{(.*?)\}", style, re.S)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    curves = [(f"c{place}", "card") for place in range(8)]
    for first, second in PAIRS + curves:
        light, dark = sorted((luminance(colours[first]), luminance(colours[second])))[::-1]
        ratio = (light + 0.05) / (dark + 0.05)
        assert ratio >= (3 if first[0] == "c" and first[1].isdigit() else 4.5), (first, second)
