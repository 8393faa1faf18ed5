"""Cases drawn at random from the product of everything that can be different about a call.

A number is a case: `drawn(i)` is the same one everywhere. Its sizes, dtypes, strides, masks, gates,
heads, policies and engine settings come from `CHOICES`, each independent of the others, so that in
a few thousand draws every pair of values has met (`test_cases.py` counts them).
"""

import random
from functools import partial

import torch
from cases import HUGE, KernelCase, listed, open_sequences, own_policy_loss
from loss_calls import LOSSES, Arguments, each_tensor, flat
from torch import Tensor

from kepo_kernels import Head, LoRA, reference

SIZES = (1, 2, 5, 64, 127)
VOCABULARIES = (1, 2, 5, 64, 127, 257)
HEADS = ("plain", "softcap", "scale", "softcap scale", "lora", "softcap scale lora")
FROZEN = ((), ("hidden",), ("lm_head", "bias"), ("lora_a",), ("lm_head", "bias", "lora_b"))
EVERYTHING = ("hidden", "lm_head", "bias", "lora_a", "lora_b")
CHOICES = {
    "loss": LOSSES,
    "dtype": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "lead": ((1, 1), (1, 2), (2, 1), (5, 2), (2, 5), (3, 7), (1, 64), (2, 33)),
    "hidden": SIZES,
    "vocab": VOCABULARIES,
    "flat": (False, True),
    "strides": ("contiguous", "transposed", "sliced", "expanded"),
    "mask": (None, *("ragged", "holes", "integers", "floats") * 2, "nothing"),
    "weights": ("token_mean", "sequence_mean", "sum", "weights"),
    "temperature": (1.0, 0.7, 2.0),
    "bias": (False, True),
    "head": HEADS,
    "frozen": (*FROZEN, EVERYTHING),
    "chunk_rows": (None, 1, 3, HUGE),
}
TEACHER = {
    "teacher_hidden": SIZES,
    "teacher_vocab": VOCABULARIES,
    "teacher_bias": (False, True),
    "teacher_head": HEADS,
    "teacher_temperature": (None, 0.5, 2.0),
    "listed": (None, None, None, 1, 3, 40),
    "beta": (0.0, 0.1, 0.5, 1.0),
    "gate": ("none", "bool", "float", "closed", "left out"),
    "compact": (False, True),
}
POLICY = {
    "policy_loss": ("clip", "cispo", "sapo", "reinforce", own_policy_loss),
    "importance_level": ("token", "sequence"),
    "kl_estimator": (None, "k1", "k2", "k3"),
    "kl_bias_correction": (False, True),
    "entropy_coef": (0.0, 0.1, -0.1),
    "entropy_weights": (False, True),
    "delta": (None, 1.6),
    "old": (False, True),
    "sampler": (None, "sequence", "token"),
    "advantages": ("sequence", "token", "some 0"),
    "targets": (torch.int64, torch.int32),
}
PARTS = {"parts": ("both", "both", "teacher", "policy")}
OF_LOSS = {"gated_kd": TEACHER, "grpo": POLICY, "kepo": TEACHER | POLICY | PARTS}


def choices(number: int) -> dict[str, object]:
    """One value for every way in which this case can be different."""
    pick = random.Random(number).choice
    chosen = {name: pick(values) for name, values in CHOICES.items()}
    return chosen | {name: pick(values) for name, values in OF_LOSS[chosen["loss"]].items()}


def drawn(number: int) -> KernelCase:
    chosen = choices(number)
    batch, length = chosen["lead"]
    sizes = {"batch": batch, "length": length, "std": 1.5, "seed": number}
    names = ("hidden", "vocab", "teacher_hidden", "teacher_vocab")
    sizes |= {name: chosen[name] for name in names if name in chosen}
    if sizes.get("teacher_vocab") == 1:
        sizes["vocab"] = 1  # one column of many: the divergence is 0 but for log(exp(x)) - x
    settings = {"temperature": chosen["temperature"], "chunk_rows": chosen["chunk_rows"]}
    names = ("beta", "teacher_temperature", "policy_loss", "importance_level", "entropy_coef")
    settings |= {name: chosen[name] for name in names if name in chosen}
    if min(chosen["vocab"], chosen.get("teacher_vocab", 2)) == 1 and settings.get("beta") == 0.1:
        settings["beta"] = 0.5  # the oracle's log(0.9 + 0.1) is not 0, its log(0.5 + 0.5) is
    if chosen.get("delta") and chosen["policy_loss"] == "clip":  # elsewhere it has no meaning
        settings["delta"] = chosen["delta"]
    if chosen.get("kl_estimator"):
        settings |= {"kl_estimator": chosen["kl_estimator"], "kl_coef": 0.2}
        settings["kl_bias_correction"] = chosen["kl_bias_correction"]
    if chosen["dtype"] in (torch.bfloat16, torch.float16):
        settings["logits_dtype"] = torch.float32
    biases = [name for name in ("bias", "teacher_bias") if chosen.get(name)]
    return KernelCase(
        chosen["loss"],
        " ".join(biases),
        settings,
        sizes,
        partial(finish, chosen, number),
        chosen["dtype"],
        tuple(chosen["frozen"]),
    )


def finish(chosen: dict[str, object], number: int, call: Arguments) -> Arguments:
    """What make_problem does not know of, in an order in which each step finds what it needs."""
    generator = torch.Generator().manual_seed(number)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    lead, dtype = chosen["lead"], chosen["dtype"]
    for name in ("lm_head", "teacher_lm_head"):
        kind = chosen.get(name.replace("lm_head", "head"))
        if kind is not None:
            call = call | {name: head(call[name], kind, normal)}
    if chosen.get("listed"):
        call = listed(chosen["listed"])(call)
    call = call | masks(chosen["mask"], lead, normal)
    call = call | gates(chosen.get("gate"), lead[0], normal)
    call = call | weightings(chosen, lead, normal)
    if chosen["loss"] != "gated_kd":
        call = call | policies(chosen, lead, dtype, normal)
    if chosen["strides"] == "expanded":
        for name in ("hidden", "teacher_hidden"):
            if name in call:
                call = call | {name: each_tensor(call[name], lambda x: x[:1].expand_as(x))}
    if "old" in chosen:
        call = call | earlier(chosen, call, normal)
    if chosen["flat"]:
        call = flat(call)
    call = one_part(chosen.get("parts"), call)
    if chosen.get("compact") and "teacher_hidden" in call:
        opened = open_sequences(call)
        if opened is not None:
            teacher = each_tensor(call["teacher_hidden"], lambda x: x[opened])
            call = call | {"teacher_hidden": teacher}
    return {name: each_tensor(x, partial(strided, chosen["strides"])) for name, x in call.items()}


def head(weight: Tensor, kind: str, normal: partial) -> Tensor | Head:
    if kind == "plain":
        return weight
    lora = None
    if "lora" in kind:
        a, b = normal(2, weight.shape[1]).to(weight.dtype), normal(len(weight), 2).to(weight.dtype)
        lora = LoRA(a, b, 0.5 / weight.shape[1] ** 0.5)  # logits of order 1 whatever the width
    softcap, scale = 3.0 if "softcap" in kind else None, 0.5 if "scale" in kind else 1.0
    return Head(weight, softcap, scale, lora)


def masks(kind: str | None, lead: tuple[int, int], normal: partial) -> Arguments:
    if kind is None:
        return {}
    mask = normal(lead) > -0.5
    if kind == "ragged":
        mask = torch.arange(lead[1]) < mask.sum(-1, keepdim=True)
    if kind == "nothing":
        mask = torch.zeros_like(mask)
    dtype = {"integers": torch.int64, "floats": torch.float32}.get(kind, torch.bool)
    return {"completion_mask": mask.to(dtype)}


def gates(kind: str | None, batch: int, normal: partial) -> Arguments:
    if kind is None:
        return {}
    if kind == "left out":
        return {"gate": None}
    gate = normal(batch).clamp(min=0.0)
    if kind == "none":
        gate = torch.ones(batch)
    return {"gate": {"float": gate, "closed": torch.zeros(batch)}.get(kind, gate > 0)}


def weightings(chosen: dict[str, object], lead: tuple[int, int], normal: partial) -> Arguments:
    """A reduction, or weights of either sign, some of them 0."""
    prefixes = ("policy_", "distill_") if chosen["loss"] == "kepo" else ("",)
    if chosen["weights"] != "weights":
        return {f"{prefix}reduction": chosen["weights"] for prefix in prefixes}
    return {f"{prefix}weights": normal(lead) * (normal(lead) > 0.0) for prefix in prefixes}


def policies(
    chosen: dict[str, object], lead: tuple[int, int], dtype: torch.dtype, normal: partial
) -> Arguments:
    advantages = normal(lead[0] if chosen["advantages"] == "sequence" else lead)
    if chosen["advantages"] == "some 0":
        advantages = advantages * (normal(lead) > 0)
    given = {"advantages": advantages.to(dtype)}
    if chosen["sampler"] is not None:
        weights = normal(lead[0] if chosen["sampler"] == "sequence" else lead)
        given["sampler_weights"] = weights.clamp(min=0.0)
    if chosen["entropy_weights"]:
        given["entropy_weights"] = normal(lead) * (normal(lead) > 0.0)
    return given


def one_part(kept: str | None, call: Arguments) -> Arguments:
    """The joint loss without its policy, or without its teacher."""
    of_policy = ("targets", "advantages", "old_logprobs", "ref_logprobs", "sampler_weights")
    of_policy += ("entropy_weights",)
    gone = {
        "teacher": (*of_policy, "policy_weights", "policy_reduction", "kl_coef", "entropy_coef"),
        "policy": ("teacher_hidden", "teacher_lm_head", "teacher_bias", "gate", "distill_weights")
        + ("distill_reduction",),
    }
    return {name: x for name, x in call.items() if name not in gone.get(kept, ())}


def earlier(chosen: dict[str, object], call: Arguments, normal: partial) -> Arguments:
    """Log-probabilities near those of the call's own head, so that ratios are on all sides."""
    double = {
        name: each_tensor(call.get(name), Tensor.double) for name in ("hidden", "lm_head", "bias")
    }
    logits = reference.project(*double.values()).flatten(0, 1)
    logprobs = reference.token_logprob(logits, call["targets"].flatten(), chosen["temperature"])
    logprobs = logprobs.reshape(chosen["lead"])
    given = {"targets": call["targets"].to(chosen["targets"])}
    for name, wanted in (("old_logprobs", "old"), ("ref_logprobs", "kl_estimator")):
        if chosen[wanted]:
            given[name] = (logprobs + 0.5 * normal(chosen["lead"])).to(chosen["dtype"])
    return given


def strided(kind: str, x: Tensor) -> Tensor:
    """The same values, otherwise in memory; what lies between them is NaN or no token."""
    if kind == "transposed" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "sliced":
        filler = torch.nan if x.is_floating_point() else 77
        room = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), filler, dtype=torch.float64)
        view = room.to(x.dtype)[..., 1::2]
        return view.copy_(x)
    return x


# ------------------------------------------------------------------------- rows that do not exist


def weights_of(call: Arguments) -> dict[str, Tensor]:
    """Each term's weight of every token, as the oracle has them: "policy" and "distill"."""
    mask = call.get("completion_mask")
    mask = torch.ones(call["hidden"].shape[:-1]) if mask is None else mask
    terms = {"": None, "policy_": None, "distill_": call.get("gate")}
    found = {}
    for prefix, gate in terms.items():
        given, reduction = call.get(f"{prefix}weights"), call.get(f"{prefix}reduction")
        if given is None and reduction is None:
            continue
        if prefix == "":
            gate = call.get("gate")
        present = reference.reduction_weights(mask, gate, "sum" if reduction is None else reduction)
        weights = present if given is None else given * present
        found[prefix or ("policy_" if "advantages" in call else "distill_")] = weights
    return found


def poisoned(call: Arguments) -> Arguments:
    """NaN, and no token ids, wherever a tensor belongs to a token that takes no part."""
    weights = weights_of(call)
    active = {term: w != 0 for term, w in weights.items()}
    everywhere = [*active.values()]
    if call.get("entropy_coef") and call.get("entropy_weights") is not None:
        everywhere.append(call["entropy_weights"] != 0)
    anywhere = torch.stack(everywhere).any(0)
    of_policy, of_teacher = active.get("policy_"), active.get("distill_")
    where = {"hidden": anywhere, "targets": anywhere, "teacher_hidden": of_teacher}
    of_tokens = ("advantages", "old_logprobs", "ref_logprobs", "sampler_weights")
    where |= dict.fromkeys(of_tokens, of_policy)

    def spoil(name: str, x: object) -> object:
        live = where.get(name)
        if live is None:
            return x

        def change(x: Tensor) -> Tensor:
            # Not what is per sequence, or of the open sequences only.
            if x.shape[: live.dim()] != live.shape:
                return x
            of_tokens = live.reshape(*live.shape, *[1] * (x.dim() - live.dim()))
            return torch.where(of_tokens, x, torch.nan if x.is_floating_point() else -(10**6))

        return each_tensor(x, change)

    return {name: spoil(name, x) for name, x in call.items()}
