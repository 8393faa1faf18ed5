"""Compile every Triton kernel in every configuration that is launched, for GPUs that are not here.

    python tools/compile_kernels.py                        # all targets; 2 minutes on 2 cores
    python tools/compile_kernels.py --target sm_90 gfx942 --csv variants.csv
    python tools/compile_kernels.py --quick                # a sample, two targets; seconds

No GPU, driver or CUDA toolkit is needed: Triton brings its compilers. Exit status 1, with reasons,
if a kernel does not compile, spills registers, needs more shared memory than the target has,
computes the address of a row in 32 bits, uses an atomic or a TF32 dot, or reads aligned rows with
loads of fewer than 16 bytes.

Nobody lists the configurations: the row functions and `scaled` run on tensors without memory, and
what they would launch is written down, specialised as Triton's JIT does.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from tools.kernel_report import SHARED_LIMIT, Report, examine
from tools.kernel_table import Variant, print_table, write

QUICK_TARGETS = ("sm_90", "gfx942")
# Vocabulary and the teacher's: under one block, several blocks, Qwen's with equal, wider, narrower.
WIDTHS = ((37, 37), (1000, 1000), (151_936, 151_936), (151_936, 152_064), (151_936, 151_669))
# Of logits, and of a gradient that does not go where they are: all that a loss launches on a GPU.
DTYPES = (("float32", "bfloat16"), ("float32", "float16"), ("float32", None), ("bfloat16", None))
BETAS = (None, 0.0, 0.5, 1.0)  # None: no teacher
HEADS = ("bfloat16", "float16", "float32")  # to which an fp32 gradient is cast
Result = TypeVar("Result")


class Case(NamedTuple):
    """One call of both row functions."""

    dtypes: tuple[str, str | None]
    beta: float | None
    softcap: float = 0.0
    teacher_softcap: float = 0.0
    rows: int = 8192
    widths: tuple[int, int] = (151_936, 151_936)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    started = time.perf_counter()
    targets = args.target or (QUICK_TARGETS if args.quick else tuple(SHARED_LIMIT))
    variants = launched_variants(targets, cases(args.quick))
    results = []
    for done, result in enumerate(in_processes(judged, variants, args.jobs), 1):
        results.append(result)
        progress(f"{done} of {len(variants)}: {result[0].kernel} on {result[0].target}")
    progress("")
    print_table(results)
    if args.csv:
        write(args.csv, results)
    notes = {note for _, report in results for note in report.notes}
    for note in sorted(notes):
        print(f"note: {note}")
    faults = [(variant, fault) for variant, report in results for fault in report.faults]
    for variant, fault in faults:
        print(f"FAULT {fault}\n      {variant}")
    seconds = time.perf_counter() - started
    version = importlib.import_module("triton").__version__
    print(f"triton {version}: {len(variants)} variants in {seconds:.0f} s, {len(faults)} faults")
    return 1 if faults else 0


def launched_variants(targets: Iterable[str], cases: Iterable[Case]) -> list[Variant]:
    """All launches of both row functions in these cases, once each for every target."""
    import torch

    from kepo_kernels.rows import triton_rows

    found: dict[Variant, None] = {}
    start, select_device, hip = triton_rows._start, torch.cuda.device, torch.version.hip
    for amd in (False, True):
        ours = [target for target in targets if target.startswith("gfx") == amd]

        def listen(kernel, *rest, ours: list[str] = ours, **options) -> None:
            start(_Listener(kernel, ours, found), *rest, **options)

        triton_rows._start = listen
        torch.cuda.device = lambda _: contextlib.nullcontext()  # there is none to select
        torch.version.hip = "0" if amd else None  # by this the launches tell whose GPU it is
        try:
            if ours:
                call_rows(triton_rows, cases)
        finally:
            triton_rows._start, torch.cuda.device, torch.version.hip = start, select_device, hip
    return list(found)


class _Listener(NamedTuple):
    """Stands for a kernel: a launch is written down."""

    kernel: object
    targets: list[str]
    found: dict[Variant, None]

    def __getitem__(self, grid) -> Callable[..., None]:
        def launch(*args, **options) -> None:
            for target in self.targets:
                self.found.setdefault(specialised(self.kernel, target, args, options))

        return launch


def cases(quick: bool) -> list[Case]:
    """The formulas in full at one shape, and the shapes in full for two formulas.

    A shape changes which integers are multiples of 16, and with them loads and addresses; the
    formula changes the arithmetic between them. Their whole product would add the same arithmetic
    between the same loads. Launches without targets are those with them (all are -1), and the
    number of rows is in the grid alone: as long as that is so the cases for it compile nothing.
    """
    if quick:
        return [Case(dtypes, beta) for dtypes in DTYPES for beta in (None, 0.5)] + [
            Case(DTYPES[0], 0.5, 30.0, 30.0)
        ]
    found = [
        Case(dtypes, beta, softcap, softcap)
        for dtypes in DTYPES
        for beta in BETAS
        for softcap in (0.0, 30.0)
    ]
    found += [Case(DTYPES[0], 0.5, 30.0, 0.0), Case(DTYPES[0], 0.5, 0.0, 30.0)]
    for dtypes in DTYPES:
        for beta in (None, 0.5):
            found += [Case(dtypes, beta, rows=rows) for rows in (1, 7)]
            found += [Case(dtypes, beta, widths=widths) for widths in WIDTHS]
    return found


def call_rows(rows_module, cases: Iterable[Case]) -> None:
    """The row functions in these cases, on tensors without memory."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from kepo_kernels.rows.contract import NUM_COEFFICIENTS, RowSettings

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    with FakeTensorMode():
        for case in cases:
            n, (vocab, teacher_vocab) = case.rows, case.widths
            dtype, out = (None if x is None else getattr(torch, x) for x in case.dtypes)
            logits = empty(n, vocab, dtype=dtype)
            targets = empty(n, dtype=torch.int64)
            teacher = None if case.beta is None else empty(n, teacher_vocab, dtype=dtype)
            beta = 0.5 if case.beta is None else case.beta
            settings = RowSettings(beta, 1.1, 1.2, case.softcap, case.teacher_softcap)
            table = rows_module.row_forward(logits, targets, teacher, settings)
            coefficients = empty(NUM_COEFFICIENTS, n)
            out = None if out is None else empty(n, vocab, dtype=out)
            args = (logits, targets, teacher, table, coefficients, settings, out)
            rows_module.row_backward_(*args)
        for dtype in HEADS:
            for shape in ((151_936, 2048), (37, 37)):
                factor = torch.empty((), device="cuda")
                rows_module.scaled(empty(*shape), factor, getattr(torch, dtype))


def specialised(kernel, target: str, args: tuple, options: dict) -> Variant:
    """The variant that `kernel[grid](*args, **options)` would compile, by Triton's own code.

    Tensors without memory have address 0, and so are aligned, as the allocator's are.
    """
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(gpu_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking for that address is frowned upon
        bound, found, rest = bind(*args, **options)
    values = list(bound.values())
    names = [param.name for param in kernel.params]
    constant = [kind == "constexpr" for kind, _ in found]
    return Variant(
        kernel.fn.__module__,
        kernel.fn.__qualname__,
        target,
        tuple((name, kind) for name, (kind, _) in zip(names, found, strict=True)),
        tuple((place, values[place]) for place, yes in enumerate(constant) if yes),
        tuple(
            (place, tuple(map(tuple, backend.parse_attr(attribute))))
            for place, (_, attribute) in enumerate(found)
            if not constant[place] and isinstance(attribute, str) and attribute
        ),
        tuple(sorted(rest.items())),
    )


def gpu_target(name: str):
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def in_processes(
    work: Callable[[Variant], Result], variants: list[Variant], jobs: int
) -> Iterator[Result]:
    """What `work` says of each variant, as they are done, from `jobs` processes."""
    with tempfile.TemporaryDirectory(prefix="compile-kernels-") as cache:
        if jobs == 1:
            _start_worker(cache)
            yield from map(work, variants)
            return
        context = multiprocessing.get_context("spawn")
        with context.Pool(jobs, _start_worker, (cache,)) as pool:
            yield from pool.imap_unordered(work, variants)


def _start_worker(cache: str) -> None:
    # A cached kernel would have no words of ptxas.
    os.environ["TRITON_CACHE_DIR"] = cache
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"


def build(variant: Variant):
    """What `triton.compile` makes of the variant; raises what the compiler raises."""
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    source = ASTSource(
        kernel,
        dict(variant.signature),
        {(place,): value for place, value in variant.constexprs},
        {(place,): [list(attribute) for attribute in found] for place, found in variant.attrs},
    )
    options = dict(variant.options)
    return triton.compile(source, target=gpu_target(variant.target), options=options)


def judged(variant: Variant) -> tuple[Variant, Report]:
    """The variant, compiled, with its report."""
    started = time.perf_counter()
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            binary = build(variant)
        threads = binary.metadata.num_warps * gpu_target(variant.target).warp_size
        report = examine(
            variant.target, binary.asm, binary.metadata.shared, threads, log.getvalue()
        )
    except Exception as error:  # whatever the compiler raises is what we want to know
        words = " ".join(str(error).split())[:300]
        report = Report(faults=[f"does not compile: {type(error).__name__}: {words}"])
    report.seconds = time.perf_counter() - started
    return variant, report


def progress(words: str) -> None:
    """One line that overwrites itself; where nobody watches, nothing."""
    if sys.stderr.isatty():
        print(f"\r  {words:60}\r", end="", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", nargs="+", choices=SHARED_LIMIT, help="default: all")
    add("--quick", action="store_true", help=f"a sample, for {' and '.join(QUICK_TARGETS)}")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    add("--csv", type=Path, help="write one row per variant, with versions and commit, here")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: expected at least 1")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        parser.error(f"triton cannot be imported: {error}")
    return args


if __name__ == "__main__":
    sys.exit(main())
