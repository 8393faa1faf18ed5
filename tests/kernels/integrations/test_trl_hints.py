"""Hints in KepoGRPOTrainer: who is asked again, and what takes the place of what."""

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")

from benchmarks.trl.grpo_equality import Case, trainer
from kepo_kernels import KepoInputError
from kepo_kernels.integrations.trl import KepoGRPOTrainer

HINT = 93
"""The id of w91."""


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def made(folder, hinted_prompts, **more):
    """A trainer that completes a prompt by the prompt itself, backwards."""
    how = dict(gate_reward="length", gate_threshold=4.0, hinted_prompts=hinted_prompts)
    found = trainer(Case("dapo"), KepoGRPOTrainer, folder, **how | more)
    found.asked = []

    def backwards(prompt_ids, *_, **__):
        found.asked.append(prompt_ids)
        return [ids[::-1] for ids in prompt_ids], None

    found._generate_single_turn = backwards
    return found


SHORT, LONG = "w1 w2 w3", "w1 w2 w3 w4 w5"


def rows(*prompts):
    return [{"prompt": prompt, "note": f"of {prompt}"} for prompt in prompts for _ in range(4)]


def test_a_hinted_completion_stands_behind_the_plain_prompt(folder):
    told = []

    def hinted(prompts, completions, examples):
        told.append((prompts, completions, examples))
        return [f"w91 {prompt}" for prompt in prompts[:3]] + [None]

    one = made(folder, hinted)
    output = one._generate_and_score_completions(rows(SHORT, LONG))
    [(prompts, completions, examples)] = told
    assert prompts == [SHORT] * 4 and completions == ["w3 w2 w1"] * 4
    assert [example["note"] for example in examples] == [f"of {SHORT}"] * 4
    assert len(one.asked) == 2 and len(one.asked[1]) == 8
    ends = output["completion_ids"] == HINT
    assert ends.any(1).tolist() == [True] * 3 + [False] * 5
    assert not (output["prompt_ids"] == HINT).any()
    assert output["kepo_gate"].tolist() == [0.0] * 8  # there is no teacher
    metrics = one._metrics["train"]
    assert metrics["kepo/hinted_share"] == [3 / 8]
    assert metrics["rewards/length/mean"] == [(3 * 4 + 3 + 4 * 5) / 8]


def test_nobody_is_asked_again_without_need(folder):
    one = made(folder, lambda *_: pytest.fail("nothing has failed"))
    one._generate_and_score_completions(rows(LONG, LONG))
    assert len(one.asked) == 1
    assert one._metrics["train"]["kepo/hinted_share"] == [0.0]
    one.model.eval()
    one._generate_and_score_completions(rows(SHORT, SHORT))
    assert len(one.asked) == 2  # in evaluation there are no hints


def test_one_open_completion_is_enough(folder):
    """A prompt of which one completion is open is none of the failed."""
    one = made(folder, lambda *_: pytest.fail("nothing has failed"))
    plain = one._generate_single_turn

    def first_is_longer(prompt_ids, *given):
        found, logprobs = plain(prompt_ids, *given)
        return [[5, *found[0]], *found[1:]], logprobs

    one._generate_single_turn = first_is_longer
    one._generate_and_score_completions(rows(SHORT))
    assert len(one.asked) == 1


def test_hints_need_a_gate_and_one_turn(folder):
    with pytest.raises(KepoInputError, match="hinted_prompts is given without gate_reward"):
        made(folder, lambda *_: [], gate_reward=None)
    with pytest.raises(KepoInputError, match="hinted_prompts is given beside tools"):
        made(folder, lambda *_: [], rollout_func=lambda prompts, trainer: {})


async def later(prompts, completions, examples):
    return prompts


@pytest.mark.parametrize("given", [["w1"], later, "w91"], ids=["list", "async", "text"])
def test_what_is_no_plain_function_is_refused(folder, given):
    with pytest.raises(KepoInputError, match=r"hinted_prompts is .*; expected a plain function"):
        made(folder, given)


@pytest.mark.parametrize("found", [["w91"], None, {"a": 1}, "abcd"], ids=str)
def test_hints_of_another_number_or_kind_are_refused(folder, found):
    """A text as long as the group would be read as prompts of one letter."""
    one = made(folder, lambda *_: found)
    with pytest.raises(
        KepoInputError, match=r"hinted_prompts: it returned a .*expected a list of 4"
    ):
        one._generate_and_score_completions(rows(SHORT))
