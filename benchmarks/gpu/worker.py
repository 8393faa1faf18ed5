"""A process that runs sections of suite.py, one after the other, as it is told to.

It is told and answers in lines of JSON over a socket. What is printed goes to the log: its output
is redirected there, tracebacks included. Where the device's context is dead after a section it says
so and ends. With `--once` it runs one function of commands.py instead, for the tools to look at.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from benchmarks.another_checkout import import_kernels_of
from benchmarks.gpu import commands
from benchmarks.gpu.clock import Clock, Skipped


def main() -> int:
    args = parse()
    if args.package:
        import_kernels_of(args.package)
    sys.path += args.also
    if args.once:
        getattr(commands, args.once)(args.device)
        return 0
    os.set_inheritable(args.socket, False)  # or a child of ours would keep it open after our end
    link = socket.socket(fileno=args.socket)

    def tell(**event: object) -> None:
        sys.stdout.flush()
        link.sendall((json.dumps(event, default=str) + "\n").encode())

    tell(ready=os.getpid())
    for line in link.makefile("r", encoding="utf-8"):
        order = json.loads(line)
        print(f"\n--- {order['name']}", flush=True)
        word, detail = run(order, args.device, tell)
        dead = settled()
        if dead:
            print(f"the context is dead: {dead}", flush=True)
        tell(done=order["name"], word=word, detail=detail, dead=dead)
        if dead:
            return 3
    return 0


def run(order: dict, kind: str, tell: Callable[..., None]) -> tuple[str, str]:
    """The verdict on a section and a line about it; its rows are told as they come."""
    try:
        section = import_module(order["module"]).SECTIONS[order["name"]]
        found = section(Clock(kind, lambda: order["until"] - time.monotonic()))
        if not inspect.isgenerator(found):
            return "PASS", str(found)
        rows = 0
        for row in found:
            tell(row=row)
            rows += 1
        return "PASS", f"{rows} rows"
    except Skipped as reason:
        return "SKIP", f"skipped: {reason}"
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        return "FAIL", f"{type(error).__name__}: {first_line(error)}"


def settled() -> str:
    """Waits for the device and frees what is not in use; says what is wrong, if anything is."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        gc.collect()  # tensors in the frames of a traceback
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # after an illegal access each call raises, until the process ends
        return first_line(error) or type(error).__name__
    return ""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--socket", type=int, help="number of the open file to be told through")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--package", type=Path, help="folder whose kepo_kernels is imported, not this one's")
    add("--also", action="append", default=[], help="a folder with further packages")
    add("--once", help="a function of commands.py to run instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
