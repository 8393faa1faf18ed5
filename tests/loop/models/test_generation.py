"""Generation that computes a prompt once and drops rows that ended, against transformers' own."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from families import EVERY, asked, pictures, with_a_sliding_window

from kepo.models import generation
from kepo.models.encoding import Prompt
from kepo.models.generation import Generation
from kepo.models.sampling import Sampled, SamplingLaw, SamplingParams, greedy
from kepo.models.vision import forward_inputs
from kepo.models.vlm import VLM

CLOSE = dict(rtol=1e-4, atol=1e-5)
LAWS = {"plain": (1.0, 1.0), "nucleus": (0.8, 0.9), "greedy": (0.0, 1.0)}
LONG = 70  # tokens: more than a cache has room for at once
SEEDS = range(20, 32)


@pytest.fixture(scope="module", params=EVERY)
def vlm(request, tinies) -> VLM:
    return ending(VLM.load(tinies / request.param))


@pytest.fixture(scope="module")
def student(tinies) -> VLM:
    return ending(VLM.load(tinies / "qwen3"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[Prompt]:
    """Of four lengths: two images, none, one, and three of which two are the same."""
    a, b, c = pictures(tmp_path_factory.mktemp("images"), (64, 32), (32, 32), (224, 160))
    texts = ["Which?", "No picture at all?", "One", "Again, and with more words?"]
    return [Prompt(*both) for both in zip(texts, [(a, c), (), (b,), (c, a, c)], strict=True)]


def ending(vlm: VLM, every: int = 29) -> VLM:
    """The model with many end tokens, so that its completions have all lengths."""
    allowed = sorted(set(range(len(vlm.tokenizer))) - set(vlm.never_sampled()))
    return VLM(vlm.model, replace(vlm.encoder, end_ids=tuple(allowed[::every])))


def params_of(law: str, n: int = 3, max_tokens: int = LONG) -> SamplingParams:
    temperature, top_p = LAWS[law]
    return SamplingParams(n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p)


def by_transformers(vlm: VLM, inputs, params: SamplingParams, seeds) -> Sampled:
    """The oracle: every prompt repeated n times, `model.generate`, every row to the last end."""
    from transformers import GenerationConfig

    law, kept = SamplingLaw(params.temperature or 1.0, params.top_p, seeds, params.max_tokens), []
    rows = torch.arange(len(seeds))

    def drawn(input_ids, scores):
        token, logprob = law(scores, rows, len(kept))
        kept.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)

    settings = GenerationConfig(
        max_new_tokens=params.max_tokens,
        do_sample=False,
        suppress_tokens=vlm.never_sampled(),
        eos_token_id=list(vlm.encoder.end_ids),
        pad_token_id=vlm.tokenizer.pad_token_id,
        # What is left open is read from the model's file.
        temperature=1.0, top_p=1.0, top_k=50, repetition_penalty=1.0,
    )  # fmt: skip
    own, vlm.model.generation_config = vlm.model.generation_config, settings
    given = forward_inputs(vlm.model, inputs.repeat(params.n))
    given.pop("position_ids", None)  # it counts them itself
    with torch.no_grad():
        sequences = vlm.model.generate(
            **given,
            generation_config=settings,
            logits_processor=[] if params.greedy else [drawn],
        )
    vlm.model.generation_config = own
    ids = sequences[:, inputs.input_ids.shape[1] :]
    ended = torch.isin(ids, torch.tensor(vlm.encoder.end_ids))
    mask = (ended.cumsum(-1) - ended.long()) == 0
    logprobs = torch.zeros(ids.shape) if params.greedy else torch.stack(kept, 1)
    return Sampled(ids, mask, torch.where(mask, logprobs, 0.0))


def same(ours: Sampled, theirs: Sampled) -> None:
    assert torch.equal(ours.mask, theirs.mask)
    assert torch.equal(ours.ids[ours.mask], theirs.ids[ours.mask])
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, **CLOSE)


def agrees_with_transformers(vlm: VLM, shown: list[Prompt], law: str) -> Sampled:
    inputs, params = vlm.encode(asked(vlm, shown)), params_of(law)
    seeds = SEEDS[: params.n * len(shown)]
    ours = vlm.generate(inputs, params, seeds)
    same(ours, by_transformers(vlm, inputs, params, seeds))
    return ours


@pytest.mark.parametrize("law", LAWS)
def test_tokens_and_logprobs_are_those_of_transformers(vlm, prompts, law):
    ours = agrees_with_transformers(vlm, prompts, law)
    assert (ours.ids[~ours.mask] == vlm.tokenizer.pad_token_id).all()
    lengths = ours.mask.sum(-1).tolist()
    assert law == "greedy" or (len(set(lengths)) > 5 and ours.ids.shape[1] == max(lengths))


def test_prompts_of_one_length_and_without_pictures(vlm, prompts):
    agrees_with_transformers(vlm, [prompts[1]], "plain")
    agrees_with_transformers(vlm, [prompts[1], prompts[1], prompts[1]], "nucleus")


def test_the_room_of_a_cache_grows(student, prompts):
    """Few tokens end here, so that most rows come to the limit."""
    vlm = ending(student, every=300)
    ours = agrees_with_transformers(vlm, prompts, "plain")
    assert ours.mask.sum(-1).max() == LONG > generation.BLOCK


# ---- rows ----


def rows_of_forwards(vlm: VLM, call) -> list[int]:
    seen = []
    layer = vlm.family.decoder(vlm.model).layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        call()
    finally:
        hook.remove()
    return seen


def test_a_prompt_is_one_row_and_a_row_that_ended_is_none(vlm, prompts):
    inputs, params, found = vlm.encode(asked(vlm, prompts)), params_of("plain"), []
    rows = rows_of_forwards(vlm, lambda: found.append(vlm.generate(inputs, params, SEEDS)))
    lengths = found[0].mask.sum(-1)
    going = [int((lengths > place).sum()) for place in range(1, int(lengths.max()))]
    assert rows == [len(prompts), *going] and len(set(going)) > 5


def test_one_token_takes_one_forward(student, prompts):
    inputs, params = student.encode(prompts), params_of("plain", max_tokens=1)
    assert rows_of_forwards(student, lambda: student.generate(inputs, params, SEEDS)) == [4]


def test_other_ranks_get_their_forwards(student, prompts):
    """A rank that is done runs one row on while another is not; its completions do not change."""
    inputs, told = student.encode(prompts), []
    student = ending(student, every=7)
    ends = student.encoder.end_ids
    plain = student.generate(inputs, params_of("plain", max_tokens=60), SEEDS)
    longest = plain.ids.shape[1]
    assert longest < 50

    def any_goes_on(mine: bool) -> bool:
        told.append(mine)
        return len(told) < 55

    never = torch.tensor(student.never_sampled())
    law = SamplingLaw(1.0, 1.0, SEEDS, 60)

    def draw(logits, rows, place):
        return law(logits.index_fill(1, never, -torch.inf), rows, place)

    found = []
    rows = rows_of_forwards(
        student,
        lambda: found.extend(
            generation.generate(student.model, inputs, draw, Generation(3, 60, ends, any_goes_on))
        ),
    )
    assert len(rows) == 55 and set(rows[longest:]) == {1}
    assert told == [True] * (longest - 1) + [False] * (55 - longest + 1)
    ids, logprobs = found
    assert ids.shape[1] == longest and torch.equal(ids[plain.mask], plain.ids[plain.mask])
    torch.testing.assert_close(logprobs[plain.mask], plain.logprobs[plain.mask], **CLOSE)


@pytest.mark.parametrize("going", ["1111", "0111", "1110", "0100", "1001011", "0011", "1010"])
def test_rows_that_go_on_come_first_and_few_move(going):
    going = [one == "1" for one in going]
    order = generation._filled_up(going)
    assert sorted(order) == [row for row, goes_on in enumerate(going) if goes_on]
    moved = sum(row != place for place, row in enumerate(order))
    assert moved == going[: len(order)].count(False)


# ---- kinds of models ----


def test_a_sliding_window_is_kept(tinies, prompts):
    vlm = ending(VLM.load(tinies / "qwen2.5"))
    vlm.model = with_a_sliding_window(vlm.model, 8)
    other = agrees_with_transformers(vlm, prompts, "plain")
    whole = ending(VLM.load(tinies / "qwen2.5"))
    assert not torch.equal(
        other.logprobs, whole.generate(whole.encode(prompts), params_of("plain"), SEEDS).logprobs
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_eager_attention_and_checkpointing_agree(student, prompts, attention):
    model = copy.deepcopy(student.model)
    model.set_attn_implementation(attention)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    vlm = VLM(model, student.encoder)
    same(
        vlm.generate(vlm.encode(prompts), params_of("plain"), SEEDS),
        student.generate(student.encode(prompts), params_of("plain"), SEEDS),
    )
    assert model.training


def test_bf16_logprobs_are_those_of_a_full_forward(vlm, prompts):
    half = VLM(copy.deepcopy(vlm.model).bfloat16(), vlm.encoder)
    inputs = half.encode(asked(vlm, prompts))
    ids, mask, logprobs = half.generate(inputs, params_of("plain"), SEEDS)
    assert logprobs.dtype == torch.float32
    with torch.no_grad():
        logits = (half.completion_hidden(inputs.repeat(3), ids, mask) @ half.head.weight.T).float()
    logits[..., half.never_sampled()] = -torch.inf
    scored = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert (scored - logprobs)[mask].abs().mean() < 0.02


# ---- the checks above fail where the fault is ----


def one_place_late(patch):
    made = generation._State.__init__
    patch.setattr(
        generation._State,
        "__init__",
        lambda self, cache, axes, positions, mask: made(self, cache, axes, positions + 1, mask),
    )


def anothers_cache(patch):
    kept = generation._RoomyLayer.keep
    patch.setattr(
        generation._RoomyLayer, "keep", lambda self, rows, to, source: kept(self, rows, to, to)
    )


def anothers_padding(patch):
    kept = generation._State.keep

    def keep(self, order):
        mask = self.mask
        kept(self, order)
        self.mask = mask[: len(order)]

    patch.setattr(generation._State, "keep", keep)


def anothers_position(patch):
    kept = generation._State.keep

    def keep(self, order):
        positions = self.positions
        kept(self, order)
        self.positions = positions[: len(order)]

    patch.setattr(generation._State, "keep", keep)


def anothers_numbers(patch):
    call = SamplingLaw.__call__
    patch.setattr(
        SamplingLaw,
        "__call__",
        lambda self, logits, rows, place: call(self, logits, torch.arange(len(rows)), place),
    )


def numbers_of_the_token_before(patch):
    call = SamplingLaw.__call__
    patch.setattr(
        SamplingLaw,
        "__call__",
        lambda self, logits, rows, place: call(self, logits, rows, max(0, place - 1)),
    )


FAULTS = [
    one_place_late,
    anothers_cache,
    anothers_padding,
    anothers_position,
    anothers_numbers,
    numbers_of_the_token_before,
]


@pytest.mark.parametrize("plant", FAULTS)
def test_the_check_fails_where_the_fault_is(student, prompts, plant, monkeypatch):
    inputs, params = student.encode(prompts), params_of("plain")
    expected = by_transformers(student, inputs, params, SEEDS)
    same(student.generate(inputs, params, SEEDS), expected)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        same(student.generate(inputs, params, SEEDS), expected)


def test_greedy_takes_the_first_of_equals():
    logits = torch.tensor([[0.0, 2.0, 2.0], [-torch.inf, -1.0, -1.0]])
    tokens, logprobs = greedy(logits, torch.arange(2), 0)
    assert tokens.tolist() == [1, 1] and logprobs.tolist() == [0, 0]
