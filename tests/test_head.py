"""A vocabulary's logits piece by piece: the loss and the gradients of all at once."""

import copy

import pytest
import torch
from families import build
from torch.nn.functional import cross_entropy

import sparsekit.model.head as head
from sparsekit.model import Said
from sparsekit.train.head import summed
from sparsekit.train.losses import Objective
from sparsekit.train.records import IGNORED
from sparsekit.train.teacher import Running
from tests.matrix import families

TOKENS = torch.randint(1, 60, (3, 40), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.clone()
LABELS[1, 10:25] = IGNORED


@pytest.fixture(params=["Llama", "Mistral", "GPT2", "OPT"])
def model(request):
    found = build(request.param).double()
    for name, parameter in found.named_parameters():
        parameter.requires_grad_("q_proj" in name or "attn" in name or "head" in name)
    return found


def whole(model, dense=None, share=0.0, hidden=0.0):
    """The loss by one forward pass, and what trains by its gradient."""
    out = model(input_ids=TOKENS, output_hidden_states=True)
    logits, targets = out.logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()
    loss = (1 - share) * cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    if dense is not None:
        with torch.no_grad():
            other = dense(input_ids=TOKENS, output_hidden_states=True)
        p = other.logits[:, :-1].flatten(0, 1).softmax(-1)
        each = (p * (p.log() - logits.log_softmax(-1))).sum(-1)
        loss = loss + share * each[targets != IGNORED].sum()
    loss.backward()
    return float(loss.detach()), gradients(model)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("teaches", [False, True])
@pytest.mark.parametrize("numbers", [1, 10**9])
def test_pieces_are_the_whole(model, numbers, teaches, monkeypatch):
    monkeypatch.setattr(head, "NUMBERS", numbers)
    dense = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(1.05)
    expected, wanted = whole(model, dense if teaches else None, 0.3 if teaches else 0.0)
    objective = Objective(Running(lambda: dense) if teaches else None, distill=0.3)
    loss, _, count = objective(model, TOKENS, LABELS, torch.arange(3))
    (2 * loss).backward()
    found = gradients(model)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5) and count == int((LABELS[:, 1:] != IGNORED).sum())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], 2 * gradient, rtol=2e-4, atol=1e-5)


def test_no_piece_is_larger_than_it_may_be(monkeypatch):
    """The largest logits that are computed, and the blocks run once."""
    model = build("Llama")
    monkeypatch.setattr(head, "NUMBERS", 3 * 16 * model.config.vocab_size)
    seen, runs = [], []
    model.lm_head.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    model.model.layers[0].register_forward_hook(lambda *_: runs.append(1))
    loss, *_ = Objective()(model, TOKENS, LABELS, torch.arange(3))
    loss.backward()
    assert runs == [1] and seen == [1, 16, 16, 7]


def test_half_precision_of_a_trainer(monkeypatch):
    """Under autocast the head is in half precision and the loss in float32, as in one pass."""
    monkeypatch.setattr(head, "NUMBERS", 1)
    model = build("Llama")
    with torch.autocast("cpu", torch.bfloat16):
        whole = model(input_ids=TOKENS).logits[:, :-1].float().flatten(0, 1)
        expected = cross_entropy(whole, LABELS[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
        loss, *_ = Objective()(model, TOKENS, LABELS, torch.arange(3))
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(expected), rel=1e-3)


def test_without_gradients(monkeypatch):
    monkeypatch.setattr(head, "NUMBERS", 1)
    model = build("Llama")
    with torch.no_grad():
        said = Said(model, TOKENS)
        pieces = torch.cat([said.logits(places) for places in said.places(last=True)], 1)
        torch.testing.assert_close(pieces, model(input_ids=TOKENS).logits)
        assert float(summed(said, lambda logits, _: logits.sum())) == pytest.approx(
            float(pieces[:, :-1].sum()), rel=1e-4
        )


@pytest.mark.long
@pytest.mark.parametrize("family", families.names())
def test_every_family(family):
    """The logits of each place, with the head run apart, are those of one forward pass."""
    try:
        model = families.build(family)
    except Exception:  # no tiny model can be built of it
        pytest.skip("no tiny model")
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        said = Said(model, ids)
        pieces = torch.cat([said.logits(places) for places in torch.arange(24).split(7)], 1)
        torch.testing.assert_close(pieces, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
