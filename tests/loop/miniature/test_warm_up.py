"""Supervised training learns, repeats to the bit, and evaluation counts what was said."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("sklearn")
pytest.importorskip("transformers")

from toy import TASK, hint_request, hinted_prompt, question_prompt, worked_answer

from kepo.data.load import load_omnimedvqa
from kepo.digits.dataset import SMALL_DIGITS, write_digits
from kepo.digits.tiny import build_tiny
from kepo.errors import KepoConfigError, KepoDataError
from kepo.evaluation.answers import greedy_scores, means, summary
from kepo.miniature import warm_up
from kepo.miniature.warm_up import (
    _loss,
    _pictures,
    _sample,
    _schedule,
    digits_of,
    train_supervised,
    worked_hint,
)
from kepo.models.encoding import Prompt
from kepo.models.vlm import VLM
from kepo_kernels import fused_linear_loss


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits(root, train=1, test=1, seed=0)
    return load_omnimedvqa(root / "train")[:4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    build_tiny(path, size="student", seed=0)
    return path


SETTINGS = dict(batch_size=4, lr=2e-3, progress=False)


def test_worked_texts(examples):
    example = replace(examples[0], rationale="9 + 9 = 18", answer="D")
    assert worked_answer(example) == "<think>9 + 9 = 18</think><answer>D</answer>"
    assert worked_hint(example) == "9 + 9"
    assert worked_hint(replace(example, rationale="look left")) == "look left"
    digits = ("3 + 8", "8 + 3", "4 + 4")
    named = [worked_hint(replace(example, rationale=f"{x} = 1"), "one_digit") for x in digits]
    assert named == ["? + 8", "8 + ?", "4 + ?"]


TEXTS = ("<hint>1</hint>", "<think>3 + 15 = 18</think><answer>C</answer>")
"""Two completions of different length: one of them is padded."""


def value_and_gradients(folder, examples, loss_of):
    """The loss of ``TEXTS`` and its gradient in every weight, by name."""
    vlm = VLM.load(folder)
    prompts = [Prompt(question_prompt(e), e.images) for e in examples[:2]]
    loss = loss_of(vlm, prompts, list(TEXTS))
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in vlm.model.named_parameters()}


def mean_cross_entropy(vlm, prompts, texts):
    """With whole logits, each completion by itself, so that there is no padding."""
    terms = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids, mask = vlm.encode_completions([text])
        hidden = vlm.completion_hidden(vlm.encode([prompt]), ids, mask)[0]
        terms.append(cross_entropy(hidden @ vlm.head.weight.T, ids[0], reduction="none"))
    return torch.cat(terms).mean()


def differing(found, right):
    """Names of what is not the same to float32's rounding, of the largest entry of each."""
    assert found.keys() == right.keys()
    return [
        name
        for name, x in right.items()
        if (found[name] - x).abs().max() > 2e-5 * x.abs().max() + 1e-8
    ]


def test_loss_is_the_mean_cross_entropy_of_completion_tokens(folder, examples):
    right = value_and_gradients(folder, examples, mean_cross_entropy)
    assert differing(value_and_gradients(folder, examples, _loss), right) == []


@pytest.mark.parametrize(
    "fault",
    [dict(reduction="sequence_mean"), dict(completion_mask=None), dict(temperature=1.0005)],
    ids=str,
)
def test_another_loss_would_be_seen(folder, examples, monkeypatch, fault):
    right = value_and_gradients(folder, examples, mean_cross_entropy)
    monkeypatch.setattr(
        warm_up, "fused_linear_loss", lambda *x, **named: fused_linear_loss(*x, **named | fault)
    )
    wrong = differing(value_and_gradients(folder, examples, _loss), right)
    assert "loss" in wrong and len(wrong) == len(right)


def test_training_learns_a_handful_by_heart_and_evaluate_sees_it(folder, examples):
    vlm = VLM.load(folder)
    before = greedy_scores(vlm, examples, TASK, max_tokens=14)
    assert means(before) == {
        example.modality: 0.0 for example in examples
    }  # random weights do not write the format
    losses = train_supervised(vlm, examples, steps=60, seed=0, **SETTINGS)
    assert len(losses) == 60 and losses[0] > 3 and losses[-1] < 0.05
    assert not vlm.model.training
    table = greedy_scores(vlm, examples, TASK, max_tokens=14, batch_size=3)
    assert table == {example.modality: [1.0] for example in examples}
    wrong = [replace(e, answer="A" if e.answer != "A" else "B") for e in examples]
    assert greedy_scores(vlm, wrong, TASK, max_tokens=14) == {e.modality: [0.0] for e in examples}
    cut_off = greedy_scores(vlm, examples, TASK, max_tokens=3)
    assert cut_off == {e.modality: [0.0] for e in examples}
    # Every answer by itself, in the order of the questions, under its modality.
    one = [replace(e, modality="CT") for e in (examples[0], wrong[1], examples[2])]
    scores = greedy_scores(vlm, [*one, examples[3]], TASK, max_tokens=14)
    assert scores == {"CT": [1.0, 0.0, 1.0], examples[3].modality: [1.0]}
    assert means(scores) == {"CT": 2 / 3, examples[3].modality: 1.0}


def test_training_repeats_to_the_bit(folder, examples):
    def run(seed):
        vlm = VLM.load(folder)
        losses = train_supervised(vlm, examples, steps=4, seed=seed, hint_fraction=0.5, **SETTINGS)
        return losses, [p.detach().clone() for p in vlm.model.parameters()]

    (first, weights), (again, same), (other, _) = run(1), run(1), run(2)
    assert first == again and all(map(torch.equal, weights, same))
    assert first != other


def test_samples_mix_questions_hint_requests_and_hinted_questions(examples):
    example, draw = examples[0], random.Random(0)
    counts: dict[tuple[str, str], int] = {}
    seen: dict[bool, set] = {}
    for _ in range(2000):
        prompt, text = _sample(example, _pictures(examples, "sum"), draw, 0.4)
        hinted = "Hint:" in prompt.text
        seen.setdefault(hinted, set()).add(prompt.images)
        counts[prompt.text, text] = counts.get((prompt.text, text), 0) + 1
    hint = f"<hint>{worked_hint(example)}</hint>"
    answer = worked_answer(example)
    expected = {
        (question_prompt(example), answer): 0.6,
        (hinted_prompt(example, worked_hint(example)), answer): 0.2,
        (hint_request(example, True), hint): 0.1,
        (hint_request(example, False), hint): 0.1,
    }
    assert counts.keys() == expected.keys()
    for key, share in expected.items():
        assert counts[key] / 2000 == pytest.approx(share, abs=0.035)
    plain = {_sample(example, {None: examples}, draw, 0.0)[0].text for _ in range(50)}
    assert plain == {question_prompt(example)}
    # Only the hint tells a hinted question's answer: its image is any of them.
    assert seen[False] == {example.images} and seen[True] == {e.images for e in examples}


def test_a_hint_on_one_digit_stands_above_a_picture_of_the_other(tmp_path):
    """Where the warm-up shows small digits only, its hints are about the larger one of all pairs
    of which the other is small."""
    write_digits(tmp_path, train=60, test=1)
    every = load_omnimedvqa(tmp_path / "train", modalities=("scanned",))
    small = [e for e in every if e.question_type == SMALL_DIGITS]
    of_picture = {e.images: digits_of(e) for e in small}
    pictures, draw = _pictures(small, "one_digit"), random.Random(0)
    usable = [e for e in every if min(map(int, digits_of(e))) <= 5]
    named = set()
    for _ in range(300):
        prompt, text = _sample(small[0], pictures, draw, 1.0, usable, "one_digit")
        if "Hint: " in prompt.text:
            left, _, right = prompt.text.rpartition("Hint: ")[2].split()
            place, digit = (0, right) if left == "?" else (1, left)
            said = text.removeprefix("<think>").split(" = ")[0].split(" + ")
            assert said[1 - place] == digit and said[place] <= digit
            assert of_picture[prompt.images][place] == said[place]
            named.add(digit)
    assert {"6", "7", "8", "9"} <= named


def test_schedule_rises_then_falls_to_zero():
    rates = [_schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1.0 and rates[-1] < 0.001
    assert all(a >= b for a, b in pairwise(rates[4:]))
    assert _schedule(0, 1) == 1.0


def test_training_refuses_bad_settings_and_examples(folder, examples):
    vlm = VLM.load(folder)
    fine = dict(steps=1, batch_size=1, lr=1e-3, seed=0, progress=False)
    for bad in (dict(steps=0), dict(batch_size=0), dict(lr=0.0), dict(hint_fraction=1.5)):
        with pytest.raises(KepoConfigError, match=next(iter(bad))):
            train_supervised(vlm, examples, **{**fine, **bad})
    with pytest.raises(KepoConfigError, match="hint_style='both'"):
        train_supervised(vlm, examples, **fine, hint_style="both")
    with pytest.raises(KepoDataError, match="the rationale 'look left'; expected one like"):
        odd = [replace(examples[0], rationale="look left")]
        train_supervised(vlm, odd, **fine, hint_style="one_digit")
    with pytest.raises(KepoDataError, match="examples is empty"):
        train_supervised(vlm, [], **fine)
    with pytest.raises(KepoDataError, match=f"{examples[0].id}.*no rationale"):
        train_supervised(vlm, [replace(examples[0], rationale="")], **fine)


def test_evaluate_and_summary_refuse_empty_tables(examples):
    with pytest.raises(KepoDataError, match="examples is empty"):
        greedy_scores(None, [], TASK, max_tokens=4)
    with pytest.raises(KepoConfigError, match="batch_size is 0"):
        greedy_scores(None, examples, TASK, max_tokens=4, batch_size=0)
    with pytest.raises(KepoDataError, match=r"'MRI'.*'CT'"):
        summary({"CT": 1.0}, "MRI")
    with pytest.raises(KepoDataError, match="one other modality"):
        summary({"CT": 1.0}, "CT")


def test_summary_separates_the_source():
    assert summary({"CT": 0.9, "MRI": 0.5, "OCT": 0.25}, "CT") == (0.9, 0.375)
