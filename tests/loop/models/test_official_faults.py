"""Faults of KEPO's official code that must not come back: planted, each makes its check fail."""

import faults
import pytest

from kepo.errors import KepoConfigError

FAULTS = {
    "1 gate on the total": (faults.gate_reads_accuracy, faults.gate_on_the_total),
    "2 trigger on zero format": (
        faults.trigger_reads_accuracy,
        faults.trigger_needs_zero_format_too,
    ),
    "3 hints shifted": (faults.every_prompt_has_its_own_hint, faults.hints_shifted_by_one),
    "3 hints several per prompt": (
        faults.every_prompt_has_its_own_hint,
        faults.hints_several_per_prompt,
    ),
    "4 all or nothing": (faults.single_successes_are_kept, faults.all_or_nothing),
    "4 with replacement": (faults.successes_take_the_places_of_the_worst, faults.with_replacement),
    "4 blind to rewards": (faults.successes_take_the_places_of_the_worst, faults.blind_to_rewards),
    "4 healthy groups": (
        faults.healthy_groups_are_left_alone,
        faults.every_group_of_a_triggered_rank,
    ),
    "5 no correction": (
        faults.hinted_tokens_are_weighted_by_the_ratio_of_the_laws,
        faults.no_correction,
    ),
    "5 behaviour without the hint": (
        faults.hinted_tokens_are_weighted_by_the_ratio_of_the_laws,
        faults.behaviour_without_the_hint,
    ),
    "5 another law": (
        faults.the_law_that_samples_is_the_law_that_is_kept,
        faults.kept_before_the_warpers,
    ),
    "6 answer in the prompt": (
        faults.the_answer_does_not_reach_the_student,
        faults.prompt_gives_the_answer,
    ),
    "6 no leak filter": (faults.the_answer_does_not_reach_the_student, faults.no_leak_filter),
    "6 accuracy is enough": (
        faults.accepted_samples_are_whole_and_silent_about_the_hint,
        faults.accuracy_is_enough,
    ),
    "7 empty gate": (faults.nothing_open_is_zero, faults.divided_by_the_open_tokens_alone),
    "7 parts by their own tokens": (
        faults.parts_weigh_by_their_tokens,
        faults.each_part_by_its_own_tokens,
    ),
    "8 first match": (faults.odd_hints_do_not_end_the_run, faults.first_match_or_crash),
    "8 format": (faults.braces_are_text, faults.prompts_by_format),
}
CRASHES = {"8 first match": KepoConfigError, "8 format": KepoConfigError}
"""What ended the run where the others went on with something wrong."""
CHECKS = list(dict.fromkeys(check for check, _ in FAULTS.values()))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_loop_is_without_the_fault(check):
    check()


@pytest.mark.parametrize("name", FAULTS)
def test_the_check_fails_where_the_fault_is(name, monkeypatch):
    check, plant = FAULTS[name]
    plant(monkeypatch)
    with pytest.raises(CRASHES.get(name, AssertionError)):
        check()


def test_every_item_is_there_and_named():
    assert {name.split()[0] for name in FAULTS} == set("12345678")
    assert all(check.__doc__.startswith(name[0] + ".") for name, (check, _) in FAULTS.items())
