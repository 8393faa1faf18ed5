"""Environments of their own, in which a wheel is installed beside a chosen torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("demo", "lora")  # and with demo train


@dataclass(frozen=True)
class Environment:
    """What is installed: ``pins`` fixed, the rest as pip chooses."""

    name: str
    python: str
    oldest: bool = False
    """At its lower bound everything that is promised."""
    loop: bool = True
    """The loop with its extras, or the kernels alone."""
    pins: tuple[str, ...] = ()


def bounds(extras: tuple[str, ...]) -> list[str]:
    """The lower bounds of the dependencies and these extras, as pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    pins = []
    for line in wanted:
        if own := re.fullmatch(r"kepo\[(\w+)\]", line):
            pins += bounds((own[1],))
        elif found := re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", line):
            pins.append(f"{found[1]}=={found[2]}")
        else:
            raise SystemExit(f"pyproject.toml: {line!r} has no lower bound to install")
    return list(dict.fromkeys(pins))


def interpreter(version: str) -> str | None:
    """A Python of that version: python3.x on the PATH, or one of pyenv's."""
    for found in (
        shutil.which(f"python{version}"),
        *map(str, sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))),
    ):
        words = "import sys; print('%d.%d' % sys.version_info[:2])"
        if found and output([found, "-c", words]).strip() == version:
            return found
    return None


def output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    return done.stdout if done.returncode == 0 else ""


class Workshop:
    """One environment's folder, and the log of what was run in it."""

    def __init__(self, folder: Path, log: list[str]):
        self.folder, self.log = folder, log
        self.python = folder / "env" / "bin" / "python"

    def run(self, *words: object, cwd: Path | None = None, fails: bool = False) -> str:
        """What the command printed; SystemExit if it failed (or with ``fails``, if it did not)."""
        command = [str(word) for word in words]
        dropped = ("KEPO_", "PYTHONPATH", "TRITON_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        env |= {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
        done = subprocess.run(
            command, cwd=cwd or self.folder, env=env, capture_output=True, text=True,
            errors="replace",
        )  # fmt: skip
        # Of a progress bar its last state.
        said = [line.rpartition("\r")[2] for line in (done.stdout + done.stderr).split("\n")]
        self.note("$ " + " ".join(command))
        for line in said[-30:]:
            self.note(line)
        if (done.returncode != 0) != fails:
            self.note(f"exit status {done.returncode}")
            raise SystemExit("\n".join([" ".join(command), *said[-30:]]))
        return "\n".join(said)

    def note(self, line: str) -> None:
        """A line of the log, without the names of this machine's folders; one that speaks of
        another place on it, such as a package index that pip finds nothing in, is left out."""
        names = {self.folder: ".", self.folder.parent: "WORK", ROOT: "CHECKOUT", Path.home(): "~"}
        for folder, name in names.items():
            line = line.replace(str(folder), name)
        line = re.sub(r"\S*/versions/(3\.\d+)[^/]*/bin/python", r"python\1", line)
        line = re.sub(r"^\$ \S*/(python3\.\d+)", r"$ \1", line).rstrip()
        if line and "file:///" not in line:
            self.log.append(line)

    def pip(self, *words: object) -> None:
        self.run(self.python, "-m", "pip", "install", "-q", *words)


def install(shop: Workshop, environment: Environment, wheel: Path, index: str | None) -> None:
    """torch first and alone, then the wheel, under a constraint that keeps that torch."""
    pins = [*environment.pins]
    if environment.oldest:
        pins += bounds(EXTRAS if environment.loop else ())
    torch = next((pin for pin in pins if pin.startswith("torch==")), "torch")
    shop.run(interpreter(environment.python), "-m", "venv", shop.folder / "env")
    if index is None:
        torch_without_cuda(shop, torch)
    else:
        shop.pip(torch, "--index-url", index)
    extras = f"[{','.join(EXTRAS)}]" if environment.loop else ""
    kept = f"torch=={shop.run(shop.python, '-c', VERSION_OF.format('torch')).split()[0]}"
    words = [f"kepo{extras} @ {wheel.as_uri()}", kept, *(pin for pin in pins if pin != torch)]
    if not any(pin.startswith("triton==") for pin in pins):
        words.append("triton")
    shop.pip(*words)
    # What the tests need; numpy only where the loop has not brought it.
    shop.pip(*words, "pytest", "pytest-timeout", "hypothesis", "numpy")


def torch_without_cuda(shop: Workshop, torch: str) -> None:
    """A build of torch for CUDA without most of CUDA's libraries, and without asking for them."""
    from tools.fetch_torch import companions, make_library, missing, torch_of

    shop.pip("--no-deps", torch)
    place = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(shop.run(shop.python, "-c", place).strip())
    alone, with_parts = companions(torch_of(site).requires or [])
    if small := [word for word in alone if not word.startswith("triton")]:
        shop.pip("--no-deps", *small)
    if with_parts:
        shop.pip(*with_parts)
    made = [make_library(site, soname, names) for soname, names in missing(site).items()]
    shop.note(f"stand-ins: {' '.join(made) or 'none'}")
    (about,) = site.glob("torch-*.dist-info/METADATA")
    lines = about.read_text(encoding="utf-8").splitlines(keepends=True)
    cuda = ("Requires-Dist: nvidia-", "Requires-Dist: cuda-", "Requires-Dist: triton")
    about.write_text("".join(x for x in lines if not x.startswith(cuda)), encoding="utf-8")


VERSION_OF = "from importlib.metadata import version; print(version('{}'))"
