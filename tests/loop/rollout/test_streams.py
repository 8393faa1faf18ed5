"""A completion has its own random numbers: with its seed it is the same, whatever is beside it."""

import random
from dataclasses import replace

import pytest
import torch
from PIL import Image
from toy import ENV, example

pytest.importorskip("transformers")

from kepo.config import Config
from kepo.digits.tiny import build_tiny
from kepo.models import sampling
from kepo.models.encoding import Prompt
from kepo.models.sampling import SamplingLaw, SamplingParams, draw
from kepo.models.vlm import VLM
from kepo.rollout.rollouts import sample

VOCABULARY = 151_936  # Qwen's; its fp32 sums are what a law of rare tokens must survive
LAST = 1 - 2.0**-53  # the largest number below 1


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, size="student", seed=0)
    return VLM.load(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        pixels = torch.randint(0, 256, (32, 32 * (number + 1), 3), generator=generator)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / f"{number}.png")
    return [root / f"{number}.png" for number in range(3)]


def drawn(vlm, prompts, seeds, number=1, **settings):
    """The tokens of each completion, as lists."""
    law = dict(max_tokens=12, temperature=0.9, top_p=0.95)
    ids, mask, _ = vlm.sample(prompts, SamplingParams(n=number, **{**law, **settings}), seeds)
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]


# ---- one completion, one stream ----


def its_tokens_are_the_first_to_pass_its_own_numbers():
    """Each token is the inverse of the cumulative law at the next number of the row's generator."""
    n, length, size = 5, 6, 50
    seeds = [3, 3, 2**62, 0, 17]
    law = SamplingLaw(1.0, 1.0, seeds, length)
    generator = torch.Generator().manual_seed(1)
    tokens, expected = [], []
    numbers = [random.Random(seed) for seed in seeds]
    for place in range(length):
        logits = torch.randn(size, generator=generator).repeat(n, 1)
        tokens.append(law(logits, torch.arange(n), place)[0].tolist())
        below = logits[0].double().softmax(-1).cumsum(-1)
        expected.append([int((below <= row.random()).sum()) for row in numbers])
    assert tokens == expected
    rows = list(zip(*tokens, strict=True))
    assert rows[0] == rows[1] and len(set(rows)) == 4  # 2^62 and 0 share their last 32 bits


def rare_tokens_of_a_large_vocabulary_are_drawn():
    """One token of 0.999, the others 6.6e-9 each: less than fp32 tells apart beside it."""
    rare = 1e-3 / (VOCABULARY - 1)
    law = torch.full((VOCABULARY,), rare, dtype=torch.float64)
    law[0] = 0.999
    places = torch.arange(90_000, 90_200)
    uniforms = 0.999 + (places - 0.5).double() * rare  # the middle of each one's share
    tokens = sampling.draw(law.log().float().expand(200, -1), uniforms)[:, 0]
    assert (tokens.diff() == 1).all()  # every one is drawn
    assert (tokens - places).abs().max() < 20  # the fp32 logarithm of 0.999 is off by some shares


def test_its_tokens_are_the_first_to_pass_its_own_numbers():
    its_tokens_are_the_first_to_pass_its_own_numbers()


def test_rare_tokens_of_a_large_vocabulary_are_drawn():
    rare_tokens_of_a_large_vocabulary_are_drawn()


def shared_by_all_rows(patch):
    stream = sampling._stream
    patch.setattr(sampling, "_stream", lambda seed, length: stream(0, length))


def a_column_late(patch):
    stream = sampling._stream
    patch.setattr(sampling, "_stream", lambda seed, length: stream(seed, length).roll(1))


def summed_in_fp32(patch):
    def draw(law, uniforms):
        cumulative = law.float().exp().cumsum(-1)
        reached = uniforms[:, None].float() * cumulative[:, -1:]
        return torch.searchsorted(cumulative, reached, right=True).clamp_(max=law.shape[1] - 1)

    patch.setattr(sampling, "draw", draw)


@pytest.mark.parametrize(
    ("check", "plant"),
    [
        (its_tokens_are_the_first_to_pass_its_own_numbers, shared_by_all_rows),
        (its_tokens_are_the_first_to_pass_its_own_numbers, a_column_late),
        (rare_tokens_of_a_large_vocabulary_are_drawn, summed_in_fp32),
    ],
)
def test_the_check_fails_where_the_fault_is(check, plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


# ---- draw ----


def test_a_number_falls_on_the_token_whose_share_it_is_in():
    law = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log()
    shares = {0.0: 1, 0.24: 1, 0.26: 3, 0.74: 3, 0.76: 4, LAST: 4}
    uniforms = torch.tensor(list(shares), dtype=torch.float64)
    tokens = draw(law.expand(len(shares), -1), uniforms)
    assert tokens.shape == (6, 1) and tokens.flatten().tolist() == list(shares.values())


@pytest.mark.parametrize("scale", [1.0, 0.3, 1.7])  # the sum of a law is 1 but for rounding
def test_a_token_of_probability_zero_is_never_drawn(scale):
    generator = torch.Generator().manual_seed(0)
    n, size = 2_000, 40
    law = torch.randn(n, size, generator=generator)
    absent = torch.rand(n, size, generator=generator) < 0.7
    absent[torch.arange(n), torch.randint(size, (n,), generator=generator)] = False
    absent[: n // 2, [0, -1]] = absent[: n // 2, 1:-1].any(-1, keepdim=True)
    absent[absent.all(-1), 5] = False
    law = law.masked_fill(absent, -torch.inf).log_softmax(-1) + torch.tensor(scale).log()
    uniforms = torch.rand(n, generator=generator, dtype=torch.float64)
    uniforms[: n // 2 : 2], uniforms[1 : n // 2 : 2] = 0.0, LAST
    assert not absent.gather(1, draw(law, uniforms)).any()


def test_other_seeds_are_other_tokens():
    logits = torch.zeros(200, 1000)
    first, second = (
        SamplingLaw(1.0, 1.0, range(start, start + 200), 1)(logits, torch.arange(200), 0)[0]
        for start in (0, 1000)
    )
    assert (first == second).sum() < 5 and len(first.unique()) > 150


# ---- with a model ----


def test_a_completion_is_the_same_alone_in_any_batch_and_in_any_order(vlm, images):
    texts = ("Which?", "What is it, of all these things?", "And this one?")
    prompts = [Prompt(*both) for both in zip(texts, images, strict=True)]
    seeds = list(range(100, 109))
    together = drawn(vlm, prompts, seeds, number=3)
    assert len({tuple(tokens) for tokens in together}) == 9
    alone = [drawn(vlm, [prompts[row // 3]], [seed]) for row, seed in enumerate(seeds)]
    assert [tokens for (tokens,) in alone] == together
    order = [4, 0, 8, 2]
    mixed = drawn(vlm, [prompts[row // 3] for row in order], [seeds[row] for row in order])
    assert mixed == [together[row] for row in order]
    cut = drawn(vlm, prompts, seeds, number=3, max_tokens=5)
    assert cut == [tokens[:5] for tokens in together]  # the limit takes none of the numbers away


def test_how_much_is_generated_at_once_changes_no_completion(vlm, images):
    asked = [example(f"q{i}", question="why " * 4**i, images=(images[i],)) for i in range(3)]
    config = Config(max_completion_length=6, seed=5)

    def tokens(stream=("a", 1), examples=asked, **settings):
        law = replace(config, **settings)
        groups = sample(vlm, examples, ENV, law, num_generations=2, stream=stream)
        return [r.completion_ids.tolist() for group in groups for r in group]

    whole = tokens()
    assert len({tuple(ids) for ids in whole}) == 6
    for settings in ({"rollout_batch": 2}, {"rollout_batch": 4}, {"rollout_tokens": 250}):
        assert tokens(**settings) == whole
    for other in (tokens(seed=6), tokens(stream=("a", 2)), tokens(stream=())):
        assert not any(a == b for a, b in zip(whole, other, strict=True))
    # A place's numbers are its own: the same question, asked elsewhere, is answered otherwise.
    twice = tokens(examples=[asked[0], asked[0]])
    assert twice[:2] == whole[:2] and twice[2:] != twice[:2]
