"""What stays in memory from phase to phase, and how it is written down: bytes by what they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kepo.planner.anatomy import Anatomy
from kepo.sections import ModelsConfig, SamplingConfig, TeacherConfig

GIB = 2**30
ITEMS = (
    "weights",
    "gradients",
    "optimiser",
    "teacher",
    "reference",
    "activations",
    "cache",
    "sampling",
    "loss",
    "reserve",
)
"""In the order in which they are printed and stacked."""

# Estimates, not measured here: the CUDA context with the libraries' kernels and cuBLAS's workspace;
# NCCL's buffers; and the share of what comes and goes that the caching allocator cannot reuse.
CONTEXT_BYTES = 3 * GIB // 4
NCCL_BYTES = GIB
FRAGMENTATION = 0.05
# What a card offers of its nominal size: the driver keeps some, and sizes are rounded up. One of
# 80 GB has about 78 GiB.
OFFERED = 0.97


class Held(Counter):
    """Bytes by item; they add up."""

    def __add__(self, other: Held) -> Held:
        assert (self.keys() | other.keys()) <= set(ITEMS), (self, other)  # else it would be lost
        return Held({name: self[name] + other[name] for name in ITEMS})


@dataclass(frozen=True)
class Machine:
    """Equal GPUs of one node, one process for each; or a CPU, one process."""

    gpus: int
    gpu_bytes: int
    device: str = "cuda"

    @property
    def offered(self) -> int:
        """What a run may take of a GPU."""
        return int(OFFERED * self.gpu_bytes)


@dataclass(frozen=True)
class Standing:
    """What a process holds whatever it does, and what it needs to put its weights to work."""

    held: Held
    gradients: int
    """From a backward to the optimiser's step, after which they are dropped."""
    idle_gradients: int
    """The rest of the time: DDP keeps its buckets."""
    earlier_gradients: int
    """What is there when a micro-batch's backward begins: all of them, where another micro-batch
    went before; DDP's buckets, and beside them what went before, until the last micro-batch fills
    the buckets; else nothing."""
    sharded: bool
    root: int
    """Of the student, sharded: what is whole from a forward to the end of its backward."""
    two_layers: int
    """Of the student, sharded: the layer at work and the next."""
    whole: int
    """Of the student, sharded: all of it, as for a rollout."""
    teacher_at_work: int
    reference_at_work: int
    pages: int
    """Of the loss, kept between its calls on a CPU."""
    device: str

    def beside(self, held: Held, pages: bool) -> Held:
        """All of it and ``held``. pages: those of the loss are idle, so they count by
        themselves."""
        reserve = self.pages if pages else 0
        if self.device != "cpu":
            reserve += int(FRAGMENTATION * sum(held.values()))
        return self.held + held + Held(reserve=reserve)


def standing(
    config: ModelsConfig,
    machine: Machine,
    student: Anatomy,
    teacher: Anatomy | None,
    *,
    pages: int,
    several: bool,
    penalised: bool,
) -> Standing:
    """What stays when the models are held as ``config`` says.

    pages: those that the loss keeps. several: a step has several micro-batches. penalised: there
    is a reference for the k3 penalty.
    """
    counts, width = student.counts, student.dtype.itemsize
    sharded = config.sharding == "fsdp2"
    shards = machine.gpus if sharded else 1
    # fsdp2 keeps all weights in fp32, trained or not; adapters are fp32 anyway.
    trained_bytes = 4 if sharded or config.lora_rank else width
    trained = counts.trained * trained_bytes // shards
    frozen = (counts.total - counts.trained) * (4 if sharded else width) // shards
    buckets = machine.gpus > 1 and not sharded
    root = counts.root * width if sharded else 0
    two_layers = 2 * counts.layer * width if sharded else 0
    # A reference is the student as it began, in its dtype, and sharded with it.
    reference = (counts.total - counts.adapters) * width // shards + root
    held = Held(
        weights=trained + frozen,
        optimiser=2 * trained,
        teacher=0 if teacher is None else teacher_bytes(config, machine, teacher),
        reference=reference if penalised else 0,
    )
    if machine.device != "cpu":
        held["reserve"] = CONTEXT_BYTES + (NCCL_BYTES if machine.gpus > 1 else 0)
    return Standing(
        held=held,
        gradients=trained,
        idle_gradients=trained if buckets else 0,
        earlier_gradients=(several + buckets) * trained,
        sharded=sharded,
        root=root,
        two_layers=two_layers,
        whole=counts.total * width if sharded else 0,
        teacher_at_work=0 if teacher is None else teacher_at_work(config, teacher),
        reference_at_work=two_layers if penalised else 0,
        pages=pages,
        device=machine.device,
    )


def completions_per_process(config: SamplingConfig, machine: Machine) -> int:
    """Of a step."""
    return -(-config.prompts_per_step * config.num_generations // machine.gpus)


def teacher_bytes(config: TeacherConfig, machine: Machine, teacher: Anatomy) -> int:
    """Of the teacher's weights, at rest."""
    counts, width = teacher.counts, teacher.dtype.itemsize
    whole = counts.total * width
    if config.teacher_bits is not None:
        # bitsandbytes: nf4 with an fp32 scale for every 64 numbers; int8 with one for every row.
        quantised = counts.linear * (4.5 / 8 if config.teacher_bits == 4 else 1)
        whole = int(quantised) + (counts.total - counts.linear) * width
    if config.teacher_placement == "copy":
        return whole
    root = counts.root * width
    return root if config.teacher_placement == "offload" else whole // machine.gpus + root


def teacher_at_work(config: TeacherConfig, teacher: Anatomy) -> int:
    """Above that, while it runs: sharded layers made whole, or a quantised matrix unpacked."""
    width = teacher.dtype.itemsize
    if config.teacher_placement != "copy":
        return 2 * teacher.counts.layer * width
    return teacher.counts.largest_linear * width if config.teacher_bits else 0
