"""Every preset runs two steps on tiny models and does what its file says."""

import zlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from small import config_of

from kepo import loop as train_module
from kepo.config import load, presets
from kepo.models.vlm import VLM
from kepo.objective import step
from kepo.run import roles
from kepo.run.metrics import read_metrics
from kepo.tasks.multiple_choice import MultipleChoice
from kepo.tasks.task import Task

RULES = {}
"""By preset: what a run of it must show."""
SETTINGS = {
    # Groups so small, and so many, that in some of them accuracy and format are zero throughout.
    "kepo_official": dict(prompts_per_step=8, num_generations=2),
    "kdpo_tau1": dict(seed=1),  # with which some completion has the format alone
}


def rule(*names):
    def add(check):
        for name in names:
            RULES.setdefault(name, []).append(check)
        return check

    return add


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """Runs a preset; what it asked, scored and wrote. An untrained model never answers: one text in
    four is right instead, one in two has the format, and whatever the teacher writes is a hint."""
    seen = SimpleNamespace(loaded=[], batches=[], micros=[], asked=[], drift=[])

    def watch(owner, name, note):
        whole = getattr(owner, name)

        def watched(*arguments, **settings):
            result = whole(*arguments, **settings)
            note(result, *arguments, **settings)
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(roles, "_load", lambda r, path, *rest, **settings: seen.loaded.append(path))
    watch(
        train_module, "collate", lambda batch, groups, *rest: seen.batches.append((groups, batch))
    )
    watch(train_module, "kepo_step", lambda r, *arguments: seen.micros.append(arguments[2]))
    watch(step, "drift_weights", lambda weights, *rest: seen.drift.append(weights))
    watch(VLM, "encode", lambda r, vlm, prompts: seen.asked.extend(p.text for p in prompts))
    monkeypatch.setattr(MultipleChoice, "hint_of", lambda task, text: "look left")
    code = lambda text: zlib.crc32(text.encode())  # noqa: E731
    monkeypatch.setattr(MultipleChoice, "is_right", lambda t, text, e: code(text) % 4 == 1)
    monkeypatch.setattr(MultipleChoice, "is_formatted", lambda t, text: code(text) % 5 in (1, 2))

    def start(name, **settings):
        shared = dict(steps=2, log_completions_every=1, lr=1e-4)
        seen.config = config_of(made, tmp_path, name, **{**shared, **settings})
        assert train_module.train(seen.config).exit_code == 0
        seen.steps = read_metrics(tmp_path / "metrics.jsonl")
        seen.lines = read_metrics(tmp_path / "completions.jsonl")
        before = load_file(made / "student" / "model.safetensors")
        after = load_file(
            tmp_path / "checkpoints" / "step-00000002" / "policy" / "model.safetensors"
        )
        seen.moved = any(not torch.equal(before[key], after[key]) for key in before)
        return seen

    return start


def total(seen, key):
    return sum(record[f"kepo/{key}"] for record in seen.steps)


def about_hints(seen):
    """Prompts that ask the teacher for a hint, and those that show one to the student."""
    requests = [text for text in seen.asked if text.endswith(Task.hint_instruction)]
    return requests, [text for text in seen.asked if "\nHint: look left" in text]


def right(seen):
    return [r.rewards["accuracy"] == 1.0 for groups, _ in seen.batches for g in groups for r in g]


@pytest.mark.parametrize("name", presets())
def test_preset(run, made, name):
    seen = run(name, **SETTINGS.get(name, {}))
    assert [record["step"] for record in seen.steps] == [1, 2]
    for record in seen.steps:
        assert all(isinstance(x, (int, float)) for x in record.values())
        assert torch.tensor(list(record.values()), dtype=torch.float64).isfinite().all()
        assert record["grad_norm"] > 0 and record["skipped"] == 0
    assert seen.moved and len(seen.lines) == sum(len(batch) for _, batch in seen.batches)
    teacher = str(made / "teacher")
    assert (teacher in seen.loaded) == (seen.config.teacher is not None)
    assert name in RULES
    for check in RULES[name]:
        check(seen)


def test_every_preset_has_its_rule():
    assert set(RULES) == set(presets())


@rule("sft", "grpo", "dr_grpo", "dapo")
def no_teacher(seen):
    assert seen.config.teacher is None
    assert (
        total(seen, "teacher_tokens")
        == total(seen, "distill_loss")
        == total(seen, "gate_rate")
        == 0
    )


@rule("grpo", "dr_grpo", "dapo", "gkd", "opd", "opd_jsd", "kdpo_tau0", "kdpo_tau1", "sft", "sod")
@rule("first_error", "after_error")
def no_hints(seen):
    assert total(seen, "hint_groups") == total(seen, "hinted_rate") == 0


@rule("grpo", "dr_grpo", "opd", "opd_jsd", "kdpo_tau0", "kdpo_tau1", "sod")
def own_samples_only(seen):
    assert total(seen, "sampled_completions") == 2 * 2 * 4 and total(seen, "data_completions") == 0


@rule("sft")
def nothing_is_sampled(seen):
    assert total(seen, "sampled_completions") == 0 and total(seen, "data_completions") == 4
    assert all(r["from_data"] and r["advantage"] == 1.0 for r in seen.lines)
    # The mean over all tokens of both worked answers of a step.
    for _, batch in seen.batches:
        weights = batch.policy_weights[batch.completion_mask]
        assert weights.tolist() == pytest.approx([1 / len(weights)] * len(weights))


@rule("opd", "opd_jsd", "gkd")
def the_divergence_alone(seen):
    for record in seen.steps:
        assert record["kepo/policy_loss"] == pytest.approx(0.0, abs=1e-6)
        assert record["kepo/distill_loss"] > 0 and record["kepo/gate_rate"] == 1.0
        assert record["kepo/teacher_tokens"] == record["kepo/completion_tokens"]
    assert not any(batch.policy_weights.any() for _, batch in seen.batches)


@rule("opd")
def the_divergence_is_that_of_the_student_from_the_teacher(seen):
    assert seen.config.beta == 1.0


@rule("opd_jsd", "gkd")
def the_divergence_is_the_jsd(seen):
    assert seen.config.beta == 0.5


@rule("gkd")
def half_is_from_the_data(seen):
    assert total(seen, "data_completions") == 2 and total(seen, "sampled_completions") == 2 * 4
    assert sum(r["from_data"] for r in seen.lines) == 2
    for groups, batch in seen.batches:  # and half of the weight, though one completion in five
        own = batch.distill_weights[: sum(map(len, groups))].sum()
        assert own.item() == pytest.approx(0.5) == 1 - own.item()


@rule("dr_grpo")
def no_deviation_and_a_constant_normaliser(seen):
    for groups, batch in seen.batches:
        rewards = torch.tensor([[sum(r.rewards.values()) for r in group] for group in groups])
        distance = rewards - rewards.mean(-1, keepdim=True)
        torch.testing.assert_close(batch.advantages, distance.flatten())
        assert distance.any()
        weights = batch.policy_weights[batch.completion_mask]
        assert weights.unique().tolist() == pytest.approx([1 / (8 * 8)])


@rule(
    "grpo",
    "kdpo_tau0",
    "kdpo_tau1",
    "kepo",
    "kepo_official",
    "retry",
    "first_error",
    "privileged",
    "guide",
)
def relative_advantages_and_sequence_means(seen):
    for groups, batch in seen.batches:
        rewards = torch.tensor([[sum(r.rewards.values()) for r in group] for group in groups])
        deviation = rewards.std(-1, keepdim=True) + 1e-4
        relative = (rewards - rewards.mean(-1, keepdim=True)) / deviation
        torch.testing.assert_close(batch.advantages, relative.flatten())
        n = len(batch)
        assert batch.policy_weights.sum(-1).tolist() == pytest.approx([1 / n] * n)


@rule("dapo")
def two_iterations_token_mean_exchange_and_fine(seen):
    config = seen.config
    assert (config.epsilon_low, config.epsilon_high) == (0.2, 0.28)
    passes = [micro.old_logprobs is not None for micro in seen.micros]
    # Two groups of four in micro-batches of at most three: each in halves.
    assert passes == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4
    for _, batch in seen.batches:
        weights = batch.policy_weights[batch.completion_mask]
        assert weights.unique().tolist() == pytest.approx([1 / len(weights)])
    assert all("overlong" in r["rewards"] for r in seen.lines)
    assert seen.config.dynamic_reward == "accuracy"
    # Three rounds more at most, of whole groups.
    extra, remainder = divmod(total(seen, "sampled_completions") - 2 * 2 * 4, 4)
    assert total(seen, "resampled_groups") <= extra <= 2 * 3 * 2 and remainder == 0


@rule("first_error", "after_error")
def the_two_spans_are_a_part_of_all_tokens_each(seen):
    for record, (_, batch) in zip(seen.steps, seen.batches, strict=True):
        distilled, asked = record["kepo/distilled_tokens"], record["kepo/teacher_tokens"]
        firsts = {"first_error": distilled, "after_error": asked - distilled}
        # Untrained, the teacher gives every token little: the first one is the error.
        assert firsts[seen.config.distill_tokens] == len(batch) and 0 < distilled < asked
        assert record["kepo/gate_rate"] == 1.0
    assert total(seen, "distill_loss") > 0


@rule("kdpo_tau0", "sod")
def every_sample_is_distilled_on(seen):
    assert all(record["kepo/gate_rate"] == 1.0 for record in seen.steps)
    assert total(seen, "distill_loss") > 0 and any(
        batch.advantages.any() for _, batch in seen.batches
    )


@rule("kdpo_tau1", "kepo_official")
def the_gate_reads_the_total(seen):
    opened = [x for _, batch in seen.batches for x in batch.opened.tolist()]
    rollouts = [r for groups, _ in seen.batches for group in groups for r in group]
    assert opened == [sum(r.rewards.values()) >= 1 for r in rollouts]
    assert any(opened) and opened != right(seen)  # the format alone opens it


@rule("kepo")
def the_gate_reads_accuracy_and_failed_groups_are_rescued(seen):
    opened = [x for _, batch in seen.batches for x in batch.opened.tolist()]
    assert opened == right(seen) and 0 < sum(opened) < len(opened)
    assert total(seen, "teacher_tokens") < sum(
        record["kepo/completion_tokens"] for record in seen.steps
    )
    assert total(seen, "hint_groups") > 0 and total(seen, "hint_accepted") > 0
    assert total(seen, "rescue_rate") > 0 and total(seen, "hinted_rate") > 0
    for r in seen.lines:
        assert "Hint:" not in r["prompt"]
        assert r["hint"] is None or r["rewards"]["accuracy"] == 1.0
    requests, hinted = about_hints(seen)
    assert requests and hinted and not any("answer is" in text for text in requests + hinted)


@rule("retry")
def failed_groups_are_sampled_again_without_a_hint(seen):
    assert total(seen, "hint_groups") > 0 and total(seen, "hint_accepted") > 0
    assert total(seen, "hints_written") == total(seen, "hinted_rate") == 0
    assert about_hints(seen) == ([], []) and not any(r["hint"] for r in seen.lines)
    assert [x for _, batch in seen.batches for x in batch.opened.tolist()] == right(seen)


@rule("privileged")
def the_teacher_sees_hints_where_every_answer_is_wrong(seen):
    assert total(seen, "hint_groups") == total(seen, "hints_written") > 0
    assert total(seen, "sampled_completions") == 2 * 2 * 4 and total(seen, "hinted_rate") == 0
    for groups, batch in seen.batches:
        shown = [prompt.text for prompt in batch.teacher_prompts]
        failed = [not any(r.rewards["accuracy"] for r in group) for group in groups]
        told = [bad for group, bad in zip(groups, failed, strict=True) for _ in group]
        assert ["\nHint: look left" in text for text in shown] == told
        assert not any("Hint:" in prompt.text for prompt in batch.prompts)
        rewards = [r.rewards["accuracy"] for group in groups for r in group]
        assert batch.opened.tolist() == [a or r == 1.0 for a, r in zip(told, rewards, strict=True)]
    assert 0 < total(seen, "teacher_hinted_rate") < 2


@rule("guide")
def hints_alone_with_their_ratio_inside_the_clip(seen):
    assert total(seen, "hint_accepted") > 0 and total(seen, "hinted_rate") > 0
    assert total(seen, "teacher_tokens") == total(seen, "distill_loss") == 0
    assert seen.config.hinted_correction == "clip" and seen.config.num_iterations == 1


@rule("kepo_official")
def hints_come_where_both_rewards_are_zero_and_tell_the_answer(seen):
    requests, hinted = about_hints(seen)
    assert requests and hinted and all("The answer is " in text for text in requests + hinted)
    assert (seen.config.sampling_temperature, seen.config.top_p) == (0.9, 0.95)
    # Another law samples than is scored, and the gap is seen.
    assert all(r["sampling/sampling_logp_difference/mean"] > 0.02 for r in seen.steps)


@rule("grpo", "opd", "kepo", "dapo")
def what_trains_is_what_sampled(seen):
    # Up to the few tokens that cannot be sampled, which have some probability for the trainer.
    for record in seen.steps:
        assert record["sampling/sampling_logp_difference/max"] < 0.15


@rule("sod")
def steps_are_weighted(seen):
    assert len(seen.drift) == len(seen.micros) == 8 and seen.config.beta == 1.0
    assert seen.config.policy_reduction == "token_mean" and seen.config.epsilon_high == 0.28


def test_presets_are_layers_like_any_other():
    assert load("kepo", "grpo").hint_trigger == "never"
    assert load("dapo", "kdpo_tau0").num_iterations == 2
