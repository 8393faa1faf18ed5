"""OmniMedVQA's forty-item fixture from end to end: checked, trained on, evaluated either way."""

import json
import zlib
from collections import Counter
from pathlib import Path

import pytest
import quirks
from small import config_of, rigged

from kepo.__main__ import main
from kepo.data.run_data import load_data
from kepo.loop import train
from kepo.run.metrics import read_metrics
from kepo.tasks.multiple_choice import MultipleChoice

STEPS = 2
TOKENS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return quirks.write_quirks(tmp_path_factory.mktemp("fixture") / "data")


@pytest.fixture(scope="module")
def config(made, root, tmp_path_factory):
    """All modalities, trained on and evaluated on the whole fixture."""
    return config_of(
        made,
        tmp_path_factory.mktemp("run"),
        train_data=str(root),
        train_modalities=None,
        eval_data=str(root),
        steps=STEPS,
        max_completion_length=TOKENS,
        log_completions_every=1,
        save_every=STEPS,
    )


@pytest.fixture(scope="module")
def some_right():
    """Greedy answers of an untrained model are all wrong: some texts count as right here."""
    with rigged(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MultipleChoice, "is_right", lambda task, text, example: zlib.crc32(text.encode()) % 2
        )
        yield


@pytest.fixture(scope="module")
def finished(config, some_right):
    assert train(config).exit_code == 0
    return Path(config.run_dir)


def test_the_check_finds_what_is_wrong(root, capsys):
    """The rest of the command is in test_bad_records."""
    assert main(["data", "check", str(root)]) == 1
    out = capsys.readouterr().out
    assert "40 records, 30 good questions" in out and "wrong: 10 records" in out


def test_the_run_trains_and_counts_what_it_left_out(finished, config):
    steps = [r for r in read_metrics(finished / "metrics.jsonl") if "reward" in r]
    assert [r["step"] for r in steps] == [1, STEPS]
    assert any(r["grad_norm"] > 0 for r in steps)
    left = json.loads((finished / "data.json").read_text())
    for part in ("train", "eval"):
        assert (
            left[part]["bad_records"] == quirks.PROBLEMS and left[part]["quirks"] == quirks.QUIRKS
        )
        assert left[part]["records"] == 40 and left[part]["questions"] == quirks.GOOD
        assert len(left[part]["first_problems"]) == 40 - quirks.GOOD
    assert left["shared"]["eval_questions"] == quirks.GOOD
    # What was asked about is one of the images that are in order.
    lines = read_metrics(finished / "completions.jsonl")
    asked = {image for line in lines for image in line["images"]}
    assert asked <= {str(path) for e in load_data(config).train for path in e.images}


def test_evaluation_by_modality_and_type_in_the_run_and_by_the_command(finished, config, tmp_path):
    last = read_metrics(finished / "metrics.jsonl")[-1]
    assert last["step"] == STEPS
    assert set(last["eval"]) == set(quirks.MODALITIES) and set(last["eval_types"]) == set(
        quirks.TYPES
    )
    out = tmp_path / "out.json"
    policy = finished / "checkpoints" / f"step-{STEPS:08d}" / "policy"
    words = ["--max-completion-length", str(TOKENS), "--json", str(out)]
    main(["evaluate", str(policy), config.eval_data, *words])
    found = json.loads(out.read_text())
    for mine, side in (("eval", "modalities"), ("eval_types", "question_types")):
        table = {name: part["accuracy"] for name, part in found[side].items()}
        assert table == pytest.approx(last[mine])
    assert 0 < found["overall"]["right"] < found["overall"]["questions"] == quirks.GOOD
    assert found["overall"]["unparsed"] == quirks.GOOD  # nobody taught it the format
    assert found["data"]["bad_records"] == quirks.PROBLEMS
    counted = Counter({cell["modality"]: 0 for cell in found["cells"]})
    for cell in found["cells"]:
        counted[cell["modality"]] += cell["questions"]
    assert counted == {name: part["questions"] for name, part in found["modalities"].items()}
