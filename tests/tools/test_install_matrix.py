"""What is promised of versions was installed and used: the committed table says with what."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from installing import succeed
from places import ROOT

from tools import installs
from tools.environments import EXTRAS, Environment, Workshop, bounds

TABLE = ROOT / "benchmarks" / "results" / "install_matrix.csv"


def read(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return {row["environment"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("environment", installs.ENVIRONMENTS, ids=lambda e: e.name)
def test_every_environment_was_installed_without_a_fault(environment):
    row = read(TABLE)[environment.name]
    assert row["python"].startswith(f"{environment.python}.")
    assert int(row["passed"]) > 0 and row["failed"] == "0" and row["faults"] == ""
    assert row["loop"] == (f"{installs.STEPS} + {installs.STEPS} steps" if environment.loop else
                           "refused")  # fmt: skip


@pytest.mark.parametrize("environment", installs.ENVIRONMENTS, ids=lambda e: e.name)
def test_the_page_shows_its_line(environment):
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    row = read(TABLE)[environment.name]
    versions = ("python", "torch", "triton", "transformers", "numpy", "peft")
    cells = [row[x].partition("+")[0] or "–" for x in versions] + [f"{row['passed']} passed"]
    assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("environment", installs.ENVIRONMENTS[:2], ids=lambda e: e.name)
def test_the_oldest_are_the_lower_bounds_of_today(environment):
    assert environment.oldest
    row = read(TABLE)[environment.name]
    for pin in bounds(EXTRAS if environment.loop else ()):
        name, _, version = pin.partition("==")
        used = row[name].partition("+")[0].split(".")
        bound = version.split(".")
        assert used[: len(bound)] == bound and not any(map(int, used[len(bound) :])), pin


def test_a_line_that_was_not_run_again_stays(tmp_path):
    def result(name: str, passed: int) -> installs.Result:
        return installs.Result(Environment(name, "3.13"), {"torch": "2.9"}, passed)

    path = tmp_path / "table.csv"
    both = [result("newest", 1), result("between", 2)]
    installs.write(path, both, {"newest": ["newest: a"], "between": ["between: b"]})
    installs.write(path, [result("newest", 3)], {"newest": ["newest: c"]})
    assert {name: row["passed"] for name, row in read(path).items()} == {
        "between": "2",
        "newest": "3",
    }
    log = path.with_suffix(".log").read_text(encoding="utf-8")
    assert log == "==== between: b\n\n==== newest: c\n"


def test_a_line_that_was_not_run_again_loses_what_is_no_longer_promised(tmp_path):
    path = tmp_path / "table.csv"
    result = installs.Result(Environment("newest", "3.13"), {"torch": "2.9"}, 1)
    installs.write(path, [result], {"newest": ["newest: a"]})
    with path.open(newline="", encoding="utf-8") as file:
        header, line = csv.reader(file)
    rows = ["environment,once", "between,1.0"]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    path.with_suffix(".log").write_text("==== between: b\n", encoding="utf-8")
    installs.write(path, [result], {"newest": ["newest: a"]})
    assert list(read(path)["between"]) == header
    assert list(read(path)["newest"].values()) == line


def test_the_log_names_no_place_of_the_machine(tmp_path):
    shop = Workshop(tmp_path / "newest", log := [])
    shop.note(
        "WARNING: Location 'file:///srv/index/torch/' is ignored: it is neither a file nor ..."
    )
    shop.note(f"$ {shop.python} -m pip install kepo @ {(tmp_path / 'wheel').as_uri()}")
    assert log == ["$ ./env/bin/python -m pip install kepo @ file://WORK/wheel"]


@pytest.mark.slow
def test_the_sample_needs_the_installed_package_alone(tmp_path, monkeypatch):
    """Its tests run from a copy, where no other folder of this checkout can be imported."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "kepo_kernels").symlink_to(ROOT / "kepo_kernels")
    monkeypatch.setattr(installs, "TESTS", ["tests/kernels/test_weights.py"])

    def run(*words: object) -> str:
        return succeed(words, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))

    result = installs.Result(installs.ENVIRONMENTS[-1])
    shop = SimpleNamespace(folder=tmp_path, python=sys.executable, run=run)
    installs.test_kernels(shop, result)
    assert result.passed > 0 and result.failed == 0
