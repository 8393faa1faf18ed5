"""Whatever the shapes, strides, masks and gates: the right result, or a refusal by name."""

from typing import NamedTuple

import pytest
import torch
from case_judge import well_conditioned
from case_product import strided
from checks import make_problem, unavailable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loss_calls import LOSSES, OPTIONS, Arguments, arguments, flat, function_of

from kepo_kernels import KepoInputError

STRIDES = ("contiguous", "transposed", "sliced")
SPOILERS = {
    "one more": lambda x: torch.cat((x, x[:1])),
    "one less": lambda x: x[1:],
    "a column less": lambda x: x[..., 1:],
    "a dimension more": lambda x: x.unsqueeze(-1),
    "a dimension before": lambda x: x.unsqueeze(0),
    "a dimension less": lambda x: x.flatten(0, 1) if x.dim() > 1 else x.sum(),
    "transposed": lambda x: x.transpose(0, -1),
    "integers": lambda x: x.long(),
    "halves": lambda x: x.half(),
    "doubles": lambda x: x.double(),
    "complex": lambda x: x.to(torch.complex64),
    "NaN": lambda x: torch.full_like(x, torch.nan) if x.is_floating_point() else x.long() - 10**6,
    "no tensor": lambda x: x.tolist(),
    "none": lambda x: None,
    "elsewhere": lambda x: x.to("meta"),
}


class Drawn(NamedTuple):
    loss: str
    call: Arguments
    impl: str
    spoilt: str  # what is wrong; "" = nothing


@st.composite
def calls(draw: st.DrawFn, spoilt: bool) -> Drawn:
    loss = draw(st.sampled_from(LOSSES))
    impl = draw(st.sampled_from([i for i in ("torch", "cpu") if not unavailable(i)]))
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    problem = make_problem(
        batch,
        length,
        hidden=draw(st.integers(1, 9)),
        vocab=draw(st.integers(1, 40)),
        teacher_hidden=draw(st.integers(1, 9)),
        teacher_vocab=draw(st.integers(2, 40)),
        dtype=torch.float64 if impl == "torch" else torch.float32,
        seed=draw(st.integers(0, 99)),
    )
    options = [name for name in OPTIONS[loss].split() if draw(st.booleans())]
    call = arguments(loss, problem, " ".join(options), beta=draw(st.sampled_from((0.0, 0.5, 1.0))))
    if loss == "grpo":
        del call["beta"]
    call["chunk_rows"] = draw(st.sampled_from((None, 1, 2, 5)))
    if "completion_mask" in call:
        bits = draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
        dtype = draw(st.sampled_from((torch.bool, torch.int64, torch.uint8, torch.float32)))
        call["completion_mask"] = torch.tensor(bits).reshape(batch, length).to(dtype)
    if "gate" in call:
        values = draw(st.lists(st.sampled_from((0, 1, 2)), min_size=batch, max_size=batch))
        dtype = draw(st.sampled_from((torch.bool, torch.int64, torch.float32)))
        call["gate"] = torch.tensor(values).to(dtype)
    if draw(st.booleans()):
        call = flat(call)
    if "gate" in call and draw(st.booleans()):
        call["teacher_hidden"] = call["teacher_hidden"][call["gate"] != 0]
    tensors = [name for name, x in call.items() if isinstance(x, torch.Tensor)]
    for name in tensors:
        call[name] = strided(draw(st.sampled_from(STRIDES)), call[name])
    wrong = ""
    if spoilt:
        name, how = draw(st.sampled_from(tensors)), draw(st.sampled_from(tuple(SPOILERS)))
        call[name] = SPOILERS[how](call[name])
        wrong = f"{name}: {how}"
    return Drawn(loss, call, impl, wrong)


def judge(drawn: Drawn) -> None:
    """What is right is never refused; what may be wrong is refused by name, or computed right."""
    try:
        loss = function_of(drawn.loss)(**drawn.call, impl=drawn.impl)
    except KepoInputError as error:
        assert drawn.spoilt, "a right call is refused"
        assert str(error).startswith(f"fused_{drawn.loss}_loss: "), error
        assert any(name in str(error) for name in drawn.call), error
        return
    if drawn.spoilt.endswith("NaN") and loss.isnan():
        return  # a head is not searched for NaN, but the loss shows it
    well_conditioned(drawn.loss, drawn.call, drawn.impl)


COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@given(calls(spoilt=False))
@settings(max_examples=80, **COMMON)
def test_right_calls(drawn):
    judge(drawn)


@given(calls(spoilt=True))
@settings(max_examples=60, **COMMON)
def test_perhaps_wrong_calls(drawn):
    judge(drawn)


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(calls(spoilt=False))
@settings(max_examples=1500, **COMMON)
def test_many_right_calls(drawn):
    judge(drawn)


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(calls(spoilt=True))
@settings(max_examples=1500, **COMMON)
def test_many_perhaps_wrong_calls(drawn):
    judge(drawn)
