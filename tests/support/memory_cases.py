"""Tiny runs that differ in what fills their memory, each measured in a process of its own."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from memory_run import ENVIRONMENT
from small import config_of
from toy import TASK

from kepo.config import Config
from kepo.planner.memory import Prompts
from kepo.planner.standing import Machine

CPU = Machine(gpus=1, gpu_bytes=2**60, device="cpu")


@dataclass(frozen=True)
class Shape:
    """Of a model."""

    hidden: int = 128
    layers: int = 4
    vocab: int = 512
    tied: bool = False
    vision_hidden: int = 64


@dataclass(frozen=True)
class Case:
    """Two steps of a run."""

    student: Shape
    teacher: Shape | None = None
    settings: dict = field(default_factory=dict)


# What fills the memory of each is its name.
CASES = {
    "weights": Case(Shape(hidden=512, layers=6), None, dict(micro_batch=4)),
    "activations": Case(Shape(layers=8), None, dict(micro_batch=16, max_completion_length=96)),
    "checkpointed": Case(
        Shape(layers=8),
        None,
        dict(micro_batch=32, max_completion_length=96, gradient_checkpointing=True),
    ),
    "tied_vocabulary": Case(Shape(hidden=256, vocab=32768, tied=True), None, dict(micro_batch=4)),
    "vocabulary": Case(Shape(hidden=256, vocab=32768), None, dict(micro_batch=4)),
    "long_completions": Case(Shape(), None, dict(micro_batch=4, max_completion_length=320)),
    "teacher": Case(Shape(), Shape(hidden=512, layers=8, vision_hidden=96), dict(micro_batch=16)),
    "reference": Case(Shape(hidden=512, layers=6), None, dict(micro_batch=4, kl_coef=0.1)),
    "unpacked": Case(
        Shape(layers=8),
        Shape(hidden=256, layers=4),
        dict(micro_batch=16, max_completion_length=96, share_prompts=False, kl_coef=0.1),
    ),
    "hints": Case(
        Shape(layers=8),
        Shape(hidden=256, layers=8),
        dict(
            micro_batch=8,
            max_completion_length=96,
            num_generations=16,
            num_hinted=16,
            rollout_batch=64,
            hint_trigger="always",
        ),
    ),
    "cache": Case(
        Shape(layers=8),
        None,
        dict(
            micro_batch=2,
            num_generations=16,
            prompts_per_step=6,
            max_completion_length=160,
            rollout_batch=96,
        ),
    ),
    "draws": Case(
        Shape(hidden=64, layers=2, vocab=32768),
        None,
        dict(micro_batch=2, num_generations=16, prompts_per_step=4, top_p=0.9),
    ),
    "adapters": Case(
        Shape(hidden=512, layers=6), None, dict(micro_batch=8, lora_rank=16, num_generations=8)
    ),
    "moments_of_8_bits": Case(
        Shape(hidden=512, layers=6), None, dict(micro_batch=4, optimizer="adamw_8bit")
    ),
    "sharded": Case(Shape(hidden=512, layers=6), None, dict(micro_batch=4, sharding="fsdp2")),
    "half_precision": Case(
        Shape(hidden=256, layers=6, vocab=8192),
        None,
        dict(micro_batch=8, sharding="fsdp2", dtype="bfloat16"),
    ),
    "one_micro_batch": Case(Shape(hidden=256, layers=6, vocab=8192), None, dict(micro_batch=16)),
    "evaluation": Case(
        Shape(hidden=256, layers=8),
        None,
        dict(micro_batch=2, max_completion_length=160, eval_share=0.5, eval_batch=24),
    ),
}


def config_for(case: Case, made: Path, root: Path) -> Config:
    """Writes the models; returns the run's settings."""
    plain = dict(steps=2, hint_trigger="never", gate_reward=None, max_completion_length=24)
    plain |= dict(prompts_per_step=4, num_generations=4, sampling_temperature=1.0, save_every=9)
    write(root / "student", case.student, seed=0)
    if case.teacher is None:
        plain |= dict(teacher=None, distill_coef=0.0)
    else:
        write(root / "teacher", case.teacher, seed=1)
        plain |= dict(teacher=str(root / "teacher"))
    plain |= dict(student=str(root / "student"), train_data=str(data_of(made, root)))
    return config_of(made, root / "run", **{**plain, **case.settings})


def write(folder: Path, shape: Shape, seed: int) -> None:
    """A random model of this shape, with tokenizer and image processor."""
    from transformers import Qwen3VLForConditionalGeneration

    from kepo.digits.tiny import build_tokenizer
    from kepo.models.families.family import TinySize
    from kepo.models.families.processors import pillow_processor_class
    from kepo.models.families.qwen3_vl import PATCH, tiny_config

    tokenizer = build_tokenizer()
    config = tiny_config(
        tokenizer,
        TinySize(
            hidden=shape.hidden,
            layers=shape.layers,
            heads=4,
            vision_hidden=shape.vision_hidden,
            vision_depth=2,
            tied=shape.tied,
        ),
    )
    config.text_config.vocab_size = shape.vocab
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = pillow_processor_class()(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 256 * 256},
    )
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)


def data_of(made: Path, root: Path) -> Path:
    """The digits, with questions of two lengths, so that prompts are padded."""
    import shutil

    shutil.copytree(made / "data" / "train", root / "data", dirs_exist_ok=True)
    for path in (root / "data").rglob("*.json"):
        records = json.loads(path.read_text())
        for record in records[::2]:
            record["question"] += " 1 2 3"
        path.write_text(json.dumps(records))
    return root / "data"


def prompts_of(config: Config) -> Prompts:
    """As long as the longest of the data."""
    from kepo.data.run_data import load_data
    from kepo.models.vlm import VLM
    from kepo.rollout.prompts import prompt_of

    encoder = VLM.load(config.student).encoder
    examples = load_data(config).train
    inputs = encoder.encode([prompt_of(TASK, example) for example in examples])
    image = int(inputs.mm_token_type_ids[0].sum())
    return Prompts(inputs.input_ids.shape[1] - image, image)


def measured(case: Case, config: Config, made: Path, root: Path) -> dict[str, int]:
    """Bytes that the run held at most, by phase."""
    small = dict(steps=1, max_completion_length=4, prompts_per_step=2, num_generations=2)
    small |= dict(num_hinted=2)
    layers = {} if case.teacher is None else dict(teacher=str(made / "teacher"))
    warm_up = dataclasses.replace(
        config, student=str(made / "student"), run_dir=str(root / "warm"), **small, **layers
    )
    record = dict(
        warm_up=dataclasses.asdict(warm_up),
        config=dataclasses.asdict(config),
    )
    (root / "record.json").write_text(json.dumps(record))
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, str(Path(here) / "memory_run.py"), str(root / "record.json")],
        env=dict(os.environ, **ENVIRONMENT, PYTHONPATH=os.pathsep.join([os.getcwd(), here])),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("PEAKS "))
    return json.loads(line.removeprefix("PEAKS "))
