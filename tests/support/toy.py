"""Stand-ins for models: a policy and a teacher that say what a test scripts."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from kepo.config import Config
from kepo.data.load import LETTERS, Example
from kepo.models.sampling import Sampled, Written
from kepo.rollout.models import Models
from kepo.rollout.prompts import hint_prompt, prompt_of
from kepo.rollout.types import Rollout
from kepo.tasks.environment import environment_of

ENV = environment_of(Config())
TASK = ENV.task
worked_answer = TASK.worked_answer
RIGHT = "<think>x</think><answer>A</answer>"
WRONG = "<think>x</think><answer>B</answer>"
BARE = "<answer>A</answer>"  # right, but not in the format
MALFORMED = "B"
EOS = 0
PAD = 1


def example(name: str, **fields: object) -> Example:
    facts = dict(
        id=name,
        question=f"question {name}?",
        options=("yes", "no"),
        answer="A",
        images=(Path(f"/{name}.png"),),
        modality="CT",
        question_type="x",
    )
    return Example(**{**facts, **fields})


def rollout(text: str, name: str = "q", config: Config | None = None, **facts: object) -> Rollout:
    env = environment_of(config or Config())
    ids = torch.tensor([*text.encode(), EOS])
    asked = example(name)
    [rewards] = env.scores([asked], [text], [ids.tolist()])
    return Rollout(asked, prompt_of(env.task, asked), ids, text, rewards, **facts)


def judged(text: str, answer: str) -> dict[str, float | None]:
    """The rewards of one completion, whose question has so many options that any letter is one."""
    asked = example("q1", options=tuple(f"option {letter}" for letter in LETTERS), answer=answer)
    return ENV.scores([asked], [text], [[1, 2, 3]])[0]


def question_prompt(asked: Example) -> str:
    return prompt_of(TASK, asked).text


def hinted_prompt(asked: Example, hint: str, gives_answer: bool = False) -> str:
    return prompt_of(TASK, asked, hint, gives_answer=gives_answer).text


def hint_request(asked: Example, with_answer: bool) -> str:
    return hint_prompt(TASK, asked, with_answer=with_answer).text


def group_of(texts: str | list[str], name: str = "q", **facts: object) -> list[Rollout]:
    return [rollout(text, name, **facts) for text in texts]


def drawn_logprob(prompt: str, place: int) -> float:
    """What a scripted model says of its token at ``place``: a hint makes it ten times surer."""
    return -(place + 1) / (1000 if "Hint:" in prompt else 100)


class Texts(list):
    """Texts in place of `Inputs`."""

    @property
    def input_ids(self):
        return torch.zeros(len(self), max(map(len, self)))


class ScriptedVLM:
    """Has `encode`, `generate` and `decode` of a VLM; `answer(prompt, nth_time)` is what it says.

    `seen` lists every prompt it was asked to complete, once per completion.
    """

    def __init__(self, answer: Callable[[str, int], str]):
        self.answer = answer
        self.seen: list[str] = []
        self.tokenizer = SimpleNamespace(
            eos_token_id=EOS, decode=lambda ids: "".join(map(chr, ids)).replace("\0", "")
        )

    def encode(self, prompts):
        return Texts(prompt.text for prompt in prompts)

    def encode_completions(self, texts):
        return self._padded([[*text.encode(), EOS] for text in texts])

    @property
    def encoder(self):
        return self

    collective = False
    end_ids = (EOS,)

    share_prompts = False

    def lengths(self, prompts):
        return [len(prompt.text) for prompt in prompts]

    def completion_states(self, prompts, completion_ids, completion_mask):
        return self.completion_hidden(self.encode(prompts), completion_ids, completion_mask)

    def control_tokens_in(self, text):
        return []

    def run_wrapped(self, work):
        return work()

    def close(self):
        """As a sampler, it holds nothing."""

    def sample(self, prompts, params, seeds=None):
        return self.generate(self.encode(prompts), params)

    def write(self, prompts, params, seeds):
        ids, mask, _ = self.sample(prompts, params, seeds)
        return [*map(Written, self.decode(ids, mask), mask.sum(-1).tolist())]

    def generate(self, inputs, params):
        asked = [prompt for prompt in inputs for _ in range(params.n)]
        rows = []
        for prompt in asked:
            text = self.answer(prompt, self.seen.count(prompt))
            self.seen.append(prompt)
            rows.append([*text.encode(), EOS][: params.max_tokens])
        ids, mask = self._padded(rows)
        logprobs = [[drawn_logprob(prompt, t) for t in range(ids.shape[1])] for prompt in asked]
        return Sampled(ids, mask, torch.where(mask, torch.tensor(logprobs), 0.0))

    def decode(self, ids, mask):
        return [
            bytes(t for t in row[keep].tolist() if t != EOS).decode()
            for row, keep in zip(ids, mask, strict=True)
        ]

    def _padded(self, rows):
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        return ids, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def pieces(batch, size: int) -> list:
    """The batch in micro-batches of ``size`` completions, in its own order."""
    places = range(len(batch))
    return [batch.select(places[first : first + size]) for first in range(0, len(batch), size)]


def models_of(policy: ScriptedVLM, teacher: ScriptedVLM | None = None) -> Models:
    """Those of a run in which the policy itself samples."""
    return Models(policy, teacher, ref=None, sampler=policy)


class TableVLM(ScriptedVLM):
    """A scripted model with weights: its states depend on the prompt and the token before.

    `read` lists the prompts and completions that its backbone met, as (text, ids).
    """

    VOCABULARY = 128  # ASCII

    def __init__(self, seed: int, hidden: int = 6, answer: Callable[[str, int], str] | None = None):
        super().__init__(answer or (lambda prompt, nth: RIGHT))
        generator = torch.Generator().manual_seed(seed)
        shapes = dict(tokens=(self.VOCABULARY, hidden), head=(self.VOCABULARY, hidden))
        self.weights = {
            name: torch.randn(shape, generator=generator).requires_grad_()
            for name, shape in shapes.items()
        }
        self.read: list[tuple[str, tuple[int, ...]]] = []

    @property
    def head(self):
        return self.weights["head"]

    @property
    def device(self):
        return self.head.device

    def completion_hidden(self, inputs, completion_ids, completion_mask):
        for text, ids, mask in zip(inputs, completion_ids, completion_mask, strict=True):
            self.read.append((text, tuple(ids[mask.bool()].tolist())))
        last = torch.tensor([[zlib.crc32(text.encode()) % self.VOCABULARY] for text in inputs])
        before = torch.cat([last, completion_ids[:, :-1]], dim=1)
        return torch.tanh(self.weights["tokens"][before])

    def logits(self, batch):
        """(B, T, V) of a batch's completions, every one of them, whatever its gate."""
        texts = [prompt.text for prompt in batch.prompts]
        met = len(self.read)
        hidden = self.completion_hidden(texts, batch.completion_ids, batch.completion_mask)
        del self.read[met:]
        return hidden @ self.head.T

    def logprobs(self, batch):
        """(B, T) of the tokens of a batch's completions, from `logits`."""
        chosen = batch.completion_ids[..., None]
        return self.logits(batch).log_softmax(-1).gather(-1, chosen).squeeze(-1)
