"""Which of GRPOTrainer's settings `fused_kepo_loss` can compute, and with which arguments."""

from typing import Any

from torch import Tensor

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""Loss types whose term of a token is GRPO's, and which differ in their weights alone."""

SINGLE = ("cispo", "sapo")
"""Other loss types whose term of a token needs that token's numbers alone."""


def uncovered(trainer: Any) -> str:
    """Name the settings of this trainer that the joint loss cannot compute, or return "".

    All of these need numbers of other tokens before a token's loss is known.
    """
    delta, high, low = trainer.args.delta, trainer.epsilon_high, trainer.epsilon_low
    clips = trainer.loss_type in CLIPPED
    found = {
        f"loss_type={trainer.loss_type!r}": not clips and trainer.loss_type not in SINGLE,
        f"off_policy_mask_threshold={trainer.off_policy_mask_threshold}": (
            trainer.off_policy_mask_threshold is not None
        ),
        f"top_entropy_quantile={trainer.top_entropy_quantile}": trainer.top_entropy_quantile < 1.0,
        f"router_aux_loss_coef={trainer.router_aux_loss_coef}": trainer.aux_loss_enabled,
        f"delta={delta} (not above 1 + epsilon_high)": (
            clips and delta is not None and delta <= 1 + high
        ),
        f"beta={trainer.beta}": trainer.beta < 0,
        f"epsilon={low}": not 0 <= low <= 1,
    }
    return ", ".join(words for words, is_so in found.items() if is_so)


def settings_of(trainer: Any) -> dict[str, Any]:
    """Return the arguments of the policy part that do not depend on the batch."""
    settings = dict(
        epsilon_low=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        delta=trainer.args.delta if trainer.loss_type in CLIPPED else None,
        kl_coef=trainer.beta,
        kl_bias_correction=trainer.args.use_bias_correction_kl,
        importance_level=trainer.importance_sampling_level,
        sapo_temperature_pos=trainer.args.sapo_temperature_pos,
        sapo_temperature_neg=trainer.args.sapo_temperature_neg,
        policy_loss="clip" if trainer.loss_type in CLIPPED else trainer.loss_type,
        temperature=trainer.temperature,
    )
    if trainer.loss_type == "cispo":  # TRL's bound is epsilon_high itself, ours 1 + epsilon_high
        settings["policy_loss"] = _cispo_below(trainer.epsilon_high)
    return settings


def _cispo_below(bound: float) -> Any:
    def cispo(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        return -log_ratio.detach().exp().clamp(max=bound) * advantages * logprobs

    return cispo


def policy_weights(trainer: Any, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Return each token's weight in the loss of one micro-batch, by TRL's normalisers."""
    training, kind = trainer.model.training, trainer.loss_type
    accumulated = trainer.current_gradient_accumulation_steps if training else 1.0
    mask = mask.double()
    if kind in ("grpo", "sapo"):
        lengths = mask.sum(-1, keepdim=True).clamp(min=1)
        return mask / lengths / len(mask) / accumulated
    if kind == "bnpo":
        return mask / mask.sum().clamp(min=1) / accumulated
    if kind == "dr_grpo":
        return mask / (len(mask) * trainer.max_completion_length) / accumulated
    if kind == "luspo":
        return mask / len(mask) / accumulated
    return mask / of_window(trainer, inputs["num_items_in_batch"])  # cispo, dapo


def of_window(trainer: Any, items: Tensor) -> Tensor:
    """Return the tokens of a process in one optimiser step, from their number in the whole
    generation batch: TRL's normaliser of dapo."""
    count = items.clamp(min=1) / trainer.accelerator.num_processes
    if trainer.model.training:
        accumulated = trainer.current_gradient_accumulation_steps
        count = count * accumulated / trainer.args.steps_per_generation
    return count


def entropy_of(trainer: Any, mask: Tensor) -> dict[str, Any]:
    """Return the arguments of the entropy bonus: TRL takes it as a mean over a micro-batch's
    tokens, whatever the loss type."""
    coefficient = trainer.entropy_coef if trainer._entropy_bonus_enabled else 0.0
    if trainer.use_adaptive_entropy and trainer._last_world_entropy > trainer.args.entropy_target:
        coefficient = 0.0
    if coefficient == 0.0:
        return {}
    accumulated = trainer.current_gradient_accumulation_steps if trainer.model.training else 1.0
    weights = mask.double() / mask.sum().clamp(min=1) / accumulated
    return dict(entropy_coef=coefficient, entropy_weights=weights)
