"""The model of a call's time agrees with what an H100 and an H200 measured."""

import csv
from dataclasses import dataclass

import pytest

from tools import gpu_roofline

WITHIN = 0.10  # of the measured time; on the H100, whose parts it has, it was within 6 %


@pytest.fixture(scope="module")
def sources() -> gpu_roofline.Sources:
    return gpu_roofline.Sources.read()


@pytest.mark.parametrize("card", gpu_roofline.CARDS)
@pytest.mark.parametrize("case", gpu_roofline.CASES)
def test_the_model_reproduces_what_was_measured(sources, case, card):
    """The sum of parts that were timed alone on an H100, against whole calls."""
    parts = gpu_roofline.modelled(case, card, sources)
    assert sum(parts.values()) == pytest.approx(sources.number(case, "ours", card=card), rel=WITHIN)
    bare = parts["products"] + parts["dW"]
    assert bare == pytest.approx(sources.number(case, "floor", card=card), rel=WITHIN)


def test_chunks_are_as_long_as_the_probes(sources):
    for case, (teacher, plain, _, _) in gpu_roofline.CASES.items():
        chunks = int(sources.launches[case]["chunks"])
        assert chunks * gpu_roofline.PROBED == teacher + plain


@dataclass
class Changed:
    """A file with some seconds multiplied."""

    case: str
    provider: str
    times: float

    def of(self, sources: gpu_roofline.Sources) -> gpu_roofline.Sources:
        def changed(row: dict[str, str]) -> dict[str, str]:
            if row["case"] != self.case or not row["provider"].startswith(self.provider):
                return row
            return row | {"seconds": str(float(row["seconds"]) * self.times)}

        rows = [changed(row) for row in sources.measured["H100"]]
        return sources._replace(measured=sources.measured | {"H100": rows})


@pytest.mark.parametrize(
    "change",
    [
        Changed("probe_product", "teacher wide", 1.4),
        Changed("probe_product", "dW", 2.0),
        Changed("probe_row_forward", "", 2.0),
        Changed("probe_row_backward", "JSD", 2.5),
    ],
)
def test_a_wrong_part_is_seen(sources, change):
    parts = gpu_roofline.modelled("kd_open", "H100", change.of(sources))
    measured = sources.number("kd_open", "ours")
    assert abs(sum(parts.values()) / measured - 1) > WITHIN


def test_an_h200_reads_and_writes_faster_and_multiplies_as_fast(sources):
    slow, fast = (gpu_roofline.modelled("kd_open", card, sources) for card in gpu_roofline.CARDS)
    faster = sources.bandwidth / sources.bandwidth_of("H200")
    for part in ("softmax", "divergence", "backward", "scaled"):
        assert fast[part] == pytest.approx(slow[part] * faster, rel=0.02)  # hardly issue-bound
    for part in ("products", "dW"):
        assert 0.9 * slow[part] < fast[part] < slow[part]


def test_instructions_bound_a_kernel_that_has_too_many(sources):
    many = dict.fromkeys(sources.instructions, 400.0)
    parts = gpu_roofline.modelled("kd_open", "H200", sources._replace(instructions=many))
    slots = gpu_roofline.N * gpu_roofline.V * 400 / gpu_roofline.ISSUE
    lanes = gpu_roofline.MULTIPROCESSORS * gpu_roofline.LANES
    assert parts["divergence"] == pytest.approx(slots / lanes / gpu_roofline.CLOCK)


def test_the_table_prints_and_is_written(tmp_path, capsys):
    file = tmp_path / "roofline.csv"
    assert gpu_roofline.main(["--csv", str(file)]) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(file.open()))
    assert [(row["card"], row["case"]) for row in rows] == [
        (card, case) for card in gpu_roofline.CARDS for case in gpu_roofline.CASES
    ]
    for row in rows:
        total = sum(float(row[part]) for part in gpu_roofline.PARTS)
        assert float(row["total"]) == pytest.approx(total, abs=0.05)
        assert row["total"] in printed
        if row["goal"]:
            assert row["met"] == ("yes" if float(row["total"]) <= float(row["goal"]) else "no")
    assert "measured: nvidia-h100" in printed and "guessed: " in printed


def test_a_file_without_the_probe_is_refused(tmp_path):
    file = tmp_path / "nvidia-h100_quick.csv"
    file.write_text("shape,case,provider,seconds,gb_per_s\n,copy,torch,0.001,3000\n")
    with pytest.raises(SystemExit, match=r"quick\.csv: no seconds of probe_product"):
        gpu_roofline.main(["--results", str(file)])
