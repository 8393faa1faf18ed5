"""torch.compile where numbers change from call to call: eager mode's values, and few graphs."""

import numpy as np
import pytest
import torch
from checks import make_problem
from loss_calls import LOSSES, OPTIONS, arguments, call_of, evaluate, function_of
from torch._dynamo.testing import CompileCounterWithBackend

import kepo_kernels
from kepo_kernels import Head, LoRA, fused_grpo_loss

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NUMBERS = {
    "gated_kd": {"temperature": (1.0, 0.7), "teacher_temperature": (0.9, 1.3), "beta": (0.2, 0.6)},
    "grpo": {
        "temperature": (1, 0.7),
        "epsilon_low": (0.2, 0.1),
        "epsilon_high": (0.2, 0.3),
        "delta": (2.0, 3),
        "kl_coef": (0.01, 0.2),
        "entropy_coef": (0.03, 0.001),
        "softcap": (5, 9.5),
        "logit_scale": (1.0, 1.5),
        "lora_scale": (0.5, 0.25),
    },
    "kepo": {
        "distill_coef": (1, 0.25),
        "beta": (0.5, 0.4),
        "entropy_coef": (0.01, 0.02),
        "teacher_temperature": (1, 2),
        "chunk_rows": (4, 9),
        "workspace_bytes": (10**6, 2**40),
    },
}
# One for the first values, one for those known to change, one for where an int became a float.
MOST_GRAPHS = 3


def schedule(first: float, last: float) -> list[float]:
    """Five different values, all ints if both ends are."""
    if isinstance(first, int) and isinstance(last, int):
        return [first, first + 1, first + 2, first + 3, last + 4]
    return [first, *(first + (last - first) * i / 4 for i in (1, 2, 3)), last]


def with_head(lm_head: torch.Tensor, **call: object) -> torch.Tensor:
    """fused_grpo_loss, the numbers of the head beside the others."""
    a, b = torch.linspace(-1, 1, 64).view(4, 16), torch.linspace(-1, 1, 148).view(37, 4)
    lora = LoRA(a, b, call.pop("lora_scale"))
    head = Head(lm_head, call.pop("softcap"), call.pop("logit_scale"), lora)
    return fused_grpo_loss(lm_head=head, **call)


def compiled_and_eager(function, dynamic: bool | None, calls: list[dict[str, object]]) -> int:
    """Asserts that they agree in every call, one after the other; returns the number of graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
    seen = set()
    for call in calls:
        actual, expected = evaluate(step, call), evaluate(function, call)
        assert actual.keys() == expected.keys()
        for name, number in expected.items():
            assert torch.allclose(actual[name], number, rtol=1e-6, atol=1e-7), name
        seen.add(float(expected["loss"].double()))
    assert len(seen) == len(calls)  # each value had its own effect
    return counter.frame_count


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_numbers_that_change_from_call_to_call(loss, dynamic):
    """Every number on a schedule of its own, all at once: no graph for each value."""
    options = OPTIONS[loss] + " ref_logprobs" * (loss == "grpo")
    call = arguments(loss, make_problem(length=5), options)
    schedules = [schedule(*ends) for ends in NUMBERS[loss].values()]
    steps = [dict(zip(NUMBERS[loss], x, strict=True)) for x in zip(*schedules, strict=True)]
    function = with_head if loss == "grpo" else function_of(loss)
    assert compiled_and_eager(function, dynamic, [call | x for x in steps]) <= MOST_GRAPHS


@pytest.mark.slow
def test_terms_that_come_and_go():
    """0 and None switch a term off, and on again, in one graph or in one more."""
    call = arguments("kepo", make_problem(length=5), OPTIONS["kepo"] + " ref_logprobs")
    settings = [
        {"distill_coef": 0, "delta": None, "kl_coef": 0.0, "entropy_coef": 0},
        {"distill_coef": 1, "delta": 4, "kl_coef": 0.1, "entropy_coef": 0.5},
        {"distill_coef": 0.3, "delta": None, "kl_coef": 0.0, "entropy_coef": 0.02},
        {"distill_coef": 0.0, "delta": 3.0, "kl_coef": 0.3, "entropy_coef": 0.0},
        {"distill_coef": 0.7, "delta": 2.5, "kl_coef": 0.2, "entropy_coef": 0.1},
    ]
    calls = [call | x for x in settings]
    assert compiled_and_eager(function_of("kepo"), None, calls) <= 5


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numpy_scalars_in_the_graph(kind):
    """A new value is no new graph (a float64 is a float to the compiler: known to change from the
    second value on)."""
    call = call_of("grpo")
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(fused_grpo_loss, fullgraph=True, backend=counter)
    for value in (0.5, 0.625, 0.75):
        actual = step(**call, temperature=kind(value), chunk_rows=np.int64(8 * value))
        assert torch.allclose(actual, fused_grpo_loss(**call, temperature=value), rtol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_static_graphs_are_one_for_each_value():
    """dynamic=False asks for that; the values are right all the same."""
    calls = [call_of("grpo") | {"temperature": x} for x in (0.5, 0.6, 0.7)]
    assert compiled_and_eager(function_of("grpo"), False, calls) == 3


def test_lengths_and_numbers_change_together():
    calls = [
        arguments("kepo", make_problem(batch, length), OPTIONS["kepo"], distill_coef=coefficient)
        for batch, length, coefficient in ((3, 5, 0.1), (4, 6, 0.2), (5, 9, 0.3), (2, 11, 0.4))
    ]
    assert compiled_and_eager(function_of("kepo"), None, calls) <= MOST_GRAPHS


def test_numbers_are_checked_when_the_graph_runs():
    """As in eager mode, also None and text, which are no defaults."""
    call = call_of("grpo")
    step = torch.compile(kepo_kernels.fused_grpo_loss, fullgraph=True, backend="eager")
    for bad in (-0.5, None, "1.0"):
        with pytest.raises(kepo_kernels.KepoInputError, match=f"temperature={bad!r}; expected"):
            step(**call | {"temperature": bad})
    with pytest.raises(kepo_kernels.KepoInputError, match="unexpected argument 'temprature'"):
        step(**call, temprature=0.5)
