"""What a compiled Triton kernel says of itself: registers, spills, widths of loads; and its faults.

Everything is read from texts (TTIR, PTX, the words of ptxas, SASS, amdgcn); no driver is loaded.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

WIDE = 16  # bytes: the widest load that every target has
# Bytes a block may have, by what a launch can opt in to; above it the launch fails.
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}
VALUE = re.compile(r"%[\w$.-]+")
BLOCK_LOAD = re.compile(
    r"= tt\.load (%[^:]*?) : tensor<([\dx]+)x!tt\.ptr<(f32|bf16|f16)>>.*loc\((#\w+)\)"
)
BITS = {"f32": 32, "bf16": 16, "f16": 16}
FOR = re.compile(r"scf\.for (%[\w$.-]+) = (%[\w$.-]+) to %[\w$.-]+ step (%[\w$.-]+)")
PTX_LOAD = re.compile(r"\bld\.(?:\w+\.)?global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)")
PTX_ASYNC_COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global.*?\], \[.*?\], (0x\w+|\d+)")
AMD_WIDTH = {"dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1}
AMD_LOAD = re.compile(
    rf"\b(?:global|buffer|flat)_load_(?:lds_)?({'|'.join(AMD_WIDTH)})(?:x(\d))?(?:_d16\w*)?\b"
)
Place = tuple[str, str]  # line and column of the source


@dataclass
class Report:
    """One kernel in one configuration on one target."""

    registers: int = 0
    spill_bytes: int = 0  # stores, loads and stack, by the compiler's own count
    spill_instructions: int = 0
    shared: int = 0
    narrowest_load: int | None = None  # of blocks of aligned numbers, in bytes a thread
    widest_load: int | None = None
    fma: int = 0
    addptr_i32: int = 0
    addptr_i64: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def examine(target: str, asm: dict, shared: int, threads: int, ptxas_log: str) -> Report:
    """The report on what `triton.compile` returned, faults included."""
    report = Report(shared=shared)
    nvidia = target.startswith("sm_")
    machine = asm["ptx"] if nvidia else asm["amdgcn"]
    if nvidia:
        _read_nvidia(report, asm["cubin"], ptxas_log)
        report.fma = len(re.findall(r"\bfma\.rn", machine))
    else:
        _read_amd(report, machine)
        report.fma = len(re.findall(r"\bv_(?:pk_)?fma[a-z]*_", machine))
    if report.spill_bytes or report.spill_instructions:
        report.faults.append(
            f"spills: {report.spill_bytes} bytes of stores, loads and stack, "
            f"{report.spill_instructions} instructions on local memory"
        )
    if shared > SHARED_LIMIT[target]:
        report.faults.append(f"shared memory: {shared} bytes, {target} has {SHARED_LIMIT[target]}")
    _read_ttir(report, asm["ttir"])
    if "atomic" not in " ".join(report.faults) and re.search(
        r"\b(?:atom|red)\.|_atomic_|\batomicrmw\b", machine
    ):
        report.faults.append("atomic: in the machine code")
    _judge_loads(report, asm["ttir"], machine, threads)
    return report


def _read_nvidia(report: Report, cubin: bytes, log: str) -> None:
    usage = cuobjdump(cubin, "-res-usage")

    def count(pattern: str, text: str) -> int | None:
        found = re.search(pattern, text)
        return int(found[1]) if found else None

    registers = count(r"REG:(\d+)", usage or "")
    if registers is None:
        registers = count(r"Used (\d+) registers", log)
    if registers is None:
        report.faults.append("neither ptxas nor cuobjdump says how many registers it uses")
    report.registers = registers or 0
    for what in ("bytes spill stores", "bytes spill loads", "bytes stack frame"):
        report.spill_bytes += count(rf"(\d+) {what}", log) or 0
    if not log:
        report.notes.append("no words of ptxas: spilled bytes are the stack alone")
        report.spill_bytes = count(r"STACK:(\d+)", usage or "") or 0
    # Disassembling takes as long as compiling; where ptxas says that nothing spills nothing does.
    sass = cuobjdump(cubin, "-sass") if report.spill_bytes or not log else ""
    if usage is None or sass is None:
        report.notes.append("no cuobjdump: STL and LDL are not counted, ptxas' words are all")
    report.spill_instructions = len(re.findall(r"\b(?:STL|LDL)\b", sass or ""))


def _read_amd(report: Report, amdgcn: str) -> None:
    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", amdgcn)
        if not found:
            report.faults.append(f"amdgcn has no .{name}")
        return int(found[1]) if found else 0

    report.registers = count("vgpr_count")
    report.spill_bytes = 4 * (count("vgpr_spill_count") + count("sgpr_spill_count"))
    report.spill_bytes += count("private_segment_fixed_size")
    report.spill_instructions = len(re.findall(r"\bscratch_(?:store|load)_", amdgcn))


def cuobjdump(cubin: bytes, option: str) -> str | None:
    """The words of the cuobjdump that comes with Triton; None where it is missing."""
    path = _cuobjdump_path()
    if path is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([path, option, file.name], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


@cache
def _cuobjdump_path() -> str | None:
    from triton import knobs

    try:
        return knobs.nvidia.cuobjdump.path
    except (AttributeError, RuntimeError):
        return None


def _read_ttir(report: Report, ttir: str) -> None:
    """Widths of addresses; rows that are not 64-bit; atomics; dots in TF32."""
    offsets = re.findall(r"tt\.addptr [^\n]*?, (?:tensor<[^>]*?x)?(i32|i64)>?(?: loc|\n|$)", ttir)
    report.addptr_i32, report.addptr_i64 = offsets.count("i32"), offsets.count("i64")
    for function in re.split(r"(?=tt\.func )", ttir):
        for row in re.findall(r"(%[\w$.-]+) = tt\.get_program_id x\b", function):
            for line in function.splitlines():
                operands = line.partition(" = ")[2] or line
                if not re.search(re.escape(row) + r"(?![\w$.-])", operands):
                    continue
                if not re.search(r"arith\.ext[su]i " + re.escape(row) + r" : i32 to i64", operands):
                    words = re.sub(r" loc\(.*", "", line).strip()
                    report.faults.append(f"32-bit row arithmetic: {words}")
    atomics = re.findall(r"tt\.atomic_\w+", ttir)
    if atomics:
        report.faults.append(f"atomic: {len(atomics)} {atomics[0]}")
    dots = re.findall(r"tt\.dot [^\n]*inputPrecision = tf32\b[^\n]*: tensor<[^>]*xf32>", ttir)
    if dots:
        report.faults.append(f"TF32: {len(dots)} dots of fp32 numbers")


def _judge_loads(report: Report, ttir: str, machine: str, threads: int) -> None:
    """Every load of a block from aligned rows must be of 16 bytes; found by its source line.

    A place that several calls of a helper share is judged where all of them are aligned. A block
    that has less than 16 bytes for each thread has no load that wide, and is shown, not judged.
    """
    loads = list(_block_loads(ttir))
    found: dict[Place, list[int]] = {}
    for place, width in _machine_loads(machine):
        found.setdefault(place, []).append(width)
    locations = _locations(ttir)
    places = {locations.get(name) for name in re.findall(r"tt\.load .*loc\((#\w+)\)", ttir)}
    # A thread's share of a block that is judged is at least WIDE; so little is a single number's.
    strangers = [widths for place, widths in found.items() if place not in places]
    moved = [width for widths in strangers if sum(widths) >= WIDE for width in widths]
    for place in sorted({load.place for load in loads}):
        here = [load for load in loads if load.place == place]
        if not all(load.aligned for load in here):
            continue
        # Some compilers give a load the place of what follows it, where no other load is.
        widths = found.get(place) or moved
        if not widths:
            report.notes.append(f"line {place[0]}: its load is at no known place")
            continue
        low, high = min(widths), max(widths)
        report.narrowest_load = min(low, report.narrowest_load or low)
        report.widest_load = max(high, report.widest_load or high)
        if low < WIDE and min(load.size for load in here) >= WIDE * threads:
            report.faults.append(
                f"narrow load: {low} bytes at line {place[0]}, column {place[1]}, "
                f"where aligned rows allow {WIDE}"
            )


@dataclass(frozen=True)
class _BlockLoad:
    place: Place
    size: int  # bytes of the block
    aligned: bool


def _block_loads(ttir: str) -> Iterator[_BlockLoad]:
    """The loads of blocks of fp32, bf16 and fp16.

    One is aligned if all arguments that its address and mask are computed from are multiples of 16,
    and no loaded number takes part.
    """
    locations = _locations(ttir)
    for function in re.split(r"(?=tt\.func )", ttir)[1:]:
        function, sources, roots = _dataflow(function)
        for line in function:
            load = BLOCK_LOAD.search(line)
            if not load or (place := locations.get(load[4])) is None:
                continue
            address_and_mask = VALUE.findall(load[1])[:2]
            size = BITS[load[3]] // 8
            for extent in load[2].split("x"):
                size *= int(extent)
            yield _BlockLoad(place, size, _all_aligned(address_and_mask, sources, roots))


def _dataflow(function: str) -> tuple[list[str], dict[str, set[str]], dict[str, bool]]:
    """The lines, what each value is computed from, and the roots: True for a multiple of 16.

    Sibling regions reuse names; here every value has its own. Roots are arguments and loads.
    """
    lines: list[str] = []
    sources: dict[str, set[str]] = {}
    roots: dict[str, bool] = {}
    scopes: list[dict[str, str]] = [{}]
    regions: list[tuple[list[str], list[str]]] = []  # results and carried values of open regions

    def define(name: str, scope: dict[str, str]) -> str:
        scope[name] = f"{name}.{len(lines)}"
        return scope[name]

    def known(name: str) -> str:
        return next((scope[name] for scope in reversed(scopes) if name in scope), name)

    for line in function.splitlines():
        code, _, location = line.partition(" loc(")
        if "tt.func" in code:
            for name, words in re.findall(r"(%[\w$.-]+): ([^%]*)", line):
                number = bool(re.match(r"i\d+|!tt\.ptr", words))
                roots[define(name, scopes[0])] = not number or "tt.divisibility = 16" in words
            continue
        if code.lstrip().startswith("}") and regions:
            scopes.pop()
            results, carried = regions.pop()
            if code.rstrip().endswith("{"):  # } else {
                regions.append((results, carried))
                scopes.append({})
            continue
        left, equals, right = code.partition(" = ") if re.match(r"\s*%", code) else ("", "", code)
        inner: dict[str, str] = {}
        carried: list[str] = []
        operands = {known(name) for name in VALUE.findall(right)}
        for name, start in re.findall(r"(%[\w$.-]+) = (%[\w$.-]+)", right):
            if "scf.for" in right or "scf.while" in right:
                unique = define(name, inner)
                sources[unique] = {known(start)}
                carried.append(unique)
        if loop := FOR.search(right):
            carried.remove(inner[loop[1]])
            sources[inner[loop[1]]] = {known(loop[2]), known(loop[3])}
        if "scf.yield" in right and regions:
            values = [known(name) for name in VALUE.findall(right)]
            for targets in regions[-1]:
                for target, value in zip(targets, values, strict=False):
                    sources.setdefault(target, set()).add(value)
        results = []
        for name, count in re.findall(r"(%[\w$.-]+)(?::(\d+))?", left):
            # The parts of a result of several are called %a#0, %a#1, ...; here all are %a.
            unique = define(name, scopes[-1])
            results += [unique] * int(count or 1)
            if "tt.load" in right:
                roots[unique] = False
            elif "scf." not in right:
                sources[unique] = operands
        renamed = VALUE.sub(lambda found: known(found[0]), right)
        lines.append(f"{left}{equals}{renamed} loc({location}")
        if code.rstrip().endswith("{"):
            scopes.append(inner)
            regions.append((results, carried))
    return lines, sources, roots


def _all_aligned(values: list[str], sources: dict[str, set[str]], roots: dict[str, bool]) -> bool:
    seen: set[str] = set()
    todo = list(values)
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if not roots.get(value, True):
            return False
        todo += sources.get(value, ())
    return True


def _locations(ttir: str) -> dict[str, Place]:
    """Where in the source each location is: innermost line and column."""
    words = dict(re.findall(r"^(#\w+) = loc\((.*)\)$", ttir, re.MULTILINE))

    def place(name: str) -> Place | None:
        text = words.get(name, "")
        here = re.match(r'"[^"]*":(\d+):(\d+)', text)
        if here:
            return here[1], here[2]
        inner = re.search(r"#\w+", text)
        return place(inner[0]) if inner else None

    return {name: where for name in words if (where := place(name))}


def _machine_loads(machine: str) -> Iterator[tuple[Place, int]]:
    """Place and bytes of each load from global memory, in PTX or amdgcn."""
    place = ("0", "0")
    for line in machine.splitlines():
        here = re.match(r"\s*\.loc\s+\d+\s+(\d+)\s+(\d+)", line)
        if here:
            place = here[1], here[2]
            continue
        if found := PTX_LOAD.search(line):
            yield place, int(found[1] or 1) * int(found[2]) // 8
        elif found := PTX_ASYNC_COPY.search(line):
            yield place, int(found[1], 0)
        elif found := AMD_LOAD.search(line):
            kind, times = found.groups()
            yield place, AMD_WIDTH[kind] * int(times or 1)
