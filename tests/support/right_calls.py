"""One right call of every public function; `bad_inputs.py` spoils it."""

from dataclasses import replace

import torch
from checks import make_problem
from loss_calls import arguments
from torch import Tensor

NAN, INF = float("nan"), float("inf")
BATCH, LENGTH, HIDDEN, VOCAB, TEACHER_HIDDEN, TEACHER_VOCAB = 3, 4, 16, 37, 24, 45
PROBLEM = replace(
    make_problem(BATCH, LENGTH, teacher_vocab=TEACHER_VOCAB),
    completion_mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]).bool(),
)
FUNCTIONS = {
    "fused_gated_kd_loss": arguments("gated_kd", PROBLEM, "gate completion_mask"),
    "fused_grpo_loss": arguments("grpo", PROBLEM, "completion_mask"),
    "fused_kepo_loss": arguments("kepo", PROBLEM, "completion_mask"),
    "fused_linear_logprobs": {
        name: getattr(PROBLEM, name) for name in ("hidden", "lm_head", "targets", "completion_mask")
    },
    "fused_linear_divergence": arguments("gated_kd", PROBLEM, "completion_mask"),
    "fused_linear_loss": {
        name: getattr(PROBLEM, name) for name in ("hidden", "lm_head", "targets", "completion_mask")
    }
    | {"token_loss": lambda stats, rows: -stats.logprobs},
}
KD, GRPO, KEPO, LOGPROBS, DIVERGENCE, LINEAR = FUNCTIONS
STUDENT = tuple(FUNCTIONS)
TEACHER = (KD, KEPO)
POLICY = (GRPO, KEPO)
TARGETS = (GRPO, KEPO, LOGPROBS, LINEAR)


def at(x: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    """A copy with one element changed."""
    x = x.clone()
    x[place] = value
    return x
