"""The one tolerance rule of these tests, the problems it is applied to, and the rows' oracle."""

import importlib
import math
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from kepo_kernels import reference
from kepo_kernels.rows.contract import RowSettings, RowStats, accumulate_dtype

# Relative L2 error against the fp64 oracle. A correct fp32 kernel is at 1e-7 to 2e-6.
RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 5e-6}
# bf16 and fp16: rounding the exact result once is the floor, plain torch of that dtype ("eager")
# the ceiling. Planted faults that pass "twice eager's error" are caught at a quarter of it.
OF_ROUNDING = 1.1
OF_EAGER = 0.25
# Under this norm a relative error says nothing about the code.
SMALLEST_ORACLE = 1e-6


def assert_close_to_oracle(
    actual: Tensor, oracle: Tensor, *, eager: Tensor | None = None, name: str
) -> None:
    """Raises AssertionError unless `actual` is as near to the fp64 `oracle` as its dtype can be.

    fp64, fp32: ||e|| <= RELATIVE_ERROR ||oracle||. bf16, fp16: ||e|| <= OF_ROUNDING of the error of
    rounding the oracle; and given what eager torch computes in that dtype, also ||e|| <= OF_EAGER
    ||e_eager|| and max|e| <= OF_EAGER max|e_eager|. Entries that are 0 or not finite in the oracle
    must be exactly that. An oracle of nearly 0 is refused.
    """

    def require(holds: bool, why: str) -> None:
        if not holds:
            raise AssertionError(f"{name}: {why}")

    require(oracle.dtype == torch.float64, f"the oracle is {oracle.dtype}, not float64")
    require(actual.shape == oracle.shape, f"shape {actual.shape}, not {oracle.shape}")
    dtype, actual, oracle = actual.dtype, _float64(actual), _float64(oracle)

    exact = (oracle == 0) | ~oracle.isfinite()
    wrong = exact & ~torch.isclose(actual, oracle, rtol=0, atol=0, equal_nan=True)
    require(
        not wrong.any(),
        f"{_list(actual[wrong])} where the oracle is exactly {_list(oracle[wrong])}",
    )
    if exact.all():
        return
    size = oracle[~exact].norm()
    require(bool(size >= SMALLEST_ORACLE), f"the oracle is nearly 0 (norm {size:.1e})")

    error = (actual - oracle)[~exact]
    if dtype in RELATIVE_ERROR:
        bound = RELATIVE_ERROR[dtype] * size
    else:
        bound = OF_ROUNDING * (oracle.to(dtype).double() - oracle)[~exact].norm()
    if eager is not None:
        eager_error = (_float64(eager) - oracle)[~exact]
        bound = torch.minimum(bound, OF_EAGER * eager_error.norm())
        highest = OF_EAGER * eager_error.abs().max()
        require(
            bool(error.abs().max() <= highest),
            f"largest error {error.abs().max():.2e} exceeds {highest:.2e}, {OF_EAGER} of eager's",
        )
    found = f"{error.norm():.2e} ({error.norm() / size:.1e} relative)"
    require(bool(error.norm() <= bound), f"{dtype} error {found} exceeds {bound:.2e}")  # or NaN


def _float64(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _list(x: Tensor) -> str:
    return str(x[:4].tolist()) + (f" and {len(x) - 4} more" if len(x) > 4 else "")


def rows_module(impl: str) -> ModuleType:
    """The module that holds a back-end's row functions."""
    return importlib.import_module(f"kepo_kernels.rows.{impl}_rows")


def unavailable(impl: str) -> str | None:
    """Why a back-end cannot be used here, or None when it can."""
    return getattr(rows_module(impl), "unavailable", lambda: None)()


def device_of(impl: str) -> str:
    """Where a back-end's tensors live: on the GPU for Triton, if there is one."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class RowProblem:
    """The input of one `row_forward` and `row_backward_`; see `kepo_kernels.rows.contract`."""

    logits: Tensor  # (n, V)
    targets: Tensor | None  # (n,)
    teacher: Tensor | None  # (n, V_t)
    coefficients: Tensor  # (3, n)


def make_row_problem(
    rows: int,
    vocab: int,
    teacher_vocab: int | None = None,
    *,
    std: float = 2.0,
    offset: float = -8.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> RowProblem:
    """Independent normal logits; no teacher when `teacher_vocab` is None. std = 12: peaked rows.

    A softmax does not see the offset, but a phantom column of logit 0 stands out against it.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return RowProblem(
        logits=(offset + std * normal(rows, vocab)).to(dtype),
        targets=torch.randint(vocab, (rows,), generator=generator),
        teacher=None
        if teacher_vocab is None
        else (offset + std * normal(rows, teacher_vocab)).to(dtype),
        coefficients=normal(3, rows).to(torch.float64 if dtype == torch.float64 else torch.float32),
    )


@dataclass(frozen=True)
class Problem:
    """The tensor arguments of the losses, by their names there."""

    hidden: Tensor  # (B, T, H)
    lm_head: Tensor  # (V, H)
    targets: Tensor  # (B, T)
    advantages: Tensor  # (B,) of both signs
    teacher_hidden: Tensor  # (B, T, Ht)
    teacher_lm_head: Tensor  # (V_t, Ht)
    gate: Tensor  # (B,) bool, the first sequence closed, the others open
    completion_mask: Tensor  # (B, T) bool, right padded; the last sequence is whole
    old_logprobs: Tensor  # (B, T), such that some ratios are clipped and some are not
    ref_logprobs: Tensor  # (B, T)
    bias: Tensor  # (V,)
    teacher_bias: Tensor  # (V_t,)


def make_problem(
    batch: int = 3,
    length: int = 7,
    *,
    hidden: int = 16,
    vocab: int = 37,
    teacher_hidden: int = 24,
    teacher_vocab: int | None = None,
    std: float = 2.0,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """A whole batch whose logits have standard deviation `std`; 12 makes them peaked."""
    generator = torch.Generator().manual_seed(seed)
    teacher_vocab = vocab if teacher_vocab is None else teacher_vocab

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, head, bias = normal(batch, length, hidden), normal(vocab, hidden), normal(vocab)
    head *= std / math.sqrt(hidden)
    targets = torch.randint(vocab, (batch, length), generator=generator)
    logits = (student @ head.T + bias) / temperature
    logprobs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    lengths[-1] = length
    floats = {
        "hidden": student,
        "lm_head": head,
        "advantages": torch.linspace(-1.0, 1.3, batch, dtype=torch.float64),
        "teacher_hidden": normal(batch, length, teacher_hidden),
        "teacher_lm_head": normal(teacher_vocab, teacher_hidden) * std / math.sqrt(teacher_hidden),
        "old_logprobs": logprobs + 0.3 * normal(batch, length),
        "ref_logprobs": logprobs + 0.3 * normal(batch, length),
        "bias": bias,
        "teacher_bias": normal(teacher_vocab),
    }
    return Problem(
        targets=targets,
        gate=torch.arange(batch) > 0,
        completion_mask=torch.arange(length) < lengths.unsqueeze(-1),
        **{name: x.to(dtype) for name, x in floats.items()},
    )


def row_oracle(problem: RowProblem, settings: RowSettings) -> tuple[RowStats, Tensor]:
    """What the table and the gradient should be by their definitions, in fp64."""
    beta, temperature, teacher_temperature, softcap, teacher_softcap = settings

    def capped(logits: Tensor, softcap: float) -> Tensor:
        if softcap == 0.0:
            return logits
        alive = logits > -torch.inf  # masked twice so that autograd meets no inf
        finite = torch.where(alive, logits, 0.0)
        return torch.where(alive, softcap * (finite / softcap).tanh(), -torch.inf)

    raw = problem.logits.double().clone().requires_grad_()
    u = capped(raw, softcap)
    x = u / temperature
    y = None
    if problem.teacher is not None:
        y = capped(problem.teacher.double(), teacher_softcap) / teacher_temperature
    zeros = torch.zeros(len(raw), dtype=torch.float64)

    logprob, divergence = zeros, zeros
    if problem.targets is not None:
        logprob = reference.token_logprob(x, problem.targets)
    if y is not None:
        divergence = reference.token_divergence(x, y, beta)
    numbers = torch.stack([logprob, divergence, reference.token_entropy(x)])
    (gradient,) = torch.autograd.grad((problem.coefficients.double() * numbers).sum(), raw)

    x = x.detach()
    peak = x.amax(-1)

    def log_sum(x: Tensor, peak: Tensor) -> Tensor:
        return (x - peak.unsqueeze(-1)).logsumexp(-1)

    stats = RowStats(*numbers.detach(), u.detach().amax(-1), *(zeros,) * 7)
    stats = stats._replace(log_sum=log_sum(x, peak), shared_log_sum=log_sum(x, peak))
    if y is None:
        return stats, gradient
    shared = min(x.shape[1], y.shape[1])
    x, y = x[:, :shared], y[:, :shared]
    stats = stats._replace(
        shared_log_sum=log_sum(x, peak),
        teacher_peak=y.amax(-1) * teacher_temperature,
        teacher_log_sum=log_sum(y, y.amax(-1)),
    )
    if beta > 0:
        token = x.argmax(-1, keepdim=True)
        stats = stats._replace(peak_token=token.squeeze(-1).double())
        # log q/m, where q > 0; m is p for beta = 1.
        q, p = x.softmax(-1), y.softmax(-1)
        m = (1 - beta) * q + beta * p
        at_peak = (q / m).gather(-1, token)
        from_peak = torch.where(q > 0, (q / m / at_peak).log(), 0)
        mean = (q * from_peak).sum(-1)
        stats = stats._replace(peak_ratio=at_peak.log().squeeze(-1), mean_ratio=mean)
    return stats, gradient


def run_rows(
    rows: ModuleType | SimpleNamespace,
    problem: RowProblem,
    settings: RowSettings,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """A back-end's table and gradient; the problem is left as it is."""

    def copy(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.clone().to(device)

    logits, targets, teacher = copy(problem.logits), copy(problem.targets), copy(problem.teacher)
    table = rows.row_forward(logits, targets, teacher, settings)
    unchanged = torch.equal(logits.cpu().view(torch.uint8), problem.logits.view(torch.uint8))
    assert unchanged, "the forward changed the logits"
    coefficients = copy(problem.coefficients)
    rows.row_backward_(logits, targets, teacher, table, coefficients, settings)
    return table.cpu(), logits.cpu()


def assert_table_close(table: Tensor, problem: RowProblem, stats: RowStats) -> None:
    assert table.dtype == accumulate_dtype(problem.logits.dtype)
    table, expected = RowStats(*table)._asdict(), stats._asdict()
    # The mean is of differences between ratios of order 1, which fp32 rounds by 6e-8: where q and p
    # agree it has few digits of its own. The gradient's tests look at what it is good for.
    for numbers in (table, expected):
        numbers["KL(q|m)"] = numbers["peak_ratio"] + numbers.pop("mean_ratio")
    for name, actual in table.items():
        assert_close_to_oracle(actual, expected[name], name=name)


def assert_rows_right(
    rows: ModuleType | SimpleNamespace,
    problem: RowProblem,
    settings: RowSettings,
    device: str = "cpu",
) -> None:
    table, gradient = run_rows(rows, problem, settings, device)
    stats, oracle = row_oracle(problem, settings)
    assert_table_close(table, problem, stats)
    assert gradient.dtype == problem.logits.dtype
    assert_close_to_oracle(gradient, oracle, name="gradient")
