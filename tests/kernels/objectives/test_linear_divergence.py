"""The divergence of each token, under an upstream gradient of its own, against the fp64 oracle."""

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from cases import exact_logits, heads, listed
from checks import assert_close_to_oracle, device_of, make_problem
from loss_calls import Arguments, each_tensor, evaluate, flat, number_dtype
from torch import Tensor

import kepo_kernels
from kepo_kernels import KepoInputError, linear, reference
from kepo_kernels.compute import autograd, gemm

SIZES = dict(batch=5, length=5, hidden=33, vocab=67, teacher_hidden=29, teacher_vocab=71)
ENGINE = ("impl", "chunk_rows", "logits_dtype", "return_entropy")


def call_of(dtype: torch.dtype = torch.float32, std: float = 3.0, **settings: object) -> Arguments:
    """Five sequences, the second of which has no token."""
    problem = make_problem(**SIZES, dtype=dtype, std=std)
    names = "hidden lm_head teacher_hidden teacher_lm_head completion_mask bias teacher_bias"
    call = {name: getattr(problem, name) for name in names.split()}
    call["completion_mask"][1] = False
    return call | settings


def upstream_of(call: Arguments) -> Tensor:
    """Of either sign, and 0 for every third token."""
    upstream = torch.randn(call["hidden"].shape[:-1], dtype=torch.float64)
    upstream.view(-1)[::3] = 0.0
    return upstream


def totals(
    function: Callable[..., Tensor | tuple[Tensor, ...]], upstream: Tensor
) -> Callable[..., Tensor]:
    def total(**call: object) -> Tensor:
        found = function(**call)
        found = found if isinstance(found, tuple) else (found,)
        return sum((x * upstream.to(x) * (1 - 1.5 * i)).sum() for i, x in enumerate(found))

    return total


def plain(call: Arguments) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """The oracle's divergence and, if the call asks for it, its entropy."""

    def numbers(**double: object) -> Tensor | tuple[Tensor, ...]:
        divergence = reference.linear_divergence(**double)
        if not call.get("return_entropy"):
            return divergence
        mask = double["completion_mask"]
        logits = reference.project(double["hidden"][mask], double["lm_head"], double.get("bias"))
        entropy = reference.token_entropy(logits, double.get("temperature", 1.0))
        return divergence, torch.zeros_like(divergence).masked_scatter(mask, entropy)

    return numbers


def judge(call: Arguments, impl: str, given: Arguments | None = None) -> None:
    """Values and gradients; `given`: other arguments of ours for the same thing."""
    given = (call if given is None else given) | {"impl": impl}
    given = {name: each_tensor(x, lambda t: t.to(device_of(impl))) for name, x in given.items()}
    double = {
        name: each_tensor(x, lambda t: t.double() if t.is_floating_point() else t)
        for name, x in call.items()
        if name not in ENGINE
    }
    found, expected = kepo_kernels.fused_linear_divergence(**given), plain(call)(**double)
    if not call.get("return_entropy"):
        found, expected = (found,), (expected,)
    for name, x, y in zip(("divergence", "entropy"), found, expected, strict=False):
        assert x.shape == call["hidden"].shape[:-1]
        assert x.dtype == number_dtype(call["hidden"].dtype)
        assert_close_to_oracle(x, y, name=name)
    upstream = upstream_of(call)
    actual = evaluate(totals(kepo_kernels.fused_linear_divergence, upstream), given)
    oracle = evaluate(totals(plain(call), upstream), double)
    for name, x in actual.items():
        if name != "loss":  # a sum of both signs, in fp32
            assert_close_to_oracle(x, oracle[name], name=name)


CALLS = [
    pytest.param(beta, chunk_rows, marks=[] if first == second else pytest.mark.slow)
    for first, beta in enumerate([0.0, 0.3, 1.0])
    for second, chunk_rows in enumerate([1, 3, 10**9])
]


@pytest.mark.parametrize(("beta", "chunk_rows"), CALLS)
def test_value_and_gradient(impl, beta, chunk_rows):
    call = call_of(beta=beta, chunk_rows=chunk_rows, temperature=0.7, teacher_temperature=2.0)
    judge(call, impl)
    judge(flat(call), impl)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_other_dtypes(beta, dtype):
    settings = {} if dtype == torch.float64 else {"logits_dtype": torch.float32}
    judge(call_of(dtype, beta=beta, chunk_rows=4, **settings), "torch")


@pytest.mark.parametrize("beta", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_peaked_rows_and_heads(impl, beta):
    judge(exact_logits(call_of(std=12.0, beta=beta)), impl)
    judge(heads(call_of(beta=beta, chunk_rows=4)), impl)


def test_entropy_beside_it(impl):
    judge(call_of(beta=0.3, chunk_rows=4, temperature=0.7, return_entropy=True), impl)


def test_teacher_of_the_sequences_that_have_tokens(impl):
    call = call_of(beta=0.3, chunk_rows=4)
    some = call["completion_mask"].any(-1)
    assert 0 < some.sum() < 5
    judge(call, impl, call | {"teacher_hidden": call["teacher_hidden"][some]})


@pytest.mark.parametrize(
    "beta", [0.3, *(pytest.param(x, marks=pytest.mark.slow) for x in (0.0, 1.0))]
)
def test_teacher_of_tokens(impl, beta):
    call = listed(6)(call_of(beta=beta, chunk_rows=4, temperature=0.7, return_entropy=True))
    judge(call, impl)
    judge(flat(call), impl)
    some = call["completion_mask"].any(-1)
    fewer = each_tensor(call["teacher_hidden"], lambda x: x[some])
    judge(call, impl, call | {"teacher_hidden": fewer})


def test_tokens_in_a_loss_of_ones_own():
    """The same bits as the built-in one, for all sequences and for the open ones."""
    call = listed(6)(call_of(chunk_rows=4))
    gate = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
    opened = each_tensor(call["teacher_hidden"], lambda x: x[gate != 0])

    def own(**call: object) -> Tensor:
        how = {"targets": None, "reduction": "sum"}
        return kepo_kernels.fused_linear_loss(
            **call, **how, token_loss=lambda stats, rows: stats.divergence
        )

    def built_in(**call: object) -> Tensor:
        return kepo_kernels.fused_gated_kd_loss(**call, reduction="sum")

    weights = call["completion_mask"] * gate[:, None]
    for teacher in (call["teacher_hidden"], opened):
        given = call | {"teacher_hidden": teacher, "gate": gate, "weights": weights}
        found, expected = evaluate(own, given), evaluate(built_in, given)
        for name, x in found.items():
            assert x.any() and torch.equal(x, expected[name]), name


def test_what_comes_back():
    call = call_of()
    call["hidden"].requires_grad_()
    alone = kepo_kernels.fused_linear_divergence(**call)
    again, entropy, stats = kepo_kernels.fused_linear_divergence(
        **call, return_entropy=True, return_stats=True
    )
    assert torch.equal(alone, again) and entropy.requires_grad
    assert torch.equal(stats.divergence, alone) and torch.equal(stats.entropy, entropy)
    assert not (stats.divergence.requires_grad or stats.logprobs.any())


def test_masked_rows_are_not_read():
    call = call_of(chunk_rows=4)
    dead = ~call["completion_mask"][..., None]
    spoilt = call | {
        name: call[name].masked_fill(dead, torch.nan) for name in ("hidden", "teacher_hidden")
    }
    expected = kepo_kernels.fused_linear_divergence(**call)
    found = kepo_kernels.fused_linear_divergence(**spoilt)
    assert torch.equal(found, expected) and not found[dead.squeeze(-1)].any()


def test_twice_on_a_retained_graph():
    call = call_of()
    wanted = [call[name].requires_grad_() for name in ("hidden", "lm_head", "bias")]
    total = totals(kepo_kernels.fused_linear_divergence, upstream_of(call))(**call)
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(total, wanted), strict=True):
        assert one.any() and torch.equal(one, other)


STUDENT_AND_TEACHER = ("hidden", "lm_head", "teacher_hidden", "teacher_lm_head", "logprobs")


@pytest.mark.parametrize("name", STUDENT_AND_TEACHER)
def test_what_was_changed_in_between_is_refused(name):
    """Backward computes logits again: of other tensors they would be others."""
    call = listed(6)(call_of()) if name == "logprobs" else call_of()
    x = call["hidden"].requires_grad_()
    total = kepo_kernels.fused_linear_divergence(**call).sum()
    with torch.no_grad():
        (call["teacher_hidden"].logprobs if name == "logprobs" else call[name]).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total, x)


def test_double_backward_is_refused():
    call = call_of()
    x = call["hidden"].requires_grad_()
    total = kepo_kernels.fused_linear_divergence(**call).sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(total, x, create_graph=True)


@pytest.fixture
def products(monkeypatch) -> Counter:
    """The rows of each product with a head."""
    count = Counter()

    def counted(name: str, of: int) -> None:
        good = getattr(gemm, name)

        def counting(*given: object, **how: object):
            count[name] += len(given[of])
            return good(*given, **how)

        monkeypatch.setattr(gemm, name, counting)

    for name, of in (("project_", 1), ("hidden_gradient", 0), ("accumulate_head_", 1)):
        counted(name, of)
    return count


@pytest.mark.parametrize("function", ["divergence", "tokens", "logprobs"])
def test_no_upstream_gradient_no_product(products, function):
    """Neither for masked tokens nor, in backward, for those whose gradient is 0."""
    call = call_of(chunk_rows=4)
    if function == "tokens":
        call, function = listed(6)(call), "divergence"
    elif function == "logprobs":
        call = {x: call[x] for x in ("hidden", "lm_head", "completion_mask", "chunk_rows")}
        call["targets"] = torch.randint(67, (5, 5))
    mask, upstream = call["completion_mask"], upstream_of(call)
    evaluate(totals(getattr(kepo_kernels, f"fused_linear_{function}"), upstream), call)
    live, sides = int((mask & (upstream != 0)).sum()), 1 + ("teacher_lm_head" in call)
    assert 0 < live < mask.sum()
    forward_and_backward = sides * (int(mask.sum()) + live)
    assert products == {
        "project_": forward_and_backward,
        "hidden_gradient": live,
        "accumulate_head_": live,
    }


def test_none_live_costs_nothing(products):
    call = call_of()
    upstream = torch.zeros(5, 5)
    found = evaluate(totals(kepo_kernels.fused_linear_divergence, upstream), call)
    assert products.keys() == {"project_"} and not found["lm_head"].any()
    products.clear()
    call["completion_mask"] = torch.zeros(5, 5, dtype=torch.bool)
    assert not kepo_kernels.fused_linear_divergence(**call).any() and not products


@pytest.mark.usefixtures("fresh_compiler")
def test_it_breaks_the_graph_and_says_why():
    call = call_of()

    def step(hidden: Tensor) -> Tensor:
        return kepo_kernels.fused_linear_divergence(hidden * 1.5, **call).sum() * 2

    hidden = call.pop("hidden")
    expected = step(hidden)
    assert torch.allclose(torch.compile(step, backend="aot_eager")(hidden), expected, rtol=1e-6)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fused_linear_divergence runs outside"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)


def test_a_teacher_that_does_not_fit_is_refused():
    call = call_of()
    for name, says in (("teacher_hidden", r"the 4 open ones"), ("hidden", "fits neither")):
        wrong = call | {name: call[name][:3]}
        if name == "hidden":
            wrong["completion_mask"] = None
        with pytest.raises(KepoInputError, match=f"^fused_linear_divergence: .*{says}"):
            kepo_kernels.fused_linear_divergence(**wrong)


# --------------------------------------------------------------------------------- planted mistakes


def gradient_of_a_sum(patch: pytest.MonkeyPatch) -> None:
    """Every token gets the same upstream gradient."""
    good = autograd.sweep

    def bad(student, problem, coefficients, gradients):
        def same(rows: Tensor, numbers: Tensor) -> Tensor:
            found = coefficients(rows, numbers)
            return found.mean(1, keepdim=True).expand_as(found)

        return good(student, problem, coefficients and same, gradients)

    patch.setattr(autograd, "sweep", bad)


def another_number(patch: pytest.MonkeyPatch) -> None:
    good = linear._returned
    patch.setattr(
        linear, "_returned", lambda call, stats, name, *of: good(call, stats, "entropy", *of)
    )


def rows_of_the_upstream_shifted(patch: pytest.MonkeyPatch) -> None:
    good = autograd.restricted
    patch.setattr(autograd, "restricted", lambda problem, up: good(problem, up.roll(1, -1)))


FAULTS = [gradient_of_a_sum, another_number, rows_of_the_upstream_shifted]


@pytest.mark.parametrize("plant", FAULTS)
def test_planted_faults_are_caught(plant, monkeypatch):
    judge(call_of(chunk_rows=4), "torch")
    plant(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        judge(call_of(chunk_rows=4), "torch")
    assert re.search("exceeds|is exactly", str(caught.value))
