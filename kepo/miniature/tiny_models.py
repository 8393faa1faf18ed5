"""Tiny random models of every family with their tokenizer, in the layout of released ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from kepo.data.load import Example
from kepo.errors import KepoConfigError
from kepo.miniature.warm_up import TASK, worked_hint
from kepo.models.families.family import TinySize
from kepo.models.families.processors import without_broken_torchvision
from kepo.models.families.registry import FAMILIES
from kepo.rollout.prompts import hint_prompt, prompt_of

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

# Qwen's own template without its tool and video branches: one user turn, image before text.
CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role + '\\n' }}"
    "{%- if message.content is string %}{{ message.content }}{%- else %}"
    "{%- for part in message.content %}{%- if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else %}{{ part.text }}{%- endif %}{%- endfor %}{%- endif %}<|im_end|>\n"
    "{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Size = Literal["student", "teacher"]
_SIZES = {
    "student": TinySize(hidden=96, layers=3, heads=4, vision_hidden=64, vision_depth=1),
    "teacher": TinySize(hidden=128, layers=3, heads=4, vision_hidden=96, vision_depth=1),
}
# The sampling settings in the released models' files; nothing here uses them (see VLM.generate).
_GENERATION = dict(
    do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
)  # fmt: skip


def write_tiny(
    path: str | Path,
    texts: Sequence[str],
    *,
    size: Size,
    seed: int,
    family: str = "qwen3_vl",
    tied: bool = False,
) -> None:
    """Write a random fp32 model that ``VLM.load`` can read.

    texts: what it will be asked and is to say; the tokenizer's words are theirs. family: a name in
    kepo.models.families.registry. The folder gets config, generation config, safetensors, tokenizer
    and preprocessor files, as the released models of the family have them. Models of equal texts
    share the tokenizer, hence the vocabulary. tied: output and input embedding are one matrix. The
    same seed gives the same bits; the caller's random state is left as it was. Raises
    KepoConfigError for another size or family.
    """
    without_broken_torchvision()
    import transformers

    if size not in _SIZES:
        raise KepoConfigError(f"write_tiny: size is {size!r}; expected one of {sorted(_SIZES)}")
    tinies = {name: one.tiny for name, one in FAMILIES.items() if one.tiny is not None}
    if family not in tinies:
        raise KepoConfigError(f"write_tiny: family is {family!r}; expected one of {sorted(tinies)}")
    tiny, tokenizer = tinies[family], tokenizer_of(texts)
    tokenizer.add_tokens(list(tiny.control_tokens), special_tokens=True)
    config = tiny.config(tokenizer, _SIZES[size]._replace(tied=tied))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, tiny.loads)(config).float()
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
        **_GENERATION,
    )
    model.save_pretrained(path)
    tiny.finish(Path(path), tokenizer)


def tokenizer_of(texts: Sequence[str]) -> Any:
    """Build a byte-level BPE tokenizer from the texts of a demonstration: any text round-trips, and
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
    tokenizer.train_from_iterator(texts, trainer)
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


def texts_about(examples: Sequence[Example]) -> list[str]:
    """Return all that is asked and said about examples with a rationale: plainly, with a hint, and
    when a hint is asked for."""
    prompts = []
    for example in examples:
        hint = worked_hint(example)
        prompts += [prompt_of(TASK, example), prompt_of(TASK, example, hint)]
        prompts += [hint_prompt(TASK, example, with_answer=told) for told in (True, False)]
    said = [example.rationale for example in examples]
    return ["user\n", "assistant\n", *said, *(prompt.text for prompt in prompts)]
