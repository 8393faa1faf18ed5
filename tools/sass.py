"""Instructions per column in the hot loop of every row kernel, as NVIDIA's assembler wrote them.

    python tools/sass.py                          # sm_90, the variants that a loss launches
    python tools/sass.py --target sm_100 --mix --csv sass.csv

Needs no GPU. Every instruction between a loop's first and last takes one issue slot of a
multiprocessor, predicated off or not; a warp computes 32 columns with it. So a kernel of I
instructions a column is done no sooner than rows * vocabulary * I / (lanes * clock).

The hot loop is that which loads the most. What it works on in one round is taken from its loads:

    columns a thread and round = bytes loaded / (bytes of a number * matrices read)

which must be BLOCK / (32 warps), or a multiple where the compiler unrolled, and agree with the
bytes stored; if not, that is an error, not a number. Loads of a pipelined loop are those for later
rounds, as many as the round needs; what stands before and after the loop is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository

from tools import compile_kernels
from tools.compile_kernels import Case
from tools.kernel_report import SHARED_LIMIT, cuobjdump
from tools.kernel_table import Variant

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FORMS = (("float32", "bfloat16"), ("bfloat16", None))  # logits, and dlogits that go elsewhere
CASES = [Case(form, beta) for form in FORMS for beta in (None, 0.0, 1.0, 0.5)]
CASES += [Case(FORMS[0], 0.5, 30.0, 30.0)]
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16, "256": 32}


class Instruction(NamedTuple):
    address: int
    predicate: str
    name: str  # LDG.E.128
    operands: str

    @property
    def kind(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bytes(self) -> int:
        """What one thread loads or stores."""
        for part in self.name.split(".")[1:]:
            if (width := WIDTHS.get(part.removeprefix("U").removeprefix("S"))) is not None:
                return width
        return 4


# Those that loop over all columns of a row; the others work on a row's sums, or on one section.
KERNELS = ("softmax_kernel", "divergence_kernel", "backward_kernel")


@dataclass
class Counts:
    """One variant of a kernel; the numbers per column are those of its hot loop."""

    kernel: str
    teacher: str
    capped: bool
    logits: str
    out: str
    registers: int = 0
    columns: int = 0  # a thread and round
    rounds_in_one: int = 0  # above 1: unrolled by the compiler
    instructions: float = 0.0
    mufu: float = 0.0
    widest_load: int = 0  # bytes, from global memory
    load_kind: str = ""  # LDG: to registers; LDGSTS: pipelined through shared memory
    spills: int = 0  # instructions that move a register to or from local memory, in all the kernel
    mix: str = ""

    def name(self) -> str:
        words = f"{self.kernel.removesuffix('_kernel')} {self.teacher}"
        return words + (" capped" if self.capped else "")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    variants = [
        variant
        for variant in compile_kernels.launched_variants([args.target], CASES)
        if variant.kernel in KERNELS
    ]
    found = list(compile_kernels.in_processes(counted, variants, args.jobs))
    found.sort(key=lambda counts: (counts.logits != "fp32", variants_order(counts)))
    print_table(found, args.mix)
    if args.csv:
        write(args.csv, args.target, found)
    return 0


def counted(variant: Variant) -> Counts:
    """Compiles the variant and counts in its SASS."""
    types, constant = dict(variant.signature), constants(variant)
    logits = types["logits"].removeprefix("*")
    out = types.get("out", "").removeprefix("*")
    teacher = constant.get("KIND", "none")
    counts = Counts(variant.kernel, teacher, bool(constant["CAPPED"]), logits, out)
    with contextlib.redirect_stdout(io.StringIO()):  # ptxas' words
        cubin = compile_kernels.build(variant).asm["cubin"]
    usage = re.search(r"REG:(\d+)", cuobjdump(cubin, "-res-usage") or "")
    counts.registers = int(usage[1]) if usage else 0
    sass = cuobjdump(cubin, "-sass")
    if sass is None:
        raise SystemExit("this Triton has no cuobjdump that works: sass.py needs it")
    code = parsed(sass)
    counts.spills = sum(instruction.kind in ("LDL", "STL") for instruction in code)
    loop = hot_loop(code)

    threads = 32 * dict(variant.options)["num_warps"]
    matrices = 1 if teacher == "none" else 2
    once = constant["BLOCK"] // threads
    counts.columns = columns_of(loop, BYTES[logits] * matrices, BYTES.get(out), once, variant)
    counts.rounds_in_one = counts.columns // once
    kinds = Counter(instruction.kind for instruction in loop)
    counts.instructions = len(loop) / counts.columns
    counts.mufu = kinds["MUFU"] / counts.columns
    counts.widest_load = max(x.bytes for x in loop if is_load(x))
    counts.load_kind = " ".join(sorted({x.kind for x in loop if is_load(x)}))
    counts.mix = " ".join(f"{kind} {n / counts.columns:.1f}" for kind, n in kinds.most_common(12))
    return counts


def columns_of(
    loop: list[Instruction], loaded: int, stored: int | None, once: int, variant: Variant
) -> int:
    """Columns a thread and round; `loaded` and `stored` are the bytes of one column."""
    columns, rest = divmod(sum(x.bytes for x in loop if is_load(x)), loaded)
    whole = columns > 0 and rest == 0 and columns % once == 0
    stores = sum(x.bytes for x in loop if x.kind == "STG")
    if not whole or stores != (columns * stored if stored else 0):
        raise SystemExit(
            f"{variant}\nits loop loads {columns * loaded + rest} and stores {stores} bytes a "
            f"thread; expected multiples of {once} columns of {loaded} and {stored or 0} bytes"
        )
    return columns


def is_load(instruction: Instruction) -> bool:
    """From global memory, to registers or (asynchronously) to shared memory."""
    return instruction.kind in ("LDG", "LDGSTS")


def parsed(sass: str) -> list[Instruction]:
    return [
        Instruction(int(address, 16), predicate, name, operands)
        for address, predicate, name, operands in INSTRUCTION.findall(sass)
    ]


def hot_loop(code: list[Instruction]) -> list[Instruction]:
    """The loop that loads the most: all instructions on a way from one of its loads back to it.

    Not whatever lies between a label and a jump back to it: the compiler moves rare paths to the
    end of the kernel, from where they jump back as well.
    """
    after = successors(code)
    before: list[list[int]] = [[] for _ in code]
    for place, targets in enumerate(after):
        for target in targets:
            before[target].append(place)
    loops: list[list[int]] = []
    for place, instruction in enumerate(code):
        if not is_load(instruction) or any(place in loop for loop in loops):
            continue
        loop = reached(place, after) & reached(place, before)
        if loop:
            loops.append(sorted(loop))
    if not loops:
        raise SystemExit("no loop of the kernel loads from global memory")

    def loads(loop: list[int]) -> int:
        return sum(code[place].bytes for place in loop if is_load(code[place]))

    return [code[place] for place in max(loops, key=loads)]


def reached(start: int, edges: list[list[int]]) -> set[int]:
    """What one step or more lead to."""
    seen: set[int] = set()
    todo = list(edges[start])
    while todo:
        place = todo.pop()
        if place not in seen:
            seen.add(place)
            todo += edges[place]
    return seen


def successors(code: list[Instruction]) -> list[list[int]]:
    """Where each instruction may go on. A call comes back, and what it calls is not counted."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    joins: dict[str, int] = {}  # where the threads that BSSY registered meet again
    found = []
    for place, instruction in enumerate(code):
        kind, operands = instruction.kind, instruction.operands
        address = re.search(r"\b0x([0-9a-f]+)\s*$", operands.strip())
        target = places.get(int(address[1], 16)) if address else None
        barrier = re.search(r"\bB\d+\b", operands)
        if kind == "BSSY" and barrier and target is not None:
            joins[barrier[0]] = target
        goes_on = place + 1 < len(code)
        if kind == "BRA" and target is not None:
            conditional = instruction.predicate or re.search(r"\bU?P\d", operands)
            conditional = conditional or ".DIV" in instruction.name
            goes_on = goes_on and bool(conditional)
        elif kind in ("EXIT", "RET", "BRX", "JMP"):
            target, goes_on = None, goes_on and bool(instruction.predicate)
        elif kind == "BSYNC":
            target = joins.get(barrier[0]) if barrier else None
        else:
            target = None
        found.append([target] * (target is not None) + [place + 1] * goes_on)
    return found


def constants(variant: Variant) -> dict[str, object]:
    names = [name for name, _ in variant.signature]
    return {names[place]: value for place, value in variant.constexprs}


def variants_order(counts: Counts) -> tuple:
    kinds = ("none", "forward", "reverse", "mixture")
    return KERNELS.index(counts.kernel), counts.capped, kinds.index(counts.teacher)


def print_table(found: Iterable[Counts], mix: bool) -> None:
    print(
        f"{'kernel':28} {'logits':6} {'out':4} {'registers':>9} {'columns':>8} "
        f"{'instructions':>12} {'MUFU':>5} {'load B':>6}  by"
    )
    for counts in found:
        print(
            f"{counts.name():28} {counts.logits:6} {counts.out or '-':4} {counts.registers:9} "
            f"{counts.columns:8} {counts.instructions:12.1f} {counts.mufu:5.2f} "
            f"{counts.widest_load:6}  {counts.load_kind}"
        )
        if mix:
            print(f"    {counts.mix}")


def write(path: Path, target: str, found: Iterable[Counts]) -> None:
    """One row per variant, with versions and commit."""
    import triton

    from benchmarks.stamp import commit

    about = commit()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        names = [field.name for field in fields(Counts)]
        writer = csv.DictWriter(file, [*names, "target", "triton", "commit"], lineterminator="\n")
        writer.writeheader()
        for counts in found:
            numbers = {name: f"{getattr(counts, name):.2f}" for name in ("instructions", "mufu")}
            versions = {"target": target, "triton": triton.__version__, "commit": about}
            writer.writerow(asdict(counts) | numbers | versions)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    nvidia = [target for target in SHARED_LIMIT if target.startswith("sm_")]
    add("--target", choices=nvidia, default="sm_90")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    add("--mix", action="store_true", help="also the commonest instructions, per column")
    add("--csv", type=Path, help="write one row per variant, with versions and commit, here")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
