# %% [markdown]
# # KEPO in a notebook
# Each `# %%` is a cell: open this file in VS Code, Spyder or Jupyter (with jupytext), or run it
# whole, `python examples/quickstart.py`. A tiny model is made on the spot, so it takes a minute on
# a CPU; with a real one only `student` differs.

# %%
import os
import tempfile
from pathlib import Path

from PIL import Image

import kepo
from kepo.digits.tiny import build_tiny

folder = Path(tempfile.mkdtemp())
steps = int(os.environ.get("QUICKSTART_STEPS", "10"))
build_tiny(folder / "model", size="student", seed=0)

# %% [markdown]
# ## Questions
# A list of records, as lines of a JSON Lines file have them. Pictures are paths, bytes, or images
# of Pillow; a `datasets.Dataset` will do as well.

# %%
colours = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}
questions = [
    {
        "question": "Which colour is it?",
        "options": list(colours),
        "answer": name,
        "image": Image.new("RGB", (32, 32), colour),
    }
    for name, colour in colours.items()
]

# %% [markdown]
# ## A reward of one's own
# It has TRL's signature, and is given every column of the data.


# %%
def brief(completions, **columns):
    return [max(0.0, 1 - len(text) / 200) for text in completions]


# %% [markdown]
# ## Training
# Calling it again goes on where `run_dir` stopped; interrupting the kernel saves first.

# %%
config = kepo.Config(
    student=str(folder / "model"),
    run_dir=str(folder / "run"),
    steps=steps,
    prompts_per_step=3,
    num_generations=4,
    max_completion_length=24,
    lr=1e-3,
    gate_reward=None,
    hint_trigger="never",
    distill_coef=0.0,
)
run = kepo.train(config, data=questions, rewards=["accuracy", "format", brief])
print({name: value for name, value in run.metrics.items() if name.startswith("rewards/")})

# %% [markdown]
# ## How good is it?
# Greedy answers, then eight samples of each question: `pass@8` is the chance that one of them is
# right, `maj@8` that the answer most of them give is.

# %%
print(kepo.evaluate(run.checkpoint, questions))
print(kepo.evaluate(run.checkpoint, questions, samples=8, rewards=["accuracy", brief]))
