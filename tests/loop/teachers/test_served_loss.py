"""The loss with a teacher behind a server: that of the local teacher's likeliest tokens."""

from dataclasses import replace

import pytest
import torch
from served_model import serving
from toy import ENV, pieces

from kepo.config import Config
from kepo.data.load import load_omnimedvqa
from kepo.models.vlm import VLM
from kepo.objective.batch import collate
from kepo.objective.score import FrozenScores, score
from kepo.objective.step import kepo_step
from kepo.objective.totals import StepTotals
from kepo.rollout.rollouts import sample
from kepo.teachers.served import ServedTeacher
from kepo.teachers.transport import Server
from kepo_kernels import TopK

K = 9
CONFIG = Config(
    teacher="t",
    teacher_top_k=K,
    gate_reward=None,
    num_generations=3,
    max_completion_length=6,
    hint_trigger="never",
)
CLOSE = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def models(made):
    return VLM.load(made / "student"), VLM.load(made / "teacher")


@pytest.fixture(scope="module")
def micros(models, made):
    """Two micro-batches; in the first one of three gates is closed."""
    examples = load_omnimedvqa(made / "data" / "train")[:2]
    groups = sample(models[0], examples, ENV, CONFIG, num_generations=3)
    batch = collate(groups, CONFIG)
    batch.distill_weights[1] = 0.0
    return pieces(batch, 3)


@pytest.fixture
def served(models):
    teacher = models[1]
    with serving(teacher) as server:
        client = Server("teacher", server.url, CONFIG)
        yield ServedTeacher(client, server.name, teacher.encoder, teacher.head_rows, CONFIG)


def of_the_local(teacher, micro):
    """What the server should say, from the local teacher's states."""
    opened = micro.opened.nonzero().squeeze(-1)
    prompts = [micro.prompts[place] for place in opened.tolist()]
    ids, mask = micro.completion_ids[opened], micro.completion_mask[opened]
    with torch.no_grad():
        law = (teacher.completion_states(prompts, ids, mask) @ teacher.head.weight.T).log_softmax(
            -1
        )
    top = law.topk(K)
    own = torch.where(mask, law.gather(-1, ids[..., None]).squeeze(-1), 0.0)
    return FrozenScores(TopK(top.indices, top.values), own)


def losses(policy, teacher, micros, scores, config):
    """Losses, the gradients of the head, and the sums."""
    policy.model.zero_grad()
    found, totals = [], StepTotals()
    for micro, known in zip(micros, scores, strict=True):
        known = known if config.step_weights else replace(known, teacher_logprobs=None)
        loss, _ = kepo_step(policy, teacher, micro, known, config, totals)
        loss.backward()
        found.append(loss.detach())
    return torch.stack(found), policy.head.weight.grad.clone(), totals.of_all_ranks()


@pytest.mark.parametrize(
    "settings",
    [
        dict(beta=0.0),
        dict(beta=0.5, distill_coef=3.0),
        dict(beta=1.0, policy_coef=0.0),
        dict(step_weights=True, beta=1.0),
        dict(distill_tokens="first_error", beta=0.0),
        dict(temperature=0.7, teacher_temperature=1.0),
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_local_teachers_likeliest_tokens(models, micros, served, settings):
    (policy, teacher), config = models, replace(CONFIG, **settings)
    totals = StepTotals()
    found = score(served, None, micros, config, totals)
    expected = [of_the_local(teacher, micro) for micro in micros]
    if config.distill_tokens == "first_error":  # to an untrained teacher every token is one
        firsts = [
            micro.opened[:, None] & (micro.completion_mask.cumsum(-1) == 1) for micro in micros
        ]
        expected = [replace(e, distilled=f) for e, f in zip(expected, firsts, strict=True)]
    assert [len(one.teacher_hidden.ids) for one in found] == [2, 3]  # the open ones alone
    assert served.server.taken() == (5, 0)
    for one, other in zip(found, expected, strict=True):
        if config.step_weights:
            torch.testing.assert_close(one.teacher_logprobs, other.teacher_logprobs, **CLOSE)
        else:
            assert one.teacher_logprobs is None
    opened = sum(int(micro.completion_mask[micro.opened].sum()) for micro in micros)
    assert totals.teacher_tokens == opened and totals.teacher_seconds > 0
    mine = losses(policy, served, micros, found, config)
    theirs = losses(policy, served, micros, expected, config)
    torch.testing.assert_close(mine[0], theirs[0], **CLOSE)
    torch.testing.assert_close(mine[1], theirs[1], **CLOSE)
    assert mine[2].divergence == pytest.approx(theirs[2].divergence, rel=1e-5) and mine[1].any()


def test_the_divergence_is_less_than_the_whole_one_by_the_tail(models, micros, served):
    policy, teacher = models
    scores = score(teacher, None, micros, CONFIG, StepTotals())
    whole = losses(policy, teacher, micros, scores, CONFIG)
    found = []
    for k in (1, 5, 20):
        config = replace(CONFIG, teacher_top_k=k)
        one = ServedTeacher(served.server, "tiny", teacher.encoder, teacher.head_rows, config)
        scores = score(one, None, micros, config, StepTotals())
        found.append(losses(policy, one, micros, scores, config)[2].divergence)
    assert 0 < found[0] < found[1] < found[2] < whole[2].divergence


def test_with_every_gate_closed_it_is_not_asked(models, micros, served):
    closed = [replace(one, distill_weights=torch.zeros_like(one.distill_weights)) for one in micros]
    scores = score(served, None, closed, CONFIG, StepTotals())
    assert scores == [FrozenScores(), FrozenScores()] and served.server.taken() == (0, 0)
