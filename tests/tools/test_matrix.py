"""The table of Tritons: what makes it fail, and that its counts are those of what ran."""

import json
import subprocess
import sys

import pytest
from places import ROOT

from tools import matrix
from tools.matrix import Line

RIGHT = {"passed": 394, "failed": 0, "skipped": 2}


def run(monkeypatch, capsys, lines: list[Line], counts: list[dict]) -> tuple[int, str]:
    """main on what the processes are said to have found, the last by the installed Triton."""
    monkeypatch.setattr(matrix, "compiled", lambda folder, words: lines.pop(0))
    monkeypatch.setattr(matrix, "choice", lambda folder, wide: [])
    monkeypatch.setattr(matrix, "interpreted", lambda folder: dict(counts.pop(0)))
    folders = [f"triton-{n}" for n in range(len(lines) - 1)]
    return matrix.main([*folders, "--jobs", "1"]), capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "counts", "status", "words"),
    [
        ({}, {}, 0, "3.6.0    2.10, 2.11        20      0          394  sm_90"),
        ({"faults": 6}, {}, 1, " 20      6 "),
        ({"variants": 0}, {}, 1, " 0      0 "),
        ({}, {"failed": 3}, 1, "3 FAILED"),
        ({}, {"passed": 0}, 1, " 0  sm_90"),
        ({"asked": "3.5.1"}, {}, 1, "WRONG: 3.5.1 was asked for"),
    ],
    ids=["right", "a fault", "no variants", "failed tests", "no tests", "another Triton"],
)
def test_what_fails(monkeypatch, capsys, line, counts, status, words):
    older = Line(**{"asked": "3.6.0", "triton": "3.6.0", "variants": 20, "targets": "sm_90"} | line)
    found = [RIGHT | {"triton": "3.6.0"} | counts, RIGHT | {"triton": "3.9.0"}]
    done, out = run(monkeypatch, capsys, [older, Line(None, "3.9.0", 582, "sm_90")], found)
    assert done == status
    assert words in out


def test_tests_with_another_triton_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"compiled with triton 3\.9\.0, tested with another"):
        run(monkeypatch, capsys, [Line(None, "3.9.0", 582)], [RIGHT | {"triton": "3.6.0"}])


def test_a_folder_without_a_triton_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"expected one triton-\*.dist-info"):
        matrix.main([str(tmp_path)])


def test_which_targets(tmp_path):
    """Of Triton 3.4 those of AMD are missing: its wheels bring no linker for them."""
    for version in ("3.4.0", "3.6.0"):
        (tmp_path / version / f"triton-{version}.dist-info").mkdir(parents=True)
    assert matrix.choice(None, False) == matrix.choice(tmp_path / "3.6.0", True) == []
    assert matrix.choice(tmp_path / "3.4.0", False) == ["--quick", "--target", "sm_90"]
    targets = matrix.choice(tmp_path / "3.4.0", True)
    if targets:  # else ROCm is installed here
        assert targets == ["--target", "sm_80", "sm_90", "sm_100", "sm_120"]


def test_counts_are_of_what_ran(tmp_path):
    """In a process that finds another Triton first: the version is that one's."""
    (tmp_path / "triton.py").write_text("__version__ = '3.0.planted'\n")
    tests = tmp_path / "test_planted.py"
    tests.write_text(
        "import pytest\n"
        "def test_one(): pass\n"
        "def test_two(): pass\n"
        "def test_three(): assert False\n"
        "def test_four(): pytest.skip()\n"
        "def test_not_selected(): pass\n"
        "@pytest.fixture\ndef broken(): assert False\n"
        "def test_five(broken): pass\n"
    )
    counts = tmp_path / "counts.json"
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
import pathlib
from tools import matrix
matrix.TESTS, matrix.SELECTED = ["--rootdir", {str(tmp_path)!r}, {str(tests)!r}], "not selected"
sys.exit(matrix.count_tests(pathlib.Path({str(counts)!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    expected = {"passed": 2, "failed": 2, "skipped": 1, "triton": "3.0.planted"}
    assert json.loads(counts.read_text()) == expected


def test_the_tests_exist():
    """A file that was renamed would be an error of pytest, and a back-end's new name none."""
    assert all((ROOT / name).exists() for name in matrix.TESTS)
