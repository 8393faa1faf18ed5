"""The commit that results are stamped with: code that changed makes it dirty, results do not."""

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import stamp

RESULTS = "benchmarks/results/table.csv"


def git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *who, *words], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository of one commit: code, a benchmark and a table of results."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    monkeypatch.delenv("KEPO_COMMIT", raising=False)
    for name in ("code.py", "benchmarks/bench.py", RESULTS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n", encoding="utf-8")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_results_that_are_being_written_are_not_dirt(checkout):
    name = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert stamp.commit(checkout) == name
    (checkout / RESULTS).write_text("2\n", encoding="utf-8")
    (checkout / "benchmarks/results/new.csv").write_text("1\n", encoding="utf-8")
    (checkout / "untracked.py").write_text("1\n", encoding="utf-8")
    assert stamp.commit(checkout) == name
    git(checkout, "add", "benchmarks/results")
    assert stamp.commit(checkout) == name
    assert git(checkout, "describe", "--always", "--dirty").endswith("-dirty")  # what git would say


@pytest.mark.parametrize("file", ["code.py", "benchmarks/bench.py"])
@pytest.mark.parametrize("change", ["edited", "staged", "deleted"])
def test_code_that_changed_is(checkout, file, change):
    name = stamp.commit(checkout)
    if change == "deleted":
        (checkout / file).unlink()
    else:
        (checkout / file).write_text("2\n", encoding="utf-8")
    if change == "staged":
        git(checkout, "add", ".")
    (checkout / RESULTS).write_text("2\n", encoding="utf-8")
    assert stamp.commit(checkout) == f"{name}-dirty"


def test_without_a_history(checkout, tmp_path_factory, monkeypatch):
    nowhere = tmp_path_factory.mktemp("nowhere")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(nowhere.parent))
    assert stamp.commit(nowhere) == "unknown"
    monkeypatch.setenv("KEPO_COMMIT", "of the copy")
    assert stamp.commit(nowhere) == stamp.commit(checkout) == "of the copy"
