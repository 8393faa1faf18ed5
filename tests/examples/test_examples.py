"""Each example runs, at toy size, as its first lines say; and does what they say."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file

pytest.importorskip("transformers")

import kepo
from kepo.__main__ import main
from kepo.config import load
from kepo.digits.tiny import build_tiny
from kepo.run.metrics import last_metrics

EXAMPLES = ROOT / "examples"
RUN_BY_A_TEST = {"one_file.py", "own_reward.py", "own_task.py", "quickstart.py", "text_only.yaml"}


def run(name: str, *words: str, folder: Path, **environment: str) -> str:
    """Run an example as a reader would; what it prints."""
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=str(ROOT), KEPO_CACHE=str(folder / "cache"), **environment),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_no_example_is_forgotten():
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == RUN_BY_A_TEST


@pytest.mark.slow
def test_one_file_learns(tmp_path):
    started = os.times()
    out = run("one_file.py", folder=tmp_path)
    ended = os.times()
    before = float(re.search(r"student (\d\.\d+)\n", out)[1])
    after = float(re.search(r"steps of KEPO: (\d\.\d+)", out)[1])
    assert after >= before + 0.1, out
    assert re.search(r"rescued [1-9]", out)
    if not os.environ.get("CI"):  # a busy machine takes longer, not more
        assert ended.children_user - started.children_user < 60


def test_one_file_is_short_and_needs_the_losses_alone():
    text = (EXAMPLES / "one_file.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) == {
        *("__future__", "argparse", "random"),
        *("torch", "transformers", "kepo_kernels"),
    }


@pytest.mark.slow
def test_own_reward_sees_its_columns(tmp_path):
    out = run("own_reward.py", "--steps", "2", folder=tmp_path)
    assert re.search(r"concise \d\.\d\d\n$", out)


@pytest.mark.slow
def test_own_task_judges(tmp_path):
    out = run("own_task.py", "--steps", "1", folder=tmp_path)
    assert "pass@4" in out and re.search(r"^unknown +all +2 ", out, re.M)
    sys.path.insert(0, str(EXAMPLES))
    try:
        from own_task import Synonyms, questions
    finally:
        sys.path.remove(str(EXAMPLES))
    task, (red, grey) = Synonyms(), questions(tmp_path)
    assert task.is_right("<answer>Scarlet</answer>", red)
    assert not task.is_right("<answer>gray</answer>", red)
    assert task.gives_away("Gray, I think", grey) and not task.gives_away("not dark", grey)


@pytest.mark.slow
def test_quickstart_runs_cell_by_cell(tmp_path):
    """In one name space, as a notebook has it; and while a loop runs, as one does there."""
    text = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    cells = re.split(r"^# %%", text, flags=re.M)
    code = [cell for cell in cells if cell.strip() and not cell.startswith(" [markdown]")]
    assert len(code) == 5
    notebook = tmp_path / "notebook.py"
    notebook.write_text(
        f"import asyncio\nscope = {{}}\nasync def cells():\n    for cell in {code!r}:\n"
        "        exec(cell, scope)\nasyncio.run(cells())\n"
    )
    out = run(str(notebook), folder=tmp_path, QUICKSTART_STEPS="1", TMPDIR=str(tmp_path))
    assert "rewards/brief/mean" in out and "pass@8" in out


# ---- recipes ----


def test_text_alone_trains(tmp_path, monkeypatch):
    """GSM8K-like questions, a text-only model, open answers."""
    monkeypatch.chdir(tmp_path)
    build_tiny("tiny", size="student", seed=0, family="text_only")
    records = [
        {"question": f"Mia has {n} bags of 4 apples. How many apples?", "answer": str(4 * n)}
        for n in range(1, 5)
    ]
    turns = [{"role": "user", "content": "What is 15 % of 80?"}]
    records.append({"prompt": turns, "solution": "80 * 0.15 = \\boxed{12}"})
    Path("my.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    recipe = EXAMPLES / "text_only.yaml"
    words = ["--student", "tiny", "--steps", "1", "--prompts-per-step", "2", "--run-dir", "run"]
    words += ["--num-generations", "2", "--max-completion-length", "16"]
    assert main(["train", str(recipe), *words]) == 0
    assert "reward" in last_metrics(Path("run"))
    assert json.loads(Path("run/data.json").read_text())["train"]["questions"] == 5
    commented = [line for line in recipe.read_text().splitlines() if line.startswith("#   {")]
    assert json.loads(commented[0][4:]).keys() == {"question", "answer"}
    assert load(recipe).task == "open_answer"


NEWCOMER = {
    "own.yaml": (
        "student: tiny\n"
        "train_data: my.jsonl\n"
        "task: open_answer\n"
        "rewards: [accuracy, mine.py:concise]\n"
        "steps: 2\n"
    ),
    "mine.py": (
        "def concise(completions, **columns):\n"
        "    return [1.0 if len(text) < 200 else 0.0 for text in completions]\n"
    ),
}


@pytest.mark.slow
def test_own_data_and_own_reward_in_twelve_lines(tmp_path):
    """From nothing to a running GRPO, as the README has it."""
    files = NEWCOMER | {"my.jsonl": '{"question": "What is 6 * 7?", "answer": "42"}\n'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    made = (
        "from kepo.digits.tiny import build_tiny\n"
        "build_tiny('tiny', size='student', seed=0, family='text_only')\n"
    )
    assert sum(len(text.splitlines()) for text in [*NEWCOMER.values(), made]) <= 12
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(text in readme for text in NEWCOMER.values())
    assert "; ".join(made.splitlines()) in readme
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    started = time.perf_counter()
    for words in (["-c", made], ["-m", "kepo", "train", "own.yaml", "grpo"]):
        ended = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
    print(f"from nothing to two steps: {time.perf_counter() - started:.0f} s")
    found = last_metrics(tmp_path / "runs" / "kepo")
    assert found["step"] == 2 and 0 <= found["rewards/concise/mean"] <= 1


# ---- a folder of one's own ----

OWN = {
    "own.yaml": (
        "student: tiny\n"
        "train_data: data.jsonl\n"
        "task: their_task.py:Synonyms\n"
        "rewards: [their_reward.py:within, accuracy]\n"
        "run_dir: by-command\n"
        "steps: 2\n"
        "prompts_per_step: 2\n"
        "num_generations: 4\n"
        "max_completion_length: 16\n"
        "lr: 1e-3\n"
        "save_every: 2\n"
    ),
    "their_task.py": (
        "import kepo\n\n\n"
        "class Synonyms(kepo.Task):\n"
        "    instruction = 'One letter.'\n\n"
        "    def is_right(self, text, example):\n"
        "        return text[:1].lower() in [example.answer, *example.columns['also']]\n"
    ),
    "their_reward.py": (
        "import json\n\n\n"
        "def within(completions, longest, also, **columns):\n"
        "    with open('seen.jsonl', 'a') as file:\n"
        "        file.write(json.dumps([longest, also]) + '\\n')\n"
        "    pairs = zip(completions, longest, strict=True)\n"
        "    return [None if most is None else len(text) / most for text, most in pairs]\n"
    ),
    "data.jsonl": (
        '{"question": "A vowel?", "answer": "a", "also": ["e", "i", "o"], "longest": 40}\n'
        '{"question": "A digit?", "answer": "1", "also": ["2", "3", "4"], "longest": null}\n'
    ),
}


@pytest.mark.slow
def test_a_folder_of_ones_own_trains_by_the_command_and_from_python(tmp_path, monkeypatch):
    """Reward, task and data lie outside of the repository; the reward is given its own columns, and
    both ways give the same run."""
    for name, text in OWN.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert not tmp_path.is_relative_to(ROOT)
    build_tiny("tiny", size="student", seed=0, family="text_only")
    ended = subprocess.run(
        [sys.executable, "-m", "kepo", "train", "own.yaml", "grpo"],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    seen = [json.loads(line) for line in Path("seen.jsonl").read_text().splitlines()]
    assert len(seen) == 2 and all(len(longest) == 8 for longest, _ in seen)
    pairs = {(most, *also) for given in seen for most, also in zip(*given, strict=True)}
    assert pairs == {(40, "e", "i", "o"), (None, "2", "3", "4")}
    said = last_metrics(Path("by-command"))
    assert said["step"] == 2 and said["rewards/within/mean"] > 0

    from their_reward import within
    from their_task import Synonyms

    plain = {"task": "multiple_choice", "rewards": ("accuracy",)}
    config = replace(load("own.yaml", "grpo"), **plain, run_dir="by-python")
    found = kepo.train(config, rewards=[within, "accuracy"], task=Synonyms())
    assert found.exit_code == 0
    for key in ("reward", "rewards/within/mean", "rewards/accuracy/mean", "grad_norm"):
        assert found.metrics[key] == said[key], key
    weights = [
        load_file(Path(run) / "checkpoints" / "step-00000002" / "policy" / "model.safetensors")
        for run in ("by-command", "by-python")
    ]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
