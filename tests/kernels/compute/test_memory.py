"""`workspace_bytes` is a promise: what the allocator hands out is measured, not computed."""

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from checks import device_of
from torch import Tensor

import kepo_kernels
from kepo_kernels import KepoInputError
from kepo_kernels.compute import sweep
from kepo_kernels.compute.chunks import Chunking, Sizes, chunking

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def allocations(call: Callable[[], object]) -> tuple[int, object]:
    """(peak bytes that torch's CPU allocator had handed out above the start, the result)."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = call()
    events = profile.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    assert changes, "the profiler saw no allocation"
    return peak, result


@dataclass(frozen=True)
class Configuration:
    """A random joint call: sizes, dtype, what trains, and how much memory is granted."""

    seed: int
    loss: str
    impl: str
    dtype: torch.dtype
    rows: int
    hidden: int
    teacher_hidden: int
    vocab: int
    lora_rank: int
    grad_tol: float
    trains: tuple[str, ...]
    share: float  # of the way from the least workspace to that of one chunk, logarithmically
    top_k: int  # of a teacher of tokens; 0: it has hidden states

    @classmethod
    def draw(cls, seed: int) -> "Configuration":
        pick = random.Random(seed)
        rank = pick.choice((0, 0, 4))
        trains = [("hidden", "lm_head"), ("hidden",), ("lm_head",)]
        trains += [("hidden", "lora"), ("hidden", "lm_head", "lora")] if rank else []
        return cls(
            seed=seed,
            loss=pick.choice(("gated_kd", "grpo", "kepo")),
            impl=pick.choice(("cpu", "torch")),
            dtype=pick.choice(FLOATS[:3] if pick.random() < 0.8 else FLOATS),
            rows=pick.randint(1, 96),
            hidden=pick.choice((8, 33, 128, 256)),
            teacher_hidden=pick.choice((16, 65, 192)),
            vocab=pick.randint(1000, 6000),
            lora_rank=rank,
            grad_tol=pick.choice((0.0, 0.0, 1e-3)),
            trains=pick.choice(trains),
            share=pick.random(),
            top_k=pick.choice((0, 0, 1, 128)),
        )

    @property
    def backend(self) -> str:
        return "torch" if self.dtype == torch.float64 else self.impl

    def chunking(self, **settings: object) -> Chunking:
        teacher_rows = 0 if self.loss == "grpo" else self.rows
        return chunking(
            self.rows,
            self.hidden,
            self.vocab,
            teacher_rows=teacher_rows,
            teacher_hidden_size=self.teacher_hidden,
            top_k=0 if self.loss == "grpo" else self.top_k,
            dtype=self.dtype,
            impl=self.backend,
            grad_tol=self.grad_tol,
            lora_rank=self.lora_rank,
            trains=self.trains,
            **settings,
        )

    def workspace(self) -> int:
        least = self.chunking(chunk_rows=1).least_workspace_bytes
        most = self.chunking(chunk_rows=self.rows).workspace_bytes
        return int(least * (max(1.0, most / least)) ** self.share)

    def call(self, **engine_settings: object) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """The forward pass, and the tensors whose gradients are wanted."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, trains: str = "") -> Tensor:
            x = torch.randn(*shape, generator=generator).to(self.dtype) / shape[-1] ** 0.5
            return x.requires_grad_(trains in self.trains)

        # Peaked, so that grad_tol finds columns to leave out.
        hidden = (30 * normal(self.rows, self.hidden).detach()).requires_grad_(
            "hidden" in self.trains
        )
        weight = normal(self.vocab, self.hidden, trains="lm_head")
        lora = None
        if self.lora_rank:
            a = normal(self.lora_rank, self.hidden, trains="lora")
            lora = kepo_kernels.LoRA(a, normal(self.vocab, self.lora_rank, trains="lora"), 0.5)
        head = kepo_kernels.Head(weight, lora=lora)
        leaves = [hidden, weight, *(lora[:2] if lora else ())]
        teacher = normal(self.rows, self.teacher_hidden), normal(self.vocab, self.teacher_hidden)
        if self.top_k:
            drawn = torch.randn(self.rows, self.vocab, generator=generator).log_softmax(-1)
            found = drawn.topk(self.top_k)
            teacher = kepo_kernels.TopK(found.indices, found.values), None
        targets = torch.randint(self.vocab, (self.rows,), generator=generator)
        policy = targets, torch.randn(self.rows, generator=generator)
        tensors = {
            "gated_kd": (hidden, head, *teacher),
            "grpo": (hidden, head, *policy),
            "kepo": (hidden, head, *policy, *teacher),
        }[self.loss]
        gate = {"gate": torch.ones(self.rows)} if self.loss == "kepo" else {}
        function = getattr(kepo_kernels, f"fused_{self.loss}_loss")
        settings = {"impl": self.backend, "grad_tol": self.grad_tol} | engine_settings

        def forward() -> Tensor:
            return function(*tensors, **gate, **settings)

        return forward, [x for x in leaves if x.requires_grad]


def gradient_bytes(leaves: list[Tensor]) -> tuple[int, int]:
    """(accumulators, what backward returns) of these tensors."""
    wide = [8 if x.dtype == torch.float64 else 4 for x in leaves]
    return (
        sum(x.numel() * size for x, size in zip(leaves, wide, strict=True)),
        sum(x.numel() * x.itemsize for x in leaves),
    )


def assert_within(configuration: Configuration, workspace: int) -> tuple[int, int]:
    """Forward and backward of the call stay within the workspace; (measured, counted) bytes."""
    forward, leaves = configuration.call(workspace_bytes=workspace)
    forward()  # imports, caches
    accumulators, returned = gradient_bytes(leaves)
    peak, loss = allocations(forward)
    above = peak - accumulators
    assert above <= workspace, f"forward took {above} bytes of {workspace}: {configuration}"
    peak, _ = allocations(lambda: torch.autograd.grad(loss, leaves))
    assert peak - returned <= workspace, f"backward: {configuration}"
    made = configuration.chunking(workspace_bytes=workspace)
    assert made.gradient_bytes == accumulators + returned
    assert made.workspace_bytes <= workspace
    return above, made.workspace_bytes


@pytest.mark.parametrize("seed", range(60))
def test_workspace_is_kept(seed, unpoisoned):
    configuration = Configuration.draw(seed)
    above, counted = assert_within(configuration, configuration.workspace())
    if above > 4 << 20:
        assert counted < 4 * above, "the count is so pessimistic that it wastes what was granted"


@pytest.mark.parametrize("seed", [1038, 1211, 1246])
def test_packed_heads_of_16_bits_are_counted(seed, unpoisoned):
    """Without a teacher's head, what oneDNN packs for dlogits @ head is most of a short chunk."""
    configuration = Configuration.draw(seed)
    assert configuration.top_k and configuration.dtype == torch.bfloat16
    assert_within(configuration, configuration.chunking(chunk_rows=1).least_workspace_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1600, 100))
def test_workspace_is_kept_many(first, unpoisoned):
    for seed in range(first, first + 100):
        configuration = Configuration.draw(seed)
        assert_within(configuration, configuration.workspace())


def test_a_broken_promise_is_noticed(unpoisoned, monkeypatch):
    """A workspace twice as large as it says is measured as such."""
    get = sweep._Buffers.get

    def twice(self, name: str, rows: int, columns: int) -> Tensor:
        self.kept.setdefault(f"spare {name}", torch.ones(self.rows, columns, dtype=self.dtype))
        return get(self, name, rows, columns)

    monkeypatch.setattr(sweep._Buffers, "get", twice)
    configuration = Configuration.draw(0)
    with pytest.raises(AssertionError, match="forward took"):
        for seed in range(10):
            configuration = Configuration.draw(seed)
            workspace = configuration.chunking(chunk_rows=configuration.rows).workspace_bytes
            assert_within(configuration, workspace)


@pytest.mark.parametrize("seed", range(8))
def test_least_workspace(seed):
    """The error names the smallest workspace that works, and it does work."""
    configuration = Configuration.draw(seed)
    least = configuration.chunking(chunk_rows=1).least_workspace_bytes
    forward, leaves = configuration.call(workspace_bytes=least - 1)
    with pytest.raises(KepoInputError, match=rf"workspace_bytes={least - 1}.* {least} bytes"):
        forward()
    forward, leaves = configuration.call(workspace_bytes=least)
    gradients = torch.autograd.grad(forward(), leaves)
    assert all(x.isfinite().all() for x in gradients)


def test_chunking_explains_itself():
    big = {"teacher_rows": 4096, "teacher_hidden_size": 5120, "dtype": torch.bfloat16}
    big["logits_dtype"] = torch.float32  # on every processor
    made = chunking(8192, 2048, 151936, **big, workspace_bytes=1 << 30, impl="torch")
    assert made.chunk_rows * 2 * 151936 * 4 <= made.workspace_bytes <= 1 << 30
    assert made.chunks == 2 * -(-4096 // made.chunk_rows)
    assert made.gradient_bytes == (8192 + 151936) * 2048 * (4 + 2)
    one = chunking(8192, 2048, 151936, **big, chunk_rows=512, impl="torch")
    assert one.chunk_rows == 512 and one.chunks == 16
    # Every chunk of a large head costs a pass over its gradient: the default has 256 rows there.
    assert chunking(8192, 2048, 151936, dtype=torch.bfloat16, impl="torch").chunk_rows >= 256


def test_chunks_waste_little_of_a_gpu():
    """132 multiprocessors, 2048 wide: 16 x 8 tiles fill one wave, 17 x 8 begin a second."""
    sizes = Sizes(rows=8192, hidden_size=2048, vocab=151936, multiprocessors=132)
    assert sizes.fewest_waves(2048) == 2048
    assert sizes.fewest_waves(2200) == 2048  # 4 chunks either way
    assert sizes.fewest_waves(3000) == 2048  # 3 chunks of 2 waves against 4 of one
    assert sizes.fewest_waves(4224) == 4096
    both = replace(sizes, teacher_rows=4096)
    assert both.fewest_waves(3000) == 2048
    assert sizes.fewest_waves(1) == 1 and replace(sizes, rows=0).fewest_waves(7) == 7
    assert replace(sizes, multiprocessors=0).fewest_waves(3000) == 3000


def test_chunking_refuses_a_contradiction():
    with pytest.raises(KepoInputError, match=r"chunk_rows=100 takes .* \(\d+ rows fit\)"):
        chunking(100, 16, 1000, chunk_rows=100, workspace_bytes=200_000, impl="cpu")


RESIDENT = """
import torch, kepo_kernels
from kepo_kernels.compute import pages
from pathlib import Path

def status(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return int(line.split()[1]) << 10

torch.manual_seed(0)
hidden = torch.randn(512, 256, dtype=torch.bfloat16, requires_grad=True)
head = torch.randn(40000, 256, dtype=torch.bfloat16, requires_grad=True)
targets, advantages = torch.randint(40000, (512,)), torch.randn(512)

def step(rows):
    gate = torch.ones(rows)
    part = hidden[:rows], head, targets[:rows], advantages[:rows], hidden[:rows].detach(), head
    engine = {"workspace_bytes": {workspace}, "logits_dtype": torch.float32}
    loss = kepo_kernels.fused_kepo_loss(*part, gate=gate, **engine)
    return torch.autograd.grad(loss, (hidden, head))

step(2)
pages.release()
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = status("VmRSS")
gradients = step(512)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workspace_is_kept_by_the_process():
    """The largest tensors come from the system, past torch's allocator: here the kernel counts."""
    workspace, slack = 48 << 20, 16 << 20  # the matrix library has buffers of its own
    code = RESIDENT.replace("{workspace}", str(workspace))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    dtypes = {"dtype": torch.bfloat16, "logits_dtype": torch.float32}
    made = chunking(512, 256, 40000, teacher_rows=512, workspace_bytes=workspace, **dtypes)
    above = int(run.stdout) - made.gradient_bytes
    assert made.chunks > 2 and workspace // 4 < above < workspace + slack


SMALL = """
import torch, kepo_kernels
from pathlib import Path

def status(name):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if name in x)
    return int(line.split()[1]) << 10

torch.manual_seed(0)
states = [torch.randn(2048, 256, requires_grad=True), torch.randn(2048, 256)]
heads = [torch.randn(32000, 256, requires_grad=True), torch.randn(32000, 256)]
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
student, teacher = zip(states, heads)
kepo_kernels.fused_gated_kd_loss(*student, *teacher).backward()
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_small_call_holds_little():
    """The first call of a fresh process by its defaults: what it imports and the matrix library's
    buffers included. Its gradients are 33 MiB; whole matrices would take 1.5 GiB."""
    run = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 96 << 20


def test_the_default_goes_by_the_size_of_the_call():
    """Two fifths of inputs and gradients, and at least 128 rows and 32 MiB; large calls as ever."""
    teacher = {"teacher_rows": 2048, "dtype": torch.float32, "impl": "torch"}
    small = chunking(2048, 256, 32000, **teacher)
    held = 3 * (2048 + 32000) * 256 * 4
    assert 0.3 * held < small.workspace_bytes < 0.5 * held
    tiny = chunking(8192, 16, 1000, impl="torch")
    assert tiny.workspace_bytes < 32 << 20 and tiny.chunks <= 4
    narrow = chunking(2048, 16, 151936, impl="torch")
    assert 128 <= narrow.chunk_rows < 256
    large = chunking(2048, 1024, 151936, teacher_rows=2048, impl="torch")
    assert large.chunk_rows == 256
    medium = chunking(1024, 1024, 32768, teacher_rows=1024, impl="torch")
    assert medium.workspace_bytes > 120 << 20 and medium.chunks == 2


@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_no_gradient_no_accumulator(impl, unpoisoned):
    """Without gradients nothing of the size of the head is allocated."""
    hidden, head = torch.randn(8, 64), torch.randn(3000, 64, requires_grad=True)
    targets = torch.randint(3000, (8,))
    assert device_of(impl) == "cpu"

    def logprobs() -> Tensor:
        with torch.no_grad():
            return kepo_kernels.fused_linear_logprobs(hidden, head, targets, impl=impl)

    logprobs()
    peak, _ = allocations(logprobs)
    assert peak < head.numel() * 4
