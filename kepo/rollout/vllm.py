"""vLLM in the processes that train: it samples with the policy's weights, and on a GPU it sleeps
otherwise.

Tested on a CPU against vLLM 0.32 itself (tests/vllm), and everywhere against a stand-in with its
interface. On a GPU it computes differently from the trainer, and may resize images differently:
watch `sampling/sampling_logp_difference`, and set `sampler_correction: truncate`.
"""

from __future__ import annotations

import os
import socket
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kepo.data.images import open_rgb
from kepo.distributed.processes import rank, world_size
from kepo.errors import KepoConfigError, KepoError
from kepo.models.encoding import Encoder, Prompt
from kepo.models.sampling import Sampled, SamplingParams
from kepo.rollout.vllm_platform import PLATFORMS, Platform, check_interface, load_weights

DTYPES = ("float32", "bfloat16", "float16")
COLDEST, HOTTEST = 0.01, 2.0  # vLLM raises a lower temperature to the first, refuses a higher one
BANNED = -100.0  # of the biases that vLLM is sure to take, the lowest; e^-50 at the hottest


class VllmSampler:
    """A `Sampler`: one `vllm.LLM` per rank, on the rank's own GPU or a CPU, with unsharded weights.

    The same seed gives the same tokens beside other prompts as far as vLLM's rounding does not
    depend on them.
    """

    collective = False

    def __init__(
        self,
        encoder: Encoder,
        path: str | Path,
        *,
        device: torch.device,
        dtype: str,
        memory_share: float,
        never_sampled: Iterable[int],
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        llm: Any = None,
    ):
        """Make the sampler. All ranks call.

        Args:
            path: folder or Hub name of the policy; vLLM takes its configuration from there.
            device: the device that trains, and on which vLLM computes.
            dtype: the dtype vLLM computes in: float32, bfloat16 or float16.
            memory_share: the share of the GPU, or of the machine, for vLLM's weights and its cache
                of keys and values.
            never_sampled: token ids that cannot be drawn.
            weights: the policy's present weights, every tensor unsharded, under the names of its
                checkpoint. Read once in each `ready`, one tensor at a time.
            llm: an existing `vllm.LLM`, awake. None = a new one.
        """
        if dtype not in DTYPES:
            raise KepoConfigError(f"VllmSampler: dtype is {dtype!r}; expected one of {DTYPES}")
        if not 0 < memory_share <= 1:
            raise KepoConfigError(
                f"VllmSampler: memory_share is {memory_share}; expected a number in (0, 1]"
            )
        self.encoder = encoder
        self._weights = weights
        self._biases = dict.fromkeys(never_sampled, BANNED)
        self._platform = PLATFORMS[device.type]
        if llm is None:
            settings = _engine(path, encoder, dtype, memory_share, self._platform)
            anything = SamplingParams(max_tokens=1, temperature=1.0)
            asked = {"seed", *self._settings(anything)}
            check_interface(_vllm(), self._platform, settings, asked)
            llm = _started(settings)
        self._llm = llm
        self._awake = False
        self._sleep()

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Wake vLLM and give it the policy's present weights; where it can it sleeps on leaving."""
        try:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # what the trainer's allocator only keeps for later
            self._wake("weights")  # first: their memory is not mapped until then
            missing = sorted(set().union(*self._llm.apply_model(self._take_weights)))
            if missing:
                raise KepoError(
                    f"VllmSampler.ready: weights gave nothing for {len(missing)} of vLLM's "
                    f"parameters, first {missing[0]}; expected all of the checkpoint's tensors"
                )
            self._llm.reset_prefix_cache()  # both hold what older weights computed
            self._llm.llm_engine.reset_encoder_cache()
            self._wake("kv_cache")
            self._awake = True
            yield
        finally:
            self._sleep()

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
    ) -> Sampled:
        """Return completions on the CPU, those of a prompt in a row. Call it only within `ready`.

        seeds: one per completion; None draws them from torch's global generator. Raises
        KepoConfigError for settings out of range, KepoError if vLLM read a prompt differently from
        the encoder, or ended a completion other than at its end token or ``params.max_tokens``.
        """
        self._check(prompts, params)
        seeds = params.seeds_for(len(prompts), seeds)
        asked = [self._request(prompt) for prompt in prompts]
        asked = [one for one in asked for _ in range(params.n)]
        sampling_params = _vllm().SamplingParams
        settings = self._settings(params)
        drawn: Sequence[int | None] = seeds or [None] * len(asked)
        outputs = self._llm.generate(
            [request for request, _ in asked],
            sampling_params=[sampling_params(seed=seed, **settings) for seed in drawn],
            use_tqdm=False,
        )
        if len(outputs) != len(asked):
            raise KepoError(
                f"VllmSampler.sample: vLLM gave {len(outputs)} answers to {len(asked)} prompts"
            )
        for output, (request, expanded) in zip(outputs, asked, strict=True):
            if list(output.prompt_token_ids) not in (expanded, request["prompt_token_ids"]):
                raise KepoError(
                    f"VllmSampler.sample: vLLM read a prompt as {len(output.prompt_token_ids)} "
                    f"tokens and the encoder as {len(expanded)}; expected the same ones: are "
                    "images resized alike, and are the answers in order?"
                )
        completions = [self._completion(output, params.max_tokens) for output in outputs]
        return self._padded(completions, greedy=params.greedy)

    def close(self) -> None:
        """End the engine, which nothing else does: dropped, it would keep its memory."""
        self._llm.llm_engine.engine_core.shutdown()

    # ---- private ----

    def _settings(self, params: SamplingParams) -> dict[str, Any]:
        """Return the settings of a request, all but its seed, by the names of vLLM's."""
        return dict(
            n=1,
            temperature=params.temperature,
            top_p=params.top_p,
            max_tokens=params.max_tokens,
            logprobs=None if params.greedy else 0,  # 0: of the token drawn and of no others
            stop_token_ids=list(self.encoder.end_ids),
            logit_bias=self._biases,
            detokenize=False,
        )

    def _sleep(self) -> None:
        self._awake = False
        if self._platform.sleeps:
            # Level 2 drops the weights; level 1 would keep a copy in host memory that no one
            # reads, as every `ready` loads new ones.
            self._llm.sleep(level=2)

    def _wake(self, what: str) -> None:
        if self._platform.sleeps:
            self._llm.wake_up(tags=[what])

    def _take_weights(self, model: Any) -> set[str]:
        """Load the policy's weights into vLLM's model; return the names of those that got none.

        They are an error: vLLM dropped its weights when it went to sleep, or has older ones.
        """
        named = {name for name, _ in model.named_parameters()}
        config = self._llm.llm_engine.vllm_config
        return named - set(load_weights(model, config, self._weights()))

    def _request(self, prompt: Prompt) -> tuple[dict[str, Any], list[int]]:
        """Return the request to vLLM, one placeholder per image, and the ids it must expand to."""
        expanded = self.encoder.encode([prompt]).input_ids[0].tolist()
        [ids] = self.encoder.chat_ids([prompt])
        pictures = [open_rgb(path) for path in prompt.images]
        request: dict[str, Any] = {"prompt_token_ids": ids}
        if pictures:
            request["multi_modal_data"] = {"image": pictures}
        return request, expanded

    def _completion(self, output: Any, max_tokens: int) -> Any:
        (completion,) = output.outputs
        tokens, reason = completion.token_ids, completion.finish_reason
        ends = self.encoder.end_ids
        whole = reason == "stop" and len(tokens) > 0 and tokens[-1] in ends
        if not whole and not (reason == "length" and len(tokens) == max_tokens):
            raise KepoError(
                f"VllmSampler.sample: vLLM ended a completion after {len(tokens)} tokens, "
                f"finish_reason {reason!r}, last token {list(tokens[-1:])}; expected one of "
                f"{list(ends)} at its end, or max_tokens={max_tokens}. If it ran out of "
                "room, give it more memory (vllm_memory)"
            )
        return completion

    def _padded(self, completions: Sequence[Any], *, greedy: bool) -> Sampled:
        rows = [torch.tensor(list(one.token_ids)) for one in completions]
        pad = self.encoder.tokenizer.pad_token_id
        ids = pad_sequence(rows, batch_first=True, padding_value=pad)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        logprobs = torch.zeros(ids.shape)
        if not greedy:
            drawn = [
                law[token].logprob
                for one in completions
                for law, token in zip(one.logprobs, one.token_ids, strict=True)
            ]
            logprobs[mask] = torch.tensor(drawn)
        return Sampled(ids, mask, logprobs)

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        if not self._awake:
            raise KepoError("VllmSampler.sample: vLLM is asleep; call it within ready()")
        if not prompts:
            raise KepoConfigError("VllmSampler.sample: prompts is empty; expected at least one")
        if not params.greedy and not COLDEST <= params.temperature <= HOTTEST:
            raise KepoConfigError(
                f"VllmSampler.sample: temperature={params.temperature}; expected 0 (greedy) or a "
                f"number within [{COLDEST}, {HOTTEST}]"
            )


def _engine(
    path: str | Path, encoder: Encoder, dtype: str, memory_share: float, platform: Platform
) -> dict[str, Any]:
    """Return the settings of the engine, by the names of vLLM's."""
    return dict(
        model=str(path),
        dtype=dtype,
        tensor_parallel_size=1,
        distributed_executor_backend="external_launcher",  # in this process, beside the trainer
        gpu_memory_utilization=memory_share,
        max_model_len=-1,  # as long as that memory allows, not as long as the model could
        max_num_batched_tokens=4096,  # else it sets memory aside for far larger steps
        seed=rank(),
        logprobs_mode="processed_logprobs",  # of the law after biases, temperature and top_p
        generation_config="vllm",  # and not the model's own defaults
        trust_remote_code=False,
        load_format="safetensors",
        **platform.settings,
        **_reading(path, encoder),
    )


def _started(settings: dict[str, Any]) -> Any:
    vllm = _vllm()
    with _launched():
        try:
            return vllm.LLM(**settings)
        except ValueError as error:
            said = textwrap.shorten(str(error), 500)
            share = settings["gpu_memory_utilization"]
            raise KepoConfigError(
                f"sampler='vllm' with {settings['model']}: vLLM {vllm.__version__} does not start "
                f"with dtype={settings['dtype']} and vllm_memory={share}: {said}"
            ) from error


def _reading(path: str | Path, encoder: Encoder) -> dict[str, Any]:
    """Return the settings by which vLLM reads pictures as the encoder does."""
    if encoder.pictures is None:
        return {}
    if encoder.pictures.vllm is None:
        raise KepoConfigError(
            f"sampler='vllm' with {path}: it is not known whether vLLM reads this family's "
            "pictures as the encoder does; set sampler: transformers"
        )
    settings = encoder.pictures.vllm(encoder.pictures.processor)
    return dict(limit_mm_per_prompt={"video": 0}, mm_processor_kwargs=settings)


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise KepoConfigError(
            f"sampler='vllm' needs vLLM, which cannot be imported: {error}; "
            "pip install 'kepo[vllm]', or set sampler: transformers"
        ) from error
    return vllm


@contextmanager
def _launched() -> Iterator[None]:
    """Set the environment that torchrun sets, if it did not start this process: vLLM reads it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = torch.cuda.current_device() if torch.cuda.is_available() else 0
    facts: dict[str, object] = dict(RANK=rank(), LOCAL_RANK=own, WORLD_SIZE=world_size())
    facts |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    added = {name: str(fact) for name, fact in facts.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
