"""Is the working tree faster than another commit? The same calls of both, in alternating rounds.

    python benchmarks/losses/compare.py HEAD     # before committing
    python benchmarks/losses/compare.py main --shape design --case kd_open grpo --rounds 9

Checks REF out into a temporary git worktree, which is removed at the end, also after an error or
Ctrl-C. Each side runs in one process of its own, with its own kernels; only one of them computes
at a time. A ratio below 1 means that the working tree is faster.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from benchmarks.another_checkout import import_kernels_of

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = Path("kepo_kernels/_rows.so")
BUILD_INPUTS = ("csrc", "setup.py")
DEFAULT_CASES = ("kd_open", "kd_half", "grpo", "joint")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), json.loads(sys.argv[3]))
        return
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that cleanups run
    settings = {
        "shape": args.shape,
        "cases": args.case,
        "dtype": args.dtype,
        "device": args.device,
        "grad_tol": args.grad_tol,
    }
    with ExitStack() as stack:
        say(f"checking out {args.ref}")
        tree, commit = stack.enter_context(worktree(args.ref))
        print(f"{args.ref} is {commit}; its kernels are {build(tree)}")
        sides = {}
        for name, where in (("here", ROOT), (args.ref, tree)):
            say(f"{name}: warming up")
            sides[name] = stack.enter_context(Side.start(name, where, settings))
        alternate(sides, args.ref, args.rounds)


def alternate(sides: dict[str, Side], ref: str, rounds: int) -> None:
    from benchmarks.losses.measure import Measurement

    here, there = sides["here"], sides[ref]
    for name in {**here.absent, **there.absent}:
        say("")
        for side in (here, there):
            if name in side.absent:
                print(f"{name}: {side.name} cannot run it: {side.absent[name]}")
    cases = [case for case in here.cases if case in there.cases]
    if not cases:
        sys.exit("error: there is no case that both can run")
    times = {(side, case): Measurement(0.0, None) for side in sides for case in cases}
    for done in range(rounds):
        say(f"round {done + 1} of {rounds}")
        for case in cases:
            # Whoever comes second finds the caches as the other left them; so they take turns.
            for side in (here, there) if done % 2 == 0 else (there, here):
                times[side.name, case].times.append(side.ask(case))
    say("")
    print(f"{'case':10} {'here':>9} {ref[:12]:>12} {'here / ' + ref[:12]:>20} {'[p20 p80]':>13}")
    for case in cases:
        mine, other = times["here", case], times[ref, case]
        ratio = mine.over([other])
        print(
            f"{case:10} {mine.seconds.median:9.4f} {other.seconds.median:12.4f} "
            f"{ratio.median:20.3f} [{ratio.p20:5.3f} {ratio.p80:5.3f}]"
        )


# ---- git and the build


@contextmanager
def worktree(ref: str) -> Iterator[tuple[Path, str]]:
    """A temporary checkout of `ref` and its commit; gone afterwards, whatever happens."""
    commit = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", error=f"no commit {ref}")
    where = Path(tempfile.mkdtemp(prefix="kepo-compare-"))
    tree = where / "tree"
    try:
        git("worktree", "add", "--detach", str(tree), commit, error="git worktree failed")
        yield tree, commit[:12]
    finally:
        subprocess.run(
            ["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True
        )
        shutil.rmtree(where, ignore_errors=True)


def git(*words: str, error: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError as missing:
        sys.exit(f"error: {missing}")
    if done.returncode:
        sys.exit(f"error: {error}: {done.stderr.strip() or 'see git rev-parse'}")
    return done.stdout.strip()


def build(tree: Path) -> str:
    """Give the checkout its kernels: a copy of ours if their sources are the same."""
    if not (ROOT / LIBRARY).exists():
        return "not built, as ours are not: both run on torch alone"
    if all(same(ROOT / name, tree / name) for name in BUILD_INPUTS):
        shutil.copy2(ROOT / LIBRARY, tree / LIBRARY)
        return "a copy of ours: csrc/ is the same"
    say("building its kernels")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode or not (tree / LIBRARY).exists():
        words = (done.stdout + done.stderr).strip()[-2000:]
        sys.exit(f"error: the kernels of that commit do not build:\n{words}")
    return "built from its own csrc/"


def same(ours: Path, theirs: Path) -> bool:
    def contents(path: Path) -> dict[str, bytes]:
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        return {
            file.relative_to(path).as_posix(): file.read_bytes()
            for file in files
            if file.is_file() and file.suffix in {".py", ".h", ".cpp"}
        }

    return contents(ours) == contents(theirs)


# ---- the two processes


class Side:
    """A process that holds one tree's package and a problem, and times a case when asked."""

    def __init__(self, name: str, process: subprocess.Popen):
        self.name, self.process = name, process
        hello = self._hear()
        self.cases: list[str] = hello["cases"]
        self.absent: dict[str, str] = hello["absent"]

    @classmethod
    @contextmanager
    def start(cls, name: str, tree: Path, settings: dict) -> Iterator[Side]:
        command = [sys.executable, __file__, "--worker", str(tree), json.dumps(settings)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)
        try:
            yield cls(name, process)
        finally:
            process.kill()
            process.wait()

    def ask(self, case: str) -> float:
        self.process.stdin.write(case + "\n")
        self.process.stdin.flush()
        return self._hear()["seconds"]

    def _hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"error: the process of {self.name} ended; its words are above")
        answer = json.loads(line)
        if "error" in answer:
            sys.exit(f"error: {self.name}: {answer['error']}")
        return answer


def work(tree: Path, settings: dict) -> None:
    """The worker: the package of `tree`, the benchmark's own code of this checkout."""
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(**what: object) -> None:
        print(json.dumps(what), file=answers, flush=True)

    try:
        import_kernels_of(tree)
        import torch

        from benchmarks.losses.losses_of_ours import ours
        from benchmarks.losses.measure import timed
        from benchmarks.losses.problems import Problem, parse_shape

        device, dtype = torch.device(settings["device"]), getattr(torch, settings["dtype"])
        problem = Problem.make(parse_shape(settings["shape"]), dtype, device)
        calls, absent = {}, {}
        for case in settings["cases"]:
            call = ours(problem, case, settings["grad_tol"])
            try:
                timed(call, device)
                calls[case] = call
            except Exception as error:
                absent[case] = f"{type(error).__name__}: {error}".splitlines()[0]
    except Exception as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(cases=list(calls), absent=absent)
    for line in sys.stdin:
        answer(seconds=timed(calls[line.strip()], device))


def say(words: str) -> None:
    if sys.stderr.isatty():
        print(f"\r  {words:60}\r", end="", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    from benchmarks.losses.losses_of_ours import CASES
    from benchmarks.losses.problems import SHAPES, parse_shape

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("ref", nargs="?", default="HEAD", help="commit, branch or tag (default HEAD)")
    shapes = f"N,H,Ht,V or one of {', '.join(SHAPES)} (default 512,1024,1024,32768)"
    add("--shape", default="512,1024,1024,32768", help=shapes)
    add("--case", nargs="+", choices=CASES, default=DEFAULT_CASES, help="default: %(default)s")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--device", default="cpu", help="cpu or cuda (default cpu)")
    add("--rounds", type=int, default=5, help="timed calls of each (default 5)")
    add("--grad-tol", type=float, default=5e-4, help="of the cases .._tol (default 5e-4)")
    args = parser.parse_args()
    try:
        parse_shape(args.shape)
    except argparse.ArgumentTypeError as error:
        parser.error(f"--shape {error}")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    return args


if __name__ == "__main__":
    main()
