"""The plan of the comparison: named blocks of runs, each with the question that it answers.

They come in the order in which they are worth their time. Settings are chosen on the questions of
the split ``validation``, with seeds of their own; what is reported is on the split ``test``.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.methods import FACTORIAL, MAIN, NEW, TUNED

SPLITS = ("validation", "test")
TUNING_SEEDS = (11, 12)
MAIN_SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
RATES = ("1e-4", "2e-4", "4e-4", "8e-4", "1.6e-3")
COEFFICIENTS = ("3", "30")
"""Weights of the divergence beside that of COMMON."""
BEST_NEW = "best_new"
"""In a block: the method of NEW that was chosen on the validation split."""


@dataclass(frozen=True)
class Block:
    """Runs of some methods with some seeds, in one setting and on one split."""

    name: str
    setting: str
    split: str
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    why: str


def _tuning() -> tuple[str, ...]:
    rates = [f"{method}@lr={lr}" for method in TUNED for lr in RATES]
    weights = [f"kepo@lr={lr},distill_coef={x}" for lr in RATES[1:4] for x in COEFFICIENTS]
    return tuple(rates + weights)


_KINDS = ("truncate", "shape", "clip")
_CORRECTIONS = tuple(
    f"{method}@hinted_correction={kind}" for method in ("kepo", "hints_only") for kind in _KINDS
)

PLAN = (
    Block(
        *("tune", "cliff", "validation", _tuning(), TUNING_SEEDS),
        "The learning rate of each method, and the weight of KEPO's divergence.",
    ),
    Block(
        *("main", "cliff", "test", tuple(MAIN), MAIN_SEEDS),
        "KEPO against its rivals, each with its own learning rate.",
    ),
    Block(
        *("factorial", "cliff", "test", tuple(FACTORIAL.values()), MAIN_SEEDS[:4]),
        "What policy term, gate and hints are worth, alone and together.",
    ),
    Block(
        *("new", "cliff", "validation", tuple(NEW), TUNING_SEEDS),
        "Which method that is not KEPO's deserves a test.",
    ),
    Block(
        *("new_on_test", "cliff", "test", (BEST_NEW,), MAIN_SEEDS),
        "The best of them on the validation split, run once.",
    ),
    Block(
        *("samples", "cliff", "test"),
        ("retry", "kdpo_tau0@num_generations=5", "opd@num_generations=5"),
        MAIN_SEEDS[:5],
        "Whether KEPO's lead is that of its further samples: as many, without a hint.",
    ),
    *(
        Block(
            *(setting, setting, "test", ("kepo", "no_gate", "wrong_gate", "opd"), MAIN_SEEDS[:3]),
            "Whether the gate is worth something where the teacher is often wrong.",
        )
        for setting in ("weak_75", "weak_50")
    ),
    Block(
        *("one_digit", "one_digit", "test"),
        ("kepo", "gate_only", "no_gate", "kdpo_tau0"),
        MAIN_SEEDS[:4],
        "Whether hints help that do not determine the answer.",
    ),
    Block(
        *("hint_controls", "cliff", "test", ("shuffled_hints", "leaking_hints"), MAIN_SEEDS[:4]),
        "Whether what a hint says matters, and whether the answer in it does.",
    ),
    Block(
        *("correction", "cliff", "test", ("hints_only", *_CORRECTIONS), MAIN_SEEDS[:3]),
        "Whether hinted successes harm by themselves, and whether a correction helps.",
    ),
    Block(
        *("attempts", "cliff", "test", ("kepo@num_hinted=1", "kepo@max_attempts=1")),
        MAIN_SEEDS[:3],
        "How many successes, and how many attempts at them.",
    ),
    Block(
        *("beta", "cliff", "test"),
        (
            "kepo@distill_coef=10",
            "kepo@beta=0,distill_coef=1.3",
            "kepo@beta=1,distill_coef=1.3",
        ),
        MAIN_SEEDS[:3],
        "The divergence, at coefficients that give about equal gradient norms in the first steps.",
    ),
    Block(
        *("official", "cliff", "test", ("kepo_official", "kdpo_tau1"), MAIN_SEEDS[:3]),
        "The official code's KEPO and its own baseline.",
    ),
    Block(
        *("long", "cliff", "test"),
        ("grpo@steps=300", "opd@steps=300", "kdpo_tau0@steps=300", "kepo@steps=300"),
        MAIN_SEEDS[:3],
        "Where the curves end that still rise after 100 steps.",
    ),
    Block(
        *("mild", "mild", "test", ("grpo", "opd", "kepo"), MAIN_SEEDS[:3]),
        "The same where fewer groups fail entirely.",
    ),
)
BLOCKS = {block.name: block for block in PLAN}
