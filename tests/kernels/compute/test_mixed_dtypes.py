"""States, heads, LoRA and biases of different dtypes: fp32 products, each gradient of its own."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from checks import assert_close_to_oracle, make_problem
from loss_calls import LOSSES, arguments, fused, logprobs_sum, plain, trainable
from test_memory import allocations

import kepo_kernels
from kepo_kernels import Head, KepoInputError, LoRA, reference
from kepo_kernels.compute import gemm
from kepo_kernels.compute.chunks import chunking

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
PAIRS = ((BF16, FP32), (FP32, BF16), (FP16, FP32), (FP32, FP16), (BF16, FP16))
OPTIONS = {
    "gated_kd": "gate completion_mask bias teacher_bias",
    "grpo": "completion_mask old_logprobs bias",
    "kepo": "completion_mask old_logprobs bias",
}


def call_of(loss: str, states: torch.dtype, head: torch.dtype, **settings: object) -> dict:
    """Logits of std 6 in bf16 would be wrong in the second digit."""
    problem = make_problem(length=5, hidden=32, vocab=67, teacher_vocab=71, std=6.0)
    problem = replace(
        problem,
        hidden=problem.hidden.to(states),
        teacher_hidden=problem.teacher_hidden.to(states),
        lm_head=problem.lm_head.to(head),
        teacher_lm_head=problem.teacher_lm_head.to(head),
        bias=problem.bias.to(head),
    )
    return arguments(loss, problem, OPTIONS[loss], **settings)


def assert_right(loss: str, call: dict, impl: str, frozen: tuple[str, ...] = ()) -> None:
    """To the fp32 tolerance; a 16-bit gradient to its rounding."""
    actual, oracle = fused(loss, call, impl, frozen), plain(loss, call, frozen=frozen)
    assert actual.keys() == oracle.keys() and actual["loss"].dtype == FP32
    given = trainable(call)
    for name, x in actual.items():
        assert name == "loss" or x.dtype == given[name].dtype, name
        assert_close_to_oracle(x, oracle[name], name=name)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("states", "head"), PAIRS, ids=str)
def test_every_pairing(impl, loss, states, head):
    if impl == "triton" and (loss != "kepo" or FP16 in (states, head)):
        return  # it sees fp32 logits, of whatever
    assert_right(loss, call_of(loss, states, head, chunk_rows=4), impl)


@pytest.mark.parametrize("fast", [False, True])
def test_with_and_without_bf16_instructions(monkeypatch, fast):
    """Where bf16 is multiplied as such, nothing of a mixed call is."""
    monkeypatch.setattr(gemm, "fast_bf16", lambda device: fast)
    for states, head in PAIRS:
        assert_right("kepo", call_of("kepo", states, head), "torch")


@pytest.mark.parametrize(("weight", "adapter"), [(BF16, FP32), (FP32, BF16), (BF16, FP16)], ids=str)
@pytest.mark.parametrize("frozen", [(), ("lm_head",), ("hidden",)])
def test_adapters(weight, adapter, frozen):
    """PEFT keeps a LoRA in fp32 on a bf16 head."""
    call = call_of("grpo", weight, weight)
    lora = LoRA(torch.randn(4, 32).to(adapter), torch.randn(67, 4).to(adapter), 0.5)
    call["lm_head"] = Head(call["lm_head"], softcap=9.0, lora=lora)
    assert_right("grpo", call, "torch", frozen)
    assert_right("grpo", call | {"grad_tol": 1e-12}, "torch", frozen)


@pytest.mark.parametrize(
    ("student", "teacher"), [(FP32, BF16), (BF16, FP32), (BF16, FP16)], ids=str
)
def test_a_teacher_of_another_dtype(impl, student, teacher):
    call = call_of("gated_kd", student, student)
    for name in ("teacher_hidden", "teacher_lm_head"):
        call[name] = call[name].to(teacher)
    assert_right("gated_kd", call, impl)


def test_log_probabilities():
    """Whose backward computes the logits again."""
    for states, head in PAIRS:
        call = call_of("grpo", states, head)
        names = ("hidden", "lm_head", "targets", "completion_mask", "bias")
        call = {name: call[name] for name in names}
        leaves = [call[name].requires_grad_() for name in ("hidden", "lm_head", "bias")]
        found = torch.autograd.grad(logprobs_sum(**call), leaves)
        exact = {n: x.detach().double() if x.is_floating_point() else x for n, x in call.items()}
        wide = [exact[name].requires_grad_() for name in ("hidden", "lm_head", "bias")]
        oracle = torch.autograd.grad(logprobs_sum(**exact), wide)
        for name, x, y, leaf in zip(("hidden", "head", "bias"), found, oracle, leaves, strict=True):
            assert x.dtype == leaf.dtype
            assert_close_to_oracle(x, y, name=name)


def test_the_oracle_takes_them_too():
    """The product in the wider of the two."""
    x, w = torch.randn(5, 8), torch.randn(9, 8)
    for states, head in PAIRS:
        logits = reference.project(x.to(states), w.to(head))
        assert torch.equal(logits, x.to(states).float() @ w.to(head).float().T)
    with pytest.raises(KepoInputError, match="float64 goes with float64 alone"):
        kepo_kernels.fused_linear_logprobs(x, w.double(), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(KepoInputError, match=r"logits_dtype=torch\.bfloat16 with torch\.float32"):
        call = call_of("grpo", BF16, FP32, logits_dtype=BF16)
        kepo_kernels.fused_grpo_loss(**call)


@pytest.mark.parametrize(("states", "head"), PAIRS[:4], ids=str)
@pytest.mark.parametrize("trains", [("hidden", "lm_head"), ("hidden",)])
def test_the_plan_holds(states, head, trains, unpoisoned):
    """`workspace_bytes` as it is measured, forward and backward."""
    rows, width, vocab = 96, 256, 3001
    hidden = torch.randn(rows, width).to(states).requires_grad_("hidden" in trains)
    weight = torch.randn(vocab, width).to(head).requires_grad_("lm_head" in trains)
    targets, advantages = torch.randint(vocab, (rows,)), torch.randn(rows)
    advantages[::3] = 0.0
    made = partial(chunking, rows, width, vocab, dtype=states, head_dtype=head, trains=trains)
    for workspace in (made(chunk_rows=1).least_workspace_bytes, 3 << 20, 8 << 20):
        settings = {"workspace_bytes": workspace}
        counted = made(**settings)

        def forward(settings=settings):
            call = hidden, weight, targets, advantages
            return kepo_kernels.fused_grpo_loss(*call, entropy_coef=0.1, **settings)

        forward()
        leaves = [x for x in (hidden, weight) if x.requires_grad]
        wide = sum(x.numel() * 4 for x in leaves)
        returned = sum(x.numel() * x.itemsize for x in leaves)
        peak, loss = allocations(forward)
        assert peak - wide <= counted.workspace_bytes <= workspace
        peak, _ = allocations(lambda loss=loss, to=leaves: torch.autograd.grad(loss, to))
        assert peak - returned <= workspace
        assert counted.gradient_bytes == wide + returned


@pytest.mark.parametrize(("states", "head"), PAIRS, ids=str)
def test_the_plan_counts_fp32_logits_where_bf16_products_are_fast(monkeypatch, states, head):
    """A call's logits are bf16 there only if states and head both are."""
    monkeypatch.setattr(gemm, "fast_bf16", lambda device: True)
    made = partial(chunking, 1024, 64, 32768, dtype=states, head_dtype=head, chunk_rows=256)
    assert made() == made(logits_dtype=FP32) != made(logits_dtype=BF16)
