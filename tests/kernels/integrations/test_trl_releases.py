"""Releases of TRL: one range is taken, others are refused at import, in one sentence."""

import importlib.metadata
import runpy

import pytest
from places import ROOT

FILE = ROOT / "kepo_kernels" / "integrations" / "trl" / "supported.py"


def check(monkeypatch, found):
    def version(name):
        assert name == "trl"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    runpy.run_path(str(FILE))["refuse_other_releases"]()


@pytest.mark.parametrize("found", ["1.16.0", "1.16.3", "1.16.1rc1"])
def test_releases_that_were_tested(found, monkeypatch):
    check(monkeypatch, found)


@pytest.mark.parametrize("found", ["1.15.9", "1.17.0", "0.16.0", "2.16.0", "1.17.0.dev0"])
def test_other_releases_are_refused(found, monkeypatch):
    with pytest.raises(
        ImportError, match=rf"needs trl>=1\.16,<1\.17, and trl {found} is installed"
    ):
        check(monkeypatch, found)


def test_without_trl_it_says_what_to_install(monkeypatch):
    with pytest.raises(ImportError, match=r"TRL is not installed: pip install 'trl>=1\.16,<1\.17'"):
        check(monkeypatch, None)


def test_the_extra_is_that_range():
    assert '\ntrl = ["trl>=1.16,<1.17"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
