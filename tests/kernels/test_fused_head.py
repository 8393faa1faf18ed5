"""`FusedHead`: a loss inside of the head's forward is that of the model's own whole logits."""

import pytest

pytest.importorskip("transformers")

from tiny_heads import KINDS, batch, build, error, gradients, plain_numbers

from kepo_kernels import FusedHead, fused_linear_logprobs, fused_linear_loss

TOLERANCE = 1e-6


def numbers_upstream(hidden, head, x):
    """Reads the weight again in backward."""
    numbers = fused_linear_logprobs(hidden, head, x["targets"], return_entropy=True)
    return sum((each * u).sum() for each, u in zip(numbers, x["upstream"], strict=True))


def loss_in_forward(hidden, head, x):
    """The same number, whose gradients are formed in forward."""

    def token_loss(stats, rows):
        a, b = x["upstream"].flatten(1)[:, rows]
        return a * stats.logprobs + b * stats.entropy

    return fused_linear_loss(hidden, head, x["targets"], token_loss)


LOSSES = {"logprobs": numbers_upstream, "loss": loss_in_forward}


def plain(model, x):
    numbers = plain_numbers(model(input_ids=x["ids"]).logits, x["targets"])
    return sum((each * u).sum() for each, u in zip(numbers, x["upstream"], strict=True))


def by_model(model, loss, x):
    return model(input_ids=x["ids"], loss=lambda hidden, head: loss(hidden, head, x))


def by_head(model, loss, x):
    """As a forward of one's own would: backbone and head called apart."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(input_ids=x["ids"]).last_hidden_state
    return inner.lm_head(hidden, loss=lambda hidden, head: loss(hidden, head, x))


def by_handle(model, loss, x):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(input_ids=x["ids"]).last_hidden_state
    return FusedHead(inner)(hidden, lambda hidden, head: loss(hidden, head, x))


WAYS = {"model": by_model, "head": by_head, "handle": by_handle}


def value_and_gradients(model, compute):
    model.zero_grad()
    value = compute()
    value.backward()
    return {"value": value.detach()} | gradients(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_pytorch_on_whole_logits(kind, loss, way):
    model, x = build(kind), batch()
    expected = value_and_gradients(model, lambda: plain(model, x))
    FusedHead.install(model)
    found = value_and_gradients(model, lambda: WAYS[way](model, LOSSES[loss], x))
    e = error(found, expected)
    print(kind, loss, way, e)
    assert e <= TOLERANCE
