"""What a whole step is measured on, as files that any trainer reads: a student, perhaps a teacher,
and questions whose prompts are all of one length.

Completions are as long as they may be, whoever samples them: the head's rows of control tokens,
the end token among them, and of ids without a token point away from a direction that every state
has, so that their probability is 0. Nothing else about the models is special.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.loop.problem import HEAD_SIZE, Size, image_processor, picture
from kepo.data.load import load_examples
from kepo.digits.tiny import build_tokenizer
from kepo.miniature.tiny_models import CONTROL_TOKENS
from kepo.models.encoding import Encoder
from kepo.models.families.family import TinySize
from kepo.models.families.qwen3_vl import PATCH, tiny_config
from kepo.models.families.qwen_vl import pictures_of
from kepo.rollout.prompts import prompt_of
from kepo.tasks.multiple_choice import MultipleChoice

PADDING = 64  # rows of the head that no token has
IMAGE = "<|image_pad|>"
NEVER = -1e4  # in the head, on a direction in which every state is positive
TOKEN_SIDE = 2 * PATCH  # pixels on each side of what becomes one token of a picture


@dataclass(frozen=True)
class Sizes:
    """The flags that say what a step is."""

    student: tuple[int, int]
    """Hidden size and layers."""
    teacher: tuple[int, int] | None
    vocab: int
    prompt: int
    """Tokens of a prompt, its picture's among them."""
    prompts: int
    generations: int
    length: int
    """Tokens of a completion."""
    picture: int
    """Tokens on each side of a prompt's picture."""
    micro_batch: int
    device: str
    seed: int

    @property
    def completions(self) -> int:
        return self.prompts * self.generations

    @property
    def tokens(self) -> int:
        """Completion tokens of a step, all of which are sampled and trained on."""
        return self.completions * self.length


def usual_picture(prompt: int) -> int:
    """Return a side such that most of a long prompt is its picture, as where pictures are real."""
    return math.isqrt(max(4, prompt - 100))


def write(folder: Path, sizes: Sizes) -> None:
    """Write ``folder``/student, teacher, data and sizes.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sizes.json").write_text(json.dumps(asdict(sizes)), encoding="utf-8")
    tokenizer = filled(build_tokenizer(), sizes.vocab - PADDING)
    for number, name in enumerate(("student", "teacher")):
        shape = getattr(sizes, name)
        if shape is not None:
            write_model(folder / name, Size(*shape), tokenizer, sizes.vocab, sizes.seed + number)
    write_questions(folder, sizes, tokenizer)


def read_sizes(folder: Path) -> Sizes:
    found = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))
    for name in ("student", "teacher"):
        found[name] = found[name] and tuple(found[name])
    return Sizes(**found)


def filled(tokenizer: Any, count: int) -> Any:
    """Return the tokenizer with further tokens, which no text becomes, up to ``count`` ids."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    vocab |= {added["content"]: added["id"] for added in state["added_tokens"]}
    vocab |= {f"tok{number}": number for number in range(len(vocab), count)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        padding_side="left",
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
    )


def write_model(path: Path, size: Size, tokenizer: Any, vocab: int, seed: int) -> None:
    """Write a random Qwen3-VL with an untied head that never gives a control token."""
    import transformers

    config = tiny_config(
        tokenizer,
        TinySize(
            hidden=size.hidden,
            layers=size.layers,
            heads=size.hidden // HEAD_SIZE,
            vision_hidden=size.hidden // 2,
            vision_depth=1,
            tied=False,
        ),
    )
    config.text_config.vocab_size = vocab
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen3VLForConditionalGeneration(config).float()
    with torch.no_grad():
        text = model.model.language_model
        text.embed_tokens.weight[:, 0] = 1.0
        for layer in text.layers:  # which leave that direction of the stream alone
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        head = model.get_output_embeddings().weight
        head[:, 0] = 0.0
        head[tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)), 0] = NEVER
        head[len(tokenizer) :, 0] = NEVER
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    image_processor().save_pretrained(path)


def write_questions(folder: Path, sizes: Sizes, tokenizer: Any) -> None:
    """Write the questions in OmniMedVQA's layout. Digits, a token each, fill a prompt up."""
    root, side = folder / "data", TOKEN_SIDE * sizes.picture
    target = root / "QA_information" / "digits" / "all.json"
    (root / "Images").mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    for number in range(sizes.prompts):
        picture(root / "Images" / f"{number}.png", (side, side), sizes.seed + number)

    def put(fill: int) -> int:
        """Write all questions with that many digits, and return the tokens of a prompt."""
        draws = torch.Generator().manual_seed(sizes.seed)
        digits = torch.randint(10, (sizes.prompts, fill), generator=draws).tolist()
        records = [
            {
                "dataset": "digits",
                "question_id": f"q{number}",
                "question_type": "Digits",
                "question": f"What is the sum of {number:03}{''.join(map(str, digits[number]))}?",
                "gt_answer": "2",
                "image_path": f"Images/{number}.png",
                **dict(zip(("option_A", "option_B"), "23", strict=True)),
                "modality_type": "digits",
            }
            for number in range(sizes.prompts)
        ]
        target.write_text(json.dumps(records), encoding="utf-8")
        examples, _ = load_examples(root)
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        encoder = Encoder(tokenizer, pictures_of(image_processor(), image))
        shown = encoder.encode([prompt_of(MultipleChoice(), example) for example in examples])
        if not bool(shown.attention_mask.all()) or len(shown) != sizes.prompts:
            raise SystemExit("error: the prompts are not all of one length")
        return shown.input_ids.shape[1]

    fill = sizes.prompt - put(0)
    if fill < 0:
        raise SystemExit(
            f"error: --prompt {sizes.prompt}: expected at least {sizes.prompt - fill} tokens, "
            "which the question has already"
        )
    if (length := put(fill)) != sizes.prompt:
        raise SystemExit(f"error: prompts have {length} tokens; expected {sizes.prompt}")
