"""What a time is held against: the goals of this project, or the model where there is no goal."""

from __future__ import annotations

from benchmarks.losses.table import Row

FIRST_SHAPE = "qwen3vl-2b-32b"  # N = 8192, H = 2048, Ht = 5120, V = 151936
# Seconds that our own calls should need there on an H200.
H200 = {
    "kd_open": 46.5e-3,
    "kd_half": 24e-3,
    "joint_half": 35e-3,
    "grpo": 24.5e-3,
    "logprobs_forward": 8.2e-3,
    "logprobs": 33e-3,
}
# What a model of an H100 said before anything had been measured: no goals.
MODELLED_H100 = {
    "kd_open": 56e-3,
    "kd_half": 29.5e-3,
    "joint": 56e-3,
    "joint_half": 43e-3,
    "grpo": 29e-3,
    "logprobs_forward": 8.7e-3,
    "logprobs": 35e-3,
}
# Distillation at N = 8192, H = Ht = 4096, V = 128256 on an H100: a published JSD kernel's best.
PUBLISHED_SHAPE, PUBLISHED_SECONDS, PUBLISHED_BYTES = "llama-8b", 60e-3, 5.8e9
# Cases with the matrix products of another one, whose floor is theirs too.
SAME_PRODUCTS = {"kd_beta0": "kd_open", "kd_beta1": "kd_open"}


def judged(row: Row, machine: str, floors: dict[tuple[str, str], float]) -> Row:
    """The row with its time over the floor's, and with the goal of this card where it has one.

    floors: seconds by shape and case.
    """
    seconds, case, shape = row.get("seconds"), row.get("case"), row.get("shape")
    floor = floors.get((shape, SAME_PRODUCTS.get(case, case)))
    if seconds and floor:
        times = {"x_floor": "seconds", "x_floor_p20": "seconds_p20", "x_floor_p80": "seconds_p80"}
        row = row | {name: row[of] / floor for name, of in times.items()}
    if not seconds or row.get("provider") != "ours":
        return row
    if shape == FIRST_SHAPE and "H200" in machine and case in H200:
        return with_goal(row, H200[case], seconds <= H200[case], "goal of an H200")
    if shape == FIRST_SHAPE and "H100" in machine and case in MODELLED_H100:
        return noted(row, f"modelled for an H100: {1e3 * MODELLED_H100[case]:g} ms")
    if shape == PUBLISHED_SHAPE and case == "kd_open" and "H100" in machine:
        used = (row.get("peak_mib") or 0) * 2**20
        met = seconds <= PUBLISHED_SECONDS and used <= PUBLISHED_BYTES
        words = f"goal of an H100, and {used / 1e9:.2f} of {PUBLISHED_BYTES / 1e9:g} GB"
        return with_goal(row, PUBLISHED_SECONDS, met, words)
    return row


def with_goal(row: Row, target: float, met: bool, words: str) -> Row:
    return noted(row | {"target": target, "met": "yes" if met else "no"}, words)


def noted(row: Row, words: str) -> Row:
    return row | {"note": ", ".join(filter(None, (row.get("note"), words)))}
