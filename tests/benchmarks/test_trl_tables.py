"""The tables about TRL: of its options, of its losses, of the products."""

import dataclasses

import pytest

pytest.importorskip("trl", minversion="1.16")
pytest.importorskip("datasets")

from trl import DistillationConfig, GRPOConfig

from benchmarks.trl import options, tables
from benchmarks.trl.distillation_equality import Shape, by_trl, by_us, work
from benchmarks.trl.grpo_equality import CASES
from benchmarks.trl.options import EQUAL, FALLBACK, HEAD, JOINT, Row

SHOWN_ELSEWHERE = {
    "disable_dropout pad_to_multiple_of mask_truncated_completions max_completion_length",
    "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps num_iterations steps_per_generation",
    "entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target use_vllm",
    "vllm_importance_sampling_correction vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap sapo_temperature_neg sapo_temperature_pos epsilon",
    "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg router_aux_loss_coef",
}
"""Options whose effect every case of a kind has: a mask, a normaliser, a ratio, a constant."""


def test_every_option_has_a_verdict():
    found = list(options.rows())
    for config, adapters in ((GRPOConfig, (HEAD, JOINT)), (DistillationConfig, (None,))):
        names = {field.name for field in dataclasses.fields(config)} - {"loss_type"}
        for adapter in adapters:
            of_adapter = [
                row.option
                for row in found
                if row.config == config.__name__ and adapter in (None, row.adapter)
            ]
            listed = [name for name in of_adapter if not name.startswith("loss_type=")]
            assert sorted(listed) == sorted(names)
    kinds = {row.option for row in found if row.option.startswith("loss_type=")}
    assert {f"loss_type={kind}" for kind in ("grpo", "dapo", "vespo", "sapo")} <= kinds


def test_an_option_that_is_new_is_an_error(monkeypatch):
    @dataclasses.dataclass
    class Newer(GRPOConfig):
        surprise: float = 0.0

    monkeypatch.setattr("trl.GRPOConfig", Newer)
    with pytest.raises(KeyError, match="surprise"):
        list(options.rows())


def test_a_loss_type_that_is_new_is_an_error(monkeypatch):
    monkeypatch.setattr(options, "loss_types", lambda: {"dapo", "newpo"})
    with pytest.raises(KeyError, match="newpo"):
        list(options.rows())


def test_what_is_said_of_losses_is_compared():
    """An option that is equal or a fallback in the joint loss has a case that sets it."""
    compared = {name for case in CASES for name in case.settings} | {"beta"}
    kinds = {case.settings.get("loss_type", "dapo") for case in CASES}
    elsewhere = {name for names in SHOWN_ELSEWHERE for name in names.split()}
    for row in options.rows():
        if row.adapter != JOINT or row.verdict not in (EQUAL, FALLBACK):
            continue
        if row.option.startswith("loss_type="):
            assert row.option.removeprefix("loss_type=") in kinds
        elif row.option not in options.INHERITED:
            assert row.option in compared | elsewhere, row.option


def test_files_and_page_are_those_of_the_installed_release():
    assert tables.read("trl_options.csv", Row) == list(options.rows())
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.START + tables.page_tables() + tables.END in page
    compared = {x.formula for x in tables.read("trl_equality.csv", tables.Equal)}
    assert compared >= {case.name for case in CASES}


@pytest.mark.parametrize(("beta", "most"), [(0.0, 0.62), (1.0, 0.62), (0.5, 0.45)])
def test_products_of_the_heads(beta, most):
    """At the ratio of widths of a 2B student and a 14B teacher."""
    shape = Shape(rows=64, vocabulary=1024)
    ours, theirs = (work(by, beta, shape, times=0).flops for by in (by_us, by_trl))
    assert ours <= most * theirs
    x = 2 * shape.rows * shape.vocabulary
    assert ours == 3 * x * shape.student + x * shape.teacher
