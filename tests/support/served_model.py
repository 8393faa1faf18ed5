"""A server of a teacher in this process, with vLLM's interface: a real model answers truly, or it
does to an answer what a test says."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from kepo.models.encoding import Inputs, Prompt, _key
from kepo.models.sampling import SamplingParams
from kepo.models.vision import forward_inputs
from kepo.models.vlm import VLM

Answer = tuple[int, Any]
"""An HTTP code and what is sent as JSON; bytes as they are, and an iterator of them one by one."""
LIMIT = 20
"""vLLM's largest prompt_logprobs unless it is started with another."""


class Gone(Exception):
    """Raised by a script to end a request without an answer."""


class ModelServer:
    """Answers by ``vlm``. ``script(path, body, answer)`` may change what is sent, wait, or raise
    `Gone`; it is called as soon as a request comes, and calls ``answer`` for the truth."""

    def __init__(self, vlm: VLM, pictures: Path):
        self.vlm, self.name, self.limit = vlm, "tiny", LIMIT
        self.owner = "vllm"
        self.asked: list[tuple[str, Any]] = []
        self.script: Callable[[str, Any, Callable[[], Answer]], Answer] | None = None
        self._pictures, self._lock = pictures, threading.Lock()
        self.at_once = self.most_at_once = 0
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    # ---- life and death ----

    def start(self) -> None:
        """Listen, at the port of before if there was one."""
        self._server = _Server(("127.0.0.1", self.port), _handler(self))
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Be gone, with all that is connected."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()
            for one in list(server.connected):
                one.close()

    # ---- what a true server says ----

    def answer(self, path: str, body: Any) -> Answer:
        if path == "/v1/models":
            model = {"id": self.name, "max_model_len": 4096, "owned_by": self.owner}
            return 200, {"data": [model]}
        if path != "/generate" and body.get("model") != self.name:
            return 404, {"error": {"message": f"no model {body.get('model')!r}"}}
        with self._lock, torch.no_grad():
            if path == "/tokenize":
                return 200, {"tokens": self._tokens(body)}
            if path == "/v1/chat/completions":
                text, tokens = self._chat(body)
                said = {"choices": [{"message": {"content": text}}]}
                return 200, said | {"usage": {"completion_tokens": tokens}}
            if path == "/v1/completions":
                return self._scored(body["prompt"], body, [], lambda said: {"choices": [said]})
            if path == "/generate":  # SGLang's
                return 200, {"meta_info": self._of_sglang(body)}
            if path == "/inference/v1/generate":
                urls = [part["url"] for part in body["content_parts"]]
                return self._scored(body["token_ids"], body["sampling_params"], urls, dict)
        return 404, {"detail": "Not Found"}

    def _tokens(self, body: Any) -> list[int]:
        if "messages" in body:
            return self.vlm.encoder.chat_ids([self._prompt(body["messages"])])[0]
        return self.vlm.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]

    def _chat(self, body: Any) -> tuple[str, int]:
        assert body["top_k"] == -1 and body["top_p"] == body["repetition_penalty"] == 1
        params = SamplingParams(max_tokens=body["max_tokens"], temperature=body["temperature"])
        seeds = None if params.greedy else [body["seed"]]
        ids, mask, _ = self.vlm.sample([self._prompt(body["messages"])], params, seeds)
        text = self.vlm.decode(ids, mask)[0].removeprefix(self.vlm.encoder.opened)
        return text, int(mask.sum())

    def _prompt(self, messages: Any) -> Prompt:
        *earlier, last = messages
        parts = last["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        turns = tuple((turn["role"], turn["content"]) for turn in earlier)
        return Prompt(parts[-1]["text"], tuple(map(self._file, urls)), turns)

    def _file(self, url: str) -> Path:
        content = base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True)
        path = self._pictures / f"{hashlib.sha256(content).hexdigest()}.png"
        if not path.exists():
            Image.open(io.BytesIO(content)).save(path)
        return path

    def _of_sglang(self, body: Any) -> Any:
        assert body["return_logprob"] and body["sampling_params"]["temperature"] == 1
        k, first = body["top_logprobs_num"], body["logprob_start_len"]
        asked = dict(max_tokens=1, prompt_logprobs=k)
        _, said = self._scored(body["input_ids"], asked, [], dict)
        places = [
            [(x["logprob"], int(n), None) for n, x in p.items()]
            for p in said["prompt_logprobs"][1:]
        ]
        ids = body["input_ids"]
        own = [next(x for x in p if x[1] == n) for p, n in zip(places, ids[1:], strict=True)]
        best = [sorted(p, reverse=True)[:k] for p in places]
        return dict(
            input_token_logprobs=[(None, ids[first], None), *own[first:]],
            input_top_logprobs=[None, *best[first:]],
        )

    def _scored(self, ids: Any, asked: Any, urls: Any, wrap: Any) -> Answer:
        assert asked["max_tokens"] == 1
        if asked["prompt_logprobs"] > self.limit:
            message = (
                f"Requested prompt logprobs of {asked['prompt_logprobs']}, which is greater than "
                f"max allowed: {self.limit}"
            )
            return 400, {"error": {"message": message, "code": 400}}
        encoder, model = self.vlm.encoder, self.vlm.model
        images = [encoder._image(path, _key(path)) for path in map(self._file, urls)]
        grids = [grid for _, grid in images]
        whole = torch.tensor([encoder._expanded(Prompt(""), ids, grids) if grids else ids])
        types = torch.zeros_like(whole) if not grids else (whole == encoder.image_token_id).long()
        inputs = Inputs(
            whole,
            torch.ones_like(whole),
            types,
            torch.cat([patches for patches, _ in images]) if images else torch.zeros(0, 0),
            torch.stack(grids) if images else torch.zeros(0, 3, dtype=torch.long),
            (tuple(range(len(images))),),
        )
        given = forward_inputs(model, inputs)
        states = model.base_model(**given, use_cache=False).last_hidden_state[0]
        laws = (states @ self.vlm.head.weight.T).float().log_softmax(-1)
        said: list[Any] = [None]
        for law, token in zip(laws[:-1], whole[0, 1:].tolist(), strict=True):
            top = law.topk(asked["prompt_logprobs"]).indices.tolist()
            said.append({str(one): {"logprob": law[one].item()} for one in {*top, token}})
        return 200, wrap(dict(prompt_logprobs=said, prompt_token_ids=whole[0].tolist()))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *arguments: Any):
        self.connected: set[socket.socket] = set()
        super().__init__(*arguments)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none of a test's output."""


def _handler(model: ModelServer) -> type:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._do(None)

        def do_POST(self) -> None:
            self._do(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _do(self, body: Any) -> None:
            model.asked.append((self.path, body))
            model.at_once += 1
            model.most_at_once = max(model.most_at_once, model.at_once)
            self.server.connected.add(self.connection)  # type: ignore[attr-defined]
            try:
                answer = model.answer
                if model.script is None:
                    code, said = answer(self.path, body)
                else:
                    code, said = model.script(self.path, body, lambda: answer(self.path, body))
            except Gone:
                self.connection.close()
                return
            finally:
                model.at_once -= 1
                self.server.connected.discard(self.connection)  # type: ignore[attr-defined]
            if isinstance(said, Iterator):
                self.send_response(code)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                for piece in said:
                    self.wfile.write(piece)
                    self.wfile.flush()
                return
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


@contextmanager
def serving(vlm: VLM) -> Iterator[ModelServer]:
    with TemporaryDirectory() as folder:
        server = ModelServer(vlm, Path(folder))
        try:
            yield server
        finally:
            server.stop()
