"""`lm_head_weight`: the right matrix, whole, whose gradients are those of a single process."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import (
    LAYOUTS,
    Case,
    Toy,
    build,
    held,
    run_pair,
    steps,
    take_step,
    whole_weights,
)

from kepo_kernels import KepoInputError, fused_grpo_loss, fused_linear_logprobs, lm_head_weight

TOLERANCE = 1e-6
IDS = torch.arange(8).reshape(2, 4)
ARGS = IDS + 1, torch.tensor([1.0, -2.0])  # targets, advantages
SHARDED = [layout for layout in LAYOUTS if layout != "ddp"]


def refusal(model: object) -> str:
    with pytest.raises(KepoInputError) as error, lm_head_weight(model):
        pass
    assert str(error.value).startswith("lm_head_weight: ")
    return str(error.value)


def distance(weights: dict, expected: dict) -> dict[str, float]:
    """Largest error of each weight over its largest value."""
    assert weights.keys() == expected.keys()
    return {
        name: float((weights[name] - x).abs().max() / x.abs().max()) for name, x in expected.items()
    }


@pytest.fixture
def alone(tmp_path):
    """A process group of one: sharding, gathering and their hooks run as among many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --------------------------------------------------------------------------------- finding the head


def test_plain_model():
    model = Toy(tied=False)
    with lm_head_weight(model) as weight:
        assert weight is model.lm_head.weight


def test_output_embeddings_come_before_an_attribute():
    model = Toy(tied=False)
    model.get_output_embeddings = lambda: model.embed
    with lm_head_weight(model) as weight:
        assert weight is model.embed.weight
    model.get_output_embeddings = lambda: None
    with lm_head_weight(model) as weight:
        assert weight is model.lm_head.weight


def test_wrappers_are_looked_into():
    wrapper, model = nn.Module(), Toy(tied=False)
    wrapper.module = nn.Module()
    wrapper.module.module = model
    with lm_head_weight(wrapper) as weight:
        assert weight is model.lm_head.weight


def test_gathered_zero3_head_is_taken():
    model = Toy(tied=False)
    model.lm_head.weight.ds_id = 3
    with lm_head_weight(model) as weight:
        assert weight is model.lm_head.weight


def with_head(head: object) -> nn.Module:
    model = nn.Module()
    model.lm_head = head
    return model


def with_weight(weight: torch.Tensor, **attributes: object) -> nn.Module:
    head = nn.Module()
    head.weight = nn.Parameter(weight, requires_grad=False)
    head.weight.__dict__.update(attributes)
    return with_head(head)


def in_fsdp1() -> nn.Module:
    """FSDP1 wants an accelerator; only the name of its class is looked at."""
    wrapper = type("FullyShardedDataParallel", (nn.Module,), {})()
    wrapper.module = Toy(tied=False)
    return wrapper


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (None, ["model is NoneType", "torch.nn.Module"]),
        (SimpleNamespace(lm_head=nn.Linear(2, 3)), ["model is SimpleNamespace"]),
        (nn.Linear(2, 3), ["model Linear has no LM head", "ForCausalLM"]),
        (with_head(None), ["has no LM head"]),
        (with_head(nn.Identity()), ["the LM head (Identity) has no weight"]),
        (with_weight(torch.ones(4)), ["lm_head.weight [4] float32", "(V, H)"]),
        (with_weight(torch.ones(4, 2, dtype=torch.uint8)), ["[4, 2] uint8", "dequantized"]),
        (with_weight(torch.ones(0), ds_id=3), ["ZeRO-3", "GatheredParameters([lm_head.weight])"]),
        (in_fsdp1(), ["FSDP1", "fully_shard", "inside the forward"]),
    ],
)
def test_refused_by_name(model, says):
    message = refusal(model)
    for words in says:
        assert words in message, f"{words!r} is not in {message!r}"


# --------------------------------------------------------------------------------------------- PEFT


def causal_lm(tied: bool) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2)
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=tied, **sizes, **heads)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("what", ["body", "modules_to_save", "disabled"])
def test_weight_gives_the_logits_of_a_peft_model(what):
    peft = pytest.importorskip("peft")
    saved = None if what == "body" else ["lm_head"]
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved)
    model = peft.get_peft_model(causal_lm(tied=False), config)
    if saved:  # the copy has been trained
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    if what == "disabled":
        model.base_model.disable_adapter_layers()
    out = model(IDS, output_hidden_states=True)
    with lm_head_weight(model) as weight:
        torch.testing.assert_close(out.hidden_states[-1] @ weight.T, out.logits)
        assert weight.requires_grad == (what == "modules_to_save")


@pytest.mark.parametrize(
    ("tied", "settings"),
    [
        (False, {"target_modules": ["q_proj", "lm_head"]}),
        (True, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    ],
)
def test_adapted_heads_are_refused(tied, settings):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(causal_lm(tied), peft.LoraConfig(**settings))
    message = refusal(model)
    assert "PEFT has adapted the LM head (peft.tuners." in message or "peft.utils" in message
    assert "FusedHead" in message and "modules_to_save" in message


# ------------------------------------------------------------------------- sharded, in this process


def assert_gradients_agree(model: nn.Module, plain: nn.Module) -> None:
    grads = [
        {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        for one in (model, plain)
    ]
    errors = distance({name: x.full_tensor() for name, x in grads[0].items()}, grads[1])
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("backward", ["inside", "after"])
@pytest.mark.parametrize("layout", SHARDED)
def test_sharded_again_on_exit(alone, layout, backward, trained):
    plain = Toy(tied=False)
    plain.lm_head.requires_grad_(trained)
    model = held(copy.deepcopy(plain), layout)
    for one in (plain, model):
        hidden = one(IDS)
        before = type(one.lm_head.weight)
        with lm_head_weight(one) as weight:
            assert type(weight) is nn.Parameter and torch.equal(weight, plain.lm_head.weight)
            loss = fused_grpo_loss(hidden, weight, *ARGS)
            if backward == "inside":
                loss.backward()
        if backward == "after":
            assert type(one.lm_head.weight) is before
            loss.backward()
    assert "DTensor" in str(type(model.lm_head.weight))
    assert (plain.lm_head.weight.grad is not None) == trained
    assert_gradients_agree(model, plain)


def test_frozen_teacher_in_mixed_precision(alone):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = Toy(tied=False).requires_grad_(False)
    expected = model.lm_head.weight.bfloat16()
    fully_shard(model.lm_head, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad(), lm_head_weight(model) as weight:
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, expected)
        with lm_head_weight(model) as again:
            assert again is weight
        assert torch.equal(weight, expected)  # the inner block did not gather it, nor let it go
    assert "DTensor" in str(type(model.lm_head.weight))


def test_sharded_again_after_an_error(alone):
    model = held(Toy(tied=False), "own")
    with pytest.raises(ZeroDivisionError), lm_head_weight(model):
        raise ZeroDivisionError
    assert "DTensor" in str(type(model.lm_head.weight))


def test_micro_batches_add_up(alone):
    """Gradients wait for the last backward where synchronisation is off before it."""
    plain = Toy(tied=False)
    model = held(copy.deepcopy(plain), "own")
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        for one in (plain, model):
            hidden = one(IDS[last : last + 1])
            with lm_head_weight(one) as weight:
                loss = fused_grpo_loss(hidden, weight, *(x[last : last + 1] for x in ARGS))
            loss.backward()
    assert_gradients_agree(model, plain)


def test_log_probabilities_want_their_backward_inside(alone):
    """They read the weight again; after the block that is an error, and no wrong number."""
    model = held(Toy(tied=False), "own")
    hidden = model(IDS)
    with lm_head_weight(model) as weight:
        fused_linear_logprobs(hidden, weight, ARGS[0]).sum().backward()
    assert model.lm_head.weight.grad.full_tensor().any()
    hidden = model(IDS)
    with lm_head_weight(model) as weight:
        logprobs = fused_linear_logprobs(hidden, weight, ARGS[0])
    with pytest.raises(RuntimeError, match="storage of size 0"):
        logprobs.sum().backward()


def test_tensor_parallel_heads_are_refused(alone):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(Toy(tied=False), mesh["tp"], {"lm_head": ColwiseParallel()})
    assert "no module of model was given to fully_shard" in refusal(model)
    fully_shard(model, mesh=mesh["dp"])
    assert "still a DTensor [37, 16]" in refusal(model)


def test_losses_refuse_shards_by_name(alone):
    """The very parameter that FSDP2 leaves on a module."""
    model = held(Toy(tied=False), "own")
    hidden = model(IDS).detach()
    with pytest.raises(KepoInputError, match=r"lm_head is a sharded DTensor.*lm_head_weight"):
        fused_grpo_loss(hidden, model.lm_head.weight, *ARGS)


# --------------------------------------------------------------------------------- in two processes

TOYS = [
    Case("toy", tied, layout, loss, backward)
    for tied in (False, True)
    for layout in LAYOUTS
    for loss in ("grpo", "kd")
    for backward in ("after", "inside", "forward")
]
CLOSED = [Case("toy", False, layout, "kd_closed") for layout in LAYOUTS]
VLMS = [
    Case("vlm", tied, layout, loss, backward)
    for tied in (False, True)
    for layout in LAYOUTS
    for loss, backward in (("grpo", "after"), ("kd", "inside"))
]
MISTAKES = [
    Case(arch, loss=loss, read="full_tensor") for arch in ("toy", "vlm") for loss in ("grpo", "kd")
]


@pytest.mark.slow
@pytest.mark.processes
def test_one_step_in_two_processes_is_that_of_one(tmp_path):
    """Half of the batch each, over every layout; `full_tensor()` is the control that must fail."""
    pytest.importorskip("transformers")
    results = run_pair(steps, tmp_path, TOYS + CLOSED + VLMS + MISTAKES)
    expected = {}
    for case in results[0]:
        single = Case(case.arch, case.tied, "plain", case.loss)
        if single not in expected:
            expected[single] = whole_weights(take_step(single))
            start = distance(whole_weights(build(case.arch, case.tied, 0)), expected[single])
            assert min(start.values()) > 10 * TOLERANCE, "a step that moves nothing shows nothing"
        for weights in (process[case] for process in results):
            errors = distance(weights, expected[single])
            if case.read == "full_tensor":  # the head only, and by a lot: nothing else would tell
                assert errors.pop("lm_head.weight") > 1e-3, case
            assert max(errors.values()) <= TOLERANCE, (case, max(errors, key=errors.get), errors)
