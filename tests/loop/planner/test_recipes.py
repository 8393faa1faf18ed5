"""The recipes: accepted, fitting, and as their table says."""

from importlib.metadata import version
from pathlib import Path

import pytest

from kepo.check import check_settings
from kepo.config import load
from kepo.errors import KepoConfigError
from kepo.planner.memory import Setup, peak
from kepo.planner.plan import machine_of, table
from kepo.planner.standing import GIB

pytest.importorskip("transformers")
# Before 5.18 every row has its own pictures, and up to 1.3 GiB more is held than the table says.
TABLES_VERSION = tuple(map(int, version("transformers").split(".")[:2])) >= (5, 18)
RECIPES = sorted((Path(__file__).resolve().parents[3] / "recipes").glob("*.yaml"))
README = RECIPES[0].parent / "README.md"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    """Its settings are accepted, it fits, and the table says what it takes."""
    config = load(path)
    check_settings(config)
    assert config.eval_share and config.eval_batch == config.rollout_batch
    assert f"recipes/{path.name}" in path.read_text().split("student:")[0], "no command"
    if config.lora_rank:
        pytest.importorskip("peft")
    found = peak(Setup(config, machine_of(path)))
    assert found.total <= machine_of(path).offered
    row = next(
        line for line in README.read_text().splitlines() if line.startswith(f"| {path.stem}")
    )
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[5] == found.name
    if TABLES_VERSION:
        assert cells[6] == f"{found.total / GIB:.0f}"


def test_recipes_write_to_folders_of_their_own():
    assert len({load(path).run_dir for path in RECIPES}) == len(RECIPES)


def test_official_recipe_is_the_preset():
    recipe = load(RECIPES[0].parent / "8x80gb_kepo_official.yaml")
    assert recipe == load(RECIPES[0].parent / "8x80gb_kepo_official.yaml", "kepo_official")
    facts = dict(steps=190, lr=2e-6, num_generations=8, max_completion_length=1024, beta=0.5)
    assert {name: getattr(recipe, name) for name in facts} == facts


@pytest.mark.slow
def test_table_of_recipes():
    pytest.importorskip("peft")
    assert table(RECIPES) in README.read_text()


def test_table_needs_a_machine(tmp_path):
    with pytest.raises(KepoConfigError, match="does not say on what it runs"):
        table([tmp_path / "recipe.yaml"])
