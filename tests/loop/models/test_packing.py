"""Packed rows are separate rows: states and gradients, on every family; and faults are seen."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from families import EVERY, asked, pictures, with_a_sliding_window

from kepo.errors import KepoDataError
from kepo.models import packing
from kepo.models.encoding import Prompt
from kepo.models.packing import PADDING, PROMPT, Packed, pack, packed_length, prompt_positions
from kepo.models.vlm import VLM

NEAR = 2e-5  # relative: float32 through a few layers, in another order of sums
PROMPT_OF = [0, 2, 1, 2, 0, 2, 0, 2]
LENGTHS = [0, 1, 9, 4, 9, 2, 7, 3]  # masked out, nothing but an end, full, ...


@pytest.fixture(scope="module", params=EVERY)
def vlm(request, tinies) -> VLM:
    return VLM.load(tinies / request.param)


@pytest.fixture(scope="module")
def prompts(vlm, tmp_path_factory) -> list[Prompt]:
    shown = pictures(tmp_path_factory.mktemp("images"), (64, 32), (32, 32), (96, 64))
    texts = [
        Prompt("Which?", shown[0]),
        Prompt("What is the sum of the two digits?", (shown[1], shown[2])),
        Prompt("No picture"),
    ]
    return asked(vlm, texts)


@pytest.fixture
def completions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 60, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return ids, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def both_ways(vlm, prompts, completions) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """States of tokens, and gradients of all parameters, from rows and from packed rows."""
    ids, mask = completions
    found = []
    for share in (False, True):
        vlm.share_prompts = share
        vlm.model.zero_grad(set_to_none=True)
        states = vlm.completion_states([prompts[place] for place in PROMPT_OF], ids, mask)[mask]
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        (states * weights).sum().backward()
        named = vlm.model.named_parameters()
        found.append((states.detach(), {n: p.grad for n, p in named if p.grad is not None}))
    vlm.share_prompts = False
    vlm.model.zero_grad(set_to_none=True)
    return found


def equal(rows, packed) -> bool:
    (states, gradients), (mine, found) = rows, packed
    # Gradients of biases that attention does not feel are rounding: they are held against all.
    whole = max(gradient.norm() for gradient in gradients.values())
    same = found.keys() == gradients.keys() and all(
        (found[name] - gradient).norm() <= NEAR * max(gradient.norm(), 1e-3 * whole)
        for name, gradient in gradients.items()
    )
    return same and bool((mine - states).norm() <= NEAR * states.norm())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_states_and_gradients_are_those_of_rows(vlm, prompts, completions, attention):
    vlm.model.set_attn_implementation(attention)
    assert vlm.why_not_packed is None
    assert equal(*both_ways(vlm, prompts, completions))
    vlm.model.set_attn_implementation("sdpa")


def test_one_mask_serves_all_layers(vlm, prompts, completions, monkeypatch):
    """None of them makes its own of it, as torch does of booleans and of rows that lie otherwise on
    a GPU."""
    given = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(*states, attn_mask=None, **others):
        if attn_mask is not None:
            given.append(attn_mask)
        return real(*states, attn_mask=attn_mask, **others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    both_ways(vlm, prompts, completions)
    [mask] = {mask.data_ptr(): mask for mask in given if mask.dtype != torch.bool}.values()
    assert mask.dtype == vlm.model.dtype
    assert [stride % packing.ALIGNED for stride in mask.stride()] == [0, 0, 0, 1]


def test_with_gradient_checkpointing(vlm, prompts, completions):
    checkpointed = VLM(copy.deepcopy(vlm.model).train(), vlm.encoder)
    checkpointed.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert equal(
        both_ways(vlm, prompts, completions)[0], both_ways(checkpointed, prompts, completions)[1]
    )


def test_in_bfloat16_they_differ_by_its_rounding(vlm, prompts, completions):
    ids, mask = completions
    shown = [prompts[place] for place in PROMPT_OF]
    with torch.no_grad():
        truth = vlm.completion_states(shown, ids, mask)[mask]
        short = VLM(copy.deepcopy(vlm.model).bfloat16(), vlm.encoder)
        rows = short.completion_states(shown, ids, mask)[mask].float()
        short.share_prompts = True
        packed = short.completion_states(shown, ids, mask)[mask].float()
    assert 0 < (packed - truth).norm() <= 1.2 * (rows - truth).norm()


def shifted_positions(patch):
    """The completions begin one position late."""
    real = packing.pack

    def late(*given):
        packed = real(*given)
        return replace(packed, positions=packed.positions + (packed.segments >= 0))

    patch.setattr("kepo.models.vlm.pack", late)


def one_completion_sees_another(patch):
    def attends(self):
        there = self.segments != PADDING
        seen = there[:, :, None] == there[:, None, :]
        return seen.tril_()[:, None]

    patch.setattr(Packed, "attends", attends)


def padding_is_seen(patch):
    """Nothing comes after padding, so rows are padded on the left for it to be seen."""

    def attends(self):
        seen = torch.ones_like(self.segments, dtype=torch.bool)
        return (seen[:, :, None] & seen[:, None, :])[:, None]

    patch.setattr(Packed, "attends", attends)


def the_first_token_is_predicted_by_the_completion_before(patch):
    real = packing.pack

    def wrong(*given):
        packed = real(*given)
        at = packed.states_at.clone()
        at[:, 0] = at[:, 1]
        return replace(packed, states_at=at)

    patch.setattr("kepo.models.vlm.pack", wrong)


@pytest.mark.parametrize(
    "fault",
    [
        shifted_positions,
        one_completion_sees_another,
        padding_is_seen,
        the_first_token_is_predicted_by_the_completion_before,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_fault_is_seen(vlm, prompts, completions, fault, monkeypatch):
    fault(monkeypatch)
    assert not equal(*both_ways(vlm, prompts, completions))


def test_a_prompt_and_its_pictures_are_computed_once(vlm, prompts, completions, monkeypatch):
    ids, mask = completions
    seen, tower = [], []
    layer, shown = vlm.family.decoder(vlm.model).layers[0], vlm.family.vision(vlm.model)[:1]
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda *a, **k: seen.append(a[0].shape[:2]) or forward(*a, **k)
    )
    for module in shown:
        real = module.forward
        monkeypatch.setattr(
            module,
            "forward",
            lambda *a, real=real, **k: tower.append(len([*a, *k.values()][0])) or real(*a, **k),
        )
    vlm.share_prompts = True
    with torch.no_grad():
        vlm.completion_states([prompts[place] for place in PROMPT_OF], ids, mask)
    vlm.share_prompts = False
    lengths = vlm.encoder.lengths(prompts)
    own = [
        [n for n, p in zip(LENGTHS, PROMPT_OF, strict=True) if p == prompt] for prompt in range(3)
    ]
    assert seen == [(3, max(map(packed_length, lengths, own)))]
    assert tower == [len(vlm.encoder.encode(prompts).pixel_values)] * len(shown)


def test_the_layout_of_a_row(vlm, prompts):
    inputs = vlm.encoder.encode([prompts[0]])
    positions, p = prompt_positions(vlm.model, inputs), inputs.input_ids.shape[1]
    ids, mask = (
        torch.tensor([[7, 8, 9], [5, 6, 0]]),
        torch.tensor([[True] * 3, [True, True, False]]),
    )
    packed = pack(inputs, positions, ids, mask, [0, 0])
    assert packed.input_ids[0].tolist() == [*inputs.input_ids[0].tolist(), 7, 8, 5]
    assert packed.segments[0].tolist() == [PROMPT] * p + [0, 0, 1]
    follows = int(positions.max()) + 1
    assert packed.positions[:, 0, p:].tolist() == [[follows, follows + 1, follows]] * len(positions)
    assert packed.states_at.tolist() == [[p - 1, p, p + 1], [p - 1, p + 2, 0]]
    assert packed.input_ids.shape[1] == packed_length(p, [3, 2])


@pytest.mark.parametrize("prompt_of", [[0, 1], [0, 0, 2], [0, 0, 0], [0, 1, 3]])
def test_completions_without_a_prompt_of_theirs_are_refused(vlm, prompts, prompt_of):
    ids = torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(KepoDataError, match=r"prompt_of: .* 2 prompts and 3 completions"):
        inputs = vlm.encoder.encode(prompts[:2])
        vlm.packed_hidden(inputs, ids, ids == 0, prompt_of)


def test_a_mask_of_another_shape_is_refused(vlm, prompts):
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(KepoDataError, match=r"mask: \(1, 2\) beside ids \(1, 3\)"):
        vlm.packed_hidden(vlm.encoder.encode(prompts[:1]), ids, ids[:, 1:] == 0, [0])


def test_flash_attention_takes_no_mask(vlm):
    vlm.model.config.get_text_config()._attn_implementation = "flash_attention_2"
    assert "attn_implementation='flash_attention_2'" in vlm.why_not_packed
    vlm.model.set_attn_implementation("sdpa")


def test_layers_with_a_sliding_window_are_not_packed(tinies, completions):
    """A completion would feel those before it in the row."""
    plain = VLM.load(tinies / "qwen2.5")
    vlm = VLM(with_a_sliding_window(plain.model, 8), plain.encoder)
    assert "sliding_attention" in vlm.why_not_packed
    ids, mask = completions
    texts = [Prompt("Which?"), Prompt("What is the sum of the two digits?"), Prompt("No picture")]
    given = [texts[place] for place in PROMPT_OF]
    with torch.no_grad():
        rows = vlm.completion_states(given, ids, mask)[mask]
        vlm.share_prompts = True
        packed = vlm.completion_states(given, ids, mask)[mask]
    assert (packed - rows).norm() > 100 * NEAR * rows.norm()
