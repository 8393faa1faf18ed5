"""AdamW with moments in 8 bits: near AdamW, and resumed to the bit, sharded or not."""

import dataclasses
from pathlib import Path

import pytest
import torch
from several import run_all
from small import config_of, run_rigged
from toy_run import config_of as toy_config
from toy_run import run, toys, weights, write_dataset

pytest.importorskip("bitsandbytes")

from kepo.config import Config
from kepo.errors import KepoCheckpointError
from kepo.objective.optimizers import Moment, optimizer_of, quantised, widened
from kepo.run.optimizer_state import load_optimizer, save_optimizer

CONFIG = Config(optimizer="adamw_8bit", lr=1e-2, weight_decay=0.1)
SHAPES = {"large": (300, 40), "odd": (129, 33), "small": (17, 4)}


def parameters() -> dict[str, torch.nn.Parameter]:
    made = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(s, generator=made)) for n, s in SHAPES.items()}


def stepped(named, optimizer, steps: range) -> None:
    for step in steps:
        made = torch.Generator().manual_seed(step)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=made)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_it_is_adamw_but_for_the_rounding_of_its_moments():
    found, whole = parameters(), parameters()
    stepped(found, optimizer_of(found.values(), CONFIG), range(10))
    plain = dataclasses.replace(CONFIG, optimizer="adamw")
    stepped(whole, optimizer_of(whole.values(), plain), range(10))
    before = parameters()
    for name in SHAPES:
        off = (found[name] - whole[name]).norm() / (whole[name] - before[name]).norm()
        assert off < (1e-5 if name == "small" else 0.05), name
    assert (found["large"] - whole["large"]).abs().max() > 0  # else nothing was rounded


def test_the_learning_rate_of_a_step_arrives():
    named = parameters()
    optimizer = optimizer_of(named.values(), CONFIG)
    optimizer.param_groups[0]["lr"] = 0.0
    stepped(named, optimizer, range(1))
    assert all(torch.equal(x, named[n]) for n, x in parameters().items())


def test_what_is_saved_goes_on_to_the_bit(tmp_path):
    named = parameters()
    optimizer = optimizer_of(named.values(), CONFIG)
    stepped(named, optimizer, range(5))
    save_optimizer(tmp_path, named, optimizer)
    again = {n: torch.nn.Parameter(x.detach().clone()) for n, x in named.items()}
    resumed = optimizer_of(again.values(), CONFIG)
    load_optimizer(tmp_path, again, resumed)
    stepped(named, optimizer, range(5, 8))
    stepped(again, resumed, range(5, 8))
    assert all(torch.equal(named[n], again[n]) for n in SHAPES)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    named = parameters()
    save_optimizer(tmp_path, named, optimizer_of(named.values(), CONFIG))
    fresh = parameters()
    resumed = optimizer_of(fresh.values(), CONFIG)
    load_optimizer(tmp_path, fresh, resumed)
    stepped(fresh, resumed, range(2))
    other = parameters()
    stepped(other, optimizer_of(other.values(), CONFIG), range(2))
    assert all(torch.equal(other[n], fresh[n]) for n in SHAPES)


@pytest.mark.parametrize("number", [1, 2])
def test_a_moment_is_widened_and_rounded_again(number):
    named = parameters()
    optimizer = optimizer_of(named.values(), CONFIG)
    stepped(named, optimizer, range(3))
    saved = optimizer.saved(named["odd"])
    moment = Moment(saved[f"state{number}"], saved[f"absmax{number}"])
    values = widened(moment, number)
    assert values.shape == SHAPES["odd"] and (values < 0).any() == (number == 1)
    code = optimizer._inner.name2qmap["dynamic" if number == 1 else "udynamic"]
    again = widened(quantised(values, code), number)
    torch.testing.assert_close(again, values, rtol=0.1, atol=0.01 * values.abs().max().item())


def test_moments_of_another_model_are_refused(tmp_path):
    named = parameters()
    optimizer = optimizer_of(named.values(), CONFIG)
    stepped(named, optimizer, range(1))
    save_optimizer(tmp_path, named, optimizer)
    for change, message in (
        ({"new": (3, 3)}, "does not know 'new'"),
        ({"odd": (129, 34)}, r"state1/odd has shape \[129, 33\], the model's is \[129, 34\]"),
    ):
        other = {n: torch.nn.Parameter(torch.zeros(s)) for n, s in (SHAPES | change).items()}
        with pytest.raises(KepoCheckpointError, match=message):
            load_optimizer(tmp_path, other, optimizer_of(other.values(), CONFIG))


# ---- whole runs ----


def test_a_run_that_is_interrupted_goes_on_to_the_same_bits(tmp_path):
    data = write_dataset(tmp_path / "data")
    with toys():
        assert run(toy_config(data, tmp_path / "whole", optimizer="adamw_8bit")).sentence is None
        for steps in (2, 5):
            config = toy_config(data, tmp_path / "parts", steps, optimizer="adamw_8bit")
            assert run(config).sentence is None
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert "absmax1/head" not in one  # too small for 8 bits: a real model comes below
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_run_of_plain_adamw_is_not_gone_on_with(tmp_path):
    data = write_dataset(tmp_path / "data")
    with toys():
        assert run(toy_config(data, tmp_path / "run", 1)).sentence is None
        ended = run(toy_config(data, tmp_path / "run", 2, optimizer="adamw_8bit"))
    assert "optimizer: 'adamw' -> 'adamw_8bit'" in ended.sentence


SETTINGS = dict(
    optimizer="adamw_8bit", gate_reward=None, hint_trigger="never", lr=2e-4, keep_checkpoints=9
)


@pytest.mark.slow
@pytest.mark.processes
def test_shares_are_saved_and_resumed(made, tmp_path):
    """Two processes with shares, then one, then two again: the weights of one run throughout, as
    near as 8 bits are, and to the bit where nothing was cut anew."""
    one = config_of(made, tmp_path / "one", **SETTINGS, steps=4)
    assert run_rigged(dataclasses.asdict(one)) == 0
    sharded = dict(SETTINGS, sharding="fsdp2", teacher_placement="fsdp2")
    configs = [
        config_of(made, tmp_path / "whole", **sharded, steps=4),
        config_of(made, tmp_path / "parts", **sharded, steps=2),
        config_of(made, tmp_path / "parts", **sharded, steps=4),
        config_of(made, tmp_path / "mixed", **sharded, steps=2),
    ]
    run_all(configs, tmp_path / "configs.json")
    mixed = config_of(made, tmp_path / "mixed", **SETTINGS, steps=4)
    assert run_rigged(dataclasses.asdict(mixed)) == 0
    final = {n: policy(tmp_path / n) for n in ("one", "whole", "parts", "mixed")}
    for name, x in final["whole"].items():
        assert torch.equal(x, final["parts"][name]), name
    moved = norm(final["one"], policy(tmp_path / "one", 0))
    assert norm(final["one"], final["whole"]) < 0.1 * moved
    assert norm(final["one"], final["mixed"]) < 0.1 * moved
    shares = list((tmp_path / "whole" / "checkpoints" / "step-00000004").glob("optimizer-*"))
    assert len(shares) == 2


def policy(run_dir: Path, step: int = 4) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    folder = run_dir / "checkpoints" / f"step-{step:08d}" / "policy"
    return load_file(folder / "model.safetensors")


def norm(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[n] - other[n]).square().sum()) for n in one) ** 0.5
