"""A run is resumed with the teacher, questions and code it began with, or says that it is not."""

import json
import shutil

import pytest
from small import config_of

from kepo.errors import KepoCheckpointError, KepoDataError
from kepo.loop import train


@pytest.fixture
def own(made, tmp_path):
    """A run of one step on a teacher and a dataset of its own, which a test may change."""
    for name in ("teacher", "data"):
        shutil.copytree(made / name, tmp_path / name)

    def config(run_dir=tmp_path / "run", **settings):
        given = dict(
            teacher=str(tmp_path / "teacher"),
            train_data=str(tmp_path / "data" / "train"),
            eval_data=str(tmp_path / "data" / "test"),
            eval_limit=1,
            hint_trigger="never",
            steps=1,
        )
        return config_of(made, run_dir, **given | settings)

    return config


def other_answers(file):
    """The first record's right option is another one from now on, under the same id."""
    records = json.loads(file.read_text())
    first = records[0]
    wrong = next(first[f"option_{x}"] for x in "ABCD" if first[f"option_{x}"] != first["gt_answer"])
    first["gt_answer"] = wrong
    file.write_text(json.dumps(records))
    return first["question_id"]


def test_a_resume_with_another_teacher_is_refused_or_said(own, tmp_path, capsys):
    assert train(own()).exit_code == 0
    weights = tmp_path / "teacher" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(KepoCheckpointError, match=r"teacher has other files .*model\.safetensors"):
        train(own(steps=2))
    capsys.readouterr()
    assert train(own(steps=2, changed_inputs="accept")).exit_code == 0
    assert "changed_inputs: accept: teacher has other files" in capsys.readouterr().out
    assert train(own(steps=3)).exit_code == 0  # from now on it is this run's teacher
    assert "other files" not in capsys.readouterr().out


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_resume_with_other_answers_under_the_same_ids_is_refused(own, tmp_path, capsys, part):
    assert train(own()).exit_code == 0
    file = sorted((tmp_path / "data" / part / "QA_information").rglob("scanned*.json"))[0]
    name = other_answers(file)
    setting = {"train": "train_data", "test": "eval_data"}[part]
    (tmp_path / "run" / "data.json").unlink()  # what is compared is the checkpoint's
    with pytest.raises(
        KepoDataError, match=rf"{setting} has a question that is new, .*began: '{name}'"
    ):
        train(own(steps=2))
    assert train(own(steps=2, changed_inputs="accept")).exit_code == 0
    assert f"changed_inputs: accept: {setting} has" in capsys.readouterr().out


def test_the_first_model_counts_where_a_resume_reads_it(own, tmp_path, made):
    """The penalty is towards it; without one it has become the checkpoint's."""
    shutil.copytree(made / "student", tmp_path / "student")
    settings = dict(student=str(tmp_path / "student"), teacher=None, distill_coef=0.0)
    settings |= dict(gate_reward=None, eval_data=None)
    for name, kl_coef in (("with", 0.1), ("without", 0.0)):
        assert train(own(**settings, kl_coef=kl_coef, run_dir=tmp_path / name)).exit_code == 0
    weights = tmp_path / "student" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(KepoCheckpointError, match="student has other files"):
        train(own(**settings, kl_coef=0.1, run_dir=tmp_path / "with", steps=2))
    assert train(own(**settings, run_dir=tmp_path / "without", steps=2)).exit_code == 0


REWARD = "def concise(completions, **columns):\n    return [1.0] * len(completions)\n"
TASK = "from kepo.tasks.multiple_choice import MultipleChoice as Base\n\nclass Mine(Base): pass\n"


@pytest.mark.parametrize(
    ("setting", "file", "name"),
    [
        ("rewards", "my_rewards.py", "my_rewards.py:concise"),
        ("rewards", "my_module.py", "my_module:concise"),
        ("task", "my_task.py", "my_task.py:Mine"),
    ],
)
def test_a_resume_with_other_code_of_the_users_is_refused_or_said(
    own, tmp_path, capsys, monkeypatch, setting, file, name
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).write_text(TASK if setting == "task" else REWARD)
    settings = dict(
        teacher=None, distill_coef=0.0, gate_reward=None, eval_data=None, data_fraction=1.0
    )
    settings[setting] = name if setting == "task" else ("accuracy", name)
    assert train(own(**settings)).exit_code == 0
    assert train(own(**settings, steps=2)).exit_code == 0  # the same file
    with (tmp_path / file).open("a") as more:
        more.write("# another\n")
    source = name.partition(":")[0]
    words = rf"^changed_inputs: {setting} has other files than the run began with: {source}\. Bring"
    with pytest.raises(KepoCheckpointError, match=words):
        train(own(**settings, steps=3))
    capsys.readouterr()
    assert train(own(**settings, steps=3, changed_inputs="accept")).exit_code == 0
    assert f"changed_inputs: accept: {setting} has other files" in capsys.readouterr().out
    assert train(own(**settings, steps=4)).exit_code == 0
    assert "other files" not in capsys.readouterr().out


def test_a_reward_named_from_python_is_compared_too(own, tmp_path):
    (tmp_path / "my_rewards.py").write_text(REWARD)
    settings = dict(
        teacher=None, distill_coef=0.0, gate_reward=None, eval_data=None, data_fraction=1.0
    )
    rewards = ["accuracy", f"{tmp_path}/my_rewards.py:concise"]
    assert train(own(**settings), rewards=rewards).exit_code == 0
    (tmp_path / "my_rewards.py").write_text(REWARD.replace("1.0", "0.5"))
    with pytest.raises(KepoCheckpointError, match=r"rewards has other files .*my_rewards\.py"):
        train(own(**settings, steps=2), rewards=rewards)


def test_a_resume_may_compute_in_other_portions(own, tmp_path, capsys):
    """As after a run that ended for want of memory."""
    assert train(own()).exit_code == 0
    capsys.readouterr()
    portions = dict(micro_batch=1, micro_tokens=100, share_prompts=False, scores_on="device")
    assert train(own(steps=2, **portions)).exit_code == 0
    assert "resuming after step 1" in capsys.readouterr().out
