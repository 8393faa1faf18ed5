"""Whole steps (rollout, scoring, update) in tokens per second and peak memory: `kepo train`, and
TRL's trainers on the same model, prompts and lengths.

    python benchmarks/loop/step.py                               # minutes
    python benchmarks/loop/step.py --teacher 256,4               # with distillation
    python benchmarks/loop/step.py --vocab 151936 --prompts 1 --prompt 300
    python benchmarks/loop/step.py --device cuda --student 1024,16 --vocab 151936

Variants:

    shared      ours: a prompt is computed once for all its completions (share_prompts)
    rows        ours: a row of prompt and completion for each completion
    trl         TRL's GRPOTrainer, its fused head on, as it always is; with --teacher also its
                DistillationTrainer after it, as TRL has no trainer of both: it samples again
    trl-kepo    the same with fuse_head, and KepoDistillationTrainer after it
    trl-liger   TRL's own with TRL's Liger layers; on a GPU

The model is a random Qwen3-VL whose completions all have --length tokens, as no end token has any
probability; most of a longer prompt is a picture (--picture). Each variant is a process of its own
that runs the trainer itself: nothing of a step is written again here, and every gate is open. TRL
gets transformers' own processor without its part for videos, which alone needs torchvision.

In the first step all variants train on the completions that the first of them has sampled, and must
have the same loss and gradients. The second is watched for memory: `peak` is the most that was held
at any moment, on a CPU all that was resident, interpreter and libraries among it; `above` what of
it is more than before the step; of two trainers, the larger. Then the variants step in turn, round
after round. Each step must have sampled and trained on as many tokens as any other. `rest` is what
is not rollout or teacher: update and log; TRL's teacher is in it. `x ours` is the variant's time
over that of the first variant, medians of ratios within a round. In float32; on a GPU weights in
float32 and forwards in bf16.

Exit status 1 if variants disagree or fail. One that cannot run here is a row that says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository

from benchmarks.loop.on_disk import PADDING, Sizes, usual_picture, write
from benchmarks.loop.processes import Contender
from benchmarks.loop.table import Row, Table, draw, head
from benchmarks.loop.update import TOLERANCE, Mismatch
from benchmarks.loop.variants import VARIANTS
from benchmarks.losses.measure import Quantiles
from benchmarks.stamp import installed, stamp
from kepo.models.reading import hide_transformers_bars

HEAD_ROOM = 1024  # ids that the tokenizer has of its own, at most


def measured(folder: Path, sizes: Sizes, args: argparse.Namespace, table: Table) -> bool:
    """Add the rows of one length of prompt; returns whether no variant failed."""
    write(folder, sizes)
    facts = facts_of(sizes)
    going: list[Contender] = []
    good = True
    try:
        for name in args.variants:
            reason = VARIANTS[name].cannot(sizes)
            if reason:
                table.add(facts | {"variant": name, "note": reason})
                continue
            contender = Contender(folder, name, sizes)
            going.append(contender)
            say(f"P={sizes.prompt}: {name} starts")
            good &= attempt(going, contender, table, facts, partial(agree, going[0]))
        rounds = [("memory", Contender.watch)]
        rounds += [(f"round {n + 1} of {args.rounds}", Contender.time) for n in range(args.rounds)]
        for words, work in rounds:
            for contender in list(going):
                say(f"P={sizes.prompt}: {words}, {contender.name}")
                good &= attempt(going, contender, table, facts, work)
        say("")
        for contender in going:
            table.add(facts | row_of(contender, going[0]))
    finally:
        for contender in going:
            contender.end()
    return good


def attempt(
    going: list[Contender],
    contender: Contender,
    table: Table,
    facts: Row,
    work: Callable[[Contender], None],
) -> bool:
    """Do the work; where it fails, a row says why, and the contender is out."""
    try:
        work(contender)
    except (Mismatch, RuntimeError) as error:
        going.remove(contender)
        contender.end()
        say("")
        table.add(facts | {"variant": contender.name, "note": f"failed: {error}"[:300]})
        return False
    return True


def agree(truth: Contender, contender: Contender) -> None:
    contender.start()
    dtype = torch.bfloat16 if contender.sizes.device == "cuda" else torch.float32
    contender.compare(truth, TOLERANCE[dtype])


def row_of(contender: Contender, ours: Contender) -> Row:
    steps, watched, sizes = contender.steps, contender.watched, contender.sizes
    seconds = Quantiles.of([step["seconds"] for step in steps])
    pairs = zip(steps, ours.steps, strict=True)
    ratios = Quantiles.of([mine["seconds"] / its["seconds"] for mine, its in pairs])
    parts = {
        name: Quantiles.of([step[name] for step in steps]).median
        for name in ("rollout_seconds", "teacher_seconds")
    }
    return {
        "variant": contender.name,
        "tokens_per_second": sizes.tokens / seconds.median,
        **spread("seconds", seconds),
        "rounds": len(steps),
        **parts,
        "rest_seconds": seconds.median - sum(parts.values()),
        "peak_mib": watched["peak_mib"],
        "held_mib": watched["held_mib"],
        "above_mib": watched["peak_mib"] - watched["held_mib"],
        "loss": contender.first["loss"],
        "gradient_gap": contender.gap,
        **spread("x_seconds", ratios),
        "x_peak": watched["peak_mib"] / ours.watched["peak_mib"],
    }


def spread(name: str, values: Quantiles) -> Row:
    return dict(zip((name, f"{name}_p20", f"{name}_p80"), values, strict=True))


def facts_of(sizes: Sizes) -> Row:
    import transformers

    known = stamp()
    names = ("machine", "capability", "threads", "python", "torch", "trl", "commit", "date")
    return {
        **{name: known[name] for name in names},
        "transformers": transformers.__version__,
        "device": sizes.device,
        "dtype": "bfloat16" if sizes.device == "cuda" else "float32",
        "student": ",".join(map(str, sizes.student)),
        "teacher": "none" if sizes.teacher is None else ",".join(map(str, sizes.teacher)),
        "V": sizes.vocab,
        "prompt_tokens": sizes.prompt,
        "picture_tokens": sizes.picture**2,
        "prompts": sizes.prompts,
        "generations": sizes.generations,
        "length": sizes.length,
        "micro_batch": sizes.micro_batch,
    }


def say(words: str) -> None:
    """Show what is going on; on a terminal in a line that the next one takes the place of."""
    if sys.stderr.isatty():
        print(f"\r{words:60}", end="\r", file=sys.stderr, flush=True)
    elif words:
        print(words, file=sys.stderr, flush=True)


# ---- the command ----


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    hide_transformers_bars()
    print(f"TRL {installed('trl')}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print(head(), flush=True)
    table, good = Table(args.csv), True
    for prompt in args.prompt:
        with tempfile.TemporaryDirectory() as folder:
            good &= measured(Path(folder), sizes_of(args, prompt), args, table)
    if args.csv:
        print(f"\nwritten: {args.csv}")
    if args.plot:
        draw(table.rows, args.plot)
        print(f"written: {args.plot}")
    return 0 if good else 1


def sizes_of(args: argparse.Namespace, prompt: int) -> Sizes:
    names = ("student", "teacher", "vocab", "prompts", "generations", "length", "micro_batch")
    given = {name: getattr(args, name) for name in (*names, "device", "seed")}
    return Sizes(**given, prompt=prompt, picture=args.picture or usual_picture(prompt))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prompt", type=int, nargs="+", default=[60, 300, 1000], metavar="P", help="tokens of a "
        "prompt, its picture's among them; several are measured one after the other "
        "(default 60 300 1000)")  # fmt: skip
    add("--picture", type=int, metavar="SIDE", help="tokens on each side of a prompt's picture, "
        "SIDE x SIDE of P (default: what makes most of a long prompt a picture)")  # fmt: skip
    for name, default, words in (
        ("prompts", 2, "prompts of a step"),
        ("generations", 8, "completions of each prompt, G"),
        ("length", 128, "tokens of a completion, T"),
        ("micro-batch", 8, "completions per forward and backward pass"),
        ("vocab", 8192, "rows of the head"),
        ("rounds", 3, "timed steps of each variant"),
        ("seed", 0, "of models, pictures and sampling"),
    ):
        add(f"--{name}", type=int, default=default, help=f"{words} (default {default})")
    add("--student", type=shape, default=(128, 4), metavar="HIDDEN,LAYERS", help="default 128,4")
    add("--teacher", type=shape, metavar="HIDDEN,LAYERS", help="distil from such a one, too")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
        help=f"which, the one to compare with first (default {' '.join(VARIANTS)})")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--csv", type=Path, help="write the rows, with machine, versions and commit, here")
    add("--plot", type=Path, help="draw seconds against P/T here")
    args = parser.parse_args(arguments)
    check(parser, args)
    return args


def shape(text: str) -> tuple[int, int]:
    from benchmarks.loop.phases import parse_shape

    found = parse_shape(text)
    if isinstance(found, str):
        raise argparse.ArgumentTypeError(f"{text!r}: expected HIDDEN,LAYERS")
    return tuple(found)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse sizes that make no problem."""
    if args.picture is not None and args.picture < 2:
        parser.error(f"--picture {args.picture}: expected at least 2")
    least = dict(prompts=1, generations=2, length=1, micro_batch=1, rounds=1)
    for name, number in (least | {"vocab": HEAD_ROOM + PADDING}).items():
        if getattr(args, name) < number:
            words = f"--{name.replace('_', '-')} {getattr(args, name)}"
            parser.error(f"{words}: expected at least {number}")
    count = args.prompts * args.generations
    if count % args.micro_batch:
        parser.error(
            f"--micro-batch {args.micro_batch}: expected a divisor of the {count} completions of a "
            "step, as TRL has no smaller last one"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here")
    args.variants = list(dict.fromkeys(args.variants))


if __name__ == "__main__":
    sys.exit(main())
