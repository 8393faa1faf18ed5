"""KEPO in TRL's GRPOTrainer: a policy and a gated teacher, with tiny models, in half a minute.

    pip install '.[trl]'
    python examples/in_trainers/trl_grpo.py
    torchrun --nproc-per-node=2 examples/in_trainers/trl_grpo.py

The reward is the share of one word in a completion; the teacher likes that word, and speaks where
a completion has it at all.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

from kepo_kernels.integrations.trl import KepoGRPOTrainer

WORDS = ["<pad>", "<end>", *(f"word{n}" for n in range(62))]
WANTED = WORDS.index("word7")


# ---- shown in docs/trainers.md
def trainer(student, teacher, tokenizer, questions, **settings):
    return KepoGRPOTrainer(
        student,
        [share, brief],  # any reward functions of TRL's
        teacher_model=teacher,
        gate_reward="share",  # the teacher speaks of completions whose share ...
        gate_threshold=0.01,  # ... is at least this
        distill_coef=0.1,
        args=GRPOConfig(**settings),
        train_dataset=questions,
        processing_class=tokenizer,
    )


# ---- end


def share(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [ids.count(WANTED) / len(ids) for ids in completion_ids]


def brief(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [-0.001 * len(ids) for ids in completion_ids]


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=len(WORDS), hidden_size=32, intermediate_size=64)
    shape = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    ids = dict(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape, **ids, initializer_range=0.1))


def knowing(seed: int) -> LlamaForCausalLM:
    """A teacher that often says the wanted word."""
    model = tiny(seed)
    with torch.no_grad():  # a direction that every state has, and on it the word's row of the head
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[WANTED, 0] = 1.0
    return model


def words() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "word0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def run(folder: str, steps: int) -> KepoGRPOTrainer:
    kepo = trainer(
        tiny(0),
        knowing(5),
        words(),
        Dataset.from_dict({"prompt": [f"word{n} word{n + 1}" for n in range(16)]}),
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )
    kepo.train()
    return kepo


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        kepo = run(folder, steps)
    if kepo.accelerator.is_main_process:
        shares = [x["rewards/share/mean"] for x in kepo.state.log_history if "reward" in x]
        first, last = (sum(x) / len(x) for x in (shares[:5], shares[-5:]))
        print(f"mean share of the first steps {first:.3f}, of the last {last:.3f}")
        print({k: round(v, 3) for k, v in kepo.state.log_history[-2].items() if "kepo/" in k})
