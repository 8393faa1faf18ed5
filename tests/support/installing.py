"""Installing the package into environments that hold torch and what torch needs, nothing else."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def installs(test):
    return pytest.mark.slow(pytest.mark.packaging(test))


def run(command, *, cwd=ROOT, **environment):
    """Runs a command without this shell's build settings; returns the completed process."""
    dropped = ("KEPO_", "CXX", "LDFLAGS", "PYTHONPATH")
    env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)} | environment
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True
    )


def succeed(command, **kwargs) -> str:
    done = run(command, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


SMOKE = """
import importlib.util, torch, kepo_kernels
for absent in ("triton", "transformers"):
    assert importlib.util.find_spec(absent) is None, absent
hidden = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
lm_head = torch.randn(11, 8, generator=torch.Generator().manual_seed(1))
rows = torch.arange(6)
want = (hidden @ lm_head.T).log_softmax(-1)[rows, rows]
got = kepo_kernels.fused_linear_logprobs(hidden, lm_head, rows, impl="{impl}")
torch.testing.assert_close(got, want)
torch.testing.assert_close(*(torch.autograd.grad(x.sum(), hidden)[0] for x in (got, want)))
"""


def torch_and_its_needs(name: str = "torch", found: dict | None = None) -> dict:
    """Installed distributions that torch requires, Triton apart (CPU builds live without it)."""
    requirements = pytest.importorskip("packaging.requirements")
    found = {} if found is None else found
    if name not in found and name != "triton":
        found[name] = metadata.distribution(name)
        for line in found[name].requires or []:
            needed = requirements.Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                torch_and_its_needs(needed.name.lower(), found)
    return found


def torch_only_python(where: Path) -> Path:
    """A fresh environment, in which torch is linked, not copied."""
    succeed([sys.executable, "-m", "venv", "--without-pip", where])
    python = where / "bin" / "python"
    program = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(succeed([python, "-c", program]).strip())
    for distribution in torch_and_its_needs().values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return python


def pip(*arguments, python=sys.executable, **environment):
    return run([sys.executable, "-m", "pip", "--python", python, *arguments], **environment)


def wheel(source: Path, where: Path, *, isolated: bool = False, **environment) -> Path:
    isolation = [] if isolated else ["--no-build-isolation"]
    done = pip("wheel", "--no-deps", *isolation, "-w", where, source, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = where.glob("*.whl")
    return built
