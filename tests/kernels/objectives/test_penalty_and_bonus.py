"""What the penalty times the ratio, and a bonus with weights of its own, could get wrong."""

import re
from collections.abc import Callable

import pytest
import torch
from cases import CASES
from loss_calls import function_of
from torch import Tensor

from kepo_kernels import losses
from kepo_kernels.compute import call
from kepo_kernels.objectives import policy

Plant = Callable[[pytest.MonkeyPatch], None]


def detached_ratio(patch: pytest.MonkeyPatch) -> None:
    good = policy._ratio
    patch.setattr(policy, "_ratio", lambda log_ratio: good(log_ratio.detach()))


def uncorrected(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(policy, "_ratio", torch.ones_like)


def other_weights(bad: Callable[..., tuple[Tensor, Tensor]]) -> Plant:
    """Of the bonus alone."""
    good = call.Call.weights

    def weights(self: call.Call, gate: None, given: Tensor, reduction: str, prefix: str = ""):
        if prefix != "entropy_":
            return good(self, gate, given, reduction, prefix)
        return bad(lambda x: good(self, gate, x, reduction, prefix), given)

    return lambda patch: patch.setattr(call.Call, "weights", weights)


FAULTS = {
    "ratio without gradient": ("grpo corrected penalty of sequences", detached_ratio),
    "penalty not corrected": ("grpo corrected penalty of sequences", uncorrected),
    "bonus by the policy's weights": (
        "grpo bonus of its own weights",
        other_weights(lambda good, given: good(None)),
    ),
    "bonus outside of the mask": (
        "grpo bonus of its own weights",
        other_weights(lambda good, given: (given, given != 0)),
    ),
    "rows of the bonus left out": (
        "kepo bonus of its own weights",
        other_weights(lambda good, given: (good(given)[0], torch.zeros_like(given).bool())),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault, monkeypatch):
    case, plant = FAULTS[fault]
    CASES[case].judge("torch")
    plant(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        CASES[case].judge("torch")
    assert re.search("exceeds|is exactly", str(caught.value))


def test_tokens_of_neither_are_not_computed(monkeypatch):
    """Nor those of a bonus whose coefficient is 0."""
    rows = []
    project = losses.Call.problem

    def counting(self: losses.Call, *args: object, **settings: object):
        student, problem = project(self, *args, **settings)
        rows.append(len(problem.active_rows.rows))
        return student, problem

    monkeypatch.setattr(losses.Call, "problem", counting)
    case = CASES["grpo bonus of its own weights"].call()
    live = case["completion_mask"] & (case["weights"] != 0)
    praised = case["completion_mask"] & (case["entropy_weights"] != 0)
    assert (live & praised).any() and (live ^ praised).any()
    for coef in (0.2, 0.0):
        function_of("grpo")(**case | {"entropy_coef": coef})
    assert rows == [int((live | praised).sum()), int(live.sum())]
