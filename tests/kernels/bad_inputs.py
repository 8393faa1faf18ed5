"""Right calls of every public function, and what may be wrong with them."""

from dataclasses import replace

import numpy
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
    "fused_linear_loss": {
        name: getattr(PROBLEM, name) for name in ("hidden", "lm_head", "targets", "completion_mask")
    }
    | {"token_loss": lambda stats, rows: -stats.logprobs},
}
KD, GRPO, KEPO, LOGPROBS, LINEAR = FUNCTIONS
STUDENT = tuple(FUNCTIONS)
TEACHER = (KD, KEPO)
POLICY = (GRPO, KEPO)
TARGETS = (GRPO, KEPO, LOGPROBS, LINEAR)


def at(x: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    """A copy with one element changed."""
    x = x.clone()
    x[place] = value
    return x


# what is wrong: (the functions it is wrong for, the arguments, what the message has to say)
BAD_HEADS = {
    "no tensor": (STUDENT, {"hidden": [1.0]}, ["hidden is list", "expected a tensor"]),
    "numpy": (STUDENT, {"lm_head": numpy.ones((VOCAB, HIDDEN))}, ["lm_head is ndarray"]),
    "none": (TEACHER, {"teacher_hidden": None}, ["teacher_hidden is NoneType"]),
    "one dimension": (STUDENT, {"hidden": torch.ones(HIDDEN)}, ["hidden [16] float32", "(N, H)"]),
    "four dimensions": (STUDENT, {"hidden": torch.ones(1, 3, 4, HIDDEN)}, ["hidden [1, 3, 4, 16]"]),
    "head of one dimension": (STUDENT, {"lm_head": torch.ones(HIDDEN)}, ["lm_head [16]", "(V, H)"]),
    "empty head": (STUDENT, {"lm_head": torch.ones(0, HIDDEN)}, ["lm_head [0, 16]", "non-empty"]),
    "a module": (STUDENT, {"lm_head": torch.nn.Linear(HIDDEN, VOCAB)}, ["lm_head is Linear"]),
    "transposed head": (
        STUDENT,
        {"lm_head": torch.ones(HIDDEN, VOCAB)},
        ["hidden [3, 4, 16]", "lm_head [16, 37]", "must be (V, 16)"],
    ),
    "transposed teacher head": (
        TEACHER,
        {"teacher_lm_head": torch.ones(TEACHER_HIDDEN, TEACHER_VOCAB)},
        ["teacher_hidden [3, 4, 24]", "teacher_lm_head [24, 45]", "must be (V, 24)"],
    ),
    "integer states": (
        STUDENT,
        {"hidden": torch.ones(3, 4, HIDDEN, dtype=torch.int64)},
        ["hidden", "int64", "float32"],
    ),
    "complex states": (
        STUDENT,
        {"hidden": torch.ones(3, 4, HIDDEN, dtype=torch.complex64)},
        ["hidden", "complex64"],
    ),
    "fp8 head": (
        STUDENT,
        {"lm_head": PROBLEM.lm_head.to(torch.float8_e4m3fn)},
        ["lm_head", "float8_e4m3fn"],
    ),
    "mixed dtypes": (
        STUDENT,
        {"lm_head": PROBLEM.lm_head.bfloat16()},
        ["hidden", "float32", "lm_head", "bfloat16", "cast one"],
    ),
    "mixed bias": (STUDENT, {"bias": PROBLEM.bias.double()}, ["hidden", "bias [37] float64"]),
    "mixed teacher": (
        TEACHER,
        {
            "teacher_hidden": PROBLEM.teacher_hidden.half(),
            "teacher_lm_head": PROBLEM.teacher_lm_head.half(),
        },
        ["hidden is [3, 4, 16] float32", "teacher_hidden [3, 4, 24] float16"],
    ),
    "bias of the hidden size": (STUDENT, {"bias": torch.ones(HIDDEN)}, ["bias [16]", "(37,)"]),
    "bias of one": (STUDENT, {"bias": torch.ones(1)}, ["bias [1]", "(37,)"]),
    "teacher bias of the student": (
        TEACHER,
        {"teacher_bias": PROBLEM.bias},
        ["teacher_bias [37]", "(45,)"],
    ),
    "another device": (
        STUDENT,
        {"lm_head": PROBLEM.lm_head.to("meta")},
        ["hidden is on cpu and lm_head on meta"],
    ),
    "teacher elsewhere": (
        TEACHER,
        {"teacher_hidden": PROBLEM.teacher_hidden.to("meta")},
        ["hidden is on cpu and teacher_hidden on meta"],
    ),
    "teacher bias elsewhere": (
        TEACHER,
        {"teacher_bias": PROBLEM.teacher_bias.to("meta")},
        ["teacher_bias on meta"],
    ),
}

BAD_SHAPES = {
    "teacher of one token": (
        TEACHER,
        {"teacher_hidden": PROBLEM.teacher_hidden[:1, :1]},
        ["teacher_hidden [1, 1, 24]", "all 3 sequences", "the 2 open ones", "[3, 4]"],
    ),
    "teacher of one sequence": (
        TEACHER,
        {"teacher_hidden": PROBLEM.teacher_hidden[:1]},
        ["teacher_hidden [1, 4, 24]"],
    ),
    "teacher of one row, all open": (
        (KD,),
        {"teacher_hidden": PROBLEM.teacher_hidden[:1], "gate": None},
        ["teacher_hidden [1, 4, 24]", "nor all ones"],
    ),
    "teacher of other length": (
        TEACHER,
        {"teacher_hidden": PROBLEM.teacher_hidden[:, :3]},
        ["teacher_hidden [3, 3, 24]"],
    ),
    "flat teacher": (
        TEACHER,
        {"teacher_hidden": PROBLEM.teacher_hidden.flatten(0, 1)},
        ["teacher_hidden [12, 24]"],
    ),
    "gate (B, 1)": (
        TEACHER,
        {"gate": PROBLEM.gate[:, None]},
        ["gate [3, 1] bool", "expected shape [3]"],
    ),
    "gate (B, T)": (
        TEACHER,
        {"gate": PROBLEM.completion_mask},
        ["gate [3, 4] bool", "one real value per sequence"],
    ),
    "gate of one": (TEACHER, {"gate": torch.ones(1)}, ["gate [1]", "expected shape [3]"]),
    "gate a number": (TEACHER, {"gate": 1.0}, ["gate float", "expected shape [3]"]),
    "mask (T,)": (
        STUDENT,
        {"completion_mask": torch.ones(LENGTH)},
        ["completion_mask [4]", "shape [3, 4]"],
    ),
    "mask (B, 1)": (STUDENT, {"completion_mask": torch.ones(BATCH, 1)}, ["completion_mask [3, 1]"]),
    "mask flat": (STUDENT, {"completion_mask": torch.ones(12)}, ["completion_mask [12]"]),
    "mask a list": (STUDENT, {"completion_mask": [[1] * 4] * 3}, ["completion_mask list"]),
    "weights (B,)": (
        (KD, GRPO, LINEAR),
        {"weights": torch.ones(BATCH)},
        ["weights [3]", "shape [3, 4]"],
    ),
    "policy weights (B, 1)": (
        (KEPO,),
        {"policy_weights": torch.ones(BATCH, 1)},
        ["policy_weights [3, 1]"],
    ),
    "distill weights (T,)": (
        (KEPO,),
        {"distill_weights": torch.ones(LENGTH)},
        ["distill_weights [4]"],
    ),
    "no targets": ((GRPO, KEPO, LOGPROBS), {"targets": None}, ["targets is NoneType"]),
    "targets (B,)": (TARGETS, {"targets": PROBLEM.targets[:, 0]}, ["targets [3]", "shape [3, 4]"]),
    "targets shifted": (TARGETS, {"targets": PROBLEM.targets[:, 1:]}, ["targets [3, 3]"]),
    "targets elsewhere": (TARGETS, {"targets": PROBLEM.targets.to("meta")}, ["targets on meta"]),
    "no advantages": (POLICY, {"advantages": None}, ["advantages NoneType"]),
    "advantages (B, 1)": (
        POLICY,
        {"advantages": torch.ones(BATCH, 1)},
        ["advantages [3, 1]", "[3]", "[3, 4]"],
    ),
    "advantages (T,)": (POLICY, {"advantages": torch.ones(LENGTH)}, ["advantages [4]"]),
    "one advantage": (POLICY, {"advantages": torch.tensor(1.0)}, ["advantages []"]),
    "advantages elsewhere": (
        POLICY,
        {"advantages": PROBLEM.advantages.to("meta")},
        ["advantages on meta"],
    ),
    "old_logprobs (B,)": (
        POLICY,
        {"old_logprobs": torch.ones(BATCH)},
        ["old_logprobs [3]", "[3, 4]"],
    ),
    "ref_logprobs (T,)": (
        POLICY,
        {"ref_logprobs": torch.ones(LENGTH)},
        ["ref_logprobs [4]", "[3, 4]"],
    ),
}

# (1, 1) and (2, 0) take part; (0, 3) is masked; sequence 0 is closed.
BAD_VALUES = {
    "id V": (
        TARGETS,
        {"targets": at(PROBLEM.targets, (1, 1), VOCAB)},
        ["targets holds 37 at [1, 1]", "[0, 37)"],
    ),
    "id far out": (
        TARGETS,
        {"targets": at(PROBLEM.targets, (2, 0), 1_000_101)},
        ["targets holds 1000101 at [2, 0]"],
    ),
    "id -1": (
        TARGETS,
        {"targets": at(PROBLEM.targets, (0, 0), -1)},
        ["targets holds -1 at [0, 0]"],
    ),
    "ignore_index where it counts": (
        TARGETS,
        {"targets": at(PROBLEM.targets, (1, 3), -100)},
        ["targets holds -100 at [1, 3]", "completion_mask"],
    ),
    "float ids": (
        TARGETS,
        {"targets": PROBLEM.targets.float()},
        ["targets", "float32", "int64 or int32"],
    ),
    "uint8 ids": (TARGETS, {"targets": PROBLEM.targets.to(torch.uint8)}, ["targets", "uint8"]),
    "bool ids": (TARGETS, {"targets": PROBLEM.targets > 3}, ["targets", "bool"]),
    "NaN in a state": (
        STUDENT,
        {"hidden": at(PROBLEM.hidden, (1, 1, 5), NAN)},
        ["hidden holds NaN or Inf in row 5 ", "mask it out"],
    ),
    "Inf in a state": (
        STUDENT,
        {"hidden": at(PROBLEM.hidden, (2, 0, 0), INF)},
        ["hidden holds NaN or Inf in row 8 "],
    ),
    "NaN in the teacher": (
        TEACHER,
        {"teacher_hidden": at(PROBLEM.teacher_hidden, (1, 2, 0), NAN)},
        ["teacher_hidden holds NaN or Inf in row 6 "],
    ),
    "negative gate": (
        TEACHER,
        {"gate": torch.tensor([0.0, -0.5, 1.0])},
        ["gate holds -0.5 at [1]", ">= 0"],
    ),
    "NaN gate": (TEACHER, {"gate": torch.tensor([0.0, 1.0, NAN])}, ["gate holds nan at [2]"]),
    "infinite gate": (TEACHER, {"gate": torch.tensor([INF, 1.0, 1.0])}, ["gate holds inf at [0]"]),
    "complex gate": (
        TEACHER,
        {"gate": torch.ones(BATCH, dtype=torch.complex64)},
        ["gate [3] complex64"],
    ),
    "fractional mask": (
        STUDENT,
        {"completion_mask": torch.full((BATCH, LENGTH), 0.5)},
        ["completion_mask holds 0.5 at [0, 0]", "`weights`"],
    ),
    "NaN mask": (
        STUDENT,
        {"completion_mask": at(torch.ones(BATCH, LENGTH), (1, 2), NAN)},
        ["completion_mask holds nan at [1, 2]"],
    ),
    "mask of ids": (
        STUDENT,
        {"completion_mask": torch.full((BATCH, LENGTH), 7)},
        ["completion_mask holds 7"],
    ),
    "complex mask": (
        STUDENT,
        {"completion_mask": torch.ones(BATCH, LENGTH, dtype=torch.complex64)},
        ["completion_mask", "complex64"],
    ),
    "NaN weight": (
        (KD, GRPO, LINEAR),
        {"weights": at(torch.ones(BATCH, LENGTH), (1, 0), NAN)},
        ["weights holds nan at [1, 0]"],
    ),
    "infinite weight": (
        (KD, GRPO, LINEAR),
        {"weights": at(torch.ones(BATCH, LENGTH), (1, 0), INF)},
        ["weights holds inf at [1, 0]"],
    ),
    "NaN policy weight": (
        (KEPO,),
        {"policy_weights": at(torch.ones(BATCH, LENGTH), (1, 0), NAN)},
        ["policy_weights holds nan"],
    ),
    "NaN distill weight": (
        (KEPO,),
        {"distill_weights": at(torch.ones(BATCH, LENGTH), (1, 0), NAN)},
        ["distill_weights holds nan"],
    ),
    "NaN advantage": (
        POLICY,
        {"advantages": torch.tensor([0.0, NAN, 1.0])},
        ["advantages holds nan at [1, 0]"],
    ),
    "infinite advantage": (
        POLICY,
        {"advantages": torch.tensor([-INF, 0.0, 1.0])},
        ["advantages holds -inf at [0, 0]"],
    ),
    "NaN old_logprobs": (
        POLICY,
        {"old_logprobs": at(PROBLEM.old_logprobs, (2, 2), NAN)},
        ["old_logprobs holds nan at [2, 2]"],
    ),
    "infinite ref_logprobs": (
        POLICY,
        {"ref_logprobs": at(PROBLEM.ref_logprobs, (2, 2), -INF)},
        ["ref_logprobs holds -inf at [2, 2]"],
    ),
}

BAD_SETTINGS = {
    "temperature 0": (STUDENT, {"temperature": 0.0}, ["temperature=0.0", "finite number > 0"]),
    "temperature negative": (STUDENT, {"temperature": -1}, ["temperature=-1"]),
    "temperature inf": (STUDENT, {"temperature": INF}, ["temperature=inf"]),
    "temperature nan": (STUDENT, {"temperature": NAN}, ["temperature=nan"]),
    "temperature True": (STUDENT, {"temperature": True}, ["temperature=True"]),
    "temperature text": (STUDENT, {"temperature": "1.0"}, ["temperature='1.0'"]),
    "temperature tensor": (STUDENT, {"temperature": torch.tensor(1.0)}, ["temperature=tensor(1.)"]),
    "temperature None": (STUDENT, {"temperature": None}, ["temperature=None"]),
    "beta above": ((KD, KEPO, LINEAR), {"beta": 1.01}, ["beta=1.01", "[0, 1]"]),
    "beta below": ((KD, KEPO, LINEAR), {"beta": -0.1}, ["beta=-0.1"]),
    "beta nan": ((KD, KEPO, LINEAR), {"beta": NAN}, ["beta=nan"]),
    "beta False": ((KD, KEPO, LINEAR), {"beta": False}, ["beta=False"]),
    "reduction": (
        (KD, GRPO, LINEAR),
        {"reduction": "mean"},
        ["reduction='mean'", "token_mean, sequence_mean, sum"],
    ),
    "reduction None": ((KD, GRPO, LINEAR), {"reduction": None}, ["reduction=None"]),
    "policy_reduction": ((KEPO,), {"policy_reduction": "mean"}, ["policy_reduction='mean'"]),
    "distill_reduction": ((KEPO,), {"distill_reduction": "mean"}, ["distill_reduction='mean'"]),
    "distill_coef negative": ((KEPO,), {"distill_coef": -0.1}, ["distill_coef=-0.1"]),
    "distill_coef nan": ((KEPO,), {"distill_coef": NAN}, ["distill_coef=nan"]),
    "epsilon_low above 1": (POLICY, {"epsilon_low": 1.2}, ["epsilon_low=1.2", "[0, 1]"]),
    "epsilon_high negative": (POLICY, {"epsilon_high": -0.2}, ["epsilon_high=-0.2"]),
    "kl_coef negative": (
        POLICY,
        {"kl_coef": -1.0, "ref_logprobs": PROBLEM.ref_logprobs},
        ["kl_coef=-1.0"],
    ),
    "kl_coef without reference": (POLICY, {"kl_coef": 0.1}, ["kl_coef=0.1 needs ref_logprobs"]),
    "entropy_coef inf": (POLICY, {"entropy_coef": INF}, ["entropy_coef=inf"]),
    "policy_loss": (POLICY, {"policy_loss": "ppo"}, ["policy_loss='ppo'"]),
    "importance_level": (POLICY, {"importance_level": "word"}, ["importance_level='word'"]),
    "impl": (STUDENT, {"impl": "cuda"}, ["impl='cuda'", "auto, triton, cpu, torch"]),
    "impl None": (STUDENT, {"impl": None}, ["impl=None"]),
    "workspace 0": (STUDENT, {"workspace_bytes": 0}, ["workspace_bytes=0", "positive integer"]),
    "workspace float": (STUDENT, {"workspace_bytes": 1e9}, ["workspace_bytes=1000000000.0"]),
    "workspace True": (STUDENT, {"workspace_bytes": True}, ["workspace_bytes=True"]),
    "chunk_rows 0": (STUDENT, {"chunk_rows": 0}, ["chunk_rows=0"]),
    "chunk_rows negative": (STUDENT, {"chunk_rows": -5}, ["chunk_rows=-5"]),
    "logits_dtype": (
        STUDENT,
        {"logits_dtype": torch.bfloat16},
        ["logits_dtype=torch.bfloat16", "torch.float32 hidden"],
    ),
    "logits_dtype text": (STUDENT, {"logits_dtype": "float32"}, ["logits_dtype=float32"]),
    "return_stats 1": (STUDENT, {"return_stats": 1}, ["return_stats=1"]),
    "unknown setting": (
        STUDENT,
        {"chunksize": 5},
        ["unexpected argument 'chunksize'", "chunk_rows"],
    ),
    "misspelt argument": (STUDENT, {"temprature": 0.7}, ["unexpected argument 'temprature'"]),
    "no callable": ((LINEAR,), {"token_loss": 1.0}, ["token_loss is float", "callable"]),
    "half a teacher": (
        (LINEAR,),
        {"teacher_hidden": PROBLEM.teacher_hidden},
        ["teacher_hidden and teacher_lm_head"],
    ),
    "gate without teacher": (
        (LINEAR,),
        {"gate": PROBLEM.gate},
        ["gate is given without teacher_hidden"],
    ),
    "teacher bias without teacher": (
        (LINEAR,),
        {"teacher_bias": PROBLEM.teacher_bias},
        ["teacher_bias is given without"],
    ),
    "fp64 in C++": (
        STUDENT,
        {"impl": "cpu"}
        | {
            n: getattr(PROBLEM, n).double()
            for n in ("hidden", "lm_head", "teacher_hidden", "teacher_lm_head")
        },
        ["impl='cpu'", "float64", "impl='torch'"],
    ),
}

TABLE = BAD_HEADS | BAD_SHAPES | BAD_VALUES | BAD_SETTINGS
assert len(TABLE) == sum(map(len, (BAD_HEADS, BAD_SHAPES, BAD_VALUES, BAD_SETTINGS)))
