"""The rows of an update, counted by hand, and the room of a cache, against the cache itself."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from kepo.config import Config
from kepo.models.packing import why_not_packed
from kepo.models.reading import read_model
from kepo.objective import micros
from kepo.planner import shapes
from kepo.planner.generating import rooms
from kepo.planner.model_sizes import model_sizes
from kepo.planner.shapes import Shape, share_of
from kepo.planner.standing import Machine

pytest.importorskip("transformers")
# Prompts of 100 tokens; 6 groups of 8, or 48 rows of their own.
SIZES = Config(prompts_per_step=6, num_generations=8, max_completion_length=11)


@pytest.mark.parametrize(
    "settings, gpus, micro, micros",
    [
        (dict(micro_batch=16), 1, Shape(2, 180, 16, 2), 3),
        (dict(micro_batch=15), 1, Shape(1, 180, 8, 1), 6),
        (dict(micro_batch=7), 1, Shape(1, 140, 4, 1), 12),  # half of a group
        (dict(micro_batch=48, micro_tokens=400), 1, Shape(2, 180, 16, 2), 3),
        (dict(micro_batch=48, micro_tokens=179), 1, Shape(1, 140, 4, 1), 12),
        (dict(micro_batch=48, micro_tokens=50), 1, Shape(1, 110, 1, 1), 48),  # one, at the least
        (dict(micro_batch=48), 4, Shape(2, 180, 12, 2), 1),  # a whole group, and half of another
        (dict(micro_batch=16, share_prompts=False), 1, Shape(16, 111, 16, 6), 3),
        (dict(micro_batch=5, share_prompts=False), 5, Shape(5, 111, 5, 5), 2),
        # Fewer questions than GPUs: a group is cut for those that would have nothing to do.
        (dict(micro_batch=48, prompts_per_step=1), 4, Shape(1, 120, 2, 1), 1),
        (dict(micro_batch=48, prompts_per_step=3), 4, Shape(1, 180, 8, 1), 1),  # no rank gains
    ],
)
def test_micro_batch(settings, gpus, micro, micros):
    config = replace(SIZES, **settings)
    found = share_of(config, config, Machine(gpus, 2**30), 100, config.share_prompts)
    assert (found.micro, found.micros) == (micro, micros)


@pytest.mark.parametrize(
    "settings, gpus, shared, whole",
    [
        (dict(), 1, True, (6, 180, 48, 6)),
        (dict(), 1, False, (48, 111, 48, 6)),
        (dict(mini_batches=3), 1, True, (6, 180, 48, 6)),
        (dict(), 4, True, (6, 120, 12, 6)),  # of each group two completions
        (dict(prompts_per_step=1), 4, True, (1, 120, 2, 1)),
        (dict(prompts_per_step=1), 4, False, (2, 111, 2, 1)),
    ],
)
def test_all_at_once(settings, gpus, shared, whole):
    config = replace(SIZES, micro_batch=3, **settings)
    assert share_of(config, config, Machine(gpus, 2**30), 100, shared).whole == whole


@pytest.mark.parametrize("questions, ranks", [(1, 2), (1, 3), (2, 4), (3, 4), (6, 4), (5, 1)])
def test_no_rank_of_a_run_computes_more_than_is_planned(questions, ranks, monkeypatch):
    """A run lays its completions out by the ranks that it has."""
    config = replace(SIZES, prompts_per_step=questions, micro_batch=6)
    planned = share_of(config, config, Machine(ranks, 2**30), 100, True)
    monkeypatch.setattr(micros, "world_size", lambda: ranks)
    batch = shapes._full(questions, config)
    shares = micros.plan_micros(batch, [100] * len(batch), config, True)
    computed = [sum(len(row.places) for micro in own for row in micro) for own in shares]
    assert max(computed) == planned.whole.completions and sum(computed) == 8 * questions
    assert max(map(len, shares)) == planned.micros
    largest = max(len(m) * max(row.tokens for row in m) for own in shares for m in own)
    assert largest == planned.micro.rows * planned.micro.length


@pytest.mark.parametrize("attention", [None, "sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("width", [None, 8])
def test_prompts_are_shared_where_a_run_shares_them(tinies, tmp_path, attention, width):
    """By the attention and by the layers: a window is a setting of the model's."""
    shutil.copytree(tinies / "qwen2.5", tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / "config.json").read_text())
    if width is not None:
        record["text_config"] |= dict(use_sliding_window=True, sliding_window=width)
        record["text_config"] |= dict(layer_types=None, max_window_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(record))
    model = model_sizes(str(tmp_path), "float32", "cpu", attention)
    assert model.shares_prompts(SIZES) == (width is None and attention != "flash_attention_2")
    assert not model.shares_prompts(replace(SIZES, share_prompts=False))
    if attention != "flash_attention_2":  # which is not installed
        run = read_model(tmp_path, torch.float32, attn_implementation=attention)
        assert model.shares_prompts(SIZES) == (why_not_packed(run.config) is None)


def test_layers_of_linear_attention_share_no_prompt():
    from transformers import Qwen3NextConfig

    assert "linear_attention" in why_not_packed(Qwen3NextConfig(), "sdpa")
    assert "flash_attention_2" in why_not_packed(Qwen3NextConfig(), "flash_attention_2")


@pytest.mark.parametrize("appended", [1, 2, 65, 66, 131, 200])
def test_rooms_are_those_of_the_cache(appended):
    from kepo.models.generation import _RoomyLayer

    layer = _RoomyLayer(*torch.zeros(2, 3, 2, 20, 4))
    sizes = [20]
    for _ in range(appended):
        layer.update(*torch.zeros(2, 3, 2, 1, 4))
        whole = layer._whole[0].shape[2]
        if whole != sizes[-1]:
            sizes.append(whole)
    assert rooms(20, appended) == tuple(sizes[-2:])
