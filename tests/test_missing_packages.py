"""An installation without the extras names the package that a command needs, in one sentence."""

import re
import subprocess
import sys

import pytest
import tomllib
from places import ROOT

from kepo.__main__ import COMMANDS
from kepo.errors import EXTRAS, KepoPackageError, packages_named

WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""

MAIN = "from kepo.__main__ import main\n"


def without(extra: str, code: str) -> subprocess.CompletedProcess:
    """Run code in an interpreter that lacks the packages of an extra."""
    lacking = WITHOUT.format(packages=set(EXTRAS[extra])) + code
    return subprocess.run([sys.executable, "-c", lacking], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_the_missing_package(name, arguments):
    done = without("train", f"{MAIN}main({[name, *arguments]})")
    assert done.returncode == 1
    *others, sentence = done.stderr.splitlines()
    told = rf"error: kepo {name} needs [\w-]+: pip install 'kepo\[train\]'"
    assert re.fullmatch(told, sentence), done.stderr
    assert "Traceback" not in others and len(others) <= 2  # torch's warning about numpy


def test_the_list_of_commands_needs_no_package():
    done = without("train", f"{MAIN}main([])")
    assert done.returncode == 0 and "kepo train" in done.stdout


def test_a_package_that_is_missing_in_the_middle_is_named(tmp_path):
    done = without("demo", f"{MAIN}main(['demo', '--root', {str(tmp_path)!r}])")
    assert done.returncode == 1 and done.stderr.endswith(
        "error: write_digits needs scikit-learn: pip install 'kepo[demo]'\n"
    )


def test_a_public_name_names_the_missing_package():
    done = without("train", "import kepo\nkepo.train")
    assert re.search(
        r"PackageError: kepo.train needs \w+: pip install 'kepo\[train\]'", done.stderr
    )
    done = without("train", "import kepo\nkepo.load('grpo')")
    assert re.search(r"grpo.yaml needs pyyaml: pip install 'kepo\[train\]'", done.stderr)


def test_our_own_missing_module_stays_a_traceback():
    with pytest.raises(ModuleNotFoundError) as caught, packages_named("kepo train"):
        import kepo.nothing  # noqa: F401
    assert not isinstance(caught.value, KepoPackageError)
    with pytest.raises(ModuleNotFoundError) as caught, packages_named("kepo train"):
        import yaml.nothing  # noqa: F401 - the package is there, but not of the version we expect
    assert not isinstance(caught.value, KepoPackageError)


def test_the_extras_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = {
        extra: {re.match(r"[\w-]+", one)[0] for one in project["optional-dependencies"][extra]}
        for extra in EXTRAS
    }
    assert {extra: set(packages.values()) for extra, packages in EXTRAS.items()} == {
        extra: names - {"kepo"} for extra, names in listed.items()
    }
