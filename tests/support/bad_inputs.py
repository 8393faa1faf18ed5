"""What may be wrong with a call: its tensors (`bad_shapes.py`), their values, its settings."""

import numpy
import torch
from bad_shapes import BAD_HEADS, BAD_LAYOUTS, BAD_SHAPES
from right_calls import (
    BATCH,
    DIVERGENCE,
    GRPO,
    INF,
    KD,
    KEPO,
    LENGTH,
    LINEAR,
    NAN,
    POLICY,
    PROBLEM,
    STUDENT,
    TARGETS,
    TEACHER,
    VOCAB,
    at,
)

from kepo_kernels import Head, LoRA, TopK

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
    "NaN bonus weight": (
        POLICY,
        {"entropy_weights": at(torch.ones(BATCH, LENGTH), (1, 0), NAN)},
        ["entropy_weights holds nan at [1, 0]"],
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
    "advantage that float32 has not": (
        POLICY,
        {"advantages": torch.tensor([0.0, 1e300, 1.0], dtype=torch.float64)},
        ["advantages holds 1e+300 at [1, 0]", "as float32, in which they are used (up to 3.4e+38)"],
    ),
    "reference that float32 has not": (
        POLICY,
        {"ref_logprobs": at(PROBLEM.ref_logprobs.double(), (2, 2), -1e39)},
        ["ref_logprobs holds -1e+39 at [2, 2]", "as float32"],
    ),
    "gate that float32 has not": (
        TEACHER,
        {"gate": torch.tensor([0.0, 1e300, 1.0], dtype=torch.float64)},
        ["gate holds 1e+300 at [1]", "as float32"],
    ),
    "weight that float32 has not": (
        (KD, GRPO, LINEAR),
        {"weights": at(torch.ones(BATCH, LENGTH).double(), (1, 0), 1e39)},
        ["weights holds 1e+39 at [1, 0]", "as float32"],
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
    "temperature of its own for each": (
        STUDENT,
        {"temperature": torch.ones(1)},
        ["temperature=tensor([1.])", "finite number > 0"],
    ),
    "temperature that is trained": (
        STUDENT,
        {"temperature": torch.tensor(1.0, requires_grad=True)},
        ["temperature=tensor(1., requires_grad=True)"],
    ),
    "temperature without a value": (
        STUDENT,
        {"temperature": torch.ones((), device="meta")},
        ["temperature=tensor(..., device='meta'"],
    ),
    "temperature beyond floats": (STUDENT, {"temperature": 10**400}, ["temperature=1000"]),
    "temperature numpy True": (STUDENT, {"temperature": numpy.True_}, ["temperature=", "True"]),
    "beta tensor True": ((KD, KEPO, LINEAR), {"beta": torch.tensor(True)}, ["beta=tensor(True)"]),
    "complex coefficient": (POLICY, {"entropy_coef": 1j}, ["entropy_coef=1j"]),
    "numpy nan": (POLICY, {"epsilon_low": numpy.float32("nan")}, ["epsilon_low=", "nan"]),
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
    "a reference without kl_coef": (
        POLICY,
        {"ref_logprobs": PROBLEM.ref_logprobs},
        ["ref_logprobs is given without kl_coef and would have no effect"],
    ),
    "kl_bias_correction without kl_coef": (
        POLICY,
        {"kl_bias_correction": True},
        ["kl_bias_correction is given without kl_coef and would have no effect"],
    ),
    "entropy_weights without entropy_coef": (
        POLICY,
        {"entropy_weights": torch.ones(BATCH, LENGTH)},
        ["entropy_weights is given without entropy_coef and would have no effect"],
    ),
    "sampler_weights negative": (
        POLICY,
        {"sampler_weights": at(torch.ones(BATCH, LENGTH), (1, 0), -0.5)},
        ["sampler_weights holds -0.5 at [1, 0]; expected values >= 0"],
    ),
    "kl_bias_correction 1": (
        POLICY,
        {"kl_bias_correction": 1},
        ["kl_bias_correction=1; expected True or False"],
    ),
    "entropy_coef inf": (POLICY, {"entropy_coef": INF}, ["entropy_coef=inf"]),
    "policy_loss": (POLICY, {"policy_loss": "ppo"}, ["policy_loss='ppo'"]),
    "importance_level": (POLICY, {"importance_level": "word"}, ["importance_level='word'"]),
    "impl": (STUDENT, {"impl": "cuda"}, ["impl='cuda'", "auto, triton, cpu, torch"]),
    "impl None": (STUDENT, {"impl": None}, ["impl=None"]),
    "workspace 0": (STUDENT, {"workspace_bytes": 0}, ["workspace_bytes=0", "positive integer"]),
    "workspace float": (STUDENT, {"workspace_bytes": 1e9}, ["workspace_bytes=1000000000.0"]),
    "workspace numpy float": (
        STUDENT,
        {"workspace_bytes": numpy.float64(1e9)},
        ["workspace_bytes=", "positive integer"],
    ),
    "chunk_rows numpy True": (STUDENT, {"chunk_rows": numpy.True_}, ["chunk_rows=", "True"]),
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

# Beyond the numbers of float32, in which all but fp64 states are used: NaN, or no effect at all.
NUMBERS = {
    "temperature": STUDENT,
    "teacher_temperature": (KD, KEPO, LINEAR),
    "epsilon_high": POLICY,
    "delta": POLICY,
    "kl_coef": POLICY,
    "entropy_coef": POLICY,
    "sapo_temperature_pos": POLICY,
    "sapo_temperature_neg": POLICY,
    "distill_coef": (KEPO,),
}
SIZE = "of a size that float32 holds, 2.4e-38 to 3.4e+38"
BAD_SIZES = (
    {
        f"{name} {value}": (functions, {name: value}, [f"{name}={value}; expected", SIZE])
        for name, functions in NUMBERS.items()
        for value in (1e-320, 1e-39, 3.5e38, 1e308)
        if name != "delta" or value > 1
    }
    | {
        f"{name} {value}": (functions, {name: value}, [f"{name}={value}; expected", SIZE])
        for name, functions in {"beta": (KD, KEPO, LINEAR), "epsilon_low": POLICY}.items()
        for value in (1e-50, 1e-320)
    }
    | {
        f"head's {name} {value}": (
            STUDENT,
            {"lm_head": Head(PROBLEM.lm_head, **{name: value})},
            [f"lm_head.{name}={value}; expected", SIZE],
        )
        for name in ("softcap", "logit_scale")
        for value in (1e-320, 1e300)
    }
    | {
        f"LoRA's scale {value}": (
            STUDENT,
            {
                "lm_head": Head(
                    PROBLEM.lm_head, lora=LoRA(torch.ones(2, 16), torch.ones(VOCAB, 2), value)
                )
            },
            [f"lm_head.lora.scale={value}; expected", SIZE],
        )
        for value in (1e-320, -1e300)
    }
    | {
        "fp64 temperature": (
            (KD, GRPO),
            {"temperature": 1e-320}
            | {
                name: getattr(PROBLEM, name).double()
                for name in ("hidden", "lm_head", "teacher_hidden", "teacher_lm_head")
            },
            ["temperature=1e-320", "float64 holds, 4.5e-308 to 1.8e+308"],
        ),
    }
)

NO_TEACHER = dict.fromkeys(("teacher_hidden", "teacher_lm_head", "gate"))
NO_POLICY = dict.fromkeys(("targets", "advantages"))
WEIGHTS = torch.ones(BATCH, LENGTH)

# What belongs together, and came alone. A right call of the joint loss has both of its parts.
BAD_PARTS = (
    {
        "states of no teacher's head": (
            (KEPO,),
            {"teacher_lm_head": None},
            ["teacher_hidden came without teacher_lm_head", "together or not at all"],
        ),
        "a teacher's head alone": (
            (KEPO,),
            {"teacher_hidden": None},
            ["teacher_lm_head came without teacher_hidden"],
        ),
        "advantages alone": ((KEPO,), {"targets": None}, ["advantages came without targets"]),
        "targets alone": ((KEPO,), {"advantages": None}, ["targets came without advantages"]),
        "neither part": (
            (KEPO,),
            NO_TEACHER | NO_POLICY,
            ["neither targets and advantages", "nor teacher_hidden and teacher_lm_head"],
        ),
        "nothing but a gate": (
            (KEPO,),
            NO_TEACHER | NO_POLICY | {"gate": PROBLEM.gate},
            ["neither targets and advantages"],
        ),
    }
    | {
        f"{name} without a teacher": (
            (KEPO,),
            NO_TEACHER | {name: x},
            [f"{name} is given without teacher_hidden and teacher_lm_head", f"leave {name} out"],
        )
        for name, x in {
            "gate": PROBLEM.gate,
            "teacher_bias": PROBLEM.teacher_bias,
            "distill_weights": WEIGHTS,
        }.items()
    }
    | {
        f"{name} without a policy": (
            (KEPO,),
            NO_POLICY | {name: x},
            [f"{name} is given without targets and advantages", f"leave {name} out"],
        )
        for name, x in {
            "policy_weights": WEIGHTS,
            "old_logprobs": PROBLEM.old_logprobs,
            "ref_logprobs": PROBLEM.ref_logprobs,
            "sampler_weights": torch.ones(BATCH),
            "kl_coef": 0.1,
            "entropy_coef": -0.1,
            "entropy_weights": WEIGHTS,
        }.items()
    }
    | {
        "settings of no policy": (
            (KEPO,),
            NO_POLICY | {"epsilon_low": 1.2},
            ["epsilon_low=1.2", "[0, 1]"],
        ),
        "reduction of no policy": (
            (KEPO,),
            NO_POLICY | {"policy_reduction": "mean"},
            ["policy_reduction='mean'"],
        ),
        "reduction of no teacher": (
            (KEPO,),
            NO_TEACHER | {"distill_reduction": "mean"},
            ["distill_reduction='mean'"],
        ),
        "beta of no teacher": ((KEPO,), NO_TEACHER | {"beta": 1.01}, ["beta=1.01", "[0, 1]"]),
        "coefficient of no teacher": (
            (KEPO,),
            NO_TEACHER | {"distill_coef": -0.1},
            ["distill_coef=-0.1"],
        ),
        "open ones by weights that only masked tokens have": (
            (KEPO,),
            {
                "gate": None,
                "distill_weights": (~PROBLEM.completion_mask).float(),
                "teacher_hidden": PROBLEM.teacher_hidden[::2],
            },
            ["teacher_hidden [2, 4, 24]", "the 0 open ones", "a weight inside completion_mask"],
        ),
        "all but the open ones by weights": (
            (KD,),
            {
                "gate": None,
                "weights": PROBLEM.gate[:, None] * WEIGHTS,
                "teacher_hidden": PROBLEM.teacher_hidden[:1],
            },
            ["teacher_hidden [1, 4, 24]", "the 2 open ones"],
        ),
    }
)

IDS = torch.arange(3).expand(BATCH, LENGTH, 3).contiguous()
LOGPROBS = torch.tensor([0.5, 0.3, 0.1]).log().expand(BATCH, LENGTH, 3).contiguous()


def listed(ids: object = IDS, logprobs: object = LOGPROBS, **more: object) -> dict[str, object]:
    return {"teacher_hidden": TopK(ids, logprobs), "teacher_lm_head": None} | more


# A teacher of three tokens at every position.
BAD_TOKENS = {
    name: ((KD, KEPO, DIVERGENCE), wrong, says)
    for name, (wrong, says) in {
        "a head beside tokens": (
            listed(teacher_lm_head=PROBLEM.teacher_lm_head),
            ["teacher_lm_head is given beside a TopK teacher", "leave teacher_lm_head out"],
        ),
        "a bias beside tokens": (
            listed(teacher_bias=PROBLEM.teacher_bias),
            ["teacher_bias is given beside a TopK teacher"],
        ),
        "a temperature beside tokens": (
            listed(teacher_temperature=0.5),
            ["teacher_temperature is given beside a TopK teacher", "are final"],
        ),
        "a token beyond the vocabulary": (
            listed(at(IDS, (1, 2, 1), VOCAB)),
            ["teacher_hidden.ids holds 0, 37, 2 in row 6 ", "[0, 37), or -1"],
        ),
        "a token of -2": (listed(at(IDS, (1, 2, 0), -2)), ["teacher_hidden.ids holds -2, 1, 2"]),
        "a token twice": (
            listed(at(IDS, (1, 2, 2), 0)),
            ["teacher_hidden.ids holds 0, 1, 0 in row 6 ", "each token at most once"],
        ),
        "NaN of a token": (
            listed(logprobs=at(LOGPROBS, (1, 2, 2), NAN)),
            ["teacher_hidden.logprobs holds -0.693147182, -1.20397282, nan in row 6 ", "not NaN"],
        ),
        "probabilities of tokens": (
            listed(logprobs=LOGPROBS.exp()),
            ["teacher_hidden.logprobs holds 0.5, 0.", "in row", "sum to at most 1"],
        ),
        "more than all": (
            listed(logprobs=LOGPROBS + 0.11),
            ["teacher_hidden.logprobs holds", "sum to at most 1"],
        ),
        "log-probabilities of other tokens": (
            listed(logprobs=LOGPROBS[..., :2]),
            ["teacher_hidden.logprobs [3, 4, 2] float32", "shape [3, 4, 3]"],
        ),
        "tokens without log-probabilities": (
            listed(logprobs=None),
            ["teacher_hidden.logprobs is NoneType; expected a tensor"],
        ),
        "tokens as numbers": (
            listed(IDS.float()),
            ["teacher_hidden.ids [3, 4, 3] float32", "int64 or int32 token ids"],
        ),
        "log-probabilities as integers": (
            listed(logprobs=IDS),
            ["teacher_hidden.logprobs [3, 4, 3] int64", "a float tensor"],
        ),
        "tokens of other sequences": (
            listed(IDS[:1], LOGPROBS[:1]),
            ["teacher_hidden.ids [1, 4, 3] int64 on cpu fits neither all 3 sequences"],
        ),
        "no tokens": (listed(IDS[..., :0], LOGPROBS[..., :0]), ["with K > 0"]),
        "one token each, without a dimension": (
            listed(IDS[..., 0], LOGPROBS[..., 0]),
            ["teacher_hidden.ids [3, 4] int64", "(B, T, K) or (N, K)"],
        ),
    }.items()
}
BAD_TEACHERS = {
    "no teacher at all": (
        (KD, DIVERGENCE),
        {"teacher_hidden": None, "teacher_lm_head": None},
        ["teacher_hidden and teacher_lm_head are None", "or a TopK as teacher_hidden"],
    ),
    "states without their head": (
        (KD, DIVERGENCE),
        {"teacher_lm_head": None},
        ["teacher_hidden came without teacher_lm_head"],
    ),
    "a bias beside tokens, of an own loss": (
        (LINEAR,),
        listed(teacher_bias=PROBLEM.teacher_bias),
        ["teacher_bias is given beside a TopK teacher"],
    ),
}

TABLES = (
    BAD_TOKENS,
    BAD_TEACHERS,
    BAD_HEADS,
    BAD_SHAPES,
    BAD_LAYOUTS,
    BAD_VALUES,
    BAD_SETTINGS,
    BAD_SIZES,
    BAD_PARTS,
)
TABLE = {name: wrong for table in TABLES for name, wrong in table.items()}
assert len(TABLE) == sum(map(len, TABLES))
