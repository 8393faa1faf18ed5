"""Frozen teachers: hidden states and a head, or the most likely tokens of each position.

A teacher is given for all of the student's sequences, or for the open ones only. Its states, or its
tokens, may have been stored: with the student on a GPU they may stay on the CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kepo_kernels.heads import Head
from kepo_kernels.rows.top_k_rows import TopK
from kepo_kernels.validate import FLOATS, Validator, describe


@dataclass(frozen=True, eq=False)
class Teacher:
    """What both kinds of teacher have: which sequences they were given for."""

    opened: Tensor | None
    """(B,), 0 or False on closed sequences; None means all are open."""

    @property
    def tensor(self) -> Tensor:
        """Return a tensor (B, T, *) or (N, *) of it, of all sequences or of the open ones."""
        raise NotImplementedError  # states and tokens have one each, below

    name = "teacher_hidden"  # of that tensor, in errors

    def check_lead(self, check: Validator, student: Tensor) -> None:
        """Check that its sequences are those of the student's states, or the open ones."""
        lead, given = student.shape[:-1], self.tensor
        if given.shape[:-1] == lead:
            return
        opened = "all" if self.opened is None else f"the {self._count()} open"
        check.require(
            self._is_compact(lead),
            f"{self.name} {describe(given)} fits neither all {lead[0]} sequences of "
            f"hidden {describe(student)} nor {opened} ones; its leading dimensions must be "
            f"{list(lead)}, or the number of open sequences in place of the first (those whose "
            "gate, or without a gate a weight inside completion_mask, is not 0)",
        )

    def _is_compact(self, lead: torch.Size) -> bool:
        if self.opened is None or self.tensor.dim() != len(lead) + 1:
            return False
        return self.tensor.shape[:-1] == (self._count(), *lead[1:])

    def _count(self) -> int:
        assert self.opened is not None, "only open sequences are counted"
        return int(self.opened.count_nonzero())

    def rows(self, rows: Tensor, lead: torch.Size) -> Tensor:
        """Return the positions, in the flattened teacher, of rows of the flattened student."""
        if self.tensor.shape[:-1] == lead:
            return rows
        assert self.opened is not None, "`check_lead` accepts fewer sequences only with `opened`"
        tokens = lead[1] if len(lead) == 2 else 1
        # The sequence's index among the open ones.
        position = self.opened.ne(0).cumsum(0).to(rows.device) - 1
        return position[rows // tokens] * tokens + rows % tokens


@dataclass(frozen=True, eq=False)
class StatesTeacher(Teacher):
    """A teacher of hidden states, whose logits its head computes."""

    hidden: Tensor
    head: Head
    bias: Tensor | None
    temperature: float

    @property
    def tensor(self) -> Tensor:
        return self.hidden

    def check(self, check: Validator, student: Tensor) -> None:
        names = ("teacher_hidden", "teacher_lm_head", "teacher_bias")
        check.head(names, self.hidden, self.head, self.bias)
        check.same_device_or_cpu(student, teacher_hidden=self.hidden)
        check.same_device(student, teacher_lm_head=self.head.weight, teacher_bias=self.bias)
        check.dtypes(("hidden", student), ("teacher_hidden", self.hidden))
        self.check_lead(check, student)


@dataclass(frozen=True, eq=False)
class TopKTeacher(Teacher):
    """A teacher of K tokens a position."""

    top_k: TopK

    name = "teacher_hidden.ids"

    @property
    def tensor(self) -> Tensor:
        return self.top_k.ids

    def check(self, check: Validator, student: Tensor) -> None:
        ids, logprobs = self.top_k
        for name, x in (("teacher_hidden.ids", ids), ("teacher_hidden.logprobs", logprobs)):
            check.require(isinstance(x, Tensor), f"{name} is {describe(x)}; expected a tensor")
            check.strided(name, x)
        check.require(
            ids.dtype in (torch.int64, torch.int32),
            f"teacher_hidden.ids {describe(ids)}; expected int64 or int32 token ids",
        )
        check.require(
            logprobs.dtype in FLOATS and logprobs.shape == ids.shape,
            f"teacher_hidden.logprobs {describe(logprobs)}; expected one log-probability for each "
            f"of teacher_hidden.ids, a float tensor of shape {list(ids.shape)}",
        )
        check.require(
            ids.dim() == student.dim() and ids.shape[-1] > 0,
            f"teacher_hidden.ids {describe(ids)}; expected (B, T, K) or (N, K), as hidden "
            f"{describe(student)}, with K > 0",
        )
        check.same_device_or_cpu(student, **{"teacher_hidden.ids": ids})
        check.require(
            logprobs.device == ids.device,
            f"teacher_hidden.ids is on {ids.device} and .logprobs on {logprobs.device}; move one",
        )
        self.check_lead(check, student)


def teacher_given(check: Validator, teacher_hidden: object, teacher_lm_head: object) -> bool:
    """Return whether a call has a teacher; refuse a part of one."""
    if isinstance(teacher_hidden, TopK):
        return True
    return check.given_together(teacher_hidden=teacher_hidden, teacher_lm_head=teacher_lm_head)


def teacher_required(check: Validator, teacher_hidden: object, teacher_lm_head: object) -> None:
    """Refuse a call without a whole teacher."""
    check.require(
        teacher_given(check, teacher_hidden, teacher_lm_head),
        "teacher_hidden and teacher_lm_head are None; expected hidden states and a head, or a TopK "
        "as teacher_hidden",
    )


def refuse_beside_top_k(check: Validator, **given: object) -> None:
    """Refuse what only a teacher of hidden states has."""
    for name, x in given.items():
        check.require(
            x is None,
            f"{name} is given beside a TopK teacher, whose log-probabilities are final; leave "
            f"{name} out, or pass hidden states as teacher_hidden",
        )


def refuse_bad_tokens(function: str, top_k: TopK, rows: Tensor, vocab: int) -> None:
    """Refuse ids and log-probabilities that are none, at rows (n,) of the flattened teacher.

    On a CPU only, where looking waits for nothing.
    """
    ids, logprobs = top_k
    if ids.device.type != "cpu":
        return
    there = ids >= 0
    listed = torch.where(there, logprobs.double(), -torch.inf)
    in_order = ids.sort(-1).values
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    # A log-probability near -1 of 16 bits is off by 0.4 %.
    most = 1.001 if logprobs.dtype.itemsize > 2 else 1.02
    mass = listed.exp().sum(-1)
    for name, bad, expected in (
        ("ids", ((ids < -1) | (ids >= vocab)).any(-1), f"token ids in [0, {vocab}), or -1"),
        ("ids", twice.any(-1), "each token at most once"),
        ("logprobs", listed.isnan().any(-1), "log-probabilities, not NaN"),
        ("logprobs", mass > most, "log-probabilities, whose exponentials sum to at most 1"),
    ):
        if bad.any():
            row = int(bad.nonzero()[0])
            values = (ids if name == "ids" else listed)[row].tolist()
            shown = ", ".join(f"{x:.9g}" for x in values[:8]) + ", ..." * (len(values) > 8)
            Validator(function).refuse(
                f"teacher_hidden.{name} holds {shown} in row {int(rows[row])} of its "
                f"flattened sequence dimensions, which has a non-zero weight; expected {expected}"
            )
