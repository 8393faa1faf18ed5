"""`python -m kepo_kernels`: list the back-ends that work here, and say why the others do not."""

import argparse
import os
import sys

import torch

from kepo_kernels import __version__
from kepo_kernels.compute import gemm
from kepo_kernels.errors import KepoInputError
from kepo_kernels.rows.dispatch import IMPLS, pick_rows, unavailable
from kepo_kernels.versions import triton_version

SERVES = {"triton": "CUDA", "cpu": "CPU", "torch": "any device"}


def main() -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a compiler's words, on a terminal that lacks some
        sys.stdout.reconfigure(errors="backslashreplace")
    argparse.ArgumentParser(prog="python -m kepo_kernels", description=__doc__).parse_args()
    triton = triton_version()
    words = "no triton" if triton is None else f"triton {triton}"
    print(f"kepo_kernels {__version__}, torch {torch.__version__}, {words}")
    for impl in IMPLS:
        reason = unavailable(impl)
        state = f"live on {SERVES[impl]}" if reason is None else f"not live: {reason}"
        if impl == "cpu" and reason is None:
            from kepo_kernels.rows.cpu_rows import isa

            state += f" ({isa()}, {torch.get_num_threads()} threads)"
        print(f"  {impl:7} {state}")
    for kind in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        device = torch.device(kind)
        try:
            chosen = pick_rows("auto", device, torch.float32).__name__.removeprefix("kepo_kernels.")
        except KepoInputError as error:
            print(error)
            continue
        logits = gemm.default_logits_dtype(torch.bfloat16, device)
        print(f"impl='auto' on {kind}: {chosen}; bf16 inputs give {logits} logits")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as `| head` has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
