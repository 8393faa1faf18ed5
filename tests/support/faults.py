"""Faults of KEPO's official code, by the numbers of the list that this loop was written against.

A check states what is right. A fault, planted by a monkeypatch, is what the official code does
instead. test_official_faults.py pairs them.
"""

import random
import re
from dataclasses import replace

import pytest
import torch
from toy import (
    BARE,
    ENV,
    MALFORMED,
    RIGHT,
    WRONG,
    ScriptedVLM,
    TableVLM,
    drawn_logprob,
    example,
    group_of,
    hint_request,
    hinted_prompt,
    models_of,
    pieces,
    question_prompt,
    rollout,
)

from kepo.config import Config
from kepo.models import sampling
from kepo.models.sampling import SamplingLaw
from kepo.objective import batch, step
from kepo.objective.batch import collate
from kepo.objective.score import FrozenScores, score
from kepo.objective.step import kepo_step
from kepo.objective.totals import StepTotals
from kepo.rollout import hints
from kepo.rollout import rollouts as rollout_module
from kepo.rollout.types import total_reward
from kepo.tasks.multiple_choice import MultipleChoice
from kepo.tasks.task import Task
from kepo_kernels import loss_weights

CONFIG = Config(teacher="t", num_generations=4, num_hinted=2, max_attempts=3, impl="torch")


def helper(text="<hint>look left</hint>"):
    return ScriptedVLM(lambda prompt, nth: text)


def says(text):
    return ScriptedVLM(lambda prompt, nth: text)


def failed(name="bad"):
    return group_of([WRONG, MALFORMED, WRONG, WRONG], name)


def rescue(groups, policy=None, teacher=None, config=CONFIG, known=None):
    known = {} if known is None else known
    return hints.rescue(
        groups, models_of(policy or says(RIGHT), teacher or helper()), ENV, config, known
    )


# ---- 1: the gate ----


def gate_reads_accuracy():
    """1. Wrong but well-formatted answers are not distilled on."""
    opened = collate([group_of([WRONG, RIGHT, MALFORMED, BARE])], CONFIG).opened
    assert opened.tolist() == [False, True, False, True]


def gate_on_the_total(patch):
    patch.setattr(batch, "reward_of", lambda r, name, config: total_reward(r, config))


# ---- 2: the trigger ----


def trigger_reads_accuracy():
    """2. A group that is all wrong but well-formatted gets its hint."""
    policy = says(RIGHT)
    groups, _ = rescue([group_of([WRONG] * 4)], policy)
    assert policy.seen and sum(r.hinted for r in groups[0]) == 2


def trigger_needs_zero_format_too(patch):
    patch.setattr(
        hints, "all_failed", lambda g, config: not any(any(r.rewards.values()) for r in g)
    )


# ---- 3: pairing of prompts and hints ----


def every_prompt_has_its_own_hint():
    """3. From the second trigger on, too, each question is shown the hint about itself."""
    teacher, known = ScriptedVLM(lambda p, n: f"<hint>{p.split('?')[0]}</hint>"), {}
    for names in (("a", "b"), ("c", "d")):
        policy = says(RIGHT)
        rescue([failed(name) for name in names], policy, teacher, known=known)
        shown = [hinted_prompt(example(name), f"question {name}") for name in names]
        assert policy.seen == [prompt for prompt in shown for _ in range(2)]


def hints_shifted_by_one(patch):
    whole = hints.write_hints

    def shifted(*arguments):
        written = whole(*arguments)
        return written[1:] + written[:1]

    patch.setattr(hints, "write_hints", shifted)


def hints_several_per_prompt(patch):
    """As it was: the teacher samples as many as the student, and they are paired in order."""

    def doubled(teacher, examples, task, config):
        texts = [teacher.answer(hint_request(e, False), 0) for e in examples for _ in range(2)]
        found = [hints.WrittenHint(task.hint_of(text), len(text)) for text in texts]
        return found[: len(examples)]

    patch.setattr(hints, "write_hints", doubled)


# ---- 4: acceptance and injection ----


def single_successes_are_kept():
    """4. One success of a round is used, though another sample, or group, failed beside it."""
    policy = ScriptedVLM(lambda p, nth: RIGHT if "easy" in p and nth == 0 else WRONG)
    groups, _ = rescue([failed("easy"), failed("hopeless")], policy)
    assert [sum(r.hinted for r in group) for group in groups] == [1, 0]


def all_or_nothing(patch):
    whole = hints.sample

    def strict(*arguments, **settings):
        tries = whole(*arguments, **settings)
        if not all(hints.succeeds(r, CONFIG) for group in tries for r in group):
            return [[replace(r, rewards={"accuracy": 0.0}) for r in group] for group in tries]
        return tries

    patch.setattr(hints, "sample", strict)


def successes_take_the_places_of_the_worst():
    """4. Each success has a place of its own, and never that of an answer that was right."""
    always = replace(CONFIG, hint_trigger="always")
    for seed in range(20):
        random.seed(seed)
        groups, _ = rescue([group_of([RIGHT, WRONG, MALFORMED, BARE])], config=always)
        assert [r.hinted for r in groups[0]] == [False, True, True, False]


def _injected_at(choose):
    def inject(group, successes, config):
        group = list(group)
        for place, success in zip(choose(len(group), len(successes)), successes, strict=True):
            group[place] = success
        return group

    return lambda patch: patch.setattr(hints, "replace_worst", inject)


with_replacement = _injected_at(lambda n, k: random.choices([1, 2], k=k))
blind_to_rewards = _injected_at(lambda n, k: random.sample(range(n), k))


def healthy_groups_are_left_alone():
    """4. A group with a success is not touched because another one failed."""
    fine, policy = group_of([RIGHT, WRONG, WRONG, WRONG], "fine"), says(RIGHT)
    groups, _ = rescue([fine, failed()], policy)
    assert all(a is b for a, b in zip(groups[0], fine, strict=True))
    assert not any("question fine?" in prompt for prompt in policy.seen)


def every_group_of_a_triggered_rank(patch):
    patch.setattr(hints, "all_failed", lambda group, config: True)


# ---- 5: off-policy completions, and the law that samples ----


def hinted_tokens_are_weighted_by_the_ratio_of_the_laws():
    """5. With a correction the loss is that of pi(y|x) / pi(y|x, hint), at most the cap."""
    config = replace(CONFIG, hinted_correction="truncate", distill_coef=0.0, gate_reward=None)
    policy = TableVLM(1)
    groups, _ = rescue([failed()], policy, config=config)
    micro = collate(groups, config)
    loss, logprobs = kepo_step(policy, None, micro, FrozenScores(), config, StepTotals())
    told = torch.tensor([drawn_logprob("Hint:", t) for t in range(logprobs.shape[1])])
    ratio = torch.where(micro.hinted[:, None], (logprobs - told).exp().clamp(max=2.0), 1.0)
    truth = -(micro.policy_weights * ratio * micro.advantages[:, None]).sum()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-4)


def no_correction(patch):
    patch.setattr(step, "hinted_weights", lambda logprobs, *rest: torch.ones_like(logprobs))


def behaviour_without_the_hint(patch):
    """Ten times the log-probability: what the scripted policy says of a prompt without a hint."""
    whole = rollout_module.sample

    def plain(*arguments, **settings):
        groups = whole(*arguments, **settings)
        return [[replace(r, sampler_logprobs=r.sampler_logprobs * 10) for r in g] for g in groups]

    patch.setattr(hints, "sample", plain)


def the_law_that_samples_is_the_law_that_is_kept():
    """5. At temperature 0.7 and top_p 0.6 the kept number is that law's, not the model's own."""
    logits = torch.tensor([[2.0, 1.5, 0.0]])
    law = SamplingLaw(0.7, 0.6, seeds=[0], length=1)
    token, logprob = law(logits, torch.tensor([0]), 0)
    p = (logits / 0.7).softmax(-1)[0]
    assert p[0] > 0.6  # the nucleus is the first token alone
    assert token.item() == 0 and logprob.item() == 0.0


def kept_before_the_warpers(patch):
    def call(self, logits, rows, place):
        own = logits.float().log_softmax(-1)
        for warper in self._warpers:
            logits = warper(None, logits)
        token = sampling.draw(logits.log_softmax(-1), self._uniforms[rows, place])
        return token[:, 0], own.gather(1, token)[:, 0]

    patch.setattr(sampling.SamplingLaw, "__call__", call)


# ---- 6: leaks ----


def the_answer_does_not_reach_the_student():
    """6. Neither the prompt nor the hint states it, and no completion speaks of a hint."""
    policy = says(RIGHT)
    rescue([failed()], policy)
    assert policy.seen and not any("answer is" in prompt for prompt in policy.seen)
    leaked = says(RIGHT)
    rescue([failed()], leaked, helper("<hint>The answer is A</hint>"))
    assert leaked.seen == []


def prompt_gives_the_answer(patch):
    whole = rollout_module.prompt_of

    def telling(task, asked, hint=None, *, gives_answer=False):
        return whole(task, asked, hint, gives_answer=hint is not None)

    patch.setattr(rollout_module, "prompt_of", telling)


def no_leak_filter(patch):
    patch.setattr(MultipleChoice, "gives_away", lambda task, hint, example: False)


def accepted_samples_are_whole_and_silent_about_the_hint():
    """6. A completion that mentions the hint, was cut off, or lacks the format asked for, is not
    accepted."""
    both = replace(CONFIG, accept_reward="total", accept_threshold=2.0)
    for text in ("<think>The hint says so</think><answer>A</answer>", BARE):
        groups, _ = rescue([failed()], says(text), config=both)
        assert not any(r.hinted for r in groups[0])
    assert not hints.succeeds(rollout(RIGHT, truncated=True), CONFIG)


def accuracy_is_enough(patch):
    patch.setattr(hints, "succeeds", lambda r, config: r.rewards["accuracy"] >= 1)


# ---- 7: normalisation ----


def _losses(groups, size):
    policy, teacher, totals = TableVLM(1), TableVLM(5, hidden=5), StepTotals()
    config = replace(CONFIG, num_generations=len(groups[0]))
    parts = pieces(batch.collate(groups, config), size)
    for part, scores in zip(parts, score(teacher, None, parts, config, totals), strict=True):
        kepo_step(policy, teacher, part, scores, config, totals)
    return totals.of_all_ranks().distill_loss


def nothing_open_is_zero():
    """7. Where every gate is closed, the divergence and all of its weights are 0, and finite."""
    groups = [group_of([WRONG, MALFORMED])]
    assert (collate(groups, CONFIG).distill_weights == 0).all()
    assert _losses(groups, 2) == 0.0


def divided_by_the_open_tokens_alone(patch):
    def weights(mask, gate=None, reduction="token_mean"):
        weights = mask.double() if gate is None else mask.double() * gate[:, None]
        return weights / weights.sum()

    patch.setattr(batch, "loss_weights", weights)


def parts_weigh_by_their_tokens():
    """7. A step's token mean is the same however its completions are dealt out."""
    long = "<think>" + "x" * 40 + "</think>" + BARE
    groups = [group_of([RIGHT, WRONG]), group_of([long, BARE])]
    assert _losses(groups, 1) == pytest.approx(_losses(groups, 4), rel=1e-5)


def each_part_by_its_own_tokens(patch):
    whole = batch.Batch.select

    def select(self, places):
        part = whole(self, places)
        weights = loss_weights(part.completion_mask, part.opened)
        return replace(part, distill_weights=weights * len(part) / len(self))

    patch.setattr(batch.Batch, "select", select)


# ---- 8: texts that end a run ----


def odd_hints_do_not_end_the_run():
    """8. A hint that is missing, of several lines or doubled is a case like any other."""
    for text, usable in (
        ("none", False),
        ("<hint>look\nleft</hint>", True),
        ("<hint>a</hint>" * 2, False),
    ):
        policy = says(RIGHT)
        rescue([failed()], policy, helper(text))
        assert bool(policy.seen) == usable


def first_match_or_crash(patch):
    first = re.compile("<hint>(.*?)</hint>")
    patch.setattr(Task, "hint_of", lambda self, text: first.search(text).group(1))


def braces_are_text():
    """8. Braces in a question, an option or a hint are only text."""
    odd = example("q", question="Is {x} in {0} or {}?", options=("{a}", "%s"))
    for text in (
        question_prompt(odd),
        hint_request(odd, True),
        hinted_prompt(odd, "{h}"),
    ):
        assert text.startswith("Is {x} in {0} or {}?\nA. {a}\nB. %s\n")
    assert "Hint: {h}" in hinted_prompt(odd, "{h}")


def prompts_by_format(patch):
    def formatted(self, messages, hint):
        *earlier, last = messages
        said = (last["content"] + "\nHint: {hint}").format(hint=hint)
        return [*earlier, last | {"content": said}]

    patch.setattr(Task, "with_hint", formatted)
