"""A teacher behind an OpenAI-compatible server: it scores completions and writes hints, and nothing
of it is held here.

Of vLLM (0.32) ``/v1/completions`` takes token ids and gives ``prompt_logprobs``; with pictures
``/inference/v1/generate`` does, which a server has that was started with ``--enable-scale-out``. Of
SGLang it is ``/generate``, for text only: with pictures it makes text of ids, and of that other
ids. Hints come from ``/v1/chat/completions`` of both.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from PIL import Image

from kepo.data.images import open_rgb
from kepo.errors import KepoTeacherError
from kepo.models.encoding import Encoder, Prompt
from kepo.models.sampling import SamplingParams, Written
from kepo.sections import TeacherConfig
from kepo.teachers.said import Said, as_of_vllm, read
from kepo.teachers.transport import Server

PLAIN = dict(top_p=1.0, top_k=-1, repetition_penalty=1.0)
"""Settings by which a server draws from the model's own law, whatever its generation_config."""
SGLANG = "sglang"  # as its list of models names its owner
PICTURES_AT_HAND = 64
"""The number of pictures whose data URLs are kept: a group's completions show the same ones."""


class ServedTeacher:
    """A model behind a server, asked with the encoder of the student, whose tokenizer it shares."""

    collective = False  # each rank asks for itself

    def __init__(
        self,
        server: Server,
        model: str,
        encoder: Encoder,
        vocabulary: int,
        config: TeacherConfig,
        make: str = "vllm",
    ):
        """Make the teacher; nothing is asked yet.

        model: the server's name for it. vocabulary: the number of rows of the student's head. make:
        whose server it is, vllm or sglang.
        """
        self.server, self.model, self.encoder, self.make = server, model, encoder, make
        self._vocabulary, self._config = vocabulary, config

    def say(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]]) -> list[Said]:
        """Return what the teacher says at each token of the completions' ids, each under its
        prompt; of an empty completion nothing may be asked."""
        distinct = list(dict.fromkeys(prompts))
        known = dict(
            zip(distinct, self.encoder.chat_ids(distinct) if distinct else (), strict=True)
        )
        return self.server.ask_all(
            [
                partial(self.law, known[one], tokens, [partial(data_url, p) for p in one.images])
                for one, tokens in zip(prompts, completions, strict=True)
            ]
        )

    def law(self, prompt: Sequence[int], tokens: Sequence[int], pictures: Sequence[Any]) -> Said:
        """Return what the teacher says of ``tokens`` after the ids of a prompt, which have one
        placeholder for each picture. pictures: calls that return their data URLs."""
        k, ids = self._config.teacher_top_k, [*prompt, *tokens]
        if self.make == SGLANG:
            law = dict(max_new_tokens=1, temperature=1.0)
            facts = dict(return_logprob=True, logprob_start_len=len(prompt) - 1)
            body = dict(input_ids=ids, sampling_params=law, top_logprobs_num=k, **facts)
            answer = as_of_vllm(self.server.ask("/generate", body), self.source)
            return read(answer, tokens, k, self._vocabulary, self.source)
        asked: dict[str, Any] = dict(max_tokens=1, temperature=0.0, prompt_logprobs=k)
        whole: dict[str, Any] = dict(model=self.model, return_token_ids=True)
        if pictures:
            shown = [{"type": "image_url", "url": picture()} for picture in pictures]
            whole |= dict(token_ids=ids, content_parts=shown, sampling_params=asked)
            answer = self.server.ask("/inference/v1/generate", whole)
        else:
            answer = self.server.ask("/v1/completions", whole | asked | dict(prompt=ids))
            answer = self._choice("/v1/completions", answer)
        return read(answer, tokens, k, self._vocabulary, self.source)

    def write(
        self, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int] | None
    ) -> list[Written]:
        """Return one text for each prompt, as `VLM.write` does; ``params.n`` is 1. Of a server that
        does not say how many tokens it wrote, they are counted in the text."""
        drawn: Sequence[int | None] = params.seeds_for(len(prompts), seeds) or [None] * len(prompts)
        return self.server.ask_all(
            [
                partial(self._written, prompt, params, seed)
                for prompt, seed in zip(prompts, drawn, strict=True)
            ]
        )

    @property
    def source(self) -> str:
        return f"{self.server.which}={self.server.url!r}"

    # ---- private ----

    def _written(self, prompt: Prompt, params: SamplingParams, seed: int | None) -> Written:
        body: dict[str, Any] = dict(model=self.model, messages=messages_of(prompt))
        body |= PLAIN | dict(max_tokens=params.max_tokens, temperature=params.temperature)
        body |= {} if seed is None else dict(seed=seed)
        answer = self.server.ask("/v1/chat/completions", body)
        message = self._choice("/v1/chat/completions", answer).get("message")
        text = (message.get("content") if isinstance(message, dict) else None) or ""
        usage = answer.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if not isinstance(tokens, int):
            tokens = len(self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
        return Written(self.encoder.opened + text if text else "", tokens)

    def _choice(self, path: str, answer: Any) -> dict[str, Any]:
        """Return the only choice in a server's answer."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
            source = self.source
            raise KepoTeacherError(f"{source} answers {path} without a choice: {str(answer)[:200]}")
        return choices[0]


def messages_of(prompt: Prompt) -> list[dict[str, Any]]:
    """Return a prompt as the turns of a chat, with pictures as data URLs before the text."""
    pictures = [
        {"type": "image_url", "image_url": {"url": data_url(path)}} for path in prompt.images
    ]
    text: Any = [*pictures, {"type": "text", "text": prompt.text}] if pictures else prompt.text
    turns = [{"role": role, "content": said} for role, said in prompt.earlier]
    return [*turns, {"role": "user", "content": text}]


def data_url(path: Path) -> str:
    """Return a picture as the student sees it before resizing, as the data URL of a PNG."""
    stat = path.stat()
    return _data_url(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(PICTURES_AT_HAND)
def _data_url(path: Path, changed: int, size: int) -> str:
    return url_of(open_rgb(path))


def url_of(picture: Image.Image) -> str:
    """Return the data URL of a picture, without loss."""
    content = io.BytesIO()
    picture.save(content, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
