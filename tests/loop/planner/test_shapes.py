"""The rows of an update, counted by hand, and the room of a cache, against the cache itself."""

from dataclasses import replace

import pytest
import torch

from kepo.config import Config
from kepo.planner.generating import rooms
from kepo.planner.held import Machine
from kepo.planner.shapes import Shape, share_of

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
        (dict(micro_batch=48), 4, Shape(2, 180, 16, 2), 1),  # two of six groups on one of four
        (dict(micro_batch=16, share_prompts=False), 1, Shape(16, 111, 16, 6), 3),
        (dict(micro_batch=16, attn_implementation="eager"), 1, Shape(2, 180, 16, 2), 3),
        (dict(micro_batch=5, attn_implementation="flash_attention_2"), 5, Shape(5, 111, 5, 5), 2),
    ],
)
def test_micro_batch(settings, gpus, micro, micros):
    found = share_of(replace(SIZES, **settings), Machine(gpus, 2**30), 100)
    assert (found.micro, found.micros) == (micro, micros)


@pytest.mark.parametrize(
    "share_prompts, whole", [(True, (6, 180, 48, 6)), (False, (48, 111, 48, 6))]
)
def test_all_at_once(share_prompts, whole):
    config = replace(SIZES, share_prompts=share_prompts, micro_batch=3)
    assert share_of(config, Machine(1, 2**30), 100).whole == whole


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
