"""What is measured: named shapes, and the tensors of one problem of such a shape."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.losses import real
from kepo_kernels import fused_linear_logprobs

# flat:   independent normal logits of standard deviation 3, student and teacher unrelated
# peaked: as in a trained model a few candidates hold nearly all of each row's probability, and the
#         teacher knows the same candidates with other odds
FLAT_STD, NOISE_STD = 3.0, 2.0
SURE_LOGIT, UNSURE_LOGIT, CANDIDATES = 28.0, 21.0, 8
TOKENS = 16  # of a sequence


ALL = ("floor", "ours", "eager", "compiled", "liger", "trl", "cce", "torch_lce")
OURS = ALL[:2]


@dataclass(frozen=True)
class Shape:
    """N rows, student's and teacher's hidden size, vocabulary, and what is timed there."""

    name: str
    n: int
    hidden: int
    teacher_hidden: int
    vocab: int
    cases: dict[str, tuple[str, ...]]  # and by whom, unless the command line says otherwise
    peaked: bool = False
    temperature: float | None = None  # of SmolLM2's own samples, whose states these are
    once: bool = False  # whole, whatever it takes: peers unscaled, no rounds, and fp32


_EVERYTHING = dict.fromkeys(("kd_open", "kd_half", "grpo", "joint", "logprobs", "ce"), ALL)
_MODEL = dict.fromkeys(("kd_open", "kd_half", "grpo", "joint"), OURS)
_REAL = {
    **dict.fromkeys(("kd_open", "grpo"), (*OURS, "eager", "liger")),
    **dict.fromkeys(("kd_tol", "grpo_tol"), OURS),
}
_TOLERANT = {"kd_tol": (*OURS, "eager", "liger"), "grpo_tol": (*OURS, "eager")}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 64, 16, 24, 512, _EVERYTHING),
        Shape(
            "design",
            1024,
            1024,
            2048,
            32768,
            {
                "kd_open": (*OURS, "eager", "liger", "trl"),
                "kd_half": (*OURS, "eager", "liger"),
                "grpo": (*OURS, "eager", "liger"),
                "ce": (*OURS, "liger", "cce", "torch_lce"),
            },
        ),
        Shape(
            "joint",
            1024,
            1024,
            1024,
            32768,
            {"joint": (*OURS, "eager", "liger"), "two_calls": ("ours",)},
        ),
        Shape("peaked", 1024, 1024, 1024, 32768, _TOLERANT, peaked=True),
        *(Shape(f"real-{t:g}", *real.SIZES, _REAL, temperature=t) for t in real.TEMPERATURES),
        Shape("peaked-76k", 512, 1024, 1024, 75968, _TOLERANT, peaked=True),
        # The widths of a Qwen3-VL student of 2B or 8B under a teacher of 32B. A batch has more
        # rows than this, for which a CPU would need too long.
        Shape("qwen3vl-2b-32b", 256, 2048, 5120, 151936, _MODEL),
        Shape("qwen3vl-8b-32b", 128, 4096, 5120, 151936, _MODEL),
        # Memory is not read off fewer rows, so eager must run as it is: in fp32, which every
        # processor multiplies.
        Shape("memory", 2048, 1024, 1024, 151936, {"kd_open": ("ours", "eager")}, once=True),
    )
}


FAMILIES = {"real": [f"real-{t:g}" for t in real.TEMPERATURES]}
"""Names that stand for several shapes."""


def parse_shapes(text: str) -> list[Shape]:
    """A name of FAMILIES, or what parse_shape takes."""
    return [SHAPES[name] for name in FAMILIES[text]] if text in FAMILIES else [parse_shape(text)]


def parse_shape(text: str) -> Shape:
    """A name of SHAPES, or N,H,Ht,V."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        n, hidden, teacher_hidden, vocab = (int(part) for part in text.split(","))
    except ValueError as error:
        known = ", ".join(SHAPES)
        raise argparse.ArgumentTypeError(f"{text!r}; expected N,H,Ht,V or {known}") from error
    if min(n, hidden, teacher_hidden) < 1 or vocab < 2:
        raise argparse.ArgumentTypeError(f"{text!r}; expected positive numbers, V at least 2")
    return Shape("custom", n, hidden, teacher_hidden, vocab, _EVERYTHING)


@dataclass(frozen=True)
class Problem:
    """B sequences of T tokens; the student's two tensors require gradient."""

    hidden: Tensor  # (B, T, H)
    lm_head: Tensor  # (V, H)
    targets: Tensor  # (B, T)
    advantages: Tensor  # (B,)
    old_logprobs: Tensor  # (B, T), near the policy's own
    upstream: Tensor  # (B, T), of the log-probabilities
    teacher_hidden: Tensor  # (B, T, Ht)
    teacher_lm_head: Tensor  # (V, Ht)
    half: Tensor  # (B,) bool: every other sequence
    entropy: float = float("nan")  # mean over the rows, in nats

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Problem:
        generator = torch.Generator(device).manual_seed(seed)
        draw = _Draw(generator, device)
        tokens = min(TOKENS, max(1, shape.n // 2))
        batch = shape.n // tokens
        rows = batch * tokens
        made = _real if shape.temperature else _peaked if shape.peaked else _flat
        student, targets, teacher = made(draw, shape, rows)
        hidden, lm_head = (x.to(dtype) for x in student)
        teacher_hidden, teacher_lm_head = (x.to(dtype) for x in teacher)
        del student, teacher
        with torch.no_grad():
            logprobs, entropy = fused_linear_logprobs(hidden, lm_head, targets, return_entropy=True)
        # Some ratios leave the clip's bounds, most do not.
        old_logprobs = logprobs.float() + 0.1 * draw.normal(rows)
        return cls(
            hidden=hidden.view(batch, tokens, -1).requires_grad_(),
            lm_head=lm_head.requires_grad_(),
            targets=targets.view(batch, tokens),
            advantages=draw.normal(batch),
            old_logprobs=old_logprobs.view(batch, tokens),
            upstream=draw.normal(batch, tokens),
            teacher_hidden=teacher_hidden.view(batch, tokens, -1),
            teacher_lm_head=teacher_lm_head,
            half=torch.arange(batch, device=device) % 2 == 0,
            entropy=float(entropy.mean()),
        )

    def first_rows(self, rows: int) -> Problem:
        """The same problem on fewer rows; at least two sequences, so that one of them is closed."""
        batch, tokens = self.targets.shape
        tokens = min(tokens, max(1, rows // min(2, batch)))
        batch = min(batch, max(1, rows // tokens))
        part = slice(batch), slice(tokens)
        return Problem(
            hidden=self.hidden.detach()[part].contiguous().requires_grad_(),
            lm_head=self.lm_head,
            targets=self.targets[part].contiguous(),
            advantages=self.advantages[:batch],
            old_logprobs=self.old_logprobs[part].contiguous(),
            upstream=self.upstream[part].contiguous(),
            teacher_hidden=self.teacher_hidden[part].contiguous(),
            teacher_lm_head=self.teacher_lm_head,
            half=self.half[:batch],
            entropy=self.entropy,
        )

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same problem with states and heads in another dtype; itself if they have it."""
        if dtype == self.hidden.dtype:
            return self
        trained = {name: getattr(self, name).detach().to(dtype) for name in ("hidden", "lm_head")}
        return replace(
            self,
            **{name: x.requires_grad_() for name, x in trained.items()},
            teacher_hidden=self.teacher_hidden.to(dtype),
            teacher_lm_head=self.teacher_lm_head.to(dtype),
        )

    @property
    def rows(self) -> int:
        return self.targets.numel()

    def gate(self, case: str) -> Tensor:
        """(B,): kd_half and joint_half close every other sequence."""
        return self.half if case.endswith("_half") else torch.ones_like(self.half)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Those of both leaves, in new tensors: each call starts from nothing."""
        return torch.autograd.grad(loss, (self.hidden, self.lm_head))


@dataclass(frozen=True)
class _Draw:
    generator: torch.Generator
    device: torch.device

    def normal(self, *size: int, std: float = 1.0) -> Tensor:
        x = torch.randn(*size, generator=self.generator, device=self.device)
        return x.mul_(std)

    def uniform(self, *size: int) -> Tensor:
        """In (0, 1]."""
        return 1 - torch.rand(*size, generator=self.generator, device=self.device)

    def integers(self, high: int, *size: int) -> Tensor:
        return torch.randint(high, size, generator=self.generator, device=self.device)

    def choice(self, weights: Tensor) -> Tensor:
        """One column of each row of (n, k) weights: (n, 1)."""
        return torch.multinomial(weights, 1, generator=self.generator)


Side = tuple[Tensor, Tensor]  # hidden states (rows, H) and head (V, H)


def _flat(draw: _Draw, shape: Shape, rows: int) -> tuple[Side, Tensor, Side]:
    def side(width: int) -> Side:
        head = draw.normal(shape.vocab, width, std=FLAT_STD * width**-0.5)
        return draw.normal(rows, width), head

    return side(shape.hidden), draw.integers(shape.vocab, rows), side(shape.teacher_hidden)


def _peaked(draw: _Draw, shape: Shape, rows: int) -> tuple[Side, Tensor, Side]:
    """Hidden states that point at their candidates' rows of the head, plus noise.

        hidden = sum_j a_j w_(k_j) / |w_(k_j)|^2 + noise     so that  hidden . w_(k_j) ~ a_j

    All other logits are normal of standard deviation NOISE_STD. Three rows of four are sure of one
    token; the others have eight candidates, each about a nat below the last, and leave some 1e-3 of
    their probability to the rest of the vocabulary. The teacher is the student with half a nat of
    noise on each a, and a little on the rest, its head included.
    """
    width, vocab = shape.hidden, shape.vocab
    head = draw.normal(vocab, width, std=width**-0.5)  # rows of length about 1
    candidates = draw.integers(vocab, rows, CANDIDATES)
    below = draw.uniform(rows, CANDIDATES).log().neg()
    below[:, 0] = 0
    logits = UNSURE_LOGIT - below.cumsum(-1)
    sure = draw.uniform(rows) < 0.75
    logits[sure] = 0
    logits[sure, 0] = SURE_LOGIT
    noise = draw.normal(rows, width, std=NOISE_STD)

    def states(logits: Tensor, head: Tensor, noise: Tensor) -> Tensor:
        chosen = head[candidates]  # (rows, candidates, width)
        # The noise, of length NOISE_STD sqrt(width), must not move the candidates' own logits.
        wanted = logits.unsqueeze(-1) - chosen @ noise.unsqueeze(-1)
        return noise + (wanted * chosen / chosen.square().sum(-1, keepdim=True)).sum(1)

    hidden = states(logits, head, noise)
    targets = candidates.gather(1, draw.choice(logits.softmax(-1))).squeeze(1)
    other = logits + 0.5 * draw.normal(rows, CANDIDATES)
    if shape.teacher_hidden == width:
        teacher_head = head + draw.normal(vocab, width, std=0.1 * width**-0.5)
        teacher_noise = noise + draw.normal(rows, width, std=0.2 * NOISE_STD)
    else:
        teacher_head = draw.normal(vocab, shape.teacher_hidden, std=shape.teacher_hidden**-0.5)
        teacher_noise = draw.normal(rows, shape.teacher_hidden, std=NOISE_STD)
    teacher_hidden = states(other, teacher_head, teacher_noise)
    return (hidden, head), targets, (teacher_hidden, teacher_head)


def _real(draw: _Draw, shape: Shape, rows: int) -> tuple[Side, Tensor, Side]:
    """The states of a language model over its own samples; a fine-tuned copy is the teacher."""
    assert shape.temperature is not None
    found = real.rows_of(shape.temperature)
    student, teacher, targets = (
        found[name][:rows].to(draw.device) for name in ("hidden", "teacher_hidden", "targets")
    )
    heads = (found[name].to(draw.device) for name in ("lm_head", "teacher_lm_head"))
    lm_head, teacher_lm_head = heads
    return (student, lm_head), targets, (teacher, teacher_lm_head)
