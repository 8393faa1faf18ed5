"""The chunk loop: what is computed and what is not, in which order, and in how much memory."""

import os
import signal
import threading
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from checks import (
    device_of,
    make_problem,
    make_row_problem,
    rows_module,
    unavailable,
)
from loss_calls import (
    DIFFERENTIABLE,
    LOSSES,
    arguments,
    assert_right,
    assert_same_bits,
    call_of,
    evaluate,
    function_of,
    fused,
    leaves,
    logprobs_call,
    logprobs_sum,
)

import kepo_kernels
from kepo_kernels import KepoInputError
from kepo_kernels.compute import autograd, gemm
from kepo_kernels.rows.contract import RowSettings

# --------------------------------------------------------------------------- only what is asked for


@pytest.fixture
def work(monkeypatch) -> Counter:
    """How often each matrix product runs, and which gradients get a buffer."""
    count = Counter()

    def counted(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def counting(*args: object, **settings: object) -> object:
            count[name] += 1
            return function(*args, **settings)

        monkeypatch.setattr(owner, name, counting)

    for name in ("project_", "hidden_gradient", "accumulate_head_"):
        counted(gemm, name)
    empty = autograd.Gradients.empty

    def recording(*args: object) -> autograd.Gradients:
        gradients = empty(*args)
        for name, x in gradients._asdict().items():
            count[f"{name} buffer"] += x is not None
        return gradients

    monkeypatch.setattr(autograd.Gradients, "empty", recording)
    return count


WANTED = {
    ("hidden", "lm_head", "bias"): {"hidden_gradient": 2, "accumulate_head_": 2},
    ("hidden",): {"hidden_gradient": 2},
    ("lm_head",): {"accumulate_head_": 2},
    ("bias",): {},
}


@pytest.mark.parametrize("wanted", WANTED, ids=" ".join)
@pytest.mark.parametrize("function", ["loss", "logprobs"])
def test_frozen_inputs_cost_nothing(work, function, wanted):
    """No buffer and no matrix product for what is frozen; the others' gradients stay the same."""
    call = call_of("grpo") if function == "loss" else logprobs_call()
    total = kepo_kernels.fused_grpo_loss if function == "loss" else logprobs_sum
    everything = evaluate(partial(total, chunk_rows=8), call)
    assert 8 < call["completion_mask"].sum() <= 16  # two chunks
    work.clear()
    frozen = tuple(name for name in DIFFERENTIABLE if name not in wanted)
    actual = evaluate(partial(total, chunk_rows=8), call, frozen)
    assert_same_bits(actual, {name: everything[name] for name in actual})
    buffers = {f"{name} buffer": 1 for name in wanted}
    projections = 2 if function == "loss" else 4  # logits of log-probabilities are computed again
    assert +work == Counter({"project_": projections} | WANTED[wanted] | buffers)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, None])
def test_no_gradient_no_buffer(work, loss, mode):
    """Under no_grad and inference_mode, or where nothing requires a gradient: just the loss."""
    call = call_of(loss)
    expected = fused(loss, call)["loss"]
    work.clear()
    call = leaves(call, () if mode is None else DIFFERENTIABLE)
    with mode() if mode else torch.enable_grad():
        result = function_of(loss)(**call, impl="torch")
    assert torch.equal(result, expected) and not result.requires_grad
    assert set(+work) == {"project_"}


def test_parameters_of_a_module_accumulate():
    """Two backwards into the .grad of a bf16 parameter, a hook on it in between."""
    problem = make_problem(length=5, dtype=torch.bfloat16)
    head = torch.nn.Linear(16, 37, bias=False, dtype=torch.bfloat16)
    seen = []
    head.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    call = arguments("grpo", replace(problem, lm_head=head.weight), logits_dtype=torch.float32)
    for _ in range(2):
        kepo_kernels.fused_grpo_loss(**call).backward()
    assert head.weight.grad.dtype == torch.bfloat16
    assert torch.equal(seen[0], seen[1]) and torch.equal(head.weight.grad, seen[0] * 2)


# ------------------------------------------------------------------------ order, threads, processes


@pytest.mark.parametrize("loss", LOSSES)
def test_same_bits_run_to_run(impl, loss):
    call = call_of(loss, chunk_rows=4)
    assert_same_bits(fused(loss, call, impl), fused(loss, call, impl))


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_row_kernels_do_not_depend_on_the_number_of_threads(impl):
    """With the identity as head the logits are the states and dhidden is dlogits, to the bit,
    whatever the matrix products do.
    """
    if reason := unavailable(impl):
        pytest.skip(reason)
    rows, vocab = 800, 257
    states, teacher = torch.randn(2, rows, vocab) * 3
    call = {"hidden": states, "lm_head": torch.eye(vocab), "teacher_hidden": teacher}
    call |= {"teacher_lm_head": torch.eye(vocab), "temperature": 0.7, "impl": impl}
    call |= {
        "targets": torch.randint(vocab, (rows,)),
        "advantages": torch.randn(rows),
        "gate": None,
    }
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = evaluate(kepo_kernels.fused_kepo_loss, call)
        results.append({name: result[name] for name in ("loss", "hidden")})
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("chunk_rows", [1, 2, 4, 7, 100])
@pytest.mark.parametrize("loss", LOSSES)
def test_any_chunk_size_is_right(loss, chunk_rows):
    call = call_of(loss, chunk_rows=chunk_rows)
    assert_right(loss, call, "torch")
    # The numbers of a row are those of its chunk's GEMM; the sums over chunks stay near.
    whole = fused(loss, call_of(loss, chunk_rows=1000))
    torch.testing.assert_close(fused(loss, call)["loss"], whole["loss"], rtol=1e-6, atol=0)


def test_two_losses_in_two_threads(impl):
    calls = {loss: call_of(loss, chunk_rows=4) for loss in ("gated_kd", "grpo")}
    expected = {loss: fused(loss, call, impl) for loss, call in calls.items()}
    if device_of(impl) == "cpu" and impl == "triton":
        pytest.skip("the interpreter keeps its grid in a global; the kernels do not")
    found: dict[str, list] = {loss: [] for loss in calls}
    barrier = threading.Barrier(len(calls))

    def work(loss: str) -> None:
        barrier.wait()
        for _ in range(10):
            found[loss].append(fused(loss, calls[loss], impl))

    threads = [threading.Thread(target=work, args=(loss,)) for loss in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for loss, results in found.items():
        assert len(results) == 10
        for result in results:
            assert_same_bits(result, expected[loss])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_after_fork(impl):
    """A data loader's worker that inherits a process that has computed: same bits, no hang."""
    if reason := unavailable(impl):
        pytest.skip(reason)
    # Large enough for the C++ rows to have started threads of their own.
    problem = make_problem(4, 64, vocab=2000)
    call = arguments("gated_kd", problem, "gate", chunk_rows=1000)
    torch.set_num_threads(2)
    fused("gated_kd", call, impl)
    torch.set_num_threads(1)
    expected = fused("gated_kd", call, impl)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the child, should it hang
        signal.alarm(60)
        same = False
        try:
            torch.set_num_threads(1)
            actual = fused("gated_kd", call, impl)
            same = all(torch.equal(actual[name], x) for name, x in expected.items())
        finally:
            os.write(writer, b"same" if same else b"other")
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()  # ends when the child does
    os.waitpid(child, 0)
    assert answer == b"same"


# ----------------------------------------------------------------------- losses of the caller's own


@pytest.mark.parametrize(
    "returned",
    [
        lambda losses: losses.mean(),  # would be broadcast: the mean, once per token
        lambda losses: losses.mean(0, keepdim=True),
        lambda losses: losses[:-1],
        lambda losses: losses[:, None],
        lambda losses: 1.0,
        lambda losses: None,
    ],
)
def test_token_loss_of_wrong_shape(returned):
    problem = make_problem(length=5)
    with pytest.raises(KepoInputError, match=r"fused_linear_loss: token_loss returned .* 15 rows"):
        kepo_kernels.fused_linear_loss(
            problem.hidden,
            problem.lm_head,
            problem.targets,
            lambda stats, rows: returned(-stats.logprobs),
        )


def test_error_inside_a_token_loss_is_the_callers():
    problem = make_problem(length=5)

    def broken(stats, rows):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        kepo_kernels.fused_linear_loss(problem.hidden, problem.lm_head, problem.targets, broken)


# ---------------------------------------------------------------------------------- torch operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher_vocab", [None, 29])
def test_opcheck(dtype, teacher_vocab):
    """Schema, mutation, fake tensors and AOT dispatch of the C++ rows as torch operators."""
    if reason := unavailable("cpu"):
        pytest.skip(reason)
    problem = make_row_problem(3, 37, teacher_vocab, dtype=dtype)
    inputs = (problem.logits, problem.targets, problem.teacher)
    settings = RowSettings(0.5, 0.7, 1.3, softcap=8.0)
    table = rows_module("cpu").row_forward(*inputs, settings)
    torch.library.opcheck(torch.ops.kepo_kernels.row_forward, (*inputs, *settings))
    torch.library.opcheck(
        torch.ops.kepo_kernels.row_backward_, (*inputs, table, problem.coefficients, *settings)
    )
