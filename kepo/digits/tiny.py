"""Tiny random Qwen-VL models with their tokenizer, written in the layout of the released ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from kepo.data.load import Example
from kepo.digits.dataset import QUESTION, SMALL_DIGITS
from kepo.errors import KepoConfigError
from kepo.models.processors import pillow_processor_class, without_broken_torchvision
from kepo.rollout.prompts import hint_prompt, prompt_of
from kepo.tasks.multiple_choice import MultipleChoice

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FORMAT_TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<hint>", "</hint>")
PATCH = 16  # the patch size of Qwen3-VL
OLDER_PATCH = 14  # the patch size of Qwen2.5-VL
INITIALIZER_RANGE = 0.06  # with the usual 0.02 a model this narrow is slow to see the image

# Qwen's own template without its tool and video branches: one user turn, image before text.
CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role + '\\n' }}"
    "{%- if message.content is string %}{{ message.content }}{%- else %}"
    "{%- for part in message.content %}{%- if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else %}{{ part.text }}{%- endif %}{%- endfor %}{%- endif %}<|im_end|>\n"
    "{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Qwen2.5-VL's template first says who the model is.
OLDER_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZES: dict[str, dict[str, Any]] = {
    "student": dict(hidden=96, layers=3, heads=4, vision_hidden=64, vision_depth=1),
    "teacher": dict(hidden=128, layers=3, heads=4, vision_hidden=96, vision_depth=1),
}
# The sampling settings in the released models' files; nothing here uses them (see VLM.generate).
_GENERATION = dict(
    do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
)  # fmt: skip


def build_tiny(
    path: str | Path,
    *,
    size: Literal["student", "teacher"],
    seed: int,
    family: Literal["qwen3_vl", "qwen2_5_vl"] = "qwen3_vl",
    tied: bool = False,
) -> None:
    """Write a random fp32 Qwen3-VL or Qwen2.5-VL that ``VLM.load`` can read.

    The folder gets config, generation config, safetensors, tokenizer and preprocessor files, as the
    released models of the family have them. All sizes and families share the tokenizer, hence the
    vocabulary. tied: output and input embedding are one matrix. The same seed gives the same bits;
    the caller's random state is left as it was. Raises KepoConfigError for another size or family.
    """
    without_broken_torchvision()
    import transformers

    if size not in _SIZES:
        raise KepoConfigError(f"build_tiny: size is {size!r}; expected one of {sorted(_SIZES)}")
    if family not in _FAMILIES:
        raise KepoConfigError(
            f"build_tiny: family is {family!r}; expected one of {sorted(_FAMILIES)}"
        )
    name, config_of, finish = _FAMILIES[family]
    tokenizer = build_tokenizer()
    config = config_of(tokenizer, **_SIZES[size], tied=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config).float()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        **_GENERATION,
    )
    model.save_pretrained(path)
    finish(Path(path), tokenizer)


def _finish(path: Path, tokenizer: Any) -> None:
    """Write the tokenizer, its chat template in a file of its own, and the preprocessor, as in
    Qwen3-VL."""
    tokenizer.save_pretrained(path)
    pillow_processor_class()(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 256 * 256},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(path)


def _finish_older(path: Path, tokenizer: Any) -> None:
    """Write the same files as in Qwen2.5-VL: the chat template is among the tokenizer's settings,
    and the preprocessor's have their older names."""
    tokenizer.chat_template = OLDER_CHAT_TEMPLATE
    tokenizer.save_pretrained(path, save_jinja_files=False)
    settings = {
        "min_pixels": (2 * OLDER_PATCH) ** 2,
        "max_pixels": 256 * 256,
        "patch_size": OLDER_PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (path / "preprocessor_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


def build_tokenizer() -> Any:
    """Build a byte-level BPE tokenizer from the project's own prompts: any text round-trips, and
    digits stay single."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # As in Qwen, each digit is a token of its own; a mark takes its spaces along (" + ", ". ").
    pieces = Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+ ?|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # never reached: the few words of the prompts run out first
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_prompt_texts(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in CONTROL_TOKENS])
    # The tags are part of the answer, so decoding must keep them: added, but not special.
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in FORMAT_TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def model_config(
    tokenizer: Any,
    *,
    hidden: int,
    layers: int,
    heads: int,
    vision_hidden: int,
    vision_depth: int,
    tied: bool,
) -> Any:
    """Return the ``Qwen3VLConfig`` of a tiny model; the vocabulary's rows are padded to 64."""
    from transformers import Qwen3VLConfig

    head_dim = hidden // heads
    quarter = head_dim // 8
    return Qwen3VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=head_dim,
            max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 100.0,  # prompts are some fifty tokens long
                # The frequencies that time, height and width get; together half a head.
                "mrope_section": [head_dim // 2 - 2 * quarter, quarter, quarter],
                "mrope_interleaved": True,
            },
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=tied,
            initializer_range=INITIALIZER_RANGE,
        ),
        vision_config=dict(
            depth=vision_depth,
            hidden_size=vision_hidden,
            intermediate_size=2 * vision_hidden,
            num_heads=4,
            patch_size=PATCH,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=hidden,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
            initializer_range=INITIALIZER_RANGE,
        ),
        tie_word_embeddings=tied,
        **_token_ids(tokenizer),
    )


def older_model_config(
    tokenizer: Any,
    *,
    hidden: int,
    layers: int,
    heads: int,
    vision_hidden: int,
    vision_depth: int,
    tied: bool,
) -> Any:
    """Return the ``Qwen2_5_VLConfig`` of a tiny model.

    Its vision tower has one more block, so that some see windows of the image and some all of it.
    """
    from transformers import Qwen2_5_VLConfig

    head_dim = hidden // heads
    quarter = head_dim // 8
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=4096,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 100.0,
                "mrope_section": [head_dim // 2 - 2 * quarter, quarter, quarter],
            },
            bos_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=tied,
            initializer_range=INITIALIZER_RANGE,
        ),
        vision_config=dict(
            depth=vision_depth + 1,
            hidden_size=vision_hidden,
            intermediate_size=2 * vision_hidden,
            num_heads=4,
            patch_size=OLDER_PATCH,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=hidden,
            window_size=4 * OLDER_PATCH,
            fullatt_block_indexes=[vision_depth],
            initializer_range=INITIALIZER_RANGE,
        ),
        tie_word_embeddings=tied,
        **_token_ids(tokenizer),
    )


def _token_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


_FAMILIES = {
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", model_config, _finish),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", older_model_config, _finish_older),
}


def _prompt_texts() -> list[str]:
    example = Example(
        id="",
        question=QUESTION,
        options=("0", "1", "2", "3"),
        answer="A",
        images=(),
        modality="",
        question_type=SMALL_DIGITS,
    )
    task = MultipleChoice()
    prompts = [prompt_of(task, example), prompt_of(task, example, "3 + 5")]
    prompts += [hint_prompt(task, example, with_answer=told) for told in (True, False)]
    return ["user\n", "assistant\n", "3 + 5 = 8", *(prompt.text for prompt in prompts)]
