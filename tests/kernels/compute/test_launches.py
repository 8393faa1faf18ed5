"""How often a call launches something on a GPU, at a model's size: each launch costs the host time.

Counted on a device that has no memory (tests/pretend_cuda.py): the calls are the real ones, in the
chunks that they are cut into on an H100 or H200. Gate and mask are not given, or on the CPU: those
on the device cost some more to look at. `pytest -s` prints the table.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from checks import unavailable
from pretend_cuda import Launches, pretend_cuda
from torch import Tensor

import kepo_kernels
from kepo_kernels.compute import autograd, problem

HOPPER = {"multiprocessors": 132, "gpu_memory": 80 << 30}
TOKENS = 16  # of a sequence


class Size(NamedTuple):
    rows: int
    hidden: int
    teacher_hidden: int
    vocab: int


MODEL = Size(8192, 2048, 5120, 151_936)
SMALL = Size(64, 16, 24, 203)
# By case: most launches of forward and backward, and what there were when this was written.
MOST = {
    "kd_open": 250,  # 125
    "kd_half": 150,  # 69
    "grpo": 320,  # 291
    "joint": 360,  # 328
    "joint_half": 350,  # 318
    "logprobs": 120,  # 95
    "logprobs_forward": 40,  # 32
}

pytestmark = pytest.mark.skipif(unavailable("triton") is not None, reason="no Triton here")


@pytest.fixture(autouse=True)
def hopper(unpoisoned, monkeypatch):  # to poison what is empty would be counted
    monkeypatch.setattr(
        problem, "gpu_at_hand", lambda device: HOPPER if device.type == "cuda" else {}
    )


def count(case: str, size: Size = MODEL, memory: bool = False, **engine: object) -> Launches:
    """Of forward and backward; the tensors of the call are made before."""
    with pretend_cuda(memory=memory) as launches:
        call = prepared(case, size, engine)
        for kind in launches:
            kind.clear()
        call()
    return launches


def prepared(case: str, size: Size, engine: dict[str, object]) -> Callable[[], object]:
    batch = size.rows // TOKENS

    def there(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device="cuda")

    def per_token(dtype: torch.dtype) -> Tensor:
        return there(batch, TOKENS, dtype=dtype)

    hidden = there(batch, TOKENS, size.hidden).requires_grad_()
    lm_head = there(size.vocab, size.hidden).requires_grad_()
    teacher = there(batch, TOKENS, size.teacher_hidden), there(size.vocab, size.teacher_hidden)
    targets, advantages = per_token(torch.int64), there(batch, dtype=torch.float32)
    old = {"old_logprobs": per_token(torch.float32)}
    upstream = per_token(torch.float32)
    gate = torch.arange(batch) % 2 == 0 if case.endswith("half") else None
    student, policy = (hidden, lm_head), (targets, advantages)

    def loss() -> Tensor:
        if case.startswith("kd"):
            return kepo_kernels.fused_gated_kd_loss(*student, *teacher, gate=gate, **engine)
        if case == "grpo":
            return kepo_kernels.fused_grpo_loss(*student, *policy, **old, **engine)
        if case.startswith("joint"):
            call = student + policy + teacher
            return kepo_kernels.fused_kepo_loss(*call, gate=gate, **old, **engine)
        logprobs = kepo_kernels.fused_linear_logprobs(*student, targets, **engine)
        return (logprobs * upstream).sum()

    if case == "logprobs_forward":
        return torch.no_grad()(lambda: kepo_kernels.fused_linear_logprobs(*student, targets))
    return lambda: torch.autograd.grad(loss(), student)


@pytest.mark.parametrize("case", MOST)
def test_launches_at_the_size_of_a_model(case):
    found = count(case)
    kinds = zip(Launches._fields, found, strict=True)
    words = ", ".join(f"{name} {kind.total()}" for name, kind in kinds)
    print(f"\n{case:16} {found.total:4} launches: {words}")
    assert found.total <= MOST[case]


def test_all_that_is_large_is_counted():
    """Four chunks of 2048 rows: in each two logits, and both gradients of the products."""
    found = count("kd_open")
    assert found.triton == {
        "softmax_kernel": 8,
        "row_kernel": 4,
        "divergence_kernel": 4,
        "finish_kernel": 4,
        "backward_kernel": 4,
        "scaled_kernel": 2,
    }
    assert found.products == {
        "aten.mm.dtype_out": 4 + 4 + 1,  # both logits, and dW of the first chunk
        "aten.mm.dtype": 4,  # dX
        "aten.addmm.dtype_out": 3,  # dW of the others
    }


@pytest.mark.parametrize("case", ["kd_open", "grpo", "joint_half", "logprobs"])
def test_launches_depend_on_the_number_of_chunks_alone(case):
    """On a device with numbers too, on which every kernel runs: no launch depends on them."""
    chunk_rows = SMALL.rows * 2048 // MODEL.rows
    assert count(case, SMALL, memory=True, chunk_rows=chunk_rows) == count(case)
    assert count(case, SMALL, chunk_rows=2 * chunk_rows) != count(case)


def test_what_launches_and_what_does_not():
    with pretend_cuda(memory=False) as launches:
        x = torch.empty(8, 4, device="cuda")
        x.view(4, 8).T[1:].unsqueeze(0).detach()
        torch.empty_like(x)
        torch.ones(3) + 1  # on the CPU
        assert launches.total == 0
        x.mul_(2).sum()  # 2
        torch.ones(3).pin_memory().to(x.device, non_blocking=True)  # 1
        torch.zeros(3, device="cuda")  # 1
        x.mT.contiguous()  # 1
    assert launches.total == launches.others.total() == 5


def test_blocks_of_the_head_would_be_seen(monkeypatch):
    """As it was: the head's gradient was scaled in the blocks of a CPU, in two launches each."""

    def in_blocks(gradient: Tensor, factor: Tensor, dtype: torch.dtype, rows=None) -> Tensor:
        step = (1 << 19) // gradient[:1].numel()
        out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
        for to, block in zip(out.split(step), gradient.split(step), strict=True):
            to.copy_(block * factor)
        return out

    monkeypatch.setattr(
        autograd, "scaled", lambda x, *rest: None if x is None else in_blocks(x, *rest)
    )
    assert count("kd_open").total > 1200
