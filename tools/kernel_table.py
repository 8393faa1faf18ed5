"""What was compiled, and what came of it: as a table, and as rows of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.kernel_report import Report


@dataclass(frozen=True)
class Variant:
    """A kernel as the JIT would compile it; everything can be sent to another process."""

    module: str
    kernel: str
    target: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[int, object], ...]
    attrs: tuple[tuple[int, tuple], ...]
    options: tuple[tuple[str, object], ...]

    def __str__(self) -> str:
        names = [name for name, _ in self.signature]
        words = [f"{name}: {kind}" for name, kind in self.signature if kind.startswith("*")]
        words += [f"{names[place]}={value}" for place, value in self.constexprs]
        words += [f"{name}={value}" for name, value in self.options]
        return f"{self.kernel} on {self.target} ({', '.join(words)})"


def print_table(results: list[tuple[Variant, Report]]) -> None:
    """One line per kernel and target: the worst of all configurations."""
    print(
        f"{'kernel':20} {'target':7} {'variants':>8} {'registers':>9} {'spill B':>8} {'shared':>7} "
        f"{'load B':>7} {'fma':>5} {'addptr 32/64':>12} {'seconds':>8}  faults"
    )
    groups: dict[tuple[str, str], list[Report]] = {}
    for variant, report in results:
        groups.setdefault((variant.kernel, variant.target), []).append(report)
    for (kernel, target), reports in sorted(groups.items()):

        def most(value: Callable[[Report], int], among: list[Report] = reports) -> int:
            return max(map(value, among))

        widths = [
            width
            for report in reports
            for width in (report.narrowest_load, report.widest_load)
            if width
        ]
        loads = f"{min(widths)}-{max(widths)}" if widths else "-"
        addptr = f"{most(lambda r: r.addptr_i32)}/{most(lambda r: r.addptr_i64)}"
        print(
            f"{kernel:20} {target:7} {len(reports):8} {most(lambda r: r.registers):9} "
            f"{most(lambda r: r.spill_bytes):8} {most(lambda r: r.shared):7} {loads:>7} "
            f"{most(lambda r: r.fma):5} {addptr:>12} {sum(r.seconds for r in reports):8.1f}  "
            f"{sum(len(r.faults) for r in reports)}"
        )


def write(path: Path, results: list[tuple[Variant, Report]]) -> None:
    """One row per variant, with versions and commit."""
    import torch
    import triton

    from benchmarks.stamp import commit

    about = commit()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = ["kernel", "target", "variant", *asdict(Report()), "triton", "torch", "commit"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for variant, report in results:
            facts = asdict(report)
            facts |= {"faults": "; ".join(report.faults), "notes": "; ".join(report.notes)}
            writer.writerow(
                facts
                | {"kernel": variant.kernel, "target": variant.target, "variant": str(variant)}
                | {"seconds": f"{report.seconds:.2f}", "commit": about}
                | {"triton": triton.__version__, "torch": torch.__version__}
            )
