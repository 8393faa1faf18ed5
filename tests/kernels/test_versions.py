"""A Triton or a torch that is too old is named, with the oldest that will do and the remedy."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kepo_kernels import heads, versions
from kepo_kernels.errors import KepoInputError
from kepo_kernels.rows import dispatch, triton_rows

CUDA = torch.device("cuda")


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Triton is there and compiles for a device, as far as `unavailable` can see."""
    monkeypatch.setattr(triton_rows, "IMPORT_ERROR", None)
    monkeypatch.setattr(triton_rows, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(versions, "triton_version", lambda: "3.6.0")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("3.4.0", (3, 4, 0)),
        ("3.4.0+git1a2b3c", (3, 4, 0)),
        ("3.10.0", (3, 10, 0)),
        ("2.10.0a0+gitdeadbeef", (2, 10, 0)),
        ("2.10.0.dev20251120+rocm7.1", (2, 10, 0)),
        ("3.4", (3, 4)),
        ("unknown", ()),
    ],
)
def test_release(words, expected):
    assert versions.release(words) == expected


@pytest.mark.parametrize("found", ["3.3.1", "3.3.1+git", "2.1.0", "3.3"])
def test_a_triton_that_is_too_old_is_refused(on_a_gpu, monkeypatch, found):
    monkeypatch.setattr(versions, "triton_version", lambda: found)
    reason = triton_rows.unavailable()
    assert reason.startswith(f"triton {found} is too old: ")
    assert "triton >= 3.4" in reason and "pip install --upgrade torch" in reason
    with pytest.raises(KepoInputError, match=r"impl='triton' cannot be used here: triton .* too"):
        dispatch.pick_rows("triton", CUDA, torch.float32)


@pytest.mark.parametrize("found", ["3.4.0", "3.4", "3.4.0+git", "3.10.0", "4.0.0", "unknown"])
def test_others_are_not(on_a_gpu, monkeypatch, found):
    monkeypatch.setattr(versions, "triton_version", lambda: found)
    assert triton_rows.unavailable() is None


@pytest.mark.parametrize("impl", ["auto", "triton", "torch"])
def test_a_torch_that_is_too_old_for_rocm_is_refused(on_a_gpu, monkeypatch, impl):
    """Whichever back-end works on the rows: it is the product that fails."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch, "__version__", "2.9.1+rocm6.4")
    assert "torch >= 2.10" in triton_rows.unavailable()
    with pytest.raises(KepoInputError, match=r"torch 2\.9\.1\+rocm6\.4 is too old for ROCm"):
        dispatch.pick_rows(impl, CUDA, torch.float32)
    assert dispatch.pick_rows("auto", torch.device("cpu"), torch.float32)
    assert dispatch.pick_rows("torch", CUDA, torch.float64)  # plain products


@pytest.mark.parametrize(
    ("hip", "found"), [("7.1", "2.10.0+rocm7.1"), ("7.1", "2.10.0a0"), (None, "2.8.0+cu128")]
)
def test_other_torches_are_not(on_a_gpu, monkeypatch, hip, found):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "__version__", found)
    assert triton_rows.unavailable() is None
    assert dispatch.pick_rows("auto", CUDA, torch.float32) is triton_rows


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("__version__ = '3.3.1'", "triton 3.3.1 is too old: the kernels need triton >= 3.4"),
        ("raise ImportError('there is none')", "triton cannot be imported: there is none"),
    ],
    ids=["old", "missing"],
)
def test_the_command_names_it(tmp_path, source, words):
    """`python -m kepo_kernels` where another Triton comes first on the path."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(
        f"{source}\njit = lambda kernel=None, **_: kernel or jit\n"
    )
    (tmp_path / "triton" / "language.py").write_text("class constexpr: ...\n")
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {root!r}]; sys.argv = ['kepo_kernels']; "
    )
    code += "import runpy; runpy.run_module('kepo_kernels', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"triton  not live: {words}" in done.stdout
    first = done.stdout.splitlines()[0]
    assert first.endswith("triton 3.3.1" if "3.3.1" in words else "no triton")


@pytest.mark.parametrize(
    ("version", "mesh", "size", "refused"),
    [
        ("2.8.0+cu128", "cpu", 2, True),
        ("2.8.0+cu128", "cpu", 1, False),
        ("2.8.0+cu128", "cuda", 2, False),
        ("2.9.0", "cpu", 2, False),
    ],
)
def test_a_torch_that_shards_wrongly_on_cpus_is_refused(monkeypatch, version, mesh, size, refused):
    """In 2.8 gloo takes an average for a sum. Weights of a GPU mesh may be offloaded to the CPU."""
    monkeypatch.setattr(torch, "__version__", version)
    group, head = SimpleNamespace(unshard=lambda: None), SimpleNamespace()
    mesh = SimpleNamespace(device_type=mesh, size=lambda: size)
    head.weight = type("DTensor", (), {"device_mesh": mesh})()
    monkeypatch.setattr(heads, "_holders", lambda model, layer: [group])
    if not refused:
        assert heads._fsdp2_holder(None, head) is group
        return
    with pytest.raises(KepoInputError, match=r"adds up the gradients .* needs torch >= 2\.9"):
        heads._fsdp2_holder(None, head)
    with torch.no_grad():
        assert heads._fsdp2_holder(None, head) is group


def test_the_loop_refuses_it_too(monkeypatch):
    sharding = pytest.importorskip("kepo.distributed.sharding", reason="the loop is not installed")
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"needs torch >= 2\.9"):
        sharding.shard(torch.nn.Linear(2, 2), [], torch.device("cpu"), torch.float32)
