"""Tensors that are none, or of a shape, dtype or device that does not fit."""

import numpy
import torch
from right_calls import (
    BATCH,
    GRPO,
    HIDDEN,
    KD,
    KEPO,
    LENGTH,
    LINEAR,
    LOGPROBS,
    POLICY,
    PROBLEM,
    STUDENT,
    TARGETS,
    TEACHER,
    TEACHER_HIDDEN,
    TEACHER_VOCAB,
    VOCAB,
)
from torch import Tensor

from kepo_kernels import Head, LoRA


def shard(x: Tensor) -> Tensor:
    """What FSDP2 hands out; only the name of the type is looked at, so this one will do."""
    return x.as_subclass(type("DTensor", (Tensor,), {}))


def sparse_head() -> Head:
    """A head whose LoRA is sparse."""
    low = torch.eye(2, HIDDEN).to_sparse(), torch.ones(VOCAB, 2)
    return Head(PROBLEM.lm_head, lora=LoRA(*low))


def partitioned() -> Tensor:
    """What DeepSpeed ZeRO-3 leaves of a parameter."""
    x = torch.ones(0)
    x.ds_id = 7
    return x


# what is wrong: (the functions it is wrong for, the arguments, what the message has to say)
BAD_HEADS = {
    "no tensor": (STUDENT, {"hidden": [1.0]}, ["hidden is list", "expected a tensor"]),
    "numpy": (STUDENT, {"lm_head": numpy.ones((VOCAB, HIDDEN))}, ["lm_head is ndarray"]),
    "none": ((KD,), {"teacher_hidden": None}, ["came without teacher_hidden"]),
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
        {"lm_head": PROBLEM.lm_head.double()},
        ["hidden", "float32", "lm_head", "float64", "cast one"],
    ),
    "mixed bias": (STUDENT, {"bias": PROBLEM.bias.double()}, ["hidden", "bias [37] float64"]),
    "mixed teacher": (
        TEACHER,
        {
            "teacher_hidden": PROBLEM.teacher_hidden.double(),
            "teacher_lm_head": PROBLEM.teacher_lm_head.double(),
        },
        ["hidden [3, 4, 16] float32", "teacher_hidden [3, 4, 24] float64"],
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
    "states without values": (
        STUDENT,
        {"hidden": PROBLEM.hidden.to("meta")},
        ["hidden [3, 4, 16] float32 on meta has no values", "on the CPU or a CUDA device"],
    ),
    "sharded states": (
        STUDENT,
        {"hidden": shard(PROBLEM.hidden)},
        ["hidden is a sharded DTensor", "to_local()"],
    ),
    "sharded head": (
        STUDENT,
        {"lm_head": shard(PROBLEM.lm_head)},
        ["lm_head is a sharded DTensor", "with kepo_kernels.lm_head_weight(model)"],
    ),
    "sharded teacher head": (
        TEACHER,
        {"teacher_lm_head": shard(PROBLEM.teacher_lm_head)},
        ["teacher_lm_head is a sharded DTensor", "kepo_kernels.lm_head_weight(model)"],
    ),
    "partitioned head": (
        STUDENT,
        {"lm_head": partitioned()},
        ["lm_head is a parameter", "ZeRO-3", "kepo_kernels.lm_head_weight(model)"],
    ),
    "partitioned teacher head": (
        TEACHER,
        {"teacher_lm_head": partitioned()},
        ["teacher_lm_head is a parameter", "GatheredParameters"],
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
    "no targets": ((GRPO, LOGPROBS), {"targets": None}, ["targets is NoneType"]),
    "targets (B,)": (TARGETS, {"targets": PROBLEM.targets[:, 0]}, ["targets [3]", "shape [3, 4]"]),
    "targets shifted": (TARGETS, {"targets": PROBLEM.targets[:, 1:]}, ["targets [3, 3]"]),
    "targets elsewhere": (TARGETS, {"targets": PROBLEM.targets.to("meta")}, ["targets on meta"]),
    "no advantages": ((GRPO,), {"advantages": None}, ["advantages NoneType"]),
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
    "sampler_weights (1, T)": (
        POLICY,
        {"sampler_weights": torch.ones(1, LENGTH)},
        ["sampler_weights [1, 4]", "[3]", "[3, 4]"],
    ),
    "sampler_weights (B, T, 1)": (
        POLICY,
        {"sampler_weights": torch.ones(BATCH, LENGTH, 1)},
        ["sampler_weights [3, 4, 1]"],
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

LAYOUTS = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.reshape(len(x), -1).to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor(list(x.unsqueeze(-1).unbind())),
    "jagged": lambda x: torch.nested.nested_tensor(
        list(x.unsqueeze(-1).unbind()), layout=torch.jagged
    ),
}
ANYWHERE = {
    **dict.fromkeys(("hidden", "lm_head", "completion_mask"), STUDENT),
    "bias": STUDENT,
    "targets": TARGETS,
    "advantages": POLICY,
    "old_logprobs": POLICY,
    "ref_logprobs": POLICY,
    "teacher_hidden": TEACHER,
    "teacher_lm_head": TEACHER,
    "teacher_bias": TEACHER,
    "gate": TEACHER,
}
# Whatever it is that comes so, torch has no strides of it, and most operations not at all.
BAD_LAYOUTS = {
    f"{layout} {name}": (
        functions,
        {name: make(getattr(PROBLEM, name))},
        [f"{name} is a {layout.replace('jagged', 'nested')} tensor; expected a strided one"],
    )
    for layout, make in LAYOUTS.items()
    for name, functions in ANYWHERE.items()
} | {
    "sparse LoRA": (
        STUDENT,
        {"lm_head": sparse_head()},
        ["lm_head.lora.a is a sparse_coo tensor", ".to_dense()"],
    ),
    "sparse weights": (
        (KD, GRPO, LINEAR),
        {"weights": torch.ones(BATCH, LENGTH).to_sparse()},
        ["weights is a sparse_coo tensor"],
    ),
    "nested sampler weights": (
        POLICY,
        {"sampler_weights": LAYOUTS["nested"](torch.ones(BATCH, LENGTH))},
        ["sampler_weights is a nested tensor", "torch.nested.to_padded_tensor"],
    ),
}
