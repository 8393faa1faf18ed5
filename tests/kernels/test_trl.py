"""The oracle and the named weights against TRL's own code, called, not copied.

TRL's policy loss is a method of its trainer; it runs here on a stub with the few attributes that it
reads. All in fp64 but TRL's kernels, which compute in fp32.
"""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from checks import Problem, assert_close_to_oracle, make_problem, make_row_problem
from torch import Tensor

from kepo_kernels import reference, weights

try:
    import trl
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.grpo_trainer import GRPOTrainer
except (ImportError, RuntimeError) as error:  # RuntimeError: how a lazy import fails
    pytest.skip(f"TRL 1.16 or newer cannot be imported: {error}", allow_module_level=True)

FLOAT64 = torch.float64
WRITTEN_FOR = "1.16."
# No fp64 in TRL's own temperatures: these two are exact in fp32.
SAPO = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.25}
LOW, HIGH = 0.25, 0.375
MAX_LENGTH = 11


def private(call, *args):
    """Of a version this was not written for, what is private may differ: that is no failure."""
    try:
        return call(*args)
    except (AttributeError, KeyError, TypeError) as error:
        if trl.__version__.startswith(WRITTEN_FOR):
            raise
        pytest.skip(f"TRL {trl.__version__} is private otherwise: {error!r}")


def trl_policy_loss(
    logprobs: Tensor,
    entropies: Tensor,
    inputs: dict[str, Tensor],
    loss_type: str,
    *,
    level: str = "token",
    delta: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    corrects_kl: bool = False,
    processes: int = 1,
) -> Tensor:
    """GRPOTrainer._compute_loss on these log-probabilities."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropies, None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _entropy_bonus_enabled=entropy_coef != 0.0,
        accelerator=SimpleNamespace(
            num_processes=processes,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            sync_gradients=True,
        ),
        args=SimpleNamespace(
            delta=delta, use_bias_correction_kl=corrects_kl, steps_per_generation=1, **SAPO
        ),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        entropy_coef=entropy_coef,
        # TRL bounds cispo's ratio by epsilon_high itself.
        epsilon_high=1.0 + HIGH if loss_type == "cispo" else HIGH,
        epsilon_low=LOW,
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm="importance_sampling_ratio" in inputs,
        vllm_importance_sampling_correction=True,
    )
    return private(GRPOTrainer._compute_loss, trainer, None, inputs)


def problem() -> tuple[Problem, Tensor]:
    """A batch with a sequence of no tokens, and its mask as TRL has them, of integers."""
    x = make_problem(5, 7, dtype=FLOAT64, seed=1)
    mask = x.completion_mask.long()
    mask[1] = 0
    return x, mask


def trl_inputs(x: Problem, mask: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """A hole in the fourth sequence is a call of a tool, for which TRL has a mask of its own."""
    completion_mask = mask.clone()
    completion_mask[3] = 1
    nothing = x.targets[:, :0]
    return {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": x.targets,
        "completion_mask": completion_mask,
        "tool_mask": torch.where(torch.arange(5).unsqueeze(-1) == 3, mask, 1),
        "advantages": x.advantages,
        "num_items_in_batch": mask.sum(),
    } | more


def numbers(x: Problem, hidden: Tensor, lm_head: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, (B, T) each, of a whole matrix and by torch alone."""
    log_q = (hidden @ lm_head.T).log_softmax(-1)
    entropies = torch.distributions.Categorical(logits=log_q).entropy()
    return log_q.gather(-1, x.targets.unsqueeze(-1)).squeeze(-1), entropies


# TRL's loss_type: our policy_loss, and the weights of its normalisation
LOSS_TYPES = {
    "grpo": ("clip", weights.grpo_weights),
    "bnpo": ("clip", weights.bnpo_weights),
    "dr_grpo": ("clip", lambda mask: weights.dr_grpo_weights(mask, MAX_LENGTH)),
    "dapo": ("clip", weights.dapo_weights),
    "cispo": ("cispo", lambda mask: weights.dapo_weights(mask, mask.sum())),
    "sapo": ("sapo", weights.grpo_weights),
}


def compare(x: Problem, mask: Tensor, inputs: dict, ours: dict, loss_type: str, **theirs: object):
    """Value, and gradient in hidden states and head."""
    policy_loss, normalise = LOSS_TYPES[loss_type]
    leaves = [t.clone().requires_grad_() for t in (x.hidden, x.lm_head)]
    expected = trl_policy_loss(*numbers(x, *leaves), inputs, loss_type, **theirs)
    actual = reference.grpo_loss(
        *leaves,
        x.targets,
        x.advantages,
        completion_mask=mask,
        weights=ours.pop("weights", normalise(mask)),
        policy_loss=policy_loss,
        **{"epsilon_low": LOW, "epsilon_high": HIGH} | (SAPO if policy_loss == "sapo" else {}),
        **ours,
    )
    assert_close_to_oracle(actual, expected.detach(), name="loss")
    gradients = (torch.autograd.grad(loss, leaves) for loss in (actual, expected))
    for name, *pair in zip(("hidden", "lm_head"), *gradients, strict=True):
        assert_close_to_oracle(*pair, name=name)


# An option of TRL's, and the same of ours; {} is on policy.
OPTIONS = {
    "on policy": ({}, {}),
    "off policy": ({}, {"old_logprobs"}),
    "k3": ({"beta": 0.3}, {"old_logprobs", "ref_logprobs"}),
    "delta": ({"delta": 1.5}, {"old_logprobs"}),
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_policy_losses(loss_type, option, level):
    x, mask = problem()
    settings, given = OPTIONS[option]
    if option == "delta":
        # Far enough for it to bite, also on the mean of a sequence.
        x.old_logprobs.copy_(x.old_logprobs - 0.5)
    tensors = {name: getattr(x, name) for name in given}
    # What TRL calls each of them.
    names = {"old_logprobs": "old_per_token_logps", "ref_logprobs": "ref_per_token_logps"}
    inputs = trl_inputs(x, mask, **{names[name]: t for name, t in tensors.items()})
    ours = tensors | {"importance_level": level, "kl_coef": settings.get("beta", 0.0)}
    ours |= {"delta": settings.get("delta")}
    compare(x, mask, inputs, ours, loss_type, level=level, **settings)


def test_the_bounds_above_bite():
    """Some ratio is clipped below, above and by delta, or the comparison would show nothing."""
    x, mask = problem()
    logprobs, _ = numbers(x, x.hidden, x.lm_head)
    ratio = (logprobs - x.old_logprobs).exp()[mask.bool()]
    assert (ratio < 1 - LOW).any() and (ratio > 1 + HIGH).any() and (ratio.log() > -0.5).any()
    far = ((logprobs - x.old_logprobs + 0.5) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    assert (far[x.advantages < 0].exp() > 1.5).any()


# ------------------------------------------------------------------------- sampler corrections


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_sampler_corrections(mode, level, loss_type):
    """The ratio as TRL forms it (within a method too large to call), and what its loss does."""
    x, mask = problem()
    sampler = x.old_logprobs + 0.4 * torch.randn_like(x.old_logprobs)
    sampler[0, 0] = torch.nan
    low, high = 0.75, 1.25
    difference = torch.nan_to_num((x.old_logprobs - sampler) * mask, nan=0.0)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    outside = (ratio < low) | (ratio > high)
    assert outside.any() and not outside.all()
    ratio = ratio.clamp(low, high) if mode == "truncate" else ratio.masked_fill(outside, 0.0)

    ours = weights.sampler_weights(
        x.old_logprobs, sampler, mask, level=level, mode=mode, low=low, high=high
    )
    expected = ratio.squeeze(-1) if level == "sequence" else ratio * mask
    assert_close_to_oracle(ours, expected, name="sampler weights")

    inputs = trl_inputs(
        x, mask, old_per_token_logps=x.old_logprobs, ref_per_token_logps=x.ref_logprobs
    )
    inputs["importance_sampling_ratio"] = ratio
    same = {"old_logprobs": x.old_logprobs, "ref_logprobs": x.ref_logprobs, "kl_coef": 0.3}
    compare(x, mask, inputs, same | {"sampler_weights": ours}, loss_type, beta=0.3)


# ------------------------------------------------------------- the whole batch, the entropy bonus


def test_dapo_weights_of_a_micro_batch():
    """TRL divides by the tokens of the whole batch per process, as gradients are averaged."""
    x, mask = problem()
    inputs = trl_inputs(x, mask, num_items_in_batch=torch.tensor(90))
    for items in (45, torch.tensor(90) / 2):
        ours = {"weights": weights.dapo_weights(mask, items)}
        compare(x, mask, inputs, ours, "dapo", processes=2)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_entropy_bonus(loss_type):
    """TRL's bonus is a mean over tokens whatever the loss; the same where ours is one, too."""
    x, mask = problem()
    compare(x, mask, trl_inputs(x, mask), {"entropy_coef": 0.1}, loss_type, entropy_coef=0.1)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_entropy_bonus_of_its_own_weights(loss_type):
    """A mean over tokens beside any normalisation of the policy."""
    x, mask = problem()
    ours = {"entropy_coef": 0.1, "entropy_weights": weights.bnpo_weights(mask)}
    compare(x, mask, trl_inputs(x, mask), ours, loss_type, entropy_coef=0.1)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrected_penalty(level, old, loss_type):
    """TRL's default: k3 times the ratio, before that is bounded by delta."""
    x, mask = problem()
    if (level, loss_type) == ("sequence", "cispo"):
        pytest.skip("TRL multiplies (B, 1) by (B, T) log-probabilities; ours is the same per token")
    given = {"ref_per_token_logps": x.ref_logprobs} | (
        {"old_per_token_logps": x.old_logprobs} if old else {}
    )
    ours = {
        "ref_logprobs": x.ref_logprobs,
        "old_logprobs": x.old_logprobs if old else None,
        "kl_coef": 0.3,
        "kl_bias_correction": True,
        "importance_level": level,
    }
    how = {"beta": 0.3, "corrects_kl": True, "level": level}
    compare(x, mask, trl_inputs(x, mask, **given), ours, loss_type, **how)


# ------------------------------------------------------------------------------- TRL's kernels

HEADS = {
    "plain": ({}, {}),
    "scaled": ({"logit_scale": 0.5}, {"logit_scale": 1.5}),
    "capped": ({"softcap": 3.0}, {"softcap": 5.0}),
    "scaled, capped": ({"logit_scale": 0.5, "softcap": 3.0}, {}),
}


def head(weight: Tensor, softcap: float | None = None, logit_scale: float = 1.0):
    return SimpleNamespace(weight=weight, softcap=softcap, logit_scale=logit_scale, lora=None)


def trl_head(softcap: float | None = None, logit_scale: float = 1.0) -> tuple[float, float | None]:
    return logit_scale, softcap


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence(beta, options):
    student, teacher = HEADS[options]
    x = make_problem(3, 4, std=3.0)
    upstream = torch.randn(12)
    names = ("hidden", "lm_head", "bias")
    leaves = [getattr(x, name).clone().requires_grad_() for name in names]
    actual, entropy = private(
        ChunkedDivergenceFunction.apply,
        leaves[0].flatten(0, 1),
        *leaves[1:],
        x.teacher_hidden.flatten(0, 1),
        x.teacher_lm_head,
        x.teacher_bias,
        beta,
        0.7,
        *trl_head(**student),
        *trl_head(**teacher),
    )
    gradients = torch.autograd.grad(actual, leaves, upstream)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = reference.project(exact[0].flatten(0, 1), head(exact[1], **student), exact[2])
    teacher_logits = reference.project(
        x.teacher_hidden.double().flatten(0, 1),
        head(x.teacher_lm_head.double(), **teacher),
        x.teacher_bias.double(),
    )
    expected = reference.token_divergence(logits, teacher_logits, beta, 0.7)
    assert_close_to_oracle(actual, expected.detach(), name="divergence")
    oracle_entropy = reference.token_entropy(logits, 0.7).detach()
    assert_close_to_oracle(entropy, oracle_entropy, name="entropy")
    oracle = torch.autograd.grad(expected, exact, upstream.double())
    for name, *pair in zip(names, gradients, oracle, strict=True):
        assert_close_to_oracle(*pair, name=name)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence_over_the_students_tokens(beta):
    """SDPO's, whose K are the student's most likely ones."""
    loss = pytest.importorskip("trl.experimental.sdpo.loss_utils")
    rows = make_row_problem(6, 37, 37, dtype=FLOAT64)
    ids = rows.logits.topk(5).indices
    logprobs = rows.teacher.log_softmax(-1).gather(-1, ids)
    options = {"distillation_topk": 5, "distillation_alpha": beta, "distillation_add_tail": True}
    same_divergence(
        rows.logits,
        lambda x: loss.compute_topk_self_distillation_loss(x, rows.teacher, **options),
        lambda x: reference.top_k_divergence(x, ids, logprobs, beta),
    )


def test_divergence_over_a_servers_tokens():
    """Rows that list fewer, which TRL pads with log-probabilities of -inf."""
    module = "trl.experimental.server_distillation.server_distillation_trainer"
    server = pytest.importorskip(module)
    rows = make_row_problem(6, 37, 37, dtype=FLOAT64)
    logprobs, ids = rows.teacher.log_softmax(-1).topk(5)
    logprobs[2:, 3:] = -torch.inf

    def theirs(logits: Tensor) -> Tensor:
        listed = logprobs > -torch.inf
        student = torch.where(listed, logits.log_softmax(-1).gather(-1, ids), -torch.inf)
        q, _ = server._add_tail_bucket(student, listed)
        p, there = server._add_tail_bucket(logprobs, listed)
        return torch.where(there, p.exp() * (p - q), 0.0).nan_to_num(0.0).sum(-1)

    ours = ids.masked_fill(logprobs == -torch.inf, -1)
    same_divergence(
        rows.logits, theirs, lambda x: reference.top_k_divergence(x, ours, logprobs, 0.0)
    )


def same_divergence(logits: Tensor, theirs: Callable, ours: Callable) -> None:
    leaf = logits.clone().requires_grad_()
    expected, actual = private(theirs, leaf), ours(leaf)
    assert_close_to_oracle(actual, expected.detach(), name="divergence")
    gradients = (torch.autograd.grad(x.sum(), leaf)[0] for x in (actual, expected))
    assert_close_to_oracle(*gradients, name="logits")


@pytest.mark.parametrize("options", HEADS)
def test_log_probabilities(options):
    settings, _ = HEADS[options]
    x = make_problem(3, 4, std=3.0)
    upstream = torch.randn(12)
    names = ("hidden", "lm_head", "bias")
    leaves = [getattr(x, name).clone().requires_grad_() for name in names]
    scale, softcap = trl_head(**settings)
    targets = x.targets.flatten()
    actual, *_ = private(
        ChunkedLogProbFunction.apply,
        leaves[0].flatten(0, 1),
        *leaves[1:],
        targets,
        0.7,
        16,
        softcap,
        scale,
    )
    gradients = torch.autograd.grad(actual, leaves, upstream)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = reference.project(exact[0].flatten(0, 1), head(exact[1], **settings), exact[2])
    expected = reference.token_logprob(logits, targets, 0.7)
    assert_close_to_oracle(actual, expected.detach(), name="log-probabilities")
    oracle = torch.autograd.grad(expected, exact, upstream.double())
    for name, *pair in zip(names, gradients, oracle, strict=True):
        assert_close_to_oracle(*pair, name=name)
