"""Every number of a call may be Python's, numpy's, or a 0-d tensor: it means one thing."""

import numpy
import pytest
import torch
from checks import make_problem
from loss_calls import arguments, assert_right, assert_same_bits, fused, plain
from right_calls import FUNCTIONS, KEPO, LOGPROBS, PROBLEM

import kepo_kernels
from kepo_kernels import Head, KepoInputError, LoRA
from kepo_kernels.compute.chunks import chunking

KINDS = {
    "int": int,
    "numpy int64": numpy.int64,
    "numpy int32": numpy.int32,
    "numpy uint8": numpy.uint8,
    "numpy float32": numpy.float32,
    "numpy float64": numpy.float64,
    "numpy longdouble": numpy.longdouble,
    "0-d array": numpy.array,
    "0-d tensor": torch.tensor,
    "0-d fp64 tensor": lambda x: torch.tensor(x, dtype=torch.float64),
}
SETTINGS = {
    "temperature": 2.0,
    "teacher_temperature": 3.0,
    "beta": 1.0,
    "distill_coef": 2.0,
    "epsilon_low": 1.0,
    "epsilon_high": 1.0,
    "delta": 3.0,
    "kl_coef": 2.0,
    "entropy_coef": 2.0,
    "sapo_temperature_pos": 2.0,
    "sapo_temperature_neg": 3.0,
    "grad_tol": 0.0,
}
COUNTS = {"chunk_rows": 2, "workspace_bytes": 1 << 20}


def joint(kind, **counts: object) -> torch.Tensor:
    x = PROBLEM
    lora = LoRA(torch.ones(2, 16), torch.ones(len(x.lm_head), 2), kind(2.0))
    head = Head(x.lm_head, softcap=kind(3.0), logit_scale=kind(2.0), lora=lora)
    call = FUNCTIONS[KEPO] | {"old_logprobs": x.old_logprobs, "ref_logprobs": x.ref_logprobs}
    teacher = Head(x.teacher_lm_head, softcap=kind(5.0), logit_scale=kind(2.0))
    call |= {"lm_head": head, "teacher_lm_head": teacher}
    settings = {name: kind(value) for name, value in SETTINGS.items()}
    return kepo_kernels.fused_kepo_loss(**call, **settings, **counts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting(kind):
    """Counts are integers: those of a kind that has none come as Python's."""
    whole = kind in ("int", "numpy int64", "numpy int32", "0-d array", "0-d tensor")
    counts = {name: KINDS[kind](x) if whole else x for name, x in COUNTS.items()}
    cast = KINDS[kind] if kind.startswith("0-d") else lambda x: KINDS[kind](int(x))
    assert torch.equal(joint(cast, **counts), joint(float, **COUNTS))


def test_fractions():
    """To the last bit of what came: 0.7 in float32 is another number than in float64."""
    call = FUNCTIONS[LOGPROBS]
    for value in (numpy.float32(0.7), numpy.float64(0.7), numpy.float16(0.7), torch.tensor(0.7)):
        expected = kepo_kernels.fused_linear_logprobs(**call, temperature=float(value))
        actual = kepo_kernels.fused_linear_logprobs(**call, temperature=value)
        assert torch.equal(actual, expected)


def test_weights():
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    old, sampler = torch.full((2, 3), -1.0), torch.tensor([[-1.0, -3.0, 0.0], [-0.5, 0.0, 0.0]])
    steps = torch.tensor([[0, 1, 1], [0, 1, 1]])
    for kind in (numpy.int64, numpy.float32, torch.tensor):
        for made, expected in (
            (
                kepo_kernels.dr_grpo_weights(mask, kind(4)),
                kepo_kernels.dr_grpo_weights(mask, 4),
            ),
            (kepo_kernels.dapo_weights(mask, kind(7)), kepo_kernels.dapo_weights(mask, 7.0)),
            (
                kepo_kernels.sampler_weights(old, sampler, mask, low=kind(1), high=kind(2)),
                kepo_kernels.sampler_weights(old, sampler, mask, low=1.0, high=2.0),
            ),
            (
                kepo_kernels.sod_weights(steps, old, sampler, mask, epsilon=kind(1), delta=kind(1)),
                kepo_kernels.sod_weights(steps, old, sampler, mask, epsilon=1.0, delta=1.0),
            ),
        ):
            assert made.dtype == torch.float64 and torch.equal(made, expected)
    for wrong in (True, numpy.True_, torch.tensor(True), "4", None, numpy.ones(1)):
        with pytest.raises(KepoInputError, match="max_completion_length="):
            kepo_kernels.dr_grpo_weights(mask, wrong)


def test_chunking():
    """Its sizes as well: of numpy's int32 the bytes of a call would be beyond the largest."""
    expected = chunking(8192, 2048, 151936, teacher_rows=4096, workspace_bytes=1 << 30)
    for kind in (numpy.int32, numpy.int64, torch.tensor):
        sizes = kind(8192), kind(2048), kind(151936)
        made = chunking(*sizes, teacher_rows=kind(4096), workspace_bytes=kind(1 << 30))
        assert made == expected
        assert all(type(x) is int for x in vars(made).values())
    for wrong, says in (
        ({"rows": -1}, "rows=-1; expected an integer >= 0"),
        ({"vocab": 0}, "vocab=0; expected a positive integer"),
        ({"hidden_size": 16.0}, "hidden_size=16.0; expected a positive integer"),
        ({"rows": True}, "rows=True"),
        ({"chunk_rows": numpy.True_}, "chunk_rows="),
        ({"grad_tol": 2}, "grad_tol=2"),
    ):
        with pytest.raises(KepoInputError, match=f"^chunking: {says}"):
            chunking(**{"rows": 8, "hidden_size": 16, "vocab": 100} | wrong)


@pytest.mark.parametrize("loss", ["grpo", "kepo"])
@pytest.mark.parametrize(("batch", "length"), [(3, 4), (3, 1), (1, 4), (4, 4), (1, 1)])
def test_sampler_weights_as_a_column(loss, batch, length):
    """(B, 1) is one per sequence, as engines hand out ratios of whole sequences."""
    problem = make_problem(batch, length)
    weights = torch.rand(batch) + 0.5
    call = arguments(loss, problem, "completion_mask old_logprobs")
    expected = fused(loss, call | {"sampler_weights": weights})
    column = call | {"sampler_weights": weights[:, None]}
    assert_same_bits(fused(loss, column), expected)
    assert_right(loss, column)
    assert plain(loss, column)["loss"] == plain(loss, call | {"sampler_weights": weights})["loss"]


def test_sampler_weights_of_flat_tokens_as_a_column():
    problem = make_problem(5, 1)
    flat = {"hidden": problem.hidden[:, 0], "targets": problem.targets[:, 0]}
    call = arguments("grpo", problem) | flat
    weights = torch.rand(5)
    expected = fused("grpo", call | {"sampler_weights": weights})
    assert_same_bits(fused("grpo", call | {"sampler_weights": weights[:, None]}), expected)
