"""The log-probabilities that generation returns: of the very law that each token was drawn from."""

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from kepo.digits.tiny import build_tiny
from kepo.models import sampling
from kepo.models.encoding import Prompt
from kepo.models.sampling import SamplingLaw, SamplingParams
from kepo.models.vlm import VLM

LAWS = [(1.0, 1.0), (0.7, 0.9), (1.0, 0.5), (3.0, 1.0), (0.9, 0.95)]  # temperature, top_p
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, size="student", seed=0)
    return VLM.load(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    made = []
    for number, (text, width) in enumerate([("Which?", 64), ("What is it, of all these?", 32)]):
        pixels = torch.randint(0, 256, (32, width, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(root / f"{number}.png")
        made.append(Prompt(text, root / f"{number}.png"))
    return made


def law_of(logits, temperature, top_p):
    """(V,) logits -> log-probabilities, written out: the smallest set whose mass reaches top_p."""
    law = (logits.double() / temperature).softmax(-1)
    kept, mass = [], 0.0
    for token in law.argsort(descending=True).tolist():
        kept.append(token)
        mass += law[token].item()
        if mass >= top_p:
            break
    nucleus = torch.zeros_like(law)
    nucleus[kept] = law[kept] / law[kept].sum()
    return nucleus.log()


def full_forward(vlm, prompts, ids, mask, rows):
    """(n, T, V) logits of a forward without a cache, the tokens that cannot be sampled removed."""
    inputs = vlm.encode(prompts).select(rows)
    with torch.no_grad():
        logits = vlm.completion_hidden(inputs, ids, mask) @ vlm.head.weight.T
    logits[..., vlm.never_sampled()] = -torch.inf
    return logits


@pytest.mark.parametrize(("temperature", "top_p"), LAWS)
def test_logprobs_are_those_of_a_full_forward_under_the_same_law(vlm, prompts, temperature, top_p):
    torch.manual_seed(1)
    ids, mask, logprobs = vlm.generate(
        vlm.encode(prompts),
        SamplingParams(max_tokens=30, temperature=temperature, top_p=top_p, n=3),
    )
    assert logprobs.shape == ids.shape and logprobs.dtype == torch.float32
    logits = full_forward(vlm, prompts, ids, mask, [0, 0, 0, 1, 1, 1])
    for row, column in mask.nonzero().tolist():
        law = law_of(logits[row, column], temperature, top_p)
        expected = law[ids[row, column]]
        assert expected > -torch.inf  # the token was in the nucleus
        torch.testing.assert_close(logprobs[row, column].double(), expected, **CLOSE)
    assert (logprobs[~mask] == 0).all() and (logprobs <= 0).all()
    assert len(logprobs[mask].unique()) > 20  # else alignment is not tested


@pytest.mark.parametrize("ends", [{0: 1, 2: 4, 3: 8}, {0: 1, 1: 7, 2: 4, 3: 8}])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 0.98)])  # the end is in it
def test_rows_that_ended_keep_their_own_numbers(
    vlm, prompts, temperature, top_p, ends, monkeypatch
):
    """Rows end at places of our choice: beside one that goes on to the limit, or all of them."""
    end, draw, now = vlm.tokenizer.eos_token_id, sampling.draw, []
    law_call = SamplingLaw.__call__

    def told(self, logits, rows, place):
        now.append((rows.tolist(), place))
        return law_call(self, logits, rows, place)

    def steered(law, uniforms):
        tokens = draw(law, uniforms)
        tokens = torch.where(tokens == end, law.argmax(-1, keepdim=True), tokens)
        rows, place = now[-1]
        tokens[[ends.get(row) == place for row in rows]] = end
        return tokens

    monkeypatch.setattr(SamplingLaw, "__call__", told)
    monkeypatch.setattr(sampling, "draw", steered)
    torch.manual_seed(0)
    ids, mask, logprobs = vlm.generate(
        vlm.encode(prompts),
        SamplingParams(max_tokens=12, temperature=temperature, top_p=top_p, n=2),
    )
    lengths = [ends.get(row, 11) + 1 for row in range(4)]
    assert mask.sum(-1).tolist() == lengths and ids.shape[1] == max(lengths)
    assert (ids == end).sum(-1).tolist() == [int(row in ends) for row in range(4)]
    logits = full_forward(vlm, prompts, ids, mask, [0, 0, 1, 1])
    for row, column in mask.nonzero().tolist():
        expected = law_of(logits[row, column], temperature, top_p)[ids[row, column]]
        torch.testing.assert_close(logprobs[row, column].double(), expected, **CLOSE)
    assert logprobs[ids == end].isfinite().all()
    assert (logprobs[~mask] == 0).all() and (logprobs[mask] < 0).all()


def test_greedy_draws_nothing_and_says_zero(vlm, prompts):
    ids, _, logprobs = vlm.generate(
        vlm.encode(prompts), SamplingParams(max_tokens=5, temperature=0.0)
    )
    assert logprobs.shape == ids.shape and not logprobs.any()


def test_what_is_drawn_follows_the_law_that_is_reported():
    """10,000 completions of one token: frequencies are exp(logprobs) within 5 sigma."""
    n, logits = 10_000, torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0])
    law = SamplingLaw(0.7, 0.8, range(n), 1)
    token, logprobs = law(logits.repeat(n, 1), torch.arange(n), 0)
    expected = law_of(logits, 0.7, 0.8)
    torch.testing.assert_close(logprobs.double(), expected[token], **CLOSE)
    counts, p = token.bincount(minlength=5), expected.exp()
    sigma = (n * p * (1 - p)).sqrt()
    assert ((counts - n * p).abs() <= 5 * sigma).all() and counts[3:].sum() == 0
