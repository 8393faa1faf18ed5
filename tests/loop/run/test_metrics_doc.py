"""docs/metrics.md has every key that a run writes, and no other."""

import json
import re
from pathlib import Path

import pytest

from kepo.config import Config
from kepo.digits.dataset import write_digits
from kepo.digits.tiny import build_tiny
from kepo.loop import train

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


def documented() -> dict[str, list[tuple[str, ...]]]:
    """Cells of every row of every table, by the heading it stands under."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        section.splitlines()[0]: [
            tuple(cell.strip() for cell in line.strip("|").split("|"))
            for line in section.splitlines()
            if line.startswith("| `")
        ]
        for section in sections
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, set[str]]:
    """Keys of one step, its evaluations and its completions, under the headings of the page."""
    root = tmp_path_factory.mktemp("made")
    write_digits(root / "data", train=4, test=1, seed=0)
    for size in ("student", "teacher"):
        build_tiny(root / size, size=size, seed=1)
    config = Config(
        student=str(root / "student"),
        teacher=str(root / "teacher"),
        train_data=str(root / "data" / "train"),
        eval_data=str(root / "data" / "test"),
        run_dir=str(root / "run"),
        steps=1,
        prompts_per_step=2,
        num_generations=2,
        num_hinted=1,
        max_attempts=1,
        max_completion_length=4,
        sampler_correction="truncate",
        gate_reward=None,  # an untrained student never opens one
    )
    assert train(config).exit_code == 0

    def keys(name: str, *, evaluation: bool = False) -> set[str]:
        lines = (root / "run" / name).read_text().splitlines()
        records = [
            record for line in lines if ("eval" in (record := json.loads(line))) == evaluation
        ]
        assert records
        return {re.sub("^rewards/[^/]+/", "rewards/<name>/", key) for r in records for key in r}

    return {
        "metrics.jsonl, a step": keys("metrics.jsonl"),
        "metrics.jsonl, an evaluation": keys("metrics.jsonl", evaluation=True),
        "completions.jsonl": keys("completions.jsonl"),
    }


def test_every_key_is_documented_and_every_documented_key_written(written):
    for heading, rows in documented().items():
        keys = [row[0].strip("`") for row in rows]
        assert len(keys) == len(set(keys)), heading
        assert set(keys) == written[heading], heading
    assert set(documented()) == set(written)


def test_every_key_has_a_unit_a_sentence_and_a_word_on_trl():
    for rows in documented().values():
        for row in rows:
            key, unit, words, trl = row
            assert unit and len(words) > 5, key
            assert trl.partition(";")[0].partition(":")[0] in ("", "yes", "differs"), key
            assert not (key.startswith("`kepo/") and trl), key
