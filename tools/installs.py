"""Installs with the oldest and the newest of everything that is promised, and uses them.

    make installs                                        # from PyPI, half an hour
    python tools/installs.py WORK --only newest --index https://download.pytorch.org/whl/cpu

One wheel is built and installed into an environment for each line of ENVIRONMENTS, made in the
folder WORK. There `python -m kepo_kernels` must name the C++ rows, a sample of the kernel tests
must pass with the installed package (not with this checkout), and where the loop is promised the
demonstration and a run with adapters each train three steps, and what was saved is evaluated; on
Python 3.10 the loop must refuse. Exit status 1 if any of it did not.

An oldest environment holds exactly the lower bounds: they are read from pyproject.toml.

torch comes from --index, or from PyPI: for x86-64 these are builds for CUDA, of which only what is
needed on a CPU is fetched (fetch_torch.py).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from benchmarks.stamp import commit
from tools.environments import ROOT, Environment, Workshop, install, interpreter

TESTS = ["tests/kernels/test_losses.py"]  # every loss, by every back-end, against the oracle
STEPS = 3


ENVIRONMENTS = (
    Environment("oldest kernels", "3.10", oldest=True, loop=False, pins=("triton==3.4.0",)),
    Environment("oldest loop", "3.11", oldest=True, pins=("triton==3.4.0",)),
    Environment("between", "3.12", pins=("torch==2.11.0", "triton==3.6.0")),
    Environment("newest", "3.13"),
)
PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "numpy", "pillow", "safetensors"),
    *("pyyaml", "tqdm", "matplotlib", "scikit-learn", "peft"),
)


@dataclass
class Result:
    """What came of one environment."""

    environment: Environment
    versions: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    loop: str = ""
    faults: list[str] = field(default_factory=list)


VERSIONS = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
found = {"python": platform.python_version()}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = ""
print(json.dumps(found))
"""


def test_kernels(shop: Workshop, result: Result) -> None:
    """The sample, from a copy of the tests that sees no kepo_kernels but the installed one."""
    said = shop.run(shop.python, "-m", "kepo_kernels")
    if "cpu     live" not in said:
        result.faults.append("the C++ rows are not live")
    shutil.copytree(ROOT / "tests", shop.folder / "tests")
    shutil.copy(ROOT / "pyproject.toml", shop.folder)
    counts = shop.folder / "counts.xml"
    words = ["-q", "-p", "no:cacheprovider", "-o", "pythonpath=tests/support"]
    words += [f"--junitxml={counts}", *TESTS]
    try:
        shop.run(shop.python, "-m", "pytest", *words)
    except SystemExit:
        result.faults.append("kernel tests failed")
    suite = next(ElementTree.parse(counts).iter("testsuite"))
    found = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    result.failed = found["failures"] + found["errors"]
    result.skipped = found["skipped"]
    result.passed = found["tests"] - result.failed - result.skipped
    if not result.passed:
        result.faults.append("no kernel test ran")


RECIPE = f"""
student: demo/student
teacher: demo/teacher
train_data: demo/data/train
run_dir: adapters
lora_rank: 4
lr: 1e-3
kl_coef: 1e-2
gate_reward: None
steps: {STEPS}
save_every: {STEPS}
prompts_per_step: 2
num_generations: 4
max_completion_length: 8
"""


def train(shop: Workshop, result: Result) -> None:
    """The demonstration in small, a run with adapters, and an evaluation of what that saved."""
    small = {"root": "demo", "steps": STEPS, "teacher-steps": 2, "warmup-steps": 2}
    small |= {"supervised-batch": 4, "train-questions": 8, "test-questions": 2}
    flags = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    shop.run(shop.python, "-m", "kepo", "demo", *flags)
    (shop.folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    shop.run(shop.python, "-m", "kepo", "train", "recipe.yaml")
    saved = shop.folder / "adapters" / "checkpoints" / f"step-{STEPS:08d}" / "policy"
    for model in (shop.folder / "demo" / "checkpoints" / saved.parent.name / "policy", saved):
        words = ["--limit", "1", "--max-completion-length", "4", "--json", "found.json"]
        shop.run(shop.python, "-m", "kepo", "evaluate", model, "demo/data/test", *words)
    done = []
    for run in ("demo", "adapters"):
        lines = (shop.folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        steps = [r for r in records if "step_time" in r and math.isfinite(r["grad_norm"])]
        done.append(len(steps))
        if len(steps) != STEPS or not (shop.folder / run / "curves.png").exists():
            result.faults.append(f"{run}: {len(steps)} steps")
    result.loop = f"{done[0]} + {done[1]} steps"


def refuse(shop: Workshop, result: Result) -> None:
    """On Python 3.10 the loop is one sentence."""
    said = shop.run(shop.python, "-m", "kepo", "train", fails=True)
    if said.startswith("error: kepo, the training loop, needs Python 3.11"):
        result.loop = "refused"
    else:
        result.faults.append("the loop does not refuse Python 3.10 by name")


def one(environment: Environment, work: Path, wheel: Path, index: str | None, log: list) -> Result:
    """Installs, tests, trains; the environment is removed afterwards."""
    result = Result(environment)
    folder = work / environment.name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shop = Workshop(folder, log)
    log.append(f"{environment.name}: Python {environment.python}")
    try:
        if interpreter(environment.python) is None:
            raise SystemExit(f"no Python {environment.python} here: put python3.x on the PATH")
        install(shop, environment, wheel, index)
        result.versions = json.loads(shop.run(shop.python, "-c", VERSIONS, *PACKAGES))
        test_kernels(shop, result)
        (train if environment.loop else refuse)(shop, result)
        shutil.rmtree(folder)
    except SystemExit as error:
        print(error, flush=True)
        result.faults.append(str(error).splitlines()[0].replace(str(folder), "."))
    return result


def build(work: Path) -> Path:
    """A wheel from a copy of the sources alone: what an earlier build left is not in it."""
    source, built = work / "source", work / "wheel"
    for folder in (source, built):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir()
    left = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    for name in ("csrc", "kepo", "kepo_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=left)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", built, source]
    subprocess.run(command, env=os.environ | {"KEPO_REQUIRE_EXT": "1"}, check=True)
    (wheel,) = built.glob("*.whl")
    return wheel


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    logs: dict[str, list[str]] = {}
    wheel = build(work)
    chosen = [e for e in ENVIRONMENTS if args.only is None or e.name in args.only]
    results = []
    for environment in chosen:
        print(f"--- {environment.name}: Python {environment.python}", flush=True)
        log = logs[environment.name] = []
        results.append(one(environment, work, wheel, args.index, log))
        print_result(results[-1])
        if args.csv:
            write(args.csv, results, logs)
    return 1 if any(result.faults for result in results) else 0


def print_result(result: Result) -> None:
    print("  " + ", ".join(f"{name} {found}" for name, found in result.versions.items() if found))
    print(f"  kernel tests: {result.passed} passed, {result.failed} failed; loop: {result.loop}")
    for fault in result.faults:
        print(f"  FAULT: {fault}")


def write(path: Path, results: list[Result], logs: dict[str, list[str]]) -> None:
    """The table, and beside it the log; environments that did not run keep what is there, but for
    packages that the table has no longer."""
    about = {"commit": commit(), "date": time.strftime("%Y-%m-%d")}
    columns = ["environment", "python", *PACKAGES, "passed", "failed", "skipped", "loop", "faults"]
    known, said = {}, {}
    log = path.with_suffix(".log")
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            known = {row["environment"]: row for row in csv.DictReader(file)}
        sections = log.read_text(encoding="utf-8").split("==== ")[1:]
        said = {section.partition(":")[0]: section.strip() for section in sections}
    for result in results:
        name = result.environment.name
        row = {"environment": name, **result.versions, **about}
        row |= {x: getattr(result, x) for x in ("passed", "failed", "skipped", "loop")}
        known[name] = row | {"faults": "; ".join(result.faults)}
        said[name] = "\n".join(logs[name]).strip()
    order = [e.name for e in ENVIRONMENTS if e.name in known]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, [*columns, *about], restval="", extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(known[name] for name in order)
    text = "\n\n".join(f"==== {said[name]}" for name in order)
    log.write_text(text + "\n", encoding="utf-8")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("work", type=Path, help="folder for the environments, 3 GB each, one at a time")
    add("--only", nargs="+", choices=[e.name for e in ENVIRONMENTS], help="these environments")
    add("--index", help="where torch comes from; left out = PyPI, without CUDA's libraries")
    add("--csv", type=Path, help="write the table here, and the log beside it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
