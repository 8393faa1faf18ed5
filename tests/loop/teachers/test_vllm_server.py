"""A real vLLM server as the teacher: `vllm serve` in an environment of its own.

KEPO_VLLM_PYTHON names the Python of an environment that has vLLM: a tiny model is made and served.
Or KEPO_TEST_TEACHER_URL names a running server, and KEPO_TEST_TEACHER the folder of its model.
"""

import dataclasses
import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from PIL import Image
from several import free_port
from small import config_of, rigged

from kepo.config import Config
from kepo.data.load import load_omnimedvqa
from kepo.digits import tiny
from kepo.errors import KepoConfigError, KepoTeacherError
from kepo.loop import train
from kepo.miniature import tiny_models
from kepo.models.families.family import TinySize
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM
from kepo.rollout.prompts import hint_prompt, prompt_of
from kepo.run import milestones
from kepo.run.metrics import read_metrics
from kepo.tasks.multiple_choice import MultipleChoice
from kepo.teachers.first_words import check_law, check_sight, check_tokenizer, offer_of
from kepo.teachers.served import ServedTeacher
from kepo.teachers.transport import Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
TASK = MultipleChoice()
CONFIG = Config(teacher="t", teacher_top_k=20)
LONGEST_START = 600  # seconds
CLOSE = dict(rtol=0.0, atol=5e-4)  # vLLM computes in another order
SIZE = TinySize(hidden=128, layers=2, heads=2, vision_hidden=64, vision_depth=1)  # head_dim 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the model that is served."""
    if path := os.environ.get("KEPO_TEST_TEACHER"):
        return Path(path)
    if "KEPO_VLLM_PYTHON" not in os.environ:
        pytest.skip("neither KEPO_VLLM_PYTHON nor KEPO_TEST_TEACHER is set")
    folder = tmp_path_factory.mktemp("served") / "teacher"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models._SIZES, "teacher", SIZE)
        tiny.build_tiny(folder, size="teacher", seed=1)
    return folder


@contextmanager
def vllm_serves(folder, log, *more):
    """Yield the address of a vLLM that serves the folder's model, and a function that ends it."""
    with free_port() as port:
        pass
    command = [os.environ["KEPO_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", "tiny", "--max-model-len", "1024"]
    command += ["--dtype", "float32", "--enforce-eager", *more]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
    url = f"http://127.0.0.1:{port}/v1"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            end = time.monotonic() + LONGEST_START
            asked = Server("teacher", url, dataclasses.replace(CONFIG, teacher_retries=0))
            while True:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
                try:
                    asked.ask("/v1/models")
                    break
                except KepoTeacherError:
                    time.sleep(1)
            yield url, lambda: os.killpg(process.pid, signal.SIGKILL)  # its engine's process, too
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    if given := os.environ.get("KEPO_TEST_TEACHER_URL"):
        yield given
        return
    log = tmp_path_factory.mktemp("log") / "vllm.log"
    with vllm_serves(folder, log, "--enable-scale-out") as (address, _):
        yield address


@pytest.fixture(scope="module")
def local(folder):
    return VLM.load(folder)


@pytest.fixture(scope="module")
def teacher(url, local):
    server = Server("teacher", url, CONFIG)
    offer = offer_of(server, CONFIG)
    encoder = dataclasses.replace(local.encoder, positions=offer.positions)
    return ServedTeacher(server, offer.model, encoder, local.head_rows, CONFIG)


@pytest.fixture
def examples(made):
    return load_omnimedvqa(made / "data" / "train")[:3]


@pytest.mark.parametrize("pictures", ["one", "two", "none"])
def test_it_says_what_the_local_model_says(teacher, local, examples, pictures, tmp_path):
    prompts = [prompt_of(TASK, example) for example in examples]
    if pictures == "two":  # of different sizes, and a turn before them
        for number, size in enumerate([(64, 96), (160, 64)]):
            Image.new("RGB", size, (200 * number, 80, 9)).save(tmp_path / f"{number}.png")
        both = tuple(tmp_path / f"{number}.png" for number in range(2))
        turns = (("system", "Look."),)
        prompts = [dataclasses.replace(prompt, images=both, earlier=turns) for prompt in prompts]
    if pictures == "none":
        prompts = [dataclasses.replace(prompt, images=()) for prompt in prompts]
    completions = [[5, 17, 300, 2], [40], [7, 7, local.tokenizer.eos_token_id]]
    for said, prompt, tokens in zip(
        teacher.say(prompts, completions), prompts, completions, strict=True
    ):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            states = local.completion_hidden(
                local.encode([prompt]), ids, torch.ones_like(ids).bool()
            )
        law = (states[0] @ local.head.weight.T).log_softmax(-1)
        torch.testing.assert_close(said.logprobs, law.gather(1, said.ids), **CLOSE)
        torch.testing.assert_close(said.logprobs, law.topk(20).values, **CLOSE)
        torch.testing.assert_close(said.own, law.gather(1, ids.T)[:, 0], **CLOSE)


def test_it_passes_the_checks_and_writes_the_local_hints(teacher, local, examples, monkeypatch):
    assert check_tokenizer(teacher) is None
    check_law(teacher, 20)
    check_sight(teacher, prompt_of(TASK, examples[0]))
    prompts = [hint_prompt(TASK, example, with_answer=False) for example in examples]
    params = SamplingParams(max_tokens=8, temperature=0.0)
    # An untrained model says placeholders, which vLLM leaves out of the text.
    monkeypatch.setattr(VLM, "never_sampled", lambda vlm: [])
    mine, theirs = (one.write(prompts, params, None) for one in (teacher, local))
    assert [one.text for one in mine] == [one.text for one in theirs]


def test_its_limit_is_named(teacher, local):
    config = dataclasses.replace(CONFIG, teacher_top_k=21)
    more = ServedTeacher(teacher.server, teacher.model, local.encoder, local.head_rows, config)
    with pytest.raises(KepoConfigError, match=r"^teacher_top_k=21 is more.*--max-logprobs 21"):
        check_law(more, 21)


def test_it_teaches_and_killed_the_run_ends_and_goes_on(made, folder, tmp_path, monkeypatch):
    if "KEPO_VLLM_PYTHON" not in os.environ:
        pytest.skip("KEPO_VLLM_PYTHON is not set")
    monkeypatch.setattr(milestones, "plot_curves", lambda *_, **__: None)
    usual = dict(gate_reward=None, steps=4, save_every=100, teacher_retries=1)
    config = config_of(made, tmp_path / "run", **usual)
    done = [0]
    write = milestones.Run.write

    with vllm_serves(folder, tmp_path / "1.log", "--enable-scale-out") as (url, kill):

        def killing(run, step, values):
            write(run, step, values)
            done[0] = step
            if step == 2:
                kill()

        monkeypatch.setattr(milestones.Run, "write", killing)
        with rigged(), pytest.raises(KepoTeacherError, match=r"^teacher='http\S+ does not answer"):
            train(dataclasses.replace(config, teacher=url))
    assert done[0] == 2 and (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    monkeypatch.setattr(milestones.Run, "write", write)
    with vllm_serves(folder, tmp_path / "2.log", "--enable-scale-out") as (url, _), rigged():
        assert train(dataclasses.replace(config, teacher=url)).exit_code == 0
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "reward" in r]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert all(r["kepo/distill_loss"] > 0 for r in records)
