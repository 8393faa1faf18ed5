"""What may be wrong with any call: edits after which it must be refused, naming the argument.

`bad_inputs.py` has every way to spoil one right call of each public function; these few edits
fit all the calls of `cases.py` and `case_product.py`.
"""

from collections.abc import Callable

import torch
from case_product import weights_of
from loss_calls import Arguments, each_tensor
from torch import Tensor

from kepo_kernels import Head


def first_active(call: Arguments, term: str | None = None) -> tuple[int, ...]:
    """A token that takes part: in any term, or in this one."""
    weights = weights_of(call)
    kept = weights.values() if term is None else [weights[term]]
    return tuple(torch.stack([w != 0 for w in kept]).any(0).nonzero()[0].tolist())


def spoilt(name: str, value: float, term: str | None = None) -> Callable[[Arguments], Arguments]:
    """One element of an active token."""

    def edit(call: Arguments) -> Arguments:
        x = call[name].clone()
        x[first_active(call, term)] = value
        return {name: x}

    return edit


def widened(name: str, dim: int = -1) -> Callable[[Arguments], Arguments]:
    """One row or column more than fits, of a tensor or of a head's weight."""

    def wider(x: Tensor) -> Tensor:
        return torch.cat((x, x.narrow(dim, 0, 1)), dim)

    def edit(call: Arguments) -> Arguments:
        x = call[name]
        return {name: Head(wider(x.weight)) if isinstance(x, Head) else each_tensor(x, wider)}

    return edit


def setting(**wrong: object) -> Callable[[Arguments], Arguments]:
    return lambda call: wrong


def longer_teacher(call: Arguments) -> Arguments:
    """One sequence more than the student has, whatever is open."""
    count = len(call["hidden"]) + 1
    return {
        "teacher_hidden": each_tensor(
            call["teacher_hidden"], lambda x: x.repeat(count, *[1] * (x.dim() - 1))[:count]
        )
    }


def other_dtype(call: Arguments) -> Arguments:
    dtype = torch.float64 if call["hidden"].dtype != torch.float64 else torch.float32
    return {"lm_head": each_tensor(call["lm_head"], lambda x: x.to(dtype))}


# what is wrong: (an argument the call must have for it, the edit, the argument that is named)
ERRORS = {
    "hidden of another width": ("hidden", widened("hidden"), "hidden"),
    "head of another width": ("lm_head", widened("lm_head"), "lm_head"),
    "head of another dtype": ("lm_head", other_dtype, "lm_head"),
    "bias of another length": ("bias", widened("bias"), "bias"),
    "teacher of another length": ("teacher_hidden", longer_teacher, "teacher_hidden"),
    "teacher of another width": ("teacher_lm_head", widened("teacher_hidden"), "teacher_hidden"),
    "mask of another length": ("completion_mask", widened("completion_mask"), "completion_mask"),
    "mask of fractions": (
        "completion_mask",
        lambda call: {"completion_mask": call["completion_mask"] * 0.5 + 0.1},
        "completion_mask",
    ),
    "gate of another length": ("gate", widened("gate", 0), "gate"),
    "gate below 0": ("gate", lambda call: {"gate": call["gate"].float() - 9.0}, "gate"),
    "NaN in a state": ("hidden", spoilt("hidden", torch.nan), "hidden"),
    "NaN in an advantage": (
        "advantages",
        lambda call: {"advantages": torch.full_like(call["advantages"], torch.nan)},
        "advantages",
    ),
    "inf in a log-probability": (
        "old_logprobs",
        spoilt("old_logprobs", torch.inf, "policy_"),
        "old_logprobs",
    ),
    "a negative token": ("targets", spoilt("targets", -1), "targets"),
    "a token beyond the vocabulary": ("targets", spoilt("targets", 257), "targets"),
    "temperature of 0": ("hidden", setting(temperature=0.0), "temperature"),
    "teacher's temperature of 0": (
        "teacher_hidden",
        setting(teacher_temperature=0.0),
        "teacher_temperature",
    ),
    "beta above 1": ("teacher_hidden", setting(beta=1.5), "beta"),
    "an unknown policy loss": ("advantages", setting(policy_loss="ppo"), "policy_loss"),
    "an unknown level": ("advantages", setting(importance_level="word"), "importance_level"),
    "an unknown estimator": ("advantages", setting(kl_estimator="k4"), "kl_estimator"),
    "delta below the clip": (
        "advantages",
        setting(policy_loss="clip", epsilon_high=0.2, delta=1.1),
        "delta",
    ),
    "a penalty without a reference": (
        "advantages",
        setting(kl_coef=0.1, ref_logprobs=None),
        "ref_logprobs",
    ),
    "advantages of another length": ("advantages", widened("advantages", 0), "advantages"),
    "no rows in a chunk": ("hidden", setting(chunk_rows=0), "chunk_rows"),
    "an unknown setting": ("hidden", setting(chunk_row=3), "chunk_row"),
    "a softcap below 0": (
        "lm_head",
        lambda call: {"lm_head": Head(Head.of(call["lm_head"]).weight, softcap=-1.0)},
        "softcap",
    ),
}
