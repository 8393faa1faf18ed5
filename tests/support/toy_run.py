"""A whole run with a toy for the model, milliseconds a step; all it writes and reads is real."""

import io
import json
import shutil
import zlib
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from toy import BARE, EOS, MALFORMED, RIGHT, WRONG, TableVLM, drawn_logprob

from kepo.config import Config
from kepo.disk.durable import write_durably
from kepo.errors import command
from kepo.loop import train
from kepo.models.sampling import Sampled
from kepo.run import milestones
from kepo.run import open as opening
from kepo.run.metrics import read_metrics

STEPS = 5
TEXTS = (RIGHT, WRONG, MALFORMED, BARE)
OF_THE_MACHINE = ("time/", "step_time", "mem/")


class ToyPolicy(TableVLM):
    """Weights that are trained, saved and loaded; what it says follows from prompt and seed."""

    wrapper = None
    why_not_packed = "it has no rows"

    def __init__(self, saved: Path | None = None):
        super().__init__(seed=1)
        weights = load_file(saved / "model.safetensors") if saved else self.weights
        self.model = self.weights = torch.nn.ParameterDict(
            {name: torch.nn.Parameter(x.detach().clone()) for name, x in weights.items()}
        )

    def ready(self):
        return nullcontext()

    def sample(self, prompts, params, seeds=None):
        asked = [prompt.text for prompt in prompts for _ in range(params.n)]
        told = zip(asked, seeds or [0] * len(asked), strict=True)
        texts = [TEXTS[zlib.crc32(f"{text}{seed}".encode()) % 4] for text, seed in told]
        ids, mask = self._padded([[*text.encode(), EOS][: params.max_tokens] for text in texts])
        logprobs = [[drawn_logprob(text, t) for t in range(ids.shape[1])] for text in asked]
        return Sampled(ids, mask, torch.where(mask, torch.tensor(logprobs), 0.0))

    def save(self, folder):
        folder.mkdir()
        save_file(
            {name: x.detach() for name, x in self.weights.items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
        (folder / "tokenizer.json").write_text(json.dumps({"vocab": list("abcdef")}))


def draw_nothing(metrics: Path, picture: Path, source: str | None) -> None:
    write_durably(picture, f"{len(read_metrics(metrics))} records\n")


@contextmanager
def toys():
    """`train` with the toy in place of models, and no time spent on drawing."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "load_policy", lambda config, device, saved, seed: ToyPolicy(saved))
        patch.setattr(opening, "judge_of", lambda config, task: None)  # it has no encoder to ask
        patch.setattr(opening, "load_sampler", lambda config, policy: policy)
        patch.setattr(milestones, "plot_curves", draw_nothing)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


def write_dataset(root: Path) -> Path:
    (root / "QA_information").mkdir(parents=True)
    (root / "Images").mkdir()
    records = []
    for number in range(5):
        Image.new("RGB", (8, 8), (40 * number, 9, 9)).save(root / "Images" / f"{number}.png")
        record = dict(question_id=f"q{number}", question_type="T", question=f"Which is {number}?")
        record |= dict(image_path=f"Images/{number}.png", modality_type="CT")
        records.append(record | dict(gt_answer="one", option_A="one", option_B="two"))
    (root / "QA_information" / "a.json").write_text(json.dumps(records))
    return root


def config_of(data: Path, run_dir: Path, steps: int = STEPS, **settings: object) -> Config:
    values = dict(
        student="toy",
        device="cpu",
        teacher=None,
        train_data=str(data),
        eval_data=str(data),
        eval_every=2,
        run_dir=str(run_dir),
        hint_trigger="never",
        gate_reward=None,
        distill_coef=0.0,
        steps=steps,
        prompts_per_step=2,
        num_generations=4,
        micro_batch=8,
        max_completion_length=48,
        save_every=1,
        keep_checkpoints=3,
        log_completions_every=1,
        lr=1e-2,
        verify_images=False,
    )
    return Config(**{**values, **settings})


class Ended(NamedTuple):
    """How a run ended."""

    sentence: str | None
    """What it ended with, if it did not do all steps."""
    printed: str


def run(config: Config, **others: object) -> Ended:
    """Train as the command does. What is neither an end nor a sentence is raised."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        try:
            code = command(train)(config, **others).exit_code
        except SystemExit as end:
            assert str(end.code).startswith("error: "), end.code
            return Ended(str(end.code), out.getvalue())
    assert code == 0, code
    return Ended(None, out.getvalue())


def weights(run_dir: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / "policy" / "model.safetensors") | load_file(
        folder / "optimizer.safetensors"
    )


def log(run_dir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The records of a log as they are on disk, without what is the machine's."""
    lines = (run_dir / name).read_text().splitlines()
    return [
        {key: x for key, x in json.loads(line).items() if not key.startswith(OF_THE_MACHINE)}
        for line in lines
    ]


class Right(NamedTuple):
    """What an undisturbed run ends with."""

    weights: dict[str, torch.Tensor]
    metrics: list[dict]
    completions: list[dict]

    def wrong_weights(self, run_dir: Path) -> list[str]:
        found = weights(run_dir)
        return [n for n in self.weights if not torch.equal(found[n], self.weights[n])]

    def has_logs_of(self, run_dir: Path) -> bool:
        found = [log(run_dir, name) for name in ("metrics.jsonl", "completions.jsonl")]
        return found == [self.metrics, self.completions]


def undisturbed(data: Path, run_dir: Path) -> Right:
    ended = run(config_of(data, run_dir))
    assert ended.sentence is None, ended
    return Right(weights(run_dir), log(run_dir), log(run_dir, "completions.jsonl"))


def copied(folder: Path, to: Path) -> Path:
    if to.exists():
        shutil.rmtree(to)
    return Path(shutil.copytree(folder, to, symlinks=True))
