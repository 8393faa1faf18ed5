"""A name on the Hub without a network: it is said in seconds, and what is cached is read."""

import os
import subprocess
import sys
import threading

import pytest

pytest.importorskip("transformers")

import huggingface_hub
from huggingface_hub import constants, utils
from places import ROOT

from kepo.data import network
from kepo.data.identity import model_files
from kepo.errors import KepoCheckpointError, KepoConfigError, KepoDataError
from kepo.models.reading import read_config
from kepo.planner import model_sizes


class Session:
    def __init__(self, head):
        self.head = head


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """The Hub as a function that answers; the state of its library is put back afterwards."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "_ours", threading.Event())
    monkeypatch.setattr(network, "WAIT", 0.3)
    return lambda head: monkeypatch.setattr(utils, "get_session", lambda: Session(head))


def refused(url, timeout):
    raise ConnectionError("no network")


def test_a_hub_that_does_not_answer_is_waited_for_a_little_and_asked_again(hub):
    over, waited_for = threading.Event(), []
    # As a name server that is not there.
    hub(lambda url, timeout: over.wait(60) or waited_for.append(url))
    network.look_for_hub("owner/name")
    assert waited_for == [] and huggingface_hub.constants.is_offline_mode()
    over.set()
    hub(lambda url, timeout: "404")
    network.look_for_hub("owner/name")
    assert not constants.is_offline_mode()
    hub(refused)
    network.look_for_hub("owner/name")
    assert constants.is_offline_mode()


def test_nobody_is_asked_about_a_path_nor_where_the_user_is_offline(hub, monkeypatch, tmp_path):
    hub(lambda url, timeout: pytest.fail("asked"))
    monkeypatch.setattr(network, "answers", lambda: pytest.fail("asked"))
    network.look_for_hub(tmp_path)
    network.look_for_hub("/no/such/folder")
    network.look_for_hub("./nope")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    network.look_for_hub("owner/name")
    assert constants.is_offline_mode()


def test_whoever_reads_a_name_looks_first(hub, monkeypatch, tmp_path):
    hub(refused)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for read, error in (
        (read_config, KepoCheckpointError),
        (model_sizes.read_config, KepoConfigError),
    ):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(error, match=r"^nobody/nothing"):
            read("nobody/nothing")
        assert constants.is_offline_mode()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert model_files("nobody/nothing") == [] and constants.is_offline_mode()


def test_a_dataset_by_name_is_looked_for_likewise(hub, monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    from kepo.data.load import load_examples

    hub(refused)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(KepoDataError, match=r"^nobody/nothing:train is not there"):
        load_examples("nobody/nothing:train")
    assert constants.is_offline_mode()


def test_the_command_ends_in_seconds(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "?", "answer": "x"}\n')
    words = ["data", "check", str(tmp_path / "a.jsonl"), "--task", "open_answer", "--model", "nope"]
    done = subprocess.run(
        [sys.executable, "-m", "kepo", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HUB_OFFLINE": "",
            "TRANSFORMERS_OFFLINE": "",
            "HF_HOME": str(tmp_path),
        },
        timeout=100,
    )
    assert done.returncode == 1 and "error: nope: cannot load a model from it" in done.stderr
    assert "Retry" not in done.stderr  # it was not asked again and again
