"""An error begins with what it is about: a name that can be imported, a setting, or a path."""

import ast
import builtins
import dataclasses
import importlib
import inspect
import re
import types
from functools import cache
from importlib.util import find_spec

import pytest

pytest.importorskip("transformers")

from places import ROOT

import kepo_kernels
from experiments.choose import Choose
from experiments.compare import Compare
from experiments.page import Page
from experiments.scans import Seeds
from kepo.__main__ import COMMANDS
from kepo.config import Config
from kepo.digits.demo import Demo
from kepo.distributed.processes import LAUNCH
from kepo.errors import KepoError
from kepo.evaluation.report import Evaluation
from kepo.export import Export
from kepo.planner.plan import Arguments
from kepo.report.command import ReportFlags
from kepo.scans.study import Scans
from kepo_kernels.errors import KepoInputError
from kepo_kernels.validate import ENGINE_SETTINGS

PACKAGES = ("kepo", "kepo_kernels", "experiments")
VARIABLES = {*LAUNCH, "LOCAL_RANK"}
KINDS = (
    Config,
    Demo,
    Scans,
    Evaluation,
    Export,
    Arguments,
    ReportFlags,
    Compare,
    Choose,
    Page,
    Seeds,
)
SETTINGS = {
    field.name
    for kind in (
        Config,
        Demo,
        Evaluation,
        Export,
        Arguments,
        ReportFlags,
        Compare,
        Choose,
        Page,
        Scans,
        Seeds,
    )
    for field in dataclasses.fields(kind)
} | {*ENGINE_SETTINGS}
VERLS = {  # settings of verl's configuration, where kepo_kernels.integrations.verl is used
    *(f"distillation.distillation_loss.{x}" for x in ("loss_mode", "log_prob_min_clamp")),
    "kepo.gate_threshold",
}

WHOLE = {"config", "settings"}
"""Names of all settings at once, which say nothing of the one that is wrong."""

PLACES = {
    *("path", "folder", "file", "root", "index", "target", "run", "name", "path / DICT"),
    *("printable(path)", "report.path", "report.summary()", "str(problem)", "disk_sentence(error)"),
    "source",  # of settings: a file, or the word Config
}
"""What an error that begins with a file, a folder or a model of the Hub has in its first braces."""
NAMES = {"name", "argument", "which"}
"""The same where it begins with a setting: what follows it is ``=``, a colon or a verb."""
FUNCTIONS = {"self.function", "problem.function"}
"""The same where it is one of the losses, whose names the test below looks up."""


# ---- where errors are made ----


def modules():
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            framework = parts[2:3] if parts[1:2] == ("integrations",) else ()
            if parts[-1] != "__main__" and all(map(find_spec, framework)):
                yield name, file


def is_ours(module, node, raised):
    """Whether a call makes one of our errors; what is raised of a class in a variable counts."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
        return False
    kind = getattr(module, node.func.id, getattr(builtins, node.func.id, None))
    if kind is None:
        return node in raised
    return isinstance(kind, type) and issubclass(kind, (KepoError, KepoInputError))


def sites(module, tree):
    """``(line, message)`` of every call that makes an error of ours."""
    raised = {node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    for node in ast.walk(tree):
        if is_ours(module, node, raised):
            yield from openings(tree, node.lineno, node.args[0])


def openings(tree, line, message):
    """The message itself, or where it is a parameter of the function around it, what is given."""
    if not isinstance(message, ast.Name):
        yield line, message
        return
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= node.end_lineno
    ][-1]
    names = [argument.arg for argument in around.args.args]
    if message.id not in names:
        yield line, message
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == around.name:
            yield from openings(tree, node.lineno, node.args[names.index(message.id)])


# ---- what they begin with ----


def beginning(message):
    """``(text, source, after)``: what a message literally begins with; where that is nothing, the
    expression it begins with, and the literal text that follows."""
    if isinstance(message, ast.BinOp):
        return beginning(message.left)
    if isinstance(message, ast.Constant):
        return message.value, "", ""
    if not isinstance(message, ast.JoinedStr):
        return "", ast.unparse(message), ""
    first, *others = message.values
    if isinstance(first, ast.Constant):
        return first.value, "", ""
    after = others[0] if others else None
    return "", ast.unparse(first.value), after.value if isinstance(after, ast.Constant) else ""


def is_public(module, dotted):
    """Whether it is a function, class or method that this module, or the package's top, has."""
    if any(part.startswith("_") for part in dotted.split(".")):
        return False
    for owner in (module, kepo_kernels):
        found = owner
        for part in dotted.split("."):
            found = getattr(found, part, None)
        if callable(found) and getattr(found, "__module__", "").split(".")[0] in PACKAGES:
            return True
    return False


@cache
def parameters(module):
    """Of the public functions that a module defines."""
    found = set()
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_":
            found |= set(inspect.signature(value).parameters)
    return found


def is_right(module, message):
    text, source, after = beginning(message)
    if source:
        named = source in NAMES and re.match(r"=|: | is | has | names |, but ", after)
        return bool(source in PLACES | FUNCTIONS or named)
    if command := re.match(r"kepo (\w+): ", text):
        return command[1] in COMMANDS
    if re.match(r"ranks? ", text):  # of several processes, which one speaks
        return True
    word, mark = re.match(r"([\w.]*\w|)(: |\.$|)", text).groups()
    if mark and is_public(module, word):
        return True
    return word in (SETTINGS | VERLS | VARIABLES | parameters(module)) - WHOLE


def wrong(module, source):
    return [
        f"{module.__name__}:{line}: {ast.unparse(message)[:100]}"
        for line, message in sites(module, ast.parse(source))
        if not is_right(module, message)
    ]


def test_every_error_begins_with_what_it_is_about():
    found, count = [], 0
    for name, file in modules():
        module, source = importlib.import_module(name), file.read_text(encoding="utf-8")
        found += wrong(module, source)
        count += len(list(sites(module, ast.parse(source))))
    assert not found, "\n".join(found)
    assert count > 150  # they are found at all


def test_the_losses_name_themselves():
    """What begins with ``{self.function}`` has the name that its checks were begun with."""
    names, unknown = set(), []
    for name, file in modules():
        module = importlib.import_module(name)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("begin", "Validator"):
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    names.add(first.value)
                    unknown += [] if is_public(module, first.value) else [first.value]
    assert "fused_kepo_loss" in names and "loss_weights" in names
    assert unknown == []


FAULTS = {
    "a function that moved": 'raise KepoDataError("load_data: nothing is left")',
    "a class of another file": 'raise KepoDataError("VLM.load: nothing is left")',
    "a private function": 'raise KepoDataError("_private: nothing is left")',
    "no function but a word": 'raise KepoDataError("config: lr is 0")',
    "a sentence": 'raise KepoDataError(f"the loss of {n} tokens")',
    "whatever came": "raise KepoDataError(str(error))",
    "a command that is none": 'raise KepoDataError("kepo teach: nothing is left")',
    "by a helper": 'def refuse(message):\n raise KepoDataError(message)\nrefuse("the loss")',
    "a class in a variable": 'raise kind(f"{text}. Bring them back")',
    "made here, raised elsewhere": 'def made(path):\n return KepoDataError("hf: no")',
}


@pytest.mark.parametrize("source", FAULTS.values(), ids=FAULTS.keys())
def test_another_beginning_would_be_seen(source):
    assert len(wrong(planted(), source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        'raise KepoDataError("public: nothing is left")',
        'raise KepoDataError(f"of is {of}; expected a number")',
        'raise KepoDataError(f"lr={lr}; expected a number")',
        'raise KepoDataError(f"{name}={value}; expected a number")',
        'raise KepoDataError(f"{path} is empty")',
        'raise ValueError("whatever it says")',
        'def refuse(message):\n raise KepoDataError(message)\nrefuse("steps is 0")',
    ],
)
def test_right_beginnings_are_taken(source):
    assert wrong(planted(), source) == []


def planted():
    """A module with one public and one private function."""
    module = types.ModuleType("kepo.planted")
    exec(
        "from kepo.errors import KepoDataError\ndef public(of): ...\ndef _private(): ...",
        vars(module),
    )
    return module
