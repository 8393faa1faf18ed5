"""The one command for a machine with a GPU: correctness, times, a training step, within minutes.

    python benchmarks/gpu/suite.py --out FOLDER          # all of it, 8 minutes at most
    python benchmarks/gpu/suite.py --seconds 60 --only correct_bf16 losses_first
    python benchmarks/gpu/suite.py --dry-run             # the same code on the CPU, tiny sizes

Sections run in the order of sections.py, in processes of their own: one that fails, hangs or
wrecks the device costs no other. Writes three files into the folder, each line as soon as it is
known: <gpu>_<date>_<time>.csv, .log with all that was printed and every traceback, and _step.csv.
Exit status 0: no section failed; 1: one did, or none passed; 2: there is no GPU, or the arguments
are wrong.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from benchmarks.gpu import commands, targets
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.gpu.supervise import Verdict, Worker, command_run, died
from benchmarks.losses import table

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (*table.COLUMNS, "triton", "driver", "gb_per_s", "tflop_per_s")
SPARE = 3.0  # seconds before the end at which the last process is killed
TRIES = 2  # processes that may fail to start, one after the other, before the rest is given up


class Log:
    """Prints, and appends what it printed to a file that others append to as well."""

    def __init__(self, path: Path):
        self.path = path
        path.write_bytes(b"")

    def __call__(self, words: str = "") -> None:
        print(words, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(words + "\n")

    def end(self) -> None:
        """Names this machine's folders by what they are: the file is to be passed on as it is."""
        places = {str(ROOT): ".", sys.prefix: "PYTHON", str(self.path.parent): "OUT"}
        text = self.path.read_text(encoding="utf-8", errors="replace")
        for place in sorted(places, key=len, reverse=True):
            text = text.replace(place, places[place])
        self.path.write_text(text, encoding="utf-8")


@dataclass
class Report:
    """What is known so far; each row and verdict is on disk before the next is waited for."""

    log: Log
    results: Path
    environment: dict[str, object] = field(default_factory=dict)
    rows: list[table.Row] = field(default_factory=list)
    floors: dict[tuple[str, str], float] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def begin(self) -> None:
        table.write(self.results, [], COLUMNS)

    def row(self, row: table.Row) -> None:
        if "environment" in row:
            self.environment = row["environment"]
            for key, value in self.environment.items():
                self.log(f"{key:18} {value}")
            return
        if row.get("provider") == "floor" and row.get("seconds"):
            self.floors[row.get("shape"), row.get("case")] = row["seconds"]
        row = targets.judged(row, str(self.environment.get("machine", "")), self.floors)
        self.rows.append(row)
        with self.results.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n"
            )
            whole = self.environment | row
            writer.writerow({name: table._text(value) for name, value in whole.items()})
        self.log(line(row))

    def verdict(self, name: str, verdict: Verdict, seconds: float = 0.0) -> None:
        self.verdicts[name] = verdict
        self.log(f"{verdict.word} {name:22} {verdict.detail} ({seconds:.1f} s)")


def main(arguments: list[str] | None = None, sections: tuple[Section, ...] = SECTIONS) -> int:
    args = parse(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        print("gpu/suite.py: torch sees no CUDA device; --dry-run runs on the CPU", file=sys.stderr)
        return 2
    started = time.monotonic()

    def left() -> float:
        return args.seconds - (time.monotonic() - started)

    machine = "dry-run" if args.dry_run else commands.nvidia_smi("name", "gpu")
    name = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    stem = args.out / f"{name}_{time.strftime('%Y-%m-%d_%H%M%S')}"
    report = Report(Log(Path(f"{stem}.log")), Path(f"{stem}.csv"))
    log = report.log
    log("command            " + " ".join([sys.executable, *sys.argv]))
    log("nvidia-smi         " + commands.nvidia_smi(commands.STATE))
    report.begin()
    wanted = [section for section in sections if chosen(section.name, args)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            packages = unpacked(args.wheels, Path(folder), log)
            run_all(wanted, args, stem, packages, report, left)
    except BaseException as error:  # SIGTERM, too: what was found stands, and that it is not all
        log(f"ended before its time: {type(error).__name__}")
        log.end()
        raise
    summary(report)
    log("nvidia-smi         " + commands.nvidia_smi(commands.STATE))
    log(f"\nwritten: {stem}.csv and .log, {time.monotonic() - started:.0f} s")
    words = [verdict.word for verdict in report.verdicts.values()]
    passed, failed, skipped, late = (words.count(w) for w in ("PASS", "FAIL", "SKIP", "LATE"))
    log(f"{passed} sections passed, {failed} failed, {skipped} skipped, {late} left out")
    log.end()
    return 1 if failed or not passed else 0


def run_all(
    sections: list[Section],
    args: argparse.Namespace,
    stem: Path,
    packages: list[str],
    report: Report,
    left: Callable[[], float],
) -> None:
    """Every section once, in the process of the one before it, in a new one, or as a command."""
    worker, stillborn = None, 0
    log = report.log.path
    try:
        for section in sections:
            began = time.monotonic()
            limit = min(section.limit, left() - SPARE)
            command = worker_command(args, packages, section.name == "baseline")
            here = section.process if section.module else None
            if worker is not None and (worker.name != here or not worker.alive):
                worker.end()
                worker = None
            if left() < section.needs:
                verdict = Verdict("LATE", "left out: the time is over")
            elif not section.module:
                verdict = of_command(section, args, stem, limit, report)
            elif stillborn >= TRIES:
                verdict = Verdict("FAIL", "no process starts")
            else:
                if worker is None:
                    worker = Worker(here, command, log, environment(args, section.name))
                verdict = worker.ask(section.name, section.module, limit, report.row)
                stillborn = 0 if worker.ready else stillborn + 1
            report.verdict(section.name, verdict, time.monotonic() - began)
    finally:
        if worker is not None:
            worker.end()


def of_command(
    section: Section, args: argparse.Namespace, stem: Path, limit: float, report: Report
) -> Verdict:
    """The verdict on a section that is a command of its own."""
    try:
        command = commands.command_of(section.name, args.dry_run, stem, limit)
        report.log("            " + " ".join(command))
        known = environment(args, section.name) | commands.ENVIRONMENT.get(section.name, {})
        places = [str(ROOT), *filter(None, [known.get("PYTHONPATH")])]
        known["PYTHONPATH"] = os.pathsep.join(places)  # the package, wherever the script lies
        status, lines = command_run(command, limit, report.log.path, known)
    except commands.Skipped as reason:
        return Verdict("SKIP", f"skipped: {reason}")
    except OSError as error:
        return Verdict("FAIL", f"{type(error).__name__}: {error}")
    last = lines[-1][:200] if lines else "it printed nothing"
    if status is None:  # of a tool that slows things down that says nothing
        word = "FAIL" if section.name == "step" else "LATE"
        return Verdict(word, f"killed after {limit:.0f} s: {last}")
    if status and any(commands.NOT_ALLOWED in text for text in lines):
        return Verdict("SKIP", "skipped: the counters of the device may not be read here")
    return Verdict("PASS", last) if status == 0 else Verdict("FAIL", f"{died(status)}: {last}")


def worker_command(args: argparse.Namespace, packages: list[str], baseline: bool) -> list[str]:
    command = [sys.executable, str(commands.WORKER), "--device", "cpu" if args.dry_run else "cuda"]
    if baseline:
        command += ["--package", str(args.baseline)]
    return command + [word for folder in packages for word in ("--also", folder)]


def environment(args: argparse.Namespace, name: str) -> dict[str, str]:
    found = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8:replace"}
    if args.dry_run and name != "compile":
        found["TORCH_COMPILE_DISABLE"] = "1"  # the peers' C++ would take most of the dry run
    return found


def unpacked(wheels: Path | None, into: Path, log: Log) -> list[str]:
    """Folders to import from: every wheel of a folder in one of its own."""
    folders = []
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        try:
            zipfile.ZipFile(wheel).extractall(into / wheel.stem)
        except (OSError, zipfile.BadZipFile) as error:
            log(f"{wheel.name} cannot be unpacked: {error}")
            continue
        log(f"{'wheel':18} {wheel.name}")
        folders.append(str(into / wheel.stem))
    return folders


def line(row: table.Row) -> str:
    known = {"ms": ("seconds", ".3f", 1e3), "x floor": ("x_floor", ".2f", 1)}
    known |= {"MiB": ("peak_mib", ".0f", 1), "GB/s": ("gb_per_s", ".0f", 1)}
    known |= {"TFLOP/s": ("tflop_per_s", ".1f", 1)}
    parts = [f"  {row.get('case', ''):16} {row.get('provider', ''):16}"]
    for unit, (name, digits, scale) in known.items():
        value = row.get(name)
        if value is not None and value == value:
            parts.append(f"{format(scale * value, digits):>9} {unit}")
    if row.get("note"):
        parts.append(f" {row['note']}")
    if row.get("target"):
        parts.append(f"{row['target'] * 1e3:g} ms, met: {row['met']}")
    return " ".join(parts)


def summary(report: Report) -> None:
    """Each provider's time over that of our own call of the same case and shape; what failed."""
    timed = {(r["shape"], r["case"], r["provider"]): r for r in report.rows if "shape" in r}
    report.log(f"\n{'shape':16} {'case':16} {'provider':13} {'x ours':>7}")
    for (shape, case, who), row in timed.items():
        mine = timed.get((shape, case, "ours"), {})
        if who != "ours" and row.get("seconds") and mine.get("seconds"):
            ratio = row["seconds"] / mine["seconds"]
            report.log(f"{shape:16} {case:16} {who:13} {ratio:7.2f}")
    report.log()
    for name, verdict in report.verdicts.items():
        if verdict.word in ("FAIL", "LATE"):
            report.log(f"{verdict.word} {name}: {verdict.detail}")


def chosen(name: str, args: argparse.Namespace) -> bool:
    """The facts always: every row is stamped with them."""
    if name == "baseline" and args.baseline is None:
        return False
    return name == "facts" or args.only is None or name in args.only


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [section.name for section in SECTIONS]
    add("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    add("--dry-run", action="store_true", help="on the CPU, at tiny sizes")
    add("--seconds", type=float, default=480.0, help="to end within (default 480)")
    add(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        metavar="DIR",
        help="folder of the results",
    )
    add("--wheels", type=Path, metavar="DIR", help="a folder of wheels to import peers from")
    add("--baseline", type=Path, metavar="DIR", help="another checkout, timed beside this one")
    args = parser.parse_args(arguments)
    if not 0 < args.seconds < float("inf"):
        parser.error(f"--seconds {args.seconds}: expected a positive number")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}; expected a folder")
    for option in ("wheels", "baseline"):
        folder = getattr(args, option)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{option} {folder}: no such folder")
    if args.baseline is not None:
        args.baseline = args.baseline.resolve()
        if not (args.baseline / "kepo_kernels" / "__init__.py").is_file():
            parser.error(f"--baseline {args.baseline}: it holds no kepo_kernels")
    return args


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: ends the worker
    sys.exit(main())
