"""What the page says of a real model's rows stands in the file that was measured."""

import re

import pytest
from places import ROOT

from benchmarks.losses import real, table

ROWS = table.read(ROOT / "benchmarks/results/bench_real_cpu_2core_2026-11-28.csv")
PAGE = (ROOT / "docs/costs.md").read_text(encoding="utf-8")


def of(temperature: float, case: str) -> dict[str, str]:
    name = f"real-{temperature:g}"
    (row,) = (r for r in ROWS if (r["shape"], r["case"]) == (name, f"ratio:{case}"))
    return row


def test_columns_that_are_kept():
    for temperature in real.TEMPERATURES:
        entropy = float(of(temperature, "kl_1/float32")["entropy"])
        cells = []
        for case in ("grpo_tol", "kd_tol"):
            for grad_tol in ("0.0006", "0.001", "0.01"):
                kept = float(of(temperature, f"{case}@{grad_tol}/kept_columns")["ratio"])
                error = float(of(temperature, f"{case}@{grad_tol}/gradient_error")["ratio"])
                cells.append(f"{kept:.0%} ({error:.1e})".replace("%", " %") if error else "all (0)")
        row = f"| {temperature:g} ({entropy:.2f} nat) | {' | '.join(cells)} |"
        assert row in PAGE, row


def test_bias_of_the_divergence():
    for temperature in real.TEMPERATURES:
        kl = [of(temperature, f"kl_1/bf16_{what}") for what in ("states", "logits", "all")]
        jsd = of(temperature, "kl_0.5/bf16_all")
        mean = float(re.search(r"mean ([\d.e+-]+)", kl[0]["note"])[1])
        rms = float(re.search(r"a token ([\d.e+-]+)", kl[1]["note"])[1])
        biases = " | ".join(f"{100 * float(one['ratio']):+.1f} %" for one in (*kl, jsd))
        row = f"| {temperature:g} | {mean:.4f} | {biases} | {100 * rms:.0f} % |"
        assert row in PAGE, row


def over_the_products(shape: str, case: str, provider: str) -> str:
    (row,) = (r for r in ROWS if (r["shape"], r["case"], r["provider"]) == (shape, case, provider))
    return f"{float(row['x_floor']):.2f}"


def test_times_over_the_bare_products():
    for temperature in real.TEMPERATURES:
        shape, cells = f"real-{temperature:g}", []
        for dense, sparse in (("kd_open", "kd_tol"), ("grpo", "grpo_tol")):
            cells += [over_the_products(shape, dense, who) for who in ("ours", "eager", "liger")]
            cells.append(over_the_products(shape, sparse, "ours"))
        row = f"| {temperature:g} | {' | '.join(cells)} |"
        assert row in PAGE, row


def test_peak_memory_in_words():
    """Within a twentieth at every temperature."""
    said = re.search(
        r"is (\d+) MiB \(ours\), (\d+) and (\d+) \(eager and Liger, KD\), (\d+) and (\d+) ", PAGE
    )
    peers = [(case, who) for case in ("kd_open", "grpo") for who in ("eager", "liger")]
    expected = dict(zip([("kd_open", "ours"), *peers], map(int, said.groups()), strict=True))
    found = [(expected.get((row["case"], row["provider"])), row["peak_mib"]) for row in ROWS]
    pairs = [(number, float(peak)) for number, peak in found if number]
    assert len(pairs) == len(expected) * len(real.TEMPERATURES)
    for number, peak in pairs:
        assert peak == pytest.approx(number, rel=0.05)
