"""The memory that stays in use from phase to phase, as bytes by item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kepo.objective.optimizers import BLOCK
from kepo.planner.model_sizes import ModelSizes
from kepo.sections import ModelsConfig, OptimizerConfig, SamplingConfig, TeacherConfig

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
"""The items that memory is counted by, in the order in which they are printed and stacked."""

# Estimates, not measured here: the CUDA context with the libraries' kernels and cuBLAS's workspace;
# NCCL's buffers; and the share of short-lived memory that the caching allocator cannot reuse.
CONTEXT_BYTES = 3 * GIB // 4
NCCL_BYTES = GIB
FRAGMENTATION = 0.05
# The share of its nominal size that a card offers: the driver keeps some, and sizes are rounded
# up. A card of 80 GB has about 78 GiB.
OFFERED = 0.97


class Held(Counter[str]):
    """Bytes by item; ``+`` adds them item by item."""

    def __add__(self, other: Held) -> Held:  # type: ignore[override]  # a Counter has other items
        assert (self.keys() | other.keys()) <= set(ITEMS), (self, other)  # others would be lost
        return Held({name: self[name] + other[name] for name in ITEMS})


@dataclass(frozen=True)
class Machine:
    """The GPUs of one node, all equal, with a process for each; or a CPU, with one process."""

    gpus: int
    gpu_bytes: int
    device: str = "cuda"

    @property
    def offered(self) -> int:
        """The bytes of a GPU that a run may use."""
        return int(OFFERED * self.gpu_bytes)


@dataclass(frozen=True)
class Standing:
    """The memory that a process holds in every phase, and what running its models adds.

    All numbers are bytes.
    """

    held: Held
    gradients: int
    """Gradients that exist from a backward to the optimiser's step, which drops them."""
    idle_gradients: int
    """Gradients that exist the rest of the time: DDP keeps its buckets."""
    earlier_gradients: int
    """Gradients that exist when a micro-batch's backward begins: those of earlier micro-batches,
    if the step has several, and DDP's buckets, which only the last micro-batch fills; 0 if there
    are neither."""
    sharded: bool
    root: int
    """The part of a sharded student that is whole from a forward to the end of its backward; 0 if
    it is not sharded."""
    two_layers: int
    """Two layers of a sharded student, the one at work and the next; one unpacked matrix of a
    quantised one; else 0."""
    whole: int
    """All of a sharded student made whole, as for a rollout; one unpacked matrix of a quantised
    one; else 0."""
    teacher_at_work: int
    reference_at_work: int
    pages: int
    """Memory that the loss keeps between its calls on a CPU."""
    device: str

    def beside(self, held: Held, pages: bool) -> Held:
        """Return ``held`` plus the memory that stays in use in every phase.

        pages: the pages that the loss keeps are idle, so they count by themselves.
        """
        reserve = self.pages if pages else 0
        if self.device != "cpu":
            reserve += int(FRAGMENTATION * sum(held.values()))
        return self.held + held + Held(reserve=reserve)


def standing(
    config: ModelsConfig,
    optimizer: OptimizerConfig,
    machine: Machine,
    student: ModelSizes,
    teachers: Sequence[ModelSizes],
    *,
    pages: int,
    several: bool,
    penalised: bool,
) -> Standing:
    """Return the memory that stays when the models are held as ``config`` says.

    pages: bytes that the loss keeps between its calls. several: a step has several micro-batches.
    penalised: the run has a reference for the KL penalty.
    """
    counts, width = student.counts, student.dtype.itemsize
    sharded = config.sharding == "fsdp2"
    shards = machine.gpus if sharded else 1
    # fsdp2 keeps all weights in fp32, trained or not; adapters are always fp32.
    trained_bytes = 4 if sharded or config.lora_rank else width
    trained = counts.trained * trained_bytes // shards
    frozen = (counts.total - counts.trained) * (4 if sharded else width) // shards
    saved, unpacked = 0, 0
    if config.student_bits is not None:
        saved, unpacked = quantised(student, config.student_bits)
    buckets = machine.gpus > 1 and not sharded
    root = counts.root * width if sharded else 0
    two_layers = 2 * counts.layer * width if sharded else unpacked
    # The reference is the student as it began, in the student's dtype, and sharded like it.
    reference = (counts.total - counts.adapters) * width // shards + root - saved
    held = Held(
        weights=trained + frozen - saved,
        optimiser=moments_bytes(optimizer, trained // trained_bytes, trained_bytes),
        teacher=sum(teacher_bytes(config, machine, one) for one in teachers),
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
        whole=counts.total * width if sharded else unpacked,
        teacher_at_work=max((teacher_at_work(config, one) for one in teachers), default=0),
        reference_at_work=two_layers if penalised else 0,
        pages=pages,
        device=machine.device,
    )


def moments_bytes(config: OptimizerConfig, trained: int, width: int) -> int:
    """Return the bytes of both moments of so many parameters of ``width`` bytes. In 8 bits they
    have an fp32 scale for every block; the few that are too small for it are not told apart."""
    if config.optimizer == "adamw":
        return 2 * width * trained
    return 2 * (trained + 4 * trained // BLOCK)


def completions_per_process(config: SamplingConfig, machine: Machine) -> int:
    """Return the completions that one process has in a step, rounded up."""
    return -(-config.prompts_per_step * config.num_generations // machine.gpus)


def quantised(model: ModelSizes, bits: int) -> tuple[int, int]:
    """Return the bytes that bitsandbytes' quantised layers save, and those of the largest matrix
    that is unpacked to compute with it."""
    counts, width = model.counts, model.dtype.itemsize
    # nf4 with an fp32 scale for every 64 numbers; int8 with one for every row.
    held = counts.linear * (4.5 / 8 if bits == 4 else 1)
    return counts.linear * width - int(held), counts.largest_linear * width


def teacher_bytes(config: TeacherConfig, machine: Machine, teacher: ModelSizes) -> int:
    """Return the bytes of the teacher's weights while it does not run."""
    counts, width = teacher.counts, teacher.dtype.itemsize
    whole = counts.total * width
    if config.teacher_bits is not None:
        whole -= quantised(teacher, config.teacher_bits)[0]
    if config.teacher_placement == "copy":
        return whole
    root = counts.root * width
    return root if config.teacher_placement == "offload" else whole // machine.gpus + root


def teacher_at_work(config: TeacherConfig, teacher: ModelSizes) -> int:
    """Return the bytes above `teacher_bytes` while the teacher runs: two sharded or offloaded
    layers made whole, or one quantised matrix unpacked."""
    width = teacher.dtype.itemsize
    if config.teacher_placement != "copy":
        return 2 * teacher.counts.layer * width
    return quantised(teacher, config.teacher_bits)[1] if config.teacher_bits else 0
