"""The gate in verl's rollout workers: its method on what verl hands it, with a counting teacher."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("verl")

import ray
import torch
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ
from verl.utils.import_utils import load_class_from_fqn
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.config import DistillationLossConfig

from kepo_kernels import KepoInputError
from kepo_kernels.integrations.verl import use_kepo
from kepo_kernels.integrations.verl.gated_rollouts import (
    GatedAgentLoopManager,
    GatedAgentLoopWorker,
)

use_kepo()

PROMPT, RESPONSE = [5, 6, 7], [8, 9]


class Teacher:
    """In place of verl's client of teacher servers: it counts, and answers with k tokens."""

    def __init__(self, loss_mode, k):
        self.distillation_loss_config = DistillationLossConfig(
            loss_mode=loss_mode, topk=4, use_policy_gradient=False
        )
        self.k, self.asked = k, 0

    async def compute_teacher_logprobs_single(self, sequence_ids, **_):
        self.asked += 1
        shape = len(sequence_ids), self.k
        return torch.arange(self.k, dtype=torch.int32).expand(shape), torch.full(shape, -2.0)


def worker(loss_mode="kepo_jsd", k=4, settings=None):
    """A worker as its __init__ leaves it, without models, tokenizers and queues."""
    found = object.__new__(GatedAgentLoopWorker)
    found.distillation_enabled, found.teacher_key = True, "data_source"
    found.teacher_server_manager = Teacher(loss_mode, k)
    found.config = {} if settings is None else {"kepo": settings}
    return found


def rollout(reward):
    return AgentLoopOutput(
        prompt_ids=PROMPT,
        response_ids=RESPONSE,
        response_mask=[1, 1],
        reward_score=reward,
        metrics=AgentLoopMetrics(),
    )


def ask(found, output, validate=False):
    """The call of AgentLoopWorkerTQ._agent_loop_postprocess."""
    asyncio.run(
        found._compute_teacher_logprobs(
            output,
            prompt_ids=output.prompt_ids,
            response_ids=output.response_ids,
            validate=validate,
            sample_kwargs={"data_source": "digits"},
        )
    )
    return output.extra_fields


@pytest.mark.parametrize("mode, k", [("kepo_jsd", 4), ("kepo_k3", 1)])
def test_the_teacher_is_asked_about_good_rollouts_only(mode, k):
    found = worker(mode, k, dict(gate_threshold=0.5))
    rewards = [1.0, 0.2, 0.5, float("nan"), -1.0]
    fields = [ask(found, rollout(reward)) for reward in rewards]
    assert found.teacher_server_manager.asked == 2
    is_open = [bool((x["teacher_ids"] >= 0).all()) for x in fields]
    assert is_open == [True, False, True, False, False]
    kinds = {(x.shape, x.dtype) for f in fields for x in (f["teacher_ids"], f["teacher_logprobs"])}
    assert kinds == {((5, k), torch.int32), ((5, k), torch.float32)}


def test_without_a_threshold_a_reward_of_1_opens():
    found = worker()
    for reward in (0.999, 1.0):
        ask(found, rollout(reward))
    assert found.teacher_server_manager.asked == 1


def test_verl_stacks_open_and_closed_rollouts():
    found = worker()
    outputs = [rollout(reward) for reward in (1.0, 0.0)]
    for x in outputs:
        ask(found, x)
    batch = list_of_dict_to_tensordict([x.as_dict() for x in outputs])
    ids = batch["teacher_ids"]
    assert [bool((x >= 0).all()) for x in ids.unbind()] == [True, False]


def test_validation_and_runs_without_a_teacher_are_as_before():
    found = worker()
    assert ask(found, rollout(0.0), validate=True) == {}
    found.distillation_enabled = False
    assert ask(found, rollout(1.0)) == {} and found.teacher_server_manager.asked == 0


def test_what_the_gate_cannot_do_is_refused():
    with pytest.raises(KepoInputError, match=r"loss_mode=forward_kl_topk reads a teacher of every"):
        ask(worker("forward_kl_topk"), rollout(0.0))
    with pytest.raises(KepoInputError, match=r"kepo.gate_threshold=1.0 found a rollout without"):
        ask(worker(), rollout(None))


def test_verl_loads_the_manager_by_its_name():
    name = "kepo_kernels.integrations.verl.gated_rollouts.GatedAgentLoopManager"
    assert load_class_from_fqn(name, "AgentLoopManager") is GatedAgentLoopManager
    rollouts = SimpleNamespace(rollout=None, model=None)
    manager = GatedAgentLoopManager(SimpleNamespace(actor_rollout_ref=rollouts), None)
    assert isinstance(manager, AgentLoopManagerTQ)
    made = manager.agent_loop_workers_class
    assert isinstance(made, ray.actor.ActorClass)
    assert issubclass(made.__ray_actor_class__, GatedAgentLoopWorker)
