"""`FusedHead`: a loss inside of the head's forward is that of the model's own whole logits."""

import copy
import inspect

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
import two_processes
from tiny_heads import KINDS, batch, build, error, gradients, plain_numbers

from kepo_kernels import (
    FusedHead,
    KepoInputError,
    fused_kepo_loss,
    fused_linear_logprobs,
    fused_linear_loss,
    head_of,
    reference,
)

TOLERANCE = 1e-6


def numbers_upstream(hidden, head, x):
    """Reads the weight again in backward."""
    numbers = fused_linear_logprobs(hidden, head, x["targets"], return_entropy=True)
    return sum((each * u).sum() for each, u in zip(numbers, x["upstream"], strict=True))


def loss_in_forward(hidden, head, x):
    """The same number, whose gradients are formed in forward."""

    def token_loss(stats, rows):
        a, b = x["upstream"].flatten(1)[:, rows]
        return a * stats.logprobs + b * stats.entropy

    return fused_linear_loss(hidden, head, x["targets"], token_loss)


LOSSES = {"logprobs": numbers_upstream, "loss": loss_in_forward}


def plain(model, x):
    numbers = plain_numbers(model(input_ids=x["ids"]).logits, x["targets"])
    return sum((each * u).sum() for each, u in zip(numbers, x["upstream"], strict=True))


def by_model(model, loss, x):
    return model(input_ids=x["ids"], loss=lambda hidden, head: loss(hidden, head, x))


def by_head(model, loss, x):
    """As a forward of one's own would: backbone and head called apart."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(input_ids=x["ids"]).last_hidden_state
    return inner.lm_head(hidden, loss=lambda hidden, head: loss(hidden, head, x))


def by_handle(model, loss, x):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(input_ids=x["ids"]).last_hidden_state
    return FusedHead(inner)(hidden, lambda hidden, head: loss(hidden, head, x))


WAYS = {"model": by_model, "head": by_head, "handle": by_handle}


def value_and_gradients(model, compute):
    model.zero_grad()
    value = compute()
    value.backward()
    return {"value": value.detach()} | gradients(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_pytorch_on_whole_logits(kind, loss, way):
    model, x = build(kind), batch()
    expected = value_and_gradients(model, lambda: plain(model, x))
    FusedHead.install(model)
    found = value_and_gradients(model, lambda: WAYS[way](model, LOSSES[loss], x))
    assert error(found, expected) <= TOLERANCE


# ---------------------------------------------------------------------- what the loss is given


def test_the_joint_loss_has_two_heads():
    """A teacher's states and head are arguments of the function, as any other tensor."""
    model, teacher, x = build("softcap"), build("scale", seed=5).requires_grad_(False), batch()
    settings = dict(
        gate=torch.tensor([1.0, 0.5, 0.0, 0.7]),
        policy_weights=x["weights"],
        distill_weights=x["weights"],
        beta=0.3,
    )
    for one in (model, teacher):
        FusedHead.install(one)
    hidden = teacher(input_ids=x["ids"], loss=lambda hidden, head: hidden)
    assert torch.equal(hidden, teacher.model(input_ids=x["ids"]).last_hidden_state)
    advantages = x["upstream"][0, :, 0]

    def joint(compute):
        def loss(states, head):
            both = states, head, x["targets"], advantages, hidden, head_of(teacher)
            return compute(*both, **settings)

        return loss

    def expected():
        states = model.model(input_ids=x["ids"]).last_hidden_state
        return joint(reference.kepo_loss)(states, head_of(model))

    oracle = value_and_gradients(model, expected)
    found = value_and_gradients(
        model, lambda: model(input_ids=x["ids"], loss=joint(fused_kepo_loss))
    )
    assert error(found, oracle) <= 5 * TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
def test_pictures_go_the_way_they_go(tied):
    model = two_processes.build("vlm", tied, seed=0)
    inputs, x = two_processes.inputs_of(model), batch()
    inputs["pixel_values"] = inputs["pixel_values"].flatten(0, 1)

    def expected():
        numbers = plain_numbers(model(**inputs).logits, x["targets"])
        return sum((each * u).sum() for each, u in zip(numbers, x["upstream"], strict=True))

    oracle = value_and_gradients(model, expected)
    assert any("visual" in name for name in oracle)
    FusedHead.install(model)
    found = value_and_gradients(
        model, lambda: model(**inputs, loss=lambda h, head: numbers_upstream(h, head, x))
    )
    assert error(found, oracle, least=1e-2) <= TOLERANCE


def test_it_returns_what_the_function_returns():
    model, x = build("untied"), batch()
    FusedHead.install(model)
    what = {"any": (1, "thing")}
    assert model(x["ids"], loss=lambda hidden, head: what) is what
    assert model.lm_head(torch.ones(1, 32), loss=lambda hidden, head: what) is what


@pytest.mark.parametrize("keep", [2, torch.tensor([1, 4])])
def test_logits_to_keep_cuts_the_states_as_it_cuts_logits(keep):
    model, x = build("untied"), batch()
    logits = model(x["ids"], logits_to_keep=keep).logits
    FusedHead.install(model)

    def project(hidden, head):
        return hidden @ head.weight.T

    assert torch.equal(model(x["ids"], logits_to_keep=keep, loss=project), logits)


# ------------------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_call_is_untouched(kind):
    model, x = build(kind), batch()
    sample = dict(input_ids=x["ids"], max_new_tokens=3, do_sample=False)

    def everything():
        out = model(input_ids=x["ids"], labels=x["targets"])
        kept = model(input_ids=x["ids"], logits_to_keep=1).logits
        return [out.logits, out.loss, kept, model.generate(**sample)]

    before = [everything(), model.state_dict(), inspect.signature(model.forward)]
    handle = FusedHead.install(model)
    for after in (everything(), handle.remove() or everything()):
        assert all(torch.equal(a, b) for a, b in zip(after, before[0], strict=True))
    FusedHead.install(model)
    state = model.state_dict()
    assert list(state) == list(before[1]) and all(
        torch.equal(state[k], before[1][k]) for k in state
    )
    assert inspect.signature(model.forward) == before[2]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    tied = inner.get_input_embeddings().weight is getattr(inner.lm_head, "weight", None)
    assert tied == inner.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["tied", "lora", "copy"])
def test_it_is_removed_without_a_trace(kind):
    model = build(kind)
    before = [dict(module.__dict__) for module in model.modules()]
    FusedHead.install(model)
    FusedHead.install(model)(torch.ones(1, 32), lambda hidden, head: None)
    FusedHead.install(model).remove()
    assert [list(module.__dict__) for module in model.modules()] == [list(x) for x in before]


def test_a_forward_of_another_hand_is_kept_and_given_back():
    """As TRL's cast of a head to fp32 is one: what it computes for plain calls stays."""
    model, x = build("untied"), batch()
    model.lm_head.forward = lambda hidden: (
        2 * torch.nn.functional.linear(hidden, model.lm_head.weight)
    )
    theirs, logits = model.lm_head.forward, model(x["ids"]).logits
    handle = FusedHead.install(model)
    assert torch.equal(model(x["ids"]).logits, logits)
    with pytest.raises(
        KepoInputError, match=r"^FusedHead: the forward of the LM head has been rep"
    ):
        by_model(model, numbers_upstream, x)
    handle.remove()
    assert model.lm_head.forward is theirs

    handle = FusedHead.install(model)
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(KepoInputError, match=r"^FusedHead\.remove: the forward of Llama"):
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_is_a_model_of_its_own(kind):
    model, x = build(kind), batch()
    FusedHead.install(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    expected = value_and_gradients(other, lambda: plain(other, x))
    found = value_and_gradients(other, lambda: by_model(other, numbers_upstream, x))
    assert error(found, expected) <= TOLERANCE
    assert not gradients(model)


def test_accelerate_wraps_and_unwraps_it():
    """Its mixed precision replaces the model's forward, and takes its own away again."""
    accelerate = pytest.importorskip("accelerate")
    model, x = build("untied"), batch()
    handle = FusedHead.install(model)
    prepared = prepared_for_bf16(accelerate, model)
    with torch.no_grad():
        rounded = float(by_model(prepared, numbers_upstream, x))
        assert rounded == pytest.approx(float(plain(prepared, x)), abs=0.2)
        with pytest.raises(KepoInputError, match="has been replaced since"):
            handle.remove()
        bare = accelerate.utils.extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
        exact = float(by_model(bare, numbers_upstream, x))
        handle.remove()
        assert bare is model and exact == pytest.approx(float(plain(model, x)), rel=1e-5)
    assert rounded != exact


def prepared_for_bf16(accelerate, model):
    """The model as accelerate wraps it; its settings are the process's, and those of trainers in
    other tests stay in it."""
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        return accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("first", ["install", "prepare"])
def test_accelerates_autocast_reaches_the_loss_in_either_order(first):
    accelerate = pytest.importorskip("accelerate")
    model, x = build("untied"), batch()
    exact = value_and_gradients(model, lambda: plain(model, x))
    if first == "install":
        FusedHead.install(model)
    model = prepared_for_bf16(accelerate, model)
    FusedHead.install(model)
    assert model(x["ids"], loss=lambda hidden, head: torch.is_autocast_enabled("cpu"))
    theirs = value_and_gradients(model, lambda: plain(model, x))
    ours = value_and_gradients(model, lambda: by_model(model, numbers_upstream, x))
    assert error(ours, exact) > 1e-4 and error(ours, theirs) <= 2 * error(theirs, exact)


@pytest.mark.parametrize("first", ["install", "offload"])
@pytest.mark.parametrize("kind", ["untied", "bias", "lora"])
def test_a_head_that_accelerate_has_offloaded(kind, first):
    """Its weights are there inside of a forward that accelerate has put around the layer's."""
    accelerate = pytest.importorskip("accelerate")
    model, x = build(kind), batch()
    with torch.no_grad():
        expected = float(plain(model, x))
    if first == "install":
        FusedHead.install(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    handle = FusedHead.install(model)
    with torch.no_grad():
        assert float(by_model(model, numbers_upstream, x)) == pytest.approx(expected, rel=1e-6)
        assert float(plain(model, x)) == pytest.approx(expected, rel=1e-6)
        with pytest.raises(KepoInputError, match=r"lm_head.weight is on meta, as accelerate"):
            head_of(model)
        handle.remove()
        assert float(plain(model, x)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(TypeError):
        by_head(model, numbers_upstream, x)


# ------------------------------------------------------------------------------------------ PEFT


def lora_model(**settings):
    settings = dict(r=4, target_modules=["lm_head"]) | settings
    model = peft.get_peft_model(build("untied"), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def assert_equals_plain(model, x, way=by_model):
    expected = value_and_gradients(model, lambda: plain(model, x))
    found = value_and_gradients(model, lambda: way(model, numbers_upstream, x))
    assert error(found, expected) <= TOLERANCE


def test_adapters_are_what_they_are_at_the_call():
    """Two at once, one of them, none, merged: looked up as PEFT's own forward does."""
    model, x = lora_model(lora_alpha=6), batch()
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["lm_head"]))
    layer = model.get_base_model().lm_head
    for parameter in layer.lora_B.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.double()  # in fp32 the two orders of adding three products differ by more
    FusedHead.install(model)
    for names in (["default", "second"], ["second"], ["default"]):
        layer.set_adapter(names)
        assert_equals_plain(model, x)

    def numbers():
        with torch.no_grad():
            ours = by_model(model, numbers_upstream, x)
            return float(ours), float(plain(model, x))

    with_adapter = numbers()
    with model.disable_adapter():
        without = numbers()
    model.merge_adapter()
    merged = numbers()
    for ours, theirs in (with_adapter, without, merged):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert with_adapter[1] == pytest.approx(merged[1], rel=1e-5)
    assert abs(with_adapter[1] - without[1]) > 1e-3
    with model.disable_adapter():  # PEFT unmerges then
        assert numbers()[0] == pytest.approx(without[1], rel=1e-5)


@pytest.mark.parametrize("kind", ["lora, softcap", "copy"])
def test_an_adapter_is_unloaded(kind):
    """What was a part of the head is then all of it, with the model's softcap."""
    model, x = build(kind), batch()
    FusedHead.install(model)
    with torch.no_grad():
        before = float(by_model(model, numbers_upstream, x))
        model = model.merge_and_unload()
        assert float(by_model(model, numbers_upstream, x)) == pytest.approx(before, rel=1e-5)
        assert float(by_head(model, numbers_upstream, x)) == pytest.approx(before, rel=1e-5)
    FusedHead.install(model).remove()
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_peft_after_the_head_was_installed(saved):
    model, x = build("untied"), batch()
    FusedHead.install(model)
    target = ["q_proj"] if saved else ["lm_head"]
    settings = peft.LoraConfig(r=4, target_modules=target, modules_to_save=saved)
    model = peft.get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if not saved:  # nobody has told the new layer of it yet; no number comes out
        with pytest.raises(Exception, match="scalar outputs"):
            by_head(model, numbers_upstream, x).backward()
    assert_equals_plain(model, x)
    assert_equals_plain(model, x, by_head)


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(use_dora=True), "is a variant of LoRA"),
        (dict(lora_bias=True), "has a lora_bias"),
        (dict(lora_dropout=0.1), r"has lora_dropout=0\.1"),
        (dict(target_modules=["q_proj"], trainable_token_indices={"lm_head": [1]}), "is no LoRA"),
    ],
)
def test_what_no_two_matrices_compute_is_refused(settings, says):
    model = lora_model(**settings).train()
    for call in (FusedHead.install, head_of):
        with pytest.raises(KepoInputError, match=f"^head_of: PEFT has adapted .*{says}"):
            call(model)


def test_dropout_of_a_head_matters_in_training_alone():
    model = lora_model(lora_dropout=0.1).eval()
    FusedHead.install(model)
    assert_equals_plain(model, batch())
    with pytest.raises(KepoInputError, match="lora_dropout"):
        by_model(model.train(), numbers_upstream, batch())


# -------------------------------------------------------------------------------- torch's own modes


def test_gradient_checkpointing_of_the_backbone():
    model, x = build("tied").train(), batch()
    FusedHead.install(model)
    without = value_and_gradients(model, lambda: by_model(model, numbers_upstream, x))
    model.gradient_checkpointing_enable()
    found = value_and_gradients(model, lambda: by_model(model, numbers_upstream, x))
    assert error(found, without) <= TOLERANCE


def test_autocast():
    """Products in bf16 as for plain calls; what is left out of the head is what autocast rounds."""
    model, x = build("untied"), batch()
    FusedHead.install(model)
    exact = value_and_gradients(model, lambda: plain(model, x))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = value_and_gradients(model, lambda: plain(model, x))
        ours = value_and_gradients(model, lambda: by_model(model, numbers_upstream, x))
        seen = model(x["ids"], loss=lambda hidden, head: (hidden.dtype, head.weight.dtype))
    assert seen == (torch.float32, torch.float32)  # casts are the loss's, as they are the layer's
    assert error(ours, theirs) <= 2 * error(theirs, exact)


def test_states_in_bf16_and_a_head_in_fp32():
    """TRL's `cast_lm_head_to_fp32`: nothing is refused, and nothing is rounded on the way."""
    model, x = build("untied").bfloat16(), batch()
    model.lm_head.float()
    model.lm_head.forward = lambda hidden: torch.nn.functional.linear(
        hidden.float(), model.lm_head.weight
    )
    FusedHead.install(model)
    expected = value_and_gradients(model, lambda: plain(model, x))
    found = value_and_gradients(model, lambda: by_model(model, numbers_upstream, x))
    assert found["lm_head.weight"].dtype == torch.float32
    exact = {name: each.float() for name, each in expected.items() if each.dtype == torch.float32}
    assert error({name: found[name] for name in exact}, exact) <= TOLERANCE
    assert error(found, expected) <= 0.02  # the backbone's, of bf16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "softcap", "lora"])
def test_compiled(kind, fresh_compiler):
    model, x = build(kind), batch()
    expected = value_and_gradients(model, lambda: plain(model, x))
    compiled = torch.compile(model, backend="aot_eager")
    FusedHead.install(compiled)
    for loss in LOSSES.values():
        found = value_and_gradients(model, lambda loss=loss: by_model(compiled, loss, x))
        assert error(found, expected) <= 5 * TOLERANCE
    torch.testing.assert_close(
        compiled(input_ids=x["ids"]).logits, model(input_ids=x["ids"]).logits
    )
    assert head_of(compiled).softcap == head_of(model).softcap


# -------------------------------------------------------------------------------------- refusals


def test_labels_beside_a_loss_are_refused():
    model, x = build("untied"), batch()
    FusedHead.install(model)
    with pytest.raises(KepoInputError, match=r"^FusedHead: labels are given beside loss"):
        model(x["ids"], labels=x["ids"], loss=lambda hidden, head: None)


def test_a_model_that_is_none_of_transformers():
    """Its head takes a loss, inside of a forward of its own."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.lm_head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 61)

        def forward(self, x, loss=None):
            return self.lm_head(self.body(x), **({} if loss is None else {"loss": loss}))

    model, states, ids = Own(), torch.randn(5, 8), torch.arange(5)
    expected = value_and_gradients(model, lambda: plain_numbers(model(states), ids)[0].sum())
    FusedHead.install(model)
    found = value_and_gradients(
        model, lambda: model(states, lambda h, head: fused_linear_logprobs(h, head, ids).sum())
    )
    assert error(found, expected) <= TOLERANCE


def test_what_is_refused_at_once():
    with pytest.raises(KepoInputError, match="has no LM head"):
        FusedHead.install(torch.nn.Linear(2, 3))
    model = build("untied")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(KepoInputError, match="LM head is a Sequential, which may do more than mul"):
        FusedHead.install(model)
    model = build("untied")
    FusedHead.install(model)
    model.lm_head.weight.ds_id, model.lm_head.weight.data = 3, torch.empty(0)
    with pytest.raises(KepoInputError, match=r"^FusedHead: the head's weight is sharded inside"):
        model(batch()["ids"], loss=lambda hidden, head: None)


# ----------------------------------------------------------- a forward that does more than multiply

WIDE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    is_decoder=True,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
TRANSFORMING = {
    "BertLMHeadModel": ("BertConfig", {}),
    "RobertaForCausalLM": ("RobertaConfig", {}),
    "RoFormerForCausalLM": ("RoFormerConfig", {}),
    "ElectraForCausalLM": ("ElectraConfig", dict(embedding_size=16)),
    "ModernBertDecoderForCausalLM": (
        "ModernBertDecoderConfig",
        dict(cls_token_id=1, sep_token_id=2),
    ),
}


def other(name: str, config: str, **settings):
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.skipif(not hasattr(transformers, "MiniCPM3Config"), reason="an older transformers")
def test_a_factor_that_the_states_have_is_counted_once():
    from test_model_heads import build

    model, x = build("divisor of MiniCPM"), batch()
    FusedHead.install(model)
    assert model(x["ids"], loss=lambda hidden, head: head.logit_scale) == 1.0
    assert head_of(model).logit_scale == 0.25
    assert_equals_plain(model, x)


def encoder_decoder(name: str = "Bart", **settings):
    sizes = dict(vocab_size=61, d_model=32, pad_token_id=0, decoder_start_token_id=0)
    if name == "Bart":
        sizes |= dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
        sizes |= dict(decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)
    else:
        sizes |= dict(d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    return other(f"{name}ForConditionalGeneration", f"{name}Config", **sizes, **settings)


@pytest.mark.parametrize("name", TRANSFORMING)
def test_the_states_are_those_that_arrive_at_the_head(name):
    """Which are not the last of the backbone: `head_of` alone would be another model."""
    config, settings = TRANSFORMING[name]
    model, x = other(name, config, **WIDE | settings), batch()
    with pytest.raises(KepoInputError, match=f"^head_of: the forward of {name} changes the last"):
        head_of(model)
    FusedHead.install(model)
    expected = value_and_gradients(model, lambda: plain(model, x))
    found = value_and_gradients(model, lambda: by_model(model, numbers_upstream, x))
    assert error(found, expected, least=1e-2) <= 5 * TOLERANCE  # biases of keys have no gradient


@pytest.mark.parametrize("tied", [False, True])
def test_an_encoder_and_a_decoder(tied):
    model, x = encoder_decoder("T5", tie_word_embeddings=tied), batch()
    inputs = dict(input_ids=x["ids"], decoder_input_ids=x["targets"])

    def expected():
        numbers = plain_numbers(model(**inputs).logits, x["targets"])
        return sum((each * u).sum() for each, u in zip(numbers, x["upstream"], strict=True))

    oracle = value_and_gradients(model, expected)
    FusedHead.install(model)
    found = value_and_gradients(
        model, lambda: model(**inputs, loss=lambda h, head: numbers_upstream(h, head, x))
    )
    assert error(found, oracle) <= 5 * TOLERANCE


def test_what_is_done_to_the_logits_later_is_refused():
    """A bias in a buffer, which is 0 in most models: those are right."""
    ids = batch()["ids"]
    for bias in (0.0, 0.01):
        model = encoder_decoder()
        model.final_logits_bias[0, 3] = bias
        FusedHead.install(model)
        for call in (
            lambda model=model: head_of(model.train()),
            lambda model=model: model(ids, decoder_input_ids=ids, loss=lambda hidden, head: 1),
        ):
            if bias:
                says = "the forward of BartForConditionalGeneration does more to the logits"
                with pytest.raises(KepoInputError, match=says):
                    call()
            else:
                call()


def test_a_loss_that_was_not_used_is_an_error():
    class Elsewhere(transformers.LlamaForCausalLM):
        def forward(self, input_ids, again=0, **kwargs):
            hidden = self.model(input_ids).last_hidden_state
            for _ in range(again):
                self.lm_head(hidden)
            return hidden

    model, ids = Elsewhere(build("untied").config), batch()["ids"]
    FusedHead.install(model)
    with pytest.raises(KepoInputError, match=r"^FusedHead: the forward of Elsewhere has not"):
        model(ids, loss=lambda hidden, head: 1)
    with pytest.raises(KepoInputError, match=r"^FusedHead: the forward of the model calls its LM "):
        model(ids, again=2, loss=lambda hidden, head: 1)
    with pytest.raises(KepoInputError, match=r"^FusedHead: losss is a function; expected it as"):
        model(ids, losss=lambda hidden, head: 1)


def test_a_loss_may_call_models_itself():
    """A teacher that takes a loss itself, and the head, whose plain call is not the loss's."""
    model, teacher, x = build("untied"), build("scale", seed=5), batch()
    for one in (model, teacher):
        FusedHead.install(one)

    def loss(hidden, head):
        states = teacher(x["ids"], loss=lambda hidden, head: hidden)
        return states, model.lm_head(hidden), teacher(x["ids"]).logits

    states, logits, of_teacher = model(x["ids"], loss=loss)
    assert torch.equal(states, teacher.model(x["ids"]).last_hidden_state)
    assert torch.equal(logits, model(x["ids"]).logits)
    assert torch.equal(of_teacher, teacher(x["ids"]).logits)
