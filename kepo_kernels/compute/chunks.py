"""The length of chunks in rows, and the bytes they take: `workspace_bytes` is a guarantee.

The memory that a call allocates above its inputs and gradients grows with the rows of a chunk. This
module adds it up, term by term in the order of `sweep`, and picks the longest chunk that fits. The
tests measure that the allocator never hands out more.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from kepo_kernels.compute import gemm
from kepo_kernels.compute.sparsity import BLOCK_ELEMENTS
from kepo_kernels.errors import KepoInputError
from kepo_kernels.rows import top_k_rows, torch_rows
from kepo_kernels.rows.contract import accumulate_dtype
from kepo_kernels.rows.dispatch import pick_rows
from kepo_kernels.validate import Validator

# On a GPU the fp32 gradient of a large head costs a pass over the head per chunk, so chunks should
# be about 2048 rows, which for two heads of 151,936 rows is 3.1 GiB. On a CPU they should be small
# enough not to page in gigabytes, and long enough that the same pass is negligible: 256 rows, up to
# half a gigabyte. There a small call gets two fifths of the memory of its inputs and gradients, but
# at least 128 rows and 32 MiB, so that it never holds much more than it must.
DEFAULT_WORKSPACE = {"cpu": 192 << 20, "cuda": 3328 << 20}
LARGEST_SHARE = 8  # an eighth of a GPU's memory at most
CPU_CHUNK_ROWS, LEAST_CPU_CHUNK_ROWS = 256, 128
LEAST_CPU_DEFAULT = 32 << 20
TILE_ROWS, TILE_COLUMNS = 128, 256  # of a matrix product's output, on the GPUs of these years
LARGEST_CPU_DEFAULT = 512 << 20

# Vectors over the tokens of the call (weights, masks, indices) and over the rows of a chunk (the
# table, the caller's loss and its autograd graph), in bytes per token and per row.
TOKEN_BYTES = 256
ROW_BYTES = 1024
# oneDNN's own buffers of a bf16 product: 0.14 MiB a thread and 0.6 KiB a row were measured.
BF16_THREAD_BYTES = 160 << 10
# It packs a head in panels of 64 columns for dlogits @ head. A thread was seen to hold 1.7 MiB of
# them at most; where the states are narrower than a panel, all of the one panel.
PANEL_COLUMNS, PANEL_BYTES = 64, 1792 << 10
SELECTION_BYTES = 64  # per column, to find the columns that `grad_tol` keeps


@dataclass(frozen=True)
class Sizes:
    """The sizes and settings that determine the memory of a call."""

    rows: int
    hidden_size: int
    vocab: int
    dtype: torch.dtype = torch.float32  # the narrowest dtype, if states and heads differ
    mixed: bool = False  # whether they differ: states are then also held in fp32
    logits_dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    teacher_rows: int = 0
    teacher_hidden_size: int = 0
    shared_vocab: int = 0
    top_k: int = 0  # K of a TopK teacher, which has neither states nor head
    tokens: int = 0
    lora_rank: int = 0
    torch_impl: bool = False
    compacts: bool = False  # grad_tol > 0
    multiprocessors: int = 0  # of the GPU; 0 on a CPU, or if there is no GPU to ask
    gpu_memory: int = 0  # bytes of the GPU's memory; 0 likewise

    @cached_property
    def one_product(self) -> bool:
        return gemm.one_product(self.dtype, self.logits_dtype, self.device)

    def strip_bytes(self, workspace_bytes: int | None) -> int | None:
        """Return the bytes of a strip of a head: an eighth of a small workspace, or the least that
        works if that leaves no row."""
        if workspace_bytes is None:
            return None
        eighth = workspace_bytes // 8
        return eighth if self.bytes_of(1, eighth) <= workspace_bytes else 0

    def strip_rows(self, width: int, strip_bytes: int | None) -> int:
        return gemm.default_strip_rows(width, self.dtype, strip_bytes)

    def bytes_of(self, rows: int, strip_bytes: int | None = None) -> int:
        """Return the most bytes held at a time above inputs and gradients, with chunks of
        `rows`."""
        wide = gemm.gradient_dtype(self.dtype).itemsize
        narrow, logits = self.dtype.itemsize, self.logits_dtype.itemsize
        h, teacher_h = self.hidden_size, self.teacher_hidden_size
        strip = min(self.vocab, self.strip_rows(h, strip_bytes))
        a_row = (self.vocab + self.shared_vocab) * logits + ROW_BYTES
        states = wide if self.mixed else narrow
        a_row += h * (states + 2 * wide)  # the states, their upcast, their gradient
        a_row += teacher_h * (states + wide)
        a_row += 4 * self.lora_rank * wide
        a_row += (self.top_k + (self.top_k > 0)) * top_k_rows.BIN_BYTES
        if self.device.type != "cpu" and narrow == 2 and logits == 4:
            a_row += self.vocab * narrow  # dlogits in the dtype of the operands
        fixed = self.tokens * TOKEN_BYTES
        fixed += 2 * (self.vocab + self.shared_vocab) * wide  # both biases, upcast
        fixed += 2 * self.lora_rank * h * wide
        if not self.one_product or narrow == logits == 2:
            teacher_strip = min(self.shared_vocab, self.strip_rows(teacher_h, strip_bytes))
            fixed += max(strip * h, teacher_strip * teacher_h) * wide
            a_row += max(strip, teacher_strip) * wide  # the product with a strip
        if self.one_product and self.device.type == "cpu" and narrow == 2:
            panels = -(-h // PANEL_COLUMNS) * PANEL_COLUMNS * self.vocab * narrow
            packed = panels if h < PANEL_COLUMNS else min(panels, PANEL_BYTES)
            fixed += torch.get_num_threads() * (BF16_THREAD_BYTES + packed)
            a_row += ROW_BYTES
        if self.compacts or logits == 2:
            a_row += strip * (wide + logits)  # strips of dlogits: gathered, upcast
        if self.compacts:
            fixed += strip * h * (wide + narrow) + self.vocab * SELECTION_BYTES
            fixed += min(rows * self.vocab, max(BLOCK_ELEMENTS, self.vocab)) * wide
        if self.torch_impl:
            block = min(rows * self.vocab, max(torch_rows.block_elements(self.device), self.vocab))
            fixed += torch_rows.TEMPORARIES * block * accumulate_dtype(self.logits_dtype).itemsize
        scaled = min(self.vocab * h, BLOCK_ELEMENTS) * wide  # a block of a gradient, in backward
        return max(fixed + rows * a_row, scaled)

    def default_workspace(self) -> int:
        if self.device.type != "cpu":
            share = self.gpu_memory // LARGEST_SHARE or DEFAULT_WORKSPACE["cuda"]
            return max(min(DEFAULT_WORKSPACE["cuda"], share), self.bytes_of(1))
        most = max(
            DEFAULT_WORKSPACE["cpu"], min(self.bytes_of(CPU_CHUNK_ROWS), LARGEST_CPU_DEFAULT)
        )
        few = min(self.bytes_of(LEAST_CPU_CHUNK_ROWS), LARGEST_CPU_DEFAULT)
        small = max(2 * self.inputs_and_gradients() // 5, few, LEAST_CPU_DEFAULT)
        return max(min(most, small), self.bytes_of(1))

    def inputs_and_gradients(self) -> int:
        """Return the bytes of states, heads and student gradients, in the gradients' dtype."""
        student = (self.rows + self.vocab) * self.hidden_size
        teacher = (self.teacher_rows + self.shared_vocab) * self.teacher_hidden_size
        return (2 * student + teacher) * gemm.gradient_dtype(self.dtype).itemsize

    def least_workspace(self) -> int:
        """Return the bytes of chunks of one row, with the smallest strips."""
        return self.bytes_of(1, 0)

    def longest_chunk(self, workspace_bytes: int) -> int:
        """Return the largest number of rows whose bytes fit; 0 if not even one row does."""
        strip_bytes = self.strip_bytes(workspace_bytes)
        low, high = 0, max(1, self.rows)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high)
                if self.bytes_of(middle, strip_bytes) <= workspace_bytes
                else (low, middle - 1)
            )
        return low

    def fewest_waves(self, longest: int) -> int:
        """Return the chunk length up to `longest` at which the dX product wastes the least of the
        GPU.

        A product of c rows has ceil(c / 128) ceil(H / 256) tiles, which are worked on in waves of
        one tile per multiprocessor; a last wave of few tiles takes as long as a full one. At equal
        waves the fewest chunks win: each costs a pass over the gradient of the head.
        """
        spans = [n for n in (self.teacher_rows, self.rows - self.teacher_rows) if n > 0]
        if self.multiprocessors == 0 or not spans:
            return longest
        across = -(-self.hidden_size // TILE_COLUMNS)

        def waves(length: int) -> int:
            total = 0
            for span in spans:
                chunks = -(-span // length)
                length = -(-span // chunks)
                tiles = -(-length // TILE_ROWS) * across
                total += chunks * -(-tiles // self.multiprocessors)
            return total

        most = max(spans)
        fewest = -(-most // longest)
        return min((-(-most // n) for n in range(fewest, 2 * fewest + 1)), key=waves)


@dataclass(frozen=True)
class Chunking:
    """The chosen chunks and the memory they take."""

    chunk_rows: int
    """Maximum number of rows in a chunk; chunks of one kind have equal length."""
    chunks: int
    """Number of chunks: those of rows with a teacher plus those of rows without."""
    workspace_bytes: int
    """The most bytes held at a time above inputs and gradients; never more than was granted."""
    gradient_bytes: int
    """Bytes of the gradients' accumulators (fp32, fp64 for fp64) and of what backward returns."""
    least_workspace_bytes: int
    """The smallest `workspace_bytes` that works here: chunks of one row."""


def chunking(
    rows: int,
    hidden_size: int,
    vocab: int,
    *,
    teacher_rows: int = 0,
    teacher_hidden_size: int | None = None,
    teacher_vocab: int | None = None,
    top_k: int = 0,
    dtype: torch.dtype = torch.float32,
    head_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    workspace_bytes: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    impl: str = "auto",
    grad_tol: float = 0.0,
    lora_rank: int = 0,
    trains: tuple[str, ...] = ("hidden", "lm_head"),
) -> Chunking:
    """Compute the chunks that a call of these sizes will use, and its memory, without running it.

    Args:
        rows: number of tokens of non-zero weight; teacher_rows of them (<= rows) have a teacher.
        vocab, teacher_vocab: rows of the two heads; teacher_vocab None = the student's.
        teacher_hidden_size: hidden size of the teacher; None = the student's.
        top_k: K of a `TopK` teacher, which has neither hidden size nor vocabulary; 0 means that the
            teacher, if there is one, has hidden states.
        dtype, head_dtype: dtype of the states, and of the heads and the LoRA (None = the same).
        workspace_bytes, chunk_rows, logits_dtype, impl, grad_tol: as in the losses.
        lora_rank: rank of a LoRA on the student's head; 0 means there is none.
        trains: which of hidden, lm_head, lora require a gradient.

    Raises:
        KepoInputError: a size is not an integer, or workspace_bytes is too small; the message names
            the smallest that works.

    Example: `chunking(8192, 2048, 151936, dtype=torch.bfloat16).chunk_rows`.
    """
    check = Validator("chunking")
    device = torch.device(device)
    counts = {"rows": rows, "teacher_rows": teacher_rows, "lora_rank": lora_rank, "top_k": top_k}
    rows, teacher_rows, lora_rank, top_k = (
        check.integer(name, x, 0, "an integer >= 0") for name, x in counts.items()
    )
    has_states = teacher_rows > 0 and top_k == 0
    hidden_size, vocab, teacher_vocab, teacher_hidden_size = (
        check.integer(name, x, 1, "a positive integer")
        for name, x in (
            ("hidden_size", hidden_size),
            ("vocab", vocab),
            ("teacher_vocab", vocab if teacher_vocab is None else teacher_vocab),
            ("teacher_hidden_size", teacher_hidden_size or hidden_size),
        )
    )
    engine = check.engine(
        {
            "impl": impl,
            "workspace_bytes": workspace_bytes,
            "chunk_rows": chunk_rows,
            "grad_tol": grad_tol,
        }
    )
    workspace_bytes, chunk_rows = engine["workspace_bytes"], engine["chunk_rows"]
    head_dtype = head_dtype or dtype
    operands = gemm.operand_dtype({dtype, head_dtype})
    logits_dtype = logits_dtype or gemm.default_logits_dtype(operands, device)
    sizes = Sizes(
        rows=rows,
        hidden_size=hidden_size,
        vocab=vocab,
        dtype=min(dtype, head_dtype, key=lambda x: x.itemsize),
        mixed=dtype != head_dtype,
        logits_dtype=logits_dtype,
        device=device,
        teacher_rows=teacher_rows,
        teacher_hidden_size=teacher_hidden_size if has_states else 0,
        shared_vocab=min(vocab, teacher_vocab) if has_states else 0,
        top_k=top_k if teacher_rows else 0,
        tokens=rows,
        lora_rank=lora_rank,
        torch_impl=pick_rows(impl, device, logits_dtype) is torch_rows,
        compacts=engine["grad_tol"] > 0,
        **gpu_at_hand(device),
    )
    wide = gemm.gradient_dtype(dtype).itemsize
    gradients = {
        "hidden": rows * hidden_size * (wide + dtype.itemsize),
        "lm_head": vocab * hidden_size * (wide + head_dtype.itemsize),
        "lora": lora_rank * (vocab + hidden_size) * (wide + head_dtype.itemsize),
    }
    per_chunk = chunk_length(sizes, workspace_bytes, chunk_rows)
    longest = min(per_chunk, max(1, rows))
    return Chunking(
        chunk_rows=per_chunk,
        chunks=-(-teacher_rows // per_chunk) + -(-(rows - teacher_rows) // per_chunk),
        workspace_bytes=sizes.bytes_of(longest, sizes.strip_bytes(workspace_bytes)),
        gradient_bytes=sum(gradients[name] for name in trains),
        least_workspace_bytes=sizes.least_workspace(),
    )


def gpu_at_hand(device: torch.device) -> dict[str, int]:
    """Return the GPU's numbers that `Sizes` needs; empty on a CPU or without a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return {}
    gpu = torch.cuda.get_device_properties(device)
    return {"multiprocessors": gpu.multi_processor_count, "gpu_memory": gpu.total_memory}


def chunk_length(sizes: Sizes, workspace_bytes: int | None, chunk_rows: int | None) -> int:
    """Return the rows per chunk: as requested, or as many as fit in the workspace."""
    if chunk_rows is None:
        granted = sizes.default_workspace() if workspace_bytes is None else workspace_bytes
        chunk_rows = sizes.fewest_waves(sizes.longest_chunk(granted))
        if chunk_rows == 0:
            raise KepoInputError(
                f"workspace_bytes={granted} is too little for a chunk of one row, which takes "
                f"{sizes.least_workspace()} bytes here; pass at least that, or None for the default"
            )
        return chunk_rows
    longest = min(chunk_rows, max(1, sizes.rows))
    needed = sizes.bytes_of(longest, sizes.strip_bytes(workspace_bytes))
    if workspace_bytes is not None and needed > workspace_bytes:
        raise KepoInputError(
            f"chunk_rows={chunk_rows} takes {needed} bytes and workspace_bytes={workspace_bytes} "
            f"grants less; leave one of them out ({sizes.longest_chunk(workspace_bytes)} rows fit)"
        )
    return chunk_rows
