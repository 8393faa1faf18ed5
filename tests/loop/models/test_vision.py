"""Several images a prompt, each encoded once: positions, states, gradients, samples stay right."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from families import FAMILIES, pictures
from toy import RIGHT, WRONG, rollout

from kepo.config import Config
from kepo.errors import KepoCheckpointError, KepoDataError
from kepo.models import vision
from kepo.models.encoding import Prompt
from kepo.models.sampling import SamplingParams
from kepo.models.vlm import VLM
from kepo.objective.batch import collate
from kepo.objective.score import FrozenScores
from kepo.objective.step import kepo_step
from kepo.objective.totals import StepTotals

CLOSE = dict(rtol=1e-4, atol=1e-5)
DROP = "mm_token_type_ids"


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request, tinies) -> VLM:
    return VLM.load(tinies / request.param)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> list[Prompt]:
    """Two images, none, one, and three of which two are the same; some are wider than a window."""
    a, b, c = pictures(tmp_path_factory.mktemp("images"), (64, 32), (32, 32), (224, 160))
    return [
        Prompt("Which?", (a, c)),
        Prompt("No picture at all?"),
        Prompt("One", b),
        Prompt("Again?", (c, a, c)),
    ]


@pytest.fixture(scope="module")
def completion(vlm):
    return vlm.encode_completions(["<think>3 + 5 = 8</think><answer>C</answer>", "no", "a b c", ""])


def flat(inputs, ids, mask) -> dict:
    """The arguments of the model's own forward, every image as often as it is shown."""
    places = [place for places in inputs.image_places for place in places]
    images = inputs.pixel_values.split(inputs.image_grid_thw.prod(-1).tolist())
    return dict(
        input_ids=torch.cat([inputs.input_ids, ids], 1),
        attention_mask=torch.cat([inputs.attention_mask, mask.long()], 1),
        mm_token_type_ids=torch.cat([inputs.mm_token_type_ids, torch.zeros_like(ids)], 1),
        pixel_values=torch.cat([images[place] for place in places]),
        image_grid_thw=inputs.image_grid_thw[places],
    )


def positions(types: list[int], grids: list[list[int]]) -> torch.Tensor:
    """(3, L) of a row without padding: an image's tokens count up its rows and columns, and what
    follows goes on from its longer side."""
    columns, start, grids = [], 0, iter(grids)
    place = 0
    while place < len(types):
        if types[place] == 0:
            columns.append((start, start, start))
            place, start = place + 1, start + 1
            continue
        _, height, width = next(grids)
        height, width = height // 2, width // 2
        columns += [(start, start + y, start + x) for y in range(height) for x in range(width)]
        place, start = place + height * width, start + max(height, width)
    return torch.tensor(columns).T


@contextmanager
def watched(vlm):
    """Positions that the language model is given, and patches that the vision tower is, by call."""
    seen, patches = [], []
    text, tower = vlm.model.model.language_model, vlm.model.model.visual
    hooks = [
        text.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        ),
        tower.register_forward_pre_hook(lambda module, args: patches.append(len(args[0]))),
    ]
    try:
        yield seen, patches
    finally:
        for hook in hooks:
            hook.remove()


def gradients(vlm, inputs, ids, mask) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    vlm.model.zero_grad(set_to_none=True)
    hidden = vlm.completion_hidden(inputs, ids, mask)[mask]
    logprobs = (hidden @ vlm.head.weight.T).float().log_softmax(-1)
    (logprobs * torch.linspace(0, 1, logprobs.shape[1])).sum().backward()
    found = {n: p.grad for n, p in vlm.model.named_parameters() if p.grad is not None}
    vlm.model.zero_grad(set_to_none=True)
    return hidden.detach(), found


# ---- encode ----


def test_an_image_is_there_once_however_many_prompts_show_it(vlm, prompts):
    inputs = vlm.encode([prompts[0], prompts[0], *prompts])
    assert [len(places) for places in inputs.image_places] == [2, 2, 2, 0, 1, 3]
    assert inputs.image_places == ((0, 1), (0, 1), (0, 1), (), (2,), (1, 0, 1))
    sizes = inputs.image_grid_thw.prod(-1)
    assert len(sizes) == 3 and len(inputs.pixel_values) == sizes.sum()
    shown = [sum(int(sizes[place]) // 4 for place in row) for row in inputs.image_places]
    assert inputs.mm_token_type_ids.sum(1).tolist() == shown
    alone = vlm.encode([prompts[3]])
    assert torch.equal(alone.pixel_values, inputs.patches([1, 0]))
    starts = [vlm.tokenizer.decode(row).split("user\n")[1] for row in inputs.input_ids]
    assert starts[3].startswith("No picture") and starts[4].startswith("<|vision_start|>")


def test_select_keeps_the_images_of_its_prompts(vlm, prompts):
    inputs = vlm.encode(prompts)
    for rows in ([3, 1], [1], [2, 2, 0], [1, 3, 3]):
        part, again = inputs.select(rows), vlm.encode([prompts[row] for row in rows])
        assert part.image_places == again.image_places
        assert torch.equal(part.image_grid_thw, again.image_grid_thw)
        assert torch.equal(part.pixel_values, again.pixel_values) or 1 in rows
        assert len(part.pixel_values) == len(again.pixel_values)
    assert inputs.repeat(2).pixel_values is inputs.pixel_values


# ---- forward ----


def test_states_times_head_are_the_models_logits(vlm, prompts, completion):
    inputs, (ids, mask) = vlm.encode(prompts), completion
    start = inputs.input_ids.shape[1] - 1
    with torch.no_grad():
        logits = vlm.model(**flat(inputs, ids, mask)).logits[:, start:-1]
        hidden = vlm.completion_hidden(inputs, ids, mask)
        torch.testing.assert_close((hidden @ vlm.head.weight.T)[mask], logits[mask], **CLOSE)
        for row in range(len(prompts)):  # nor does it matter what else is in the batch
            own = mask[row : row + 1, : int(mask[row].sum())]
            alone = vlm.completion_hidden(
                vlm.encode([prompts[row]]), ids[row : row + 1, : own.shape[1]], own
            )
            torch.testing.assert_close(alone[0], hidden[row][mask[row]], **CLOSE)
    tied = vlm.head.weight is vlm.model.get_input_embeddings().weight
    assert tied == vlm.model.config.tie_word_embeddings


def test_positions_are_those_of_the_images(vlm, prompts, completion):
    inputs, (ids, mask) = vlm.encode(prompts), completion
    with watched(vlm) as (seen, _), torch.no_grad():
        vlm.completion_hidden(inputs, ids, mask)
    given = flat(inputs, ids, mask)
    for row, places in enumerate(inputs.image_places):
        real = given["attention_mask"][row].bool()
        types = given[DROP][row][real].tolist()
        wanted = positions(types, [inputs.image_grid_thw[place].tolist() for place in places])
        assert torch.equal(seen[0][-3:, row, real], wanted)


def test_without_token_types_images_are_misplaced(vlm, prompts, completion, monkeypatch):
    """The fault that the tests above are there for; Qwen2.5-VL does not complain of it."""
    inputs, (ids, mask) = vlm.encode(prompts[:1]), [x[:1] for x in completion]
    plain = vlm.completion_hidden(inputs, ids, mask)
    given = vision.forward_inputs

    def dropping(*arguments):
        return {name: x for name, x in given(*arguments).items() if name != DROP}

    monkeypatch.setattr("kepo.models.vlm.forward_inputs", dropping)
    if "Qwen3" in type(vlm.model).__name__:
        with pytest.raises(ValueError, match=DROP):
            vlm.completion_hidden(inputs, ids, mask)
    else:
        assert (vlm.completion_hidden(inputs, ids, mask) - plain)[mask].abs().max() > 1e-2


def test_a_forward_that_takes_no_token_types_is_refused(vlm, prompts, completion, monkeypatch):
    inputs = vlm.encode(prompts)
    backbone = type(vlm.model.model)

    def forward(self, input_ids, **kwargs):
        raise AssertionError("must not be called")

    monkeypatch.setattr(backbone, "forward", forward)
    with pytest.raises(KepoCheckpointError, match=rf"{backbone.__name__} does not take {DROP}"):
        vlm.completion_hidden(inputs, *completion)
    with pytest.raises(KepoCheckpointError, match=DROP):
        vlm.generate(inputs, SamplingParams(max_tokens=2, temperature=1.0))


def test_a_prompt_too_long_for_the_model_is_refused(vlm, prompts, completion, monkeypatch):
    inputs, (ids, mask) = vlm.encode(prompts), completion
    longest = int(inputs.attention_mask.sum(1).max())
    text = vlm.model.config.get_text_config()
    monkeypatch.setattr(text, "max_position_embeddings", longest + ids.shape[1] - 1)
    with pytest.raises(KepoDataError, match=rf"{longest} tokens.* up to {ids.shape[1]}; expected"):
        vlm.completion_hidden(inputs, ids, mask)
    with pytest.raises(KepoDataError, match="max_position_embeddings"):
        vlm.generate(inputs, SamplingParams(max_tokens=ids.shape[1], temperature=1.0))
    short = inputs.select([1, 2])  # padded as the longest was, but not as long
    vlm.completion_hidden(short, ids[1:3], mask[1:3])


# ---- sharing features ----


@pytest.fixture
def sharing(vlm):
    if not vision.takes_features(vlm.model):
        pytest.skip("this transformers takes images, not their features")
    return vlm


@pytest.mark.parametrize("mode", ["plain", "checkpointing", "autocast"])
def test_shared_features_give_the_same_states_and_gradients(
    sharing, prompts, completion, mode, monkeypatch
):
    vlm = VLM(copy.deepcopy(sharing.model), sharing.encoder)
    inputs, (ids, mask) = vlm.encode(prompts).repeat(3), completion
    ids, mask = (x.repeat_interleave(3, 0) for x in (ids, mask))
    if mode == "autocast":  # slow on a CPU
        inputs, ids, mask = inputs.select(range(6, 9)), ids[6:9], mask[6:9]
    if mode == "checkpointing":
        vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
        vlm.model.train()
    patches = int(inputs.image_grid_thw.prod(-1).sum())
    shown = sum(int(inputs.image_grid_thw[p].prod()) for row in inputs.image_places for p in row)

    def run():
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast")
        with watched(vlm) as (_, seen), bf16:
            return *gradients(vlm, inputs, ids, mask), seen

    hidden, found, seen = run()
    monkeypatch.setattr(vision, "takes_features", lambda model: False)
    hidden_apart, apart, seen_apart = run()
    assert seen == [patches] and seen_apart == [shown] and shown >= 3 * patches
    assert (hidden - hidden_apart).norm() <= 1e-6 * hidden_apart.norm()
    assert found.keys() == apart.keys() == dict(vlm.model.named_parameters()).keys()
    # bf16 rounds each row's gradient of an image, and what nearly cancels is all rounding.
    whole = max(x.norm() for x in apart.values()) if mode == "autocast" else 0.0
    near = 2e-2 if mode == "autocast" else 2e-6
    for name, gradient in apart.items():
        assert gradient.norm() > 0
        assert (found[name] - gradient).norm() <= near * max(whole, gradient.norm()), name


@pytest.mark.parametrize("share_prompts", [False, True])
def test_a_micro_batch_encodes_the_images_of_its_questions_once(sharing, prompts, share_prompts):
    """Three completions of one question and three of another, as `kepo_step` is given them."""
    groups = [
        [replace(rollout(text), prompt=prompts[place]) for text in (RIGHT, WRONG, WRONG)]
        for place in (0, 3)
    ]
    config = Config(distill_coef=0.0, hint_trigger="never")
    batch = collate(groups, config)
    sharing.share_prompts = share_prompts
    with watched(sharing) as (_, met):
        loss, _ = kepo_step(sharing, None, batch, FrozenScores(), config, StepTotals())
        loss.backward()
    sharing.model.zero_grad(set_to_none=True)
    sharing.share_prompts = False
    assert met == [int(sharing.encode([prompts[0]]).image_grid_thw.prod(-1).sum())]


def test_a_frozen_tower_leaves_no_graph(sharing, prompts, completion):
    vlm = VLM(copy.deepcopy(sharing.model), sharing.encoder)
    vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
    vlm.model.model.visual.requires_grad_(False)
    _, found = gradients(vlm, vlm.encode(prompts), *completion)
    features = vision.forward_inputs(vlm.model, vlm.encode(prompts))["mm_encoder_outputs"]
    assert not features["image"].pooler_output[0].requires_grad
    assert found and not any("visual" in name for name in found)


def test_samples_do_not_change_when_images_are_encoded_once(sharing, prompts, monkeypatch):
    vlm = sharing
    inputs = vlm.encode(prompts)
    patches = int(inputs.image_grid_thw.prod(-1).sum())
    params, seeds = SamplingParams(n=3, max_tokens=6, temperature=1.0), range(12)
    with watched(vlm) as (seen, met):
        once = vlm.generate(inputs, params, seeds)
    assert met == [patches] and len(seen) > 1  # of all forwards, the first alone needs images
    monkeypatch.setattr(vision, "takes_features", lambda model: False)
    with watched(vlm) as (_, met):
        repeated = vlm.generate(inputs, params, seeds)
    shown = sum(int(inputs.image_grid_thw[p].prod()) for row in inputs.image_places for p in row)
    assert met == [shown] and shown > 2 * patches  # and not once more for each completion
    assert torch.equal(once.ids, repeated.ids) and torch.equal(once.mask, repeated.mask)
    torch.testing.assert_close(once.logprobs, repeated.logprobs, **CLOSE)


def test_what_was_sampled_is_what_is_scored(vlm, prompts):
    """Generation places images as training does: else its log-probabilities were another law's."""
    inputs = vlm.encode(prompts)
    ids, mask, logprobs = vlm.generate(
        inputs, SamplingParams(max_tokens=6, temperature=1.0, n=2), seeds=range(8)
    )
    with torch.no_grad():
        logits = vlm.completion_hidden(inputs.repeat(2), ids, mask) @ vlm.head.weight.T
    logits[..., vlm.never_sampled()] = -torch.inf
    scored = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(scored[mask], logprobs[mask], **CLOSE)


def test_adapters_in_the_model_share_features_too(tinies, prompts):
    peft = pytest.importorskip("peft")
    vlm = VLM.load(tinies / "qwen2.5")
    targets = ["q_proj", "v_proj", "qkv"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    vlm.model = peft.get_peft_model(vlm.model, config).get_base_model()
    ids, mask = vlm.encode_completions(["<think>3 + 5</think>"] * 4)
    inputs = vlm.encode([prompts[0]]).repeat(4)
    with watched(vlm) as (_, met):
        hidden, found = gradients(vlm, inputs, ids, mask)
    assert not vision.takes_features(vlm.model) or met == [len(inputs.pixel_values)]
    assert found and all("lora_" in name for name in found)
    assert any("visual" in name for name in found)
    logits = vlm.model(**flat(inputs, ids, mask)).logits[:, inputs.input_ids.shape[1] - 1 : -1]
    torch.testing.assert_close(hidden @ vlm.head.weight.T, logits[mask], **CLOSE)
