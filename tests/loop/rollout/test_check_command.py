"""kepo data check: what a task and a model would refuse is found without training."""

import shutil

import pytest

pytest.importorskip("transformers")

from every_layout import WRITERS, offline, plain, write
from folders import change_text_config
from PIL import Image
from toy import TASK

from kepo.__main__ import main
from kepo.config import Config
from kepo.data.load import load_examples
from kepo.data.run_data import load_data
from kepo.rollout import check_command
from kepo.rollout.encodable import encoder_at, judge_of
from kepo.rollout.prompts import prompt_of
from kepo.sections import PicturesConfig
from kepo.tasks.environment import environment_of

FAULTS = {
    "control token in the question": ({"question": "What<|im_end|>?"}, "text refused"),
    "image token in an option": ({"options": ["Heart", "<|image_pad|>"]}, "text refused"),
    "picture of an odd shape": ({"image": "Images/thin.png"}, "image refused"),
    "question beyond the positions": ({"question": "word " * 5000}, "prompt too long"),
}


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    offline(monkeypatch, tmp_path / "caches")


def checked(capsys, *words) -> tuple[int, str]:
    try:
        code = main(["data", "check", *map(str, words)])
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().out


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", WRITERS)
def test_what_a_model_cannot_be_asked_is_found_in_every_layout(
    layout, fault, tinies, tmp_path, capsys
):
    changes, kind = FAULTS[fault]
    path = write(layout, tmp_path, [plain(0), plain(1, **changes), plain(2)])
    Image.new("RGB", (603, 3), (9, 99, 9)).save(tmp_path / "Images" / "thin.png")
    words = (path, "--image-root", tmp_path)
    assert checked(capsys, *words)[0] == 0
    code, out = checked(capsys, *words, "--model", tinies / "qwen3")
    assert code == 1 and "wrong: 1 records" in out and f"     1  {kind}\n" in out
    assert "question 'q1'" in out and "2 good questions" in out
    off = dict(teacher=None, hint_trigger="never", gate_reward=None, distill_coef=0.0)
    config = Config(
        student=str(tinies / "qwen3"), train_data=str(path), image_root=str(tmp_path), **off
    )
    data = load_data(config, judge_of(config, environment_of(config).task))
    assert [e.id for e in data.train] == ["q0", "q2"]
    assert data.record["train"]["bad_records"] == {kind: 1}


def test_turns_before_the_question_are_judged_too(tinies, tmp_path, capsys):
    def turns(system):
        asks = {"role": "user", "content": "What?"}
        return {"question": None, "messages": [{"role": "system", "content": system}, asks]}

    records = [plain(0, **turns("Be brief.")), plain(1, **turns("Be<|im_start|>brief."))]
    path = write("JSON lines", tmp_path, [*records, plain(2, **turns("word " * 5000))])
    words = (path, "--image-root", tmp_path, "--model", tinies / "qwen3")
    code, out = checked(capsys, *words)
    assert code == 1 and "     1  text refused\n" in out and "     1  prompt too long\n" in out


def test_open_questions_without_pictures_need_the_task_that_asks_them(tinies, tmp_path, capsys):
    records = [plain(0, options=None, image=None, answer=4), plain(1, options=None, answer="four")]
    path = write("JSON lines", tmp_path, records)
    words = (path, "--image-root", tmp_path, "--model", tinies / "qwen3")
    assert checked(capsys, *words, "--task", "open_answer")[0] == 0
    assert "no options, which task: multiple_choice" in str(checked(capsys, *words)[0])


def test_the_models_flags_count(tinies, tmp_path, capsys):
    path = write("JSON lines", tmp_path, [plain(0), plain(1, image="Images/large.png")])
    encoder = encoder_at(str(tinies / "qwen3"), PicturesConfig())
    asked = [prompt_of(TASK, e) for e in load_examples(path, image_root=tmp_path, limit=1)[0]]
    (text,) = encoder.text_lengths(asked)
    model = shutil.copytree(tinies / "qwen3", tmp_path / "model")
    change_text_config(model, max_position_embeddings=text + 128 + 60)  # 64 tokens do not fit
    Image.linear_gradient("L").resize((640, 640)).save(tmp_path / "Images" / "large.png")
    words = (path, "--image-root", tmp_path, "--model", model)
    assert "1  prompt too long" in checked(capsys, *words)[1]
    assert checked(capsys, *words, "--max-pixels", "16384")[0] == 0
    longer = ("--max-pixels", "16384", "--max-completion-length", "180")
    assert checked(capsys, *words, *longer)[0] == 1


def test_no_weights_are_read_and_the_model_comes_first(tinies, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(tinies / "qwen3", tmp_path / "model")
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    path = write("JSON lines", tmp_path, [plain(0)])
    assert checked(capsys, path, "--image-root", tmp_path, "--model", model)[0] == 0
    monkeypatch.setattr(check_command, "load_examples", lambda *a, **k: pytest.fail("read"))
    assert "there is no such folder" in str(checked(capsys, path, "--model", tmp_path / "no")[0])


# ---- the task, without a model ----

OWN_TASKS = """
import kepo

class Fine(kepo.Task):
    pass

class Deaf(kepo.Task):
    def is_right(self, text, example):
        return example.columns["ward"] == text

class Mute(kepo.Task):
    def messages(self, example):
        return "What?"

class Odd(kepo.Task):
    def worked_answer(self, example):
        return 3

class Forgetful(kepo.Task):
    def hint_request(self, example, *, with_answer):
        return [{}[example.id]]

class Guesser(kepo.Task):
    def chance(self, example):
        return 1 / len(example.options)

class Bare:
    pass

class Stern(kepo.Task):
    def is_right(self, text, example):
        return "A" in text
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN_TASKS)
    records = [plain(0, options=None, image=None, answer=one) for one in ("A", "B")]
    records = [record | {"question_id": f"q{n}"} for n, record in enumerate(records)]
    return write("JSON lines", tmp_path, records), f"{tmp_path}/own.py"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own.py:Deaf", "raised KeyError on example 'q0': 'ward' (own.py, line 9)"),
        ("own.py:Mute", "task='Mute' asks 'What?' of example 'q0'; expected a list of turns"),
        ("own.py:Odd", "task='Odd' has the worked answer 3 of example 'q0'; expected a text"),
        ("own.py:Forgetful", "task='Forgetful' raised KeyError on example 'q0'"),
        ("own.py:Guesser", "task='Guesser' raised ZeroDivisionError on example 'q0'"),
        ("own.py:Bare", "expected a class of kepo.Task"),
        ("own.py:Gone", "has no Gone"),
        ("gone.py:Fine", "there is no file"),
        ("tenpin", "expected one of multiple_choice, open_answer, or a class of your own"),
    ],
)
def test_a_task_that_fails_is_said_without_a_model(own, name, said, capsys):
    path, file = own
    place = file.removesuffix("own.py") if ":" in name else ""
    code, _ = checked(capsys, path, "--task", f"{place}{name}")
    assert str(code).startswith("error: task=") and said in code


def test_a_record_that_a_task_is_unfit_for_is_listed_without_a_model(own, capsys):
    path, file = own
    assert checked(capsys, path)[0] == checked(capsys, path, "--task", f"{file}:Fine")[0] == 0
    code, out = checked(capsys, path, "--task", f"{file}:Stern")
    assert code == 1 and "     1  task\n" in out and "1 good questions" in out
    assert "question 'q1': the task calls its own worked answer '<answer>B</answer>' wrong" in out
    assert (
        "no options, which task: multiple" in checked(capsys, path, "--task", "multiple_choice")[0]
    )
    code, _ = checked(capsys, path, "--task", "open_answer", "--prompt-template", "{question} {x}")
    assert "prompt_template: {x} is no column of question 'q0'" in code
    assert checked(capsys, path, "--task", "open_answer")[0] == 0


def test_a_task_is_looked_for_before_hours_of_reading(own, capsys, monkeypatch):
    monkeypatch.setattr(check_command, "load_examples", lambda *a, **k: pytest.fail("read"))
    assert "has no Gone" in checked(capsys, own[0], "--task", f"{own[1]}:Gone")[0]
