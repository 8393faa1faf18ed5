"""With masks, gates and weights on the CPU the host never waits for a GPU: plan, forward, backward.

Shown on a device that computes on the CPU and refuses to be waited for (tests/pretend_cuda.py),
with torch's and with Triton's rows. So the paths of a GPU are also judged by the oracle here:
products from 16 to 32 bits, gradients in a buffer of their own, no row left out after the forward.
"""

from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from cases import listed
from checks import assert_close_to_oracle, make_problem, unavailable
from loss_calls import (
    LOSSES,
    OPTIONS,
    Arguments,
    arguments,
    each_tensor,
    evaluate,
    function_of,
    plain,
)
from pretend_cuda import HostWaits, numbers, on_device, pretend_cuda
from torch import Tensor

import kepo_kernels
from benchmarks.gpu import oracle
from kepo_kernels import Head, KepoInputError, LoRA
from kepo_kernels.compute import gemm, sweep

PLANNING = ("completion_mask", "gate", "weights", "policy_weights", "distill_weights")


@pytest.fixture(params=["torch", "triton"])
def rows(request) -> str:
    if reason := unavailable(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def moved(call: Arguments, there: tuple[str, ...] = ()) -> Arguments:
    """All tensors on the device but those that plan the rows, of which only those `there`."""
    return {
        name: x if name in PLANNING and name not in there else each_tensor(x, on_device)
        for name, x in call.items()
    }


def run(loss: str, call: Arguments, there: tuple[str, ...] = (), **waits: bool):
    with pretend_cuda(**waits):
        found = evaluate(function_of(loss), moved(call, there))
        return {name: numbers(x) for name, x in found.items()}


def assert_right(loss: str, call: Arguments, **how: object) -> None:
    oracle = plain(loss, call)
    for name, x in run(loss, call, **how).items():
        assert_close_to_oracle(x, oracle[name], name=name)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_wait_for_nothing(loss, rows):
    problem = make_problem(length=5)
    assert_right(loss, arguments(loss, problem, OPTIONS[loss], chunk_rows=4, impl=rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_wait_for_nothing(dtype, rows, monkeypatch):
    """The problems of `make gpu`, in the products and the bounds of a GPU."""
    monkeypatch.setattr(oracle, "poison", lambda device: None)
    problem = oracle.make(torch.device("cpu"), (2, 4, 16, 24, 203), dtype, bias=True)
    for name, loss in oracle.LOSSES.items():
        with monkeypatch.context() as patch:
            patch.setattr(gemm, "dlogits_dtype", lambda dtype, *_: dtype)  # as on CUDA
            truth, rounded = oracle.oracle_of(loss, problem)
        with pretend_cuda():
            p = there(problem)
            found = oracle.evaluate(loss, p, True, impl=rows, chunk_rows=3)
            found = [numbers(x) for x in found]
        for part, *of in zip(("loss", *"xwb"), found, truth, rounded, strict=True):
            oracle.judge(f"{name}, {part}", *of)


def there(problem: oracle.Problem) -> oracle.Problem:
    """On the device, but for gate and mask."""
    tensors = {f.name: getattr(problem, f.name) for f in fields(problem)}
    return replace(
        problem,
        **{
            name: on_device(x).requires_grad_(x.requires_grad)
            for name, x in tensors.items()
            if isinstance(x, Tensor) and name not in ("gate", "mask")
        },
    )


def drawn() -> Tensor:
    """Weights that are the same in every run, though they are made at import."""
    return torch.rand(3, 5, generator=torch.Generator().manual_seed(0))


SETTINGS = {
    "no mask": ("grpo", {"completion_mask": None}),
    "no mask, no gate": ("gated_kd", {"completion_mask": None, "gate": None}),
    "sapo": ("grpo", {"policy_loss": "sapo"}),
    "cispo, penalty, bonus": ("grpo", {"policy_loss": "cispo", "entropy_coef": 0.1}),
    "sequences in chunks": ("grpo", {"importance_level": "sequence"}),
    "sequences cut": ("grpo", {"importance_level": "sequence", "chunk_rows": 2}),
    "sequences, distilled": ("kepo", {"importance_level": "sequence", "chunk_rows": 2}),
    "every gate closed": ("kepo", {"gate": torch.zeros(3)}),
    "weights": ("gated_kd", {"weights": drawn()}),
    "both weights": (
        "kepo",
        {"policy_weights": drawn(), "distill_weights": drawn()},
    ),
    "no teacher": (
        "kepo",
        dict.fromkeys(("teacher_hidden", "teacher_lm_head", "teacher_bias", "gate")),
    ),
    "no policy": ("kepo", dict.fromkeys(("targets", "advantages", "old_logprobs"))),
    "weights, no gate": ("kepo", {"gate": None, "distill_weights": drawn()}),
    "statistics": ("kepo", {"beta": 1.0}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_wait_for_nothing(name):
    loss, settings = SETTINGS[name]
    call = arguments(loss, make_problem(length=5), OPTIONS[loss]) | settings
    assert_right(loss, call | {"impl": "torch"})


def test_states_of_the_open_sequences_wait_for_nothing(rows):
    """Weights on the CPU say who is open, and where a row stands in these states."""
    call = arguments("kepo", make_problem(length=5), OPTIONS["kepo"], impl=rows)
    call |= {"gate": None, "distill_weights": torch.rand(3, 5) * torch.tensor([[1], [0], [1]])}
    oracle = plain("kepo", call)
    found = run("kepo", call | {"teacher_hidden": call["teacher_hidden"][[0, 2]]})
    for name, x in found.items():
        assert_close_to_oracle(x, oracle[name], name=name)


@pytest.mark.parametrize("kind", ["states", "tokens"])
def test_a_stored_teacher_waits_for_nothing(kind, rows):
    """It stays on the CPU, all of it or the open sequences, and is copied chunk by chunk."""
    call = arguments("kepo", make_problem(length=5), OPTIONS["kepo"], impl=rows, chunk_rows=4)
    call = call if kind == "states" else listed(6)(call)
    oracle = plain("kepo", call)
    opened = call["gate"]
    for teacher in (
        call["teacher_hidden"],
        each_tensor(call["teacher_hidden"], lambda x: x[opened]),
    ):
        with pretend_cuda():
            there = moved(call) | {"teacher_hidden": teacher}
            found = evaluate(function_of("kepo"), there)
            found = {name: numbers(x) for name, x in found.items()}
        for name, x in found.items():
            assert_close_to_oracle(x, oracle[name], name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_in_sixteen_bits_wait_for_nothing(dtype, rows):
    """Their entries are written into a gradient of 16 bits, with fp16's factor in it."""
    problem = make_problem(length=5, dtype=dtype, std=3.0)
    call = listed(6)(arguments("kepo", problem, OPTIONS["kepo"], impl=rows, chunk_rows=4))
    oracle = plain("kepo", call)
    for name, x in run("kepo", call).items():
        error = (x.double() - oracle[name]).norm() / oracle[name].norm()
        assert error < (1e-5 if name == "loss" else 3 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("kind", ["states", "tokens"])
def test_a_stored_teacher_of_a_divergence(kind, rows):
    """Also where backward computes the logits again, and where tensors on the device say who is
    open: then the host waits once."""
    call = arguments("gated_kd", make_problem(length=5), "completion_mask", impl=rows, chunk_rows=4)
    call = call if kind == "states" else listed(6)(call)
    upstream = torch.randn(3, 5)

    def total(upstream: Tensor, **call: object) -> Tensor:
        return (kepo_kernels.fused_linear_divergence(**call) * upstream).sum()

    expected = evaluate(partial(total, upstream), call)
    for where, waits in (((), False), (("completion_mask",), True)):
        with pretend_cuda(may_wait=waits):
            there = moved(call, where) | {"teacher_hidden": call["teacher_hidden"]}
            found = evaluate(partial(total, on_device(upstream)), there)
            found = {name: numbers(x) for name, x in found.items()}
        for name, x in found.items():
            torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-6)


def test_a_head_of_its_own_waits_for_nothing():
    problem = make_problem(length=5)
    lora = LoRA(torch.randn(2, problem.hidden.shape[-1]), torch.randn(len(problem.lm_head), 2))
    call = arguments("kepo", problem, OPTIONS["kepo"], impl="torch")
    assert_right("kepo", call | {"lm_head": Head(problem.lm_head, 5.0, 1.5, lora)})


def test_the_open_calls_wait_for_nothing(rows):
    problem = make_problem(length=5)
    call = arguments("gated_kd", problem, "gate completion_mask targets") | {"impl": rows}

    def both(**call: object) -> Tensor:
        def token_loss(stats, rows):
            return stats.divergence - stats.logprobs

        logprobs = {k: x for k, x in call.items() if "teacher" not in k and k != "gate"}
        found, entropy = kepo_kernels.fused_linear_logprobs(**logprobs, return_entropy=True)
        open_door = kepo_kernels.fused_linear_loss(**call, token_loss=token_loss)
        return found.sum() + entropy.sum() + open_door

    on_cpu = evaluate(both, call)
    with pretend_cuda():
        found = {name: numbers(x) for name, x in evaluate(both, moved(call)).items()}
    for name, x in found.items():
        torch.testing.assert_close(x, on_cpu[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("there", [("gate",), ("completion_mask",), ("gate", "completion_mask")])
def test_one_of_them_on_the_device_is_waited_for_and_right(there):
    call = arguments("kepo", make_problem(length=5), OPTIONS["kepo"], impl="torch")
    assert_right("kepo", call, there=there, may_wait=True)
    with pytest.raises(HostWaits):
        run("kepo", call, there)


def test_waiting_is_noticed(monkeypatch):
    """Of the losses, and of what a caller's own loss does."""
    problem = make_problem(length=5)
    call = arguments("gated_kd", problem, "completion_mask", targets=problem.targets, impl="torch")
    waiting = {
        "item": lambda x: x.sum().item(),
        "bool": lambda x: bool((x > 0).any()),
        "float": lambda x: float(x.detach()[0]),
        "to": lambda x: x.to("cpu", non_blocking=True),
        "cpu": lambda x: x.cpu(),
        "nonzero": lambda x: x.nonzero(),
        "mask": lambda x: x[x > 0],
        "masked write": lambda x: x.detach().clone().__setitem__(x > 0, x[0].detach()),
        "unique": lambda x: x.unique_consecutive(),
        "new_tensor": lambda x: x.new_tensor(1.0),
        "unpinned": lambda x: torch.ones(3).to(x.device, non_blocking=True),
        "blocking": lambda x: torch.ones(3).pin_memory().to(x.device),
        "index on the CPU": lambda x: x[torch.tensor([0])],
    }
    for name, wait in waiting.items():

        def token_loss(stats, rows, wait=wait):
            wait(stats.divergence)
            return stats.divergence

        with pytest.raises(HostWaits), pretend_cuda():
            kepo_kernels.fused_linear_loss(**moved(call), token_loss=token_loss)
            pytest.fail(f"{name} was not noticed")

    def looks(coefficients: Tensor) -> Tensor:
        return coefficients.ne(0).any(0).nonzero().squeeze(-1)

    monkeypatch.setattr(sweep, "live_rows", looks)
    with pytest.raises(HostWaits, match="nonzero"):
        run("gated_kd", {name: x for name, x in call.items() if name != "targets"})


def test_any_other_mix_of_devices_is_refused():
    call = arguments("kepo", make_problem(length=5), OPTIONS["kepo"])
    for name in ("targets", "advantages", "old_logprobs", "lm_head", "teacher_lm_head", "bias"):
        with pretend_cuda(), pytest.raises(KepoInputError, match=f"{name} on cpu; move one"):
            kepo_kernels.fused_kepo_loss(**moved(call) | {name: call[name]})
    with pretend_cuda(), pytest.raises(KepoInputError, match="completion_mask on cuda:0; move"):
        elsewhere = {"completion_mask": on_device(call["completion_mask"])}
        kepo_kernels.fused_kepo_loss(**call | elsewhere)
