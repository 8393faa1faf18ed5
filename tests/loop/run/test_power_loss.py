"""A run whose machine loses power goes on from what the disk kept, to the same bits and logs."""

import random
from pathlib import Path

import pytest
import toy_run
from faulty_disk import run_until_power_loss

from kepo.disk import durable
from kepo.run import manifest


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """Data, what the whole run ends with, and how many calls change something in it."""
    root = tmp_path_factory.mktemp("known")
    data = toy_run.write_dataset(root / "data")
    with toy_run.toys():
        right = toy_run.undisturbed(data, root / "whole" / "run")
        (root / "disk").mkdir()
        config = toy_run.config_of(data, root / "disk" / "run")
        calls = run_until_power_loss(config, 0, random.Random(0))
        assert right.has_logs_of(root / "disk" / "run")
    return data, right, calls


def survive(known, disk: Path, number: int) -> tuple[int, str]:
    """Losses of power that a run had, and what is wrong with it then."""
    data, right, calls = known
    rng = random.Random(number)
    losses = 0
    disk.mkdir()
    config = toy_run.config_of(data, disk / "run")
    for _ in range(2 + number % 3):
        try:
            made = run_until_power_loss(config, rng.randrange(1, int(0.45 * calls)), rng)
        except (Exception, SystemExit) as error:
            return losses, f"after {losses}: {error!r}"
        if made is not None:
            break
        losses += 1
    ended = toy_run.run(config)
    if ended.sentence is not None:
        return losses, ended.sentence
    wrong = right.wrong_weights(disk / "run")
    logs = right.has_logs_of(disk / "run")
    return losses, "" if not wrong and logs else f"weights {wrong}, logs whole: {logs}"


def survivals(known, root, numbers):
    root.mkdir()
    losses, faults = 0, []
    with toy_run.toys():
        for number in numbers:
            had, fault = survive(known, root / f"disk-{number}", number)
            assert fault or had >= 2
            losses += had
            if fault:
                faults.append(f"{number}: {fault}")
    return losses, faults


def test_a_few_losses_of_power(known, tmp_path):
    _, faults = survivals(known, tmp_path / "disks", range(3))
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_20_runs_of_two_losses_and_more(known, tmp_path, capsys):
    losses, faults = survivals(known, tmp_path / "disks", range(20))
    with capsys.disabled():
        print(f"\npower: {20 - len(faults)} of 20 runs survived, {losses} losses in all")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, name",
    [(durable, "sync"), (manifest, "sync")],
    ids=["renaming logs and records without a sync", "renaming checkpoints without a sync"],
)
def test_renaming_without_a_sync_would_be_seen(known, tmp_path, monkeypatch, module, name):
    monkeypatch.setattr(module, name, lambda path: None)
    _, faults = survivals(known, tmp_path / "disks", range(10))
    assert faults
