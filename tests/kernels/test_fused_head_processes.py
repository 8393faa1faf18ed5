"""`FusedHead` in two processes: the gradients of a single one, in every layout of a model."""

from importlib.util import find_spec

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch
import torch.distributed as dist
from fused_in_two import DDP, LAYOUTS, Case, take, take_all
from tiny_heads import batch, build, error
from two_processes import run_pair

from kepo_kernels import FusedHead, KepoInputError

TOLERANCE = 1e-6
WHOLE = [
    Case(kind, layout, loss)
    for kind in ("untied", "tied", "lora", "copy")
    for layout in LAYOUTS
    for loss in ("logprobs", "kepo")
]
OTHERS = [Case(kind, layout) for kind in ("bias", "softcap") for layout in LAYOUTS]
VLM = [Case(kind, layout) for kind in ("vlm", "vlm, tied") for layout in LAYOUTS]
LATER = [Case(kind, x, first="wrap") for kind in ("untied", "lora", "copy") for x in ("ddp", "own")]
MICRO = [Case("tied", layout, loss, micro=2) for layout in LAYOUTS for loss in ("logprobs", "kepo")]
LORA = [Case("lora", "leaves", "kepo")]
if find_spec("accelerate"):
    VLM += [Case(kind, "accelerate") for kind in ("vlm", "vlm, tied")]
    LATER += [Case(kind, "accelerate", "kepo") for kind in ("untied", "tied", "lora", "copy")]
# Nothing below the head is trained: its gradient is the only one that can bring hooks about.
LORA += [Case("lora, softcap", layout) for layout in (*LAYOUTS, "leaves")]

# What goes wrong if a call leaves a forward out: a number that tells it, or the words of an error.
SHARDED = "FusedHead: the head's weight is sharded inside of its forward"
MISTAKES = {
    **{Case("untied", layout, way="bypass"): 1e-2 for layout in DDP},
    **{Case("tied", layout, way="no_hooks"): SHARDED for layout in ("own", "one_resharded")},
    Case("untied", "ddp_unused", way="outside"): "Expected to mark a variable ready only once",
    **{Case("untied", f"{x}_resharded", way="outside"): SHARDED for x in ("one", "layers")},
    # The head is in a group whose forward has ended, and no state has a gradient to bring its
    # hooks about: silently wrong. It is why the loss goes through model(..., loss=).
    **{Case("lora, softcap", x, way="outside"): 1e-2 for x in ("one", "layers", "norm_and_head")},
}


@pytest.mark.slow
@pytest.mark.processes
def test_gradients_in_two_processes_are_those_of_one(tmp_path):
    right = WHOLE + OTHERS + VLM + LATER + MICRO + LORA
    results = run_pair(take_all, tmp_path, [*right, *MISTAKES])
    alone = {}
    for case in results[0]:
        single = Case(case.kind, "plain", case.loss)
        expected = alone.setdefault(single, None) or take(single)
        alone[single] = expected
        for found in (process[case] for process in results):
            mistake = MISTAKES.get(case)
            if isinstance(mistake, str):
                assert isinstance(found, str) and mistake in found, (case, found)
                continue
            assert isinstance(found, dict), (case, found)
            # Biases of attention have gradients that cancel, of the VLM as of any.
            off = error(found, expected, least=1e-2 if case.kind.startswith("vlm") else 0.0)
            assert off > mistake if mistake else off <= TOLERANCE, (case, off)


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_mixed_precision_of_fsdp2(process_group):
    """The loss is given what the head would multiply: states and weight in `param_dtype`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, x = build("untied"), batch()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (model.lm_head, model):
        fully_shard(part, mp_policy=policy)
    FusedHead.install(model)
    seen = model(input_ids=x["ids"], loss=lambda states, head: (states.dtype, head.weight.dtype))
    assert seen == (torch.bfloat16, torch.bfloat16)
    logits = model(input_ids=x["ids"]).logits
    ours = model(input_ids=x["ids"], loss=lambda states, head: states @ head.weight.T)
    assert torch.equal(logits, ours)


class Around(torch.nn.Module):
    """A model whose head is in a part of it."""

    def __init__(self, model):
        super().__init__()
        self.part = model

    def get_output_embeddings(self):
        return self.part.lm_head

    def forward(self, input_ids):
        return self.part(input_ids).logits


def test_a_sharded_part_around_the_head_is_refused(process_group):
    """Its backward would read weights that have been let go of."""
    from torch.distributed.fsdp import fully_shard

    ids = batch()["ids"]
    for sharded in (False, True):
        model = Around(build("untied"))
        for part in (model.part.lm_head, *[model.part] * sharded, model):
            fully_shard(part)
        FusedHead.install(model)
        if sharded:
            with pytest.raises(
                KepoInputError, match=r"^FusedHead: the LM head is part of part, wh"
            ):
                model(ids, loss=lambda states, head: states.sum())
        else:
            model(ids, loss=lambda states, head: states.sum()).backward()


# ---- ZeRO-3 ----

ZERO3 = [
    Case(kind, "zero3", loss)
    for kind in ("untied", "tied", "lora", "copy", "lora, softcap")
    for loss in ("logprobs", "kepo")
]
ZERO3_MISTAKE = Case("untied", "zero3", way="no_hooks")


def take_all_zero3(rank, cases):
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2", "CROSS_SIZE": "1"}
    return take_all(rank, cases)


@pytest.mark.slow
@pytest.mark.processes
def test_gradients_of_zero3_are_those_of_one_process(tmp_path, monkeypatch):
    """With the real DeepSpeed, on processors."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    results = run_pair(take_all_zero3, tmp_path, [*ZERO3, ZERO3_MISTAKE])
    for case in ZERO3:
        expected = take(Case(case.kind, "plain", case.loss))
        for found in (process[case] for process in results):
            assert isinstance(found, dict), (case, found)
            assert error(found, expected) <= TOLERANCE, case
    assert all(SHARDED in process[ZERO3_MISTAKE] for process in results)
