"""What the pages say of the code: their lines of Python, the tree and the order of imports."""

import ast
import re
from pathlib import Path

import pytest
import torch
from places import IGNORED, ROOT

import kepo
import kepo_kernels

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IN_TRAINERS = sorted((ROOT / "examples" / "in_trainers").glob("*.py"))
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FOLDERS = {"kepo": kepo, "kepo_kernels": kepo_kernels}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def python_blocks() -> list[tuple[str, str]]:
    found = [(path, blocks(path.read_text(encoding="utf-8"), "python")) for path in PAGES]
    return [(path.name, block) for path, each in found for block in each]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def names() -> dict[str, object]:
    """What the snippets about losses take for granted, of 2 sequences of 5 tokens."""
    made = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made)

    return dict(
        hidden=random(2, 5, 8).requires_grad_(),
        lm_head=random(37, 8).requires_grad_(),
        teacher_hidden=random(2, 5, 12),
        teacher_lm_head=random(37, 12),
        ids=torch.randint(37, (2, 5), generator=made),
        targets=torch.randint(37, (2, 5), generator=made),
        advantages=random(2),
        rewards=torch.tensor([1.0, 0.0]),
        mask=torch.ones(2, 5),
        top_ids=torch.arange(4).expand(2, 5, 4),
        top_logprobs=random(2, 5, 5).log_softmax(-1)[..., :4],
        old_logprobs=-random(2, 5).abs(),
        vllm_logprobs=-random(2, 5).abs(),
        tokens=8,
        processes=1,
    )


class Causal(torch.nn.Module):
    """A model whose backbone gives these states."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self.hidden, self.lm_head = hidden, torch.nn.Linear(hidden.shape[-1], 37, bias=False)

    def forward(self, ids):
        return self.lm_head(self.hidden)


@pytest.mark.parametrize("page, code", python_blocks())
def test_python_in_the_pages_runs(page, code):
    """Each block on losses is run; of the others the names that they take from us are looked up.

    The lines of an example that a page shows are run with the example.
    """
    for name in re.findall(r"\bkepo\.(\w+)", code):
        assert hasattr(kepo, name), f"{page}: kepo.{name}"
    shown = any(code in path.read_text("utf-8") for path in IN_TRAINERS)
    of_trl = "GRPOTrainer(" in code  # which may not be installed
    if "import kepo\n" in code or "grpo(logits" in code or shown or of_trl:
        ast.parse(code)
        return
    scope = names()
    if "loss=lambda" in code:
        scope |= {"model": Causal(scope["hidden"]), "teacher": Causal(scope["teacher_hidden"])}
        for each in ("model", "teacher"):
            kepo_kernels.FusedHead.install(scope[each])
    elif "model(ids)" in code:
        model = torch.nn.Module()
        model.lm_head = torch.nn.Linear(8, 37, bias=False)
        model.forward = lambda ids: scope["hidden"]
        scope["model"] = model
    exec(code, scope)
    if "loss" in scope:
        assert scope["loss"].isfinite()
        if "backward" not in code:
            scope["loss"].backward()
        assert scope["hidden"].grad.norm() > 0


def test_every_file_that_the_pages_name_is_there():
    named = set()
    for path in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "README.md"]:
        words = re.findall(r"`([\w.]+(?:/[\w.]+)*/\w+\.\w+)`", path.read_text(encoding="utf-8"))
        folders = {word: word.split("/")[0] for word in words}
        named |= {x for x, top in folders.items() if (ROOT / top).is_dir() and top not in IGNORED}
    assert {"kepo/tasks/leaks.py", "csrc/row_kernels.h"} <= named and len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_function_that_extending_names_is_there():
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", text))
    code = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "kepo").rglob("*.py"))
    code += "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "kepo_kernels").rglob("*.py"))
    code += (ROOT / "csrc" / "rows.cpp").read_text(encoding="utf-8")
    assert {"load_teacher", "is_right"} <= named and len(named) > 20
    assert [name for name in sorted(named) if not re.search(rf"\b{name}\b", code)] == []


def test_the_tree_has_every_folder():
    [tree] = [block for block in blocks(ARCHITECTURE, "text") if "csrc/" in block]
    for name, package in FOLDERS.items():
        part = re.search(rf"^{name}/.*\n((?:  .*\n)*)", tree, re.M)[1]
        listed = re.findall(r"^  (\w+)/", part, re.M)
        home = Path(package.__file__).parent
        there = [path.parent.name for path in home.glob("*/__init__.py")]
        assert sorted(listed) == sorted(there), name


def orders() -> dict[str, list[str]]:
    """The folders and files of each package, those first that may import the others."""
    [block] = [block for block in blocks(ARCHITECTURE, "text") if "→" in block]
    lines = dict(re.findall(r"^(\w+):(.*(?:\n\s+.*)*)", block, re.M))
    return {name: re.findall(r"\w+", lines[name]) for name in FOLDERS}


def against(package: str, order: list[str]) -> list[str]:
    """Imports of a file from a folder that the order has before its own."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        own = path.relative_to(ROOT).with_suffix("").parts[1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] != package or own not in order or parts[1:2] == [own]:
                    continue
                other = parts[1] if len(parts) > 1 else ""
                if other in order and order.index(other) < order.index(own):
                    found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


@pytest.mark.parametrize("package", FOLDERS)
def test_imports_run_in_the_order_of_the_page(package):
    order = orders()[package]
    places = [path for path in (ROOT / package).iterdir() if path.suffix == ".py"]
    places += [path.parent for path in (ROOT / package).glob("*/__init__.py")]
    apart = {"__init__", "reference"}  # the door, and the oracle, which imports nothing of ours
    assert sorted(order) == sorted({path.stem for path in places} - apart)
    makers = {"planner", "report"}
    others = [path for path in (ROOT / package).rglob("*.py") if path.parent.name not in makers]
    assert not any("from kepo.planner" in path.read_text("utf-8") for path in others)
    assert against(package, order) == []
    assert len(against(package, order[::-1])) > 20  # so the order is one that can be broken
