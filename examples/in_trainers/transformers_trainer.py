"""KEPO's joint loss in `transformers.Trainer`: a policy and a gated teacher, with tiny models.

    python examples/in_trainers/transformers_trainer.py          # a few seconds on a CPU
    torchrun --nproc-per-node=2 examples/in_trainers/transformers_trainer.py

The completions, their advantages and gates are given, as a sampler and a reward would have left
them. The trainer's settings keep their meaning: accumulation, bf16, LoRA, DDP and FSDP.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from kepo_kernels import FusedHead, fused_kepo_loss, head_of


# ---- shown in docs/trainers.md
class KepoTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        FusedHead.install(self.model)  # once; later calls change nothing
        labels, advantages, gate = (inputs.pop(x) for x in ("labels", "advantages", "gate"))
        weights = (labels[:, 1:] != -100) / max(num_items_in_batch, 1)  # tokens of all processes
        with torch.no_grad():
            states = self.teacher.base_model(**inputs).last_hidden_state[:, :-1]

        def loss(hidden, head):  # runs inside of the LM head's forward, which has its weight whole
            given = labels[:, 1:], advantages, states, head_of(self.teacher)
            how = dict(gate=gate, policy_weights=weights, distill_weights=weights)
            return {"loss": fused_kepo_loss(hidden[:, :-1], head, *given, **how)}

        inputs = inputs | {"loss": loss}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


# ---- end


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, pad_token_id=0)
    shape = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, **shape, initializer_range=0.2))


def completions(count: int = 32, prompt: int = 4, length: int = 12) -> list[dict]:
    """Random ones of different lengths; labels are -100 where there is no completion token."""
    made = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(1, 64, (length,), generator=made)
        labels = ids.clone()
        labels[:prompt], labels[length - index % 5 :] = -100, -100
        advantage = 0.1 * float(torch.randn((), generator=made))
        gate = float(advantage > 0)  # the teacher speaks of completions that were good
        found.append(dict(input_ids=ids, labels=labels, advantages=advantage, gate=gate))
    return found


def trainer(folder: str, **settings) -> KepoTrainer:
    arguments = TrainingArguments(
        folder,
        remove_unused_columns=False,  # advantages and gate are none of the model's own
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        **settings,
    )
    made = KepoTrainer(tiny(0), arguments, train_dataset=completions())
    made.teacher = tiny(5).to(arguments.device).eval().requires_grad_(False)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    epochs = parser.parse_args().epochs
    batch = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    with tempfile.TemporaryDirectory() as folder:
        kepo = trainer(folder, num_train_epochs=epochs, learning_rate=1e-2, **batch)
        kepo.train()
    losses = [entry["loss"] for entry in kepo.state.log_history if "loss" in entry]
    print(f"mean loss of the first epoch {losses[0]:.3f}, of the last {losses[-1]:.3f}")
