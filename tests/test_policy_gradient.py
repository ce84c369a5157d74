"""Policy gradient: the estimator against enumeration, projection against its definition, learning, resuming."""

import itertools

import pytest
import torch
from families import SETTINGS, build
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from sparsekit.model import discover
from sparsekit.model.structure import choose, find_units
from sparsekit.stages.policy_gradient import policy_gradient
from sparsekit.testing import begin, context
from sparsekit.train import Checkpoints, PolicyGradient, last_checkpoint
from sparsekit.train.bernoulli import (
    Budget,
    Groups,
    budgets,
    leave_one_out,
    sample,
    score_const,
    sigmoid_norm,
    surrogate,
)

TEXT = torch.randint(1, 96, (12, 16), generator=torch.Generator().manual_seed(1))
S = torch.tensor([0.2, 0.5, 0.7, 0.9, 0.35, 0.6], dtype=torch.float64)
MASKS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)  # all 64
LOSSES = (
    torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + MASKS @ torch.arange(6.0).double()
)


def exact_gradient():
    """Of the expected loss, by differentiating the sum over all masks."""
    s = S.clone().requires_grad_()
    probability = (MASKS * s + (1 - MASKS) * (1 - s)).prod(1)
    (probability * LOSSES).sum().backward()
    return s.grad


def estimate(masks, advantages):
    s = S.clone().requires_grad_()
    surrogate(s, masks, advantages).backward()
    return s.grad


@pytest.mark.parametrize("baseline", [0.0, 7.5])
def test_the_estimator_is_unbiased(baseline):
    weight = (MASKS * S + (1 - MASKS) * (1 - S)).prod(1)
    expected = sum(
        p * estimate(mask[None], loss[None] - baseline) for p, mask, loss in zip(weight, MASKS, LOSSES, strict=True)
    )
    torch.testing.assert_close(expected, exact_gradient())


def gradients(masks, advantages):
    """The estimate of every step, (steps, units): of masks (steps, draws, units) and advantages (steps, draws)."""
    return (advantages[..., None] * (masks - S) / (S * (1 - S))).mean(-2)


def drawn(steps, draws, antithetic):
    generator, even = torch.Generator().manual_seed(5), draws + (draws % 2 if antithetic else 0)
    masks = sample(S, steps * even, generator, antithetic).view(steps, even, 6)[:, :draws]
    number = (masks @ 2 ** torch.arange(5, -1, -1).double()).long()
    return masks, LOSSES[number]


@pytest.mark.parametrize(("draws", "antithetic"), [(2, False), (4, False), (4, True), (6, True)])
def test_leave_one_out_is_unbiased_too(draws, antithetic):
    """1e5 draws; with the opposite mask in the mean, the first coordinate would be 8 to 25 % too large."""
    masks, losses = drawn(100_000 // draws, draws, antithetic)
    found = gradients(masks, losses - leave_one_out(losses, antithetic))
    assert ((found.mean(0) - exact_gradient()).abs() < 3.5 * found.std(0) / len(found) ** 0.5).all()
    biased = gradients(masks, losses - leave_one_out(losses))
    wrong = (biased.mean(0) - exact_gradient()).abs() > 5 * biased.std(0) / len(found) ** 0.5
    assert wrong.any() == antithetic


@pytest.mark.parametrize(
    ("baseline", "draws", "antithetic"),
    [
        ("leave-one-out", 2, True),
        ("leave-one-out", 3, True),
        ("moving-average", 2, False),
        ("moving-average", 2, True),
        ("initial", 2, True),
        ("none", 2, False),
    ],
)
def test_every_baseline_of_a_step_is_unbiased(small, baseline, draws, antithetic, monkeypatch):
    """The learner's own advantages, step after step, beside the exact gradient."""
    steps = 8_000
    masks, losses = drawn(steps, draws, antithetic)
    module = learner(small, baseline=baseline, antithetic=antithetic, masks=draws)
    monkeypatch.setattr(module, "_loss", lambda tokens, kept: 8.0)
    module.keep_at_start = None
    advantages = torch.stack([module._advantages(each, TEXT) for each in losses])
    found = gradients(masks, advantages)[1:]  # the first step has no baseline yet
    assert ((found.mean(0) - exact_gradient()).abs() < 3.5 * found.std(0) / len(found) ** 0.5).all()


def test_the_published_baseline_is_equation_8_and_the_published_codes_mean(small):
    module = learner(small, baseline="published", masks=2, window=5)
    delta = 0.0
    for losses in ([4.0, 6.0], [3.0, 5.0], [8.0, 2.0]):
        delta = 4 / 5 * delta + sum(losses) / (2 * 5)
        found = module._advantages(torch.tensor(losses, dtype=torch.float64), TEXT)
        assert (found / 2).tolist() == pytest.approx([loss - delta for loss in losses])  # mean of two = sum over K - 1


def test_losses_that_are_no_numbers(small):
    """Neither a lost mask nor a lost step moves anything; where all are lost the start's mask is chosen, and told."""
    module = learner(small, baseline="leave-one-out", masks=4, antithetic=True)
    found = module._advantages(torch.tensor([1.0, torch.inf, 3.0, torch.nan], dtype=torch.float64), TEXT)
    assert found.tolist() == [-4.0, 0.0, 4.0, 0.0]
    said = []
    scores = torch.rand(len(small[2]), generator=torch.Generator().manual_seed(0)).double()
    options = {"score": lambda: scores, "say": said.append}
    kept = {}
    for loss in (lambda *_: torch.nan, lambda *_: torch.inf, None):
        module = learn(small, 3 if loss else 1, loss=loss, learning_rate=0.05 if loss else 0.0, **options)
        assert module.probabilities.isfinite().all()
        kept[loss] = choose(small[2], module.scores, 0.3)
        if loss:
            assert "in 3 of 3 steps no mask had a loss that is a number; the units with the best initial" in said[-1]
            assert module.notes["steps_without_a_finite_loss"] == 3
    assert all(torch.equal(each, kept[None]) for each in kept.values())


def test_samples_follow_the_probabilities():
    for antithetic in (False, True):
        masks = sample(S, 4001, torch.Generator().manual_seed(0), antithetic)
        assert masks.shape == (4001, 6)
        torch.testing.assert_close(masks.mean(0), S, atol=0.03, rtol=0)
    one, other = masks[0], masks[1]
    assert (one + other)[1] == 1  # at one half, opposite numbers give opposite masks


@pytest.mark.parametrize("limit", [0.1, 0.4, 0.8])
def test_projection_is_the_nearest_point(limit):
    """The variational inequality: no feasible point is on the other side of the plane through the projection."""
    generator = torch.Generator().manual_seed(3)
    weight = 1 + torch.rand(9, generator=generator, dtype=torch.float64)
    z = torch.randn(9, generator=generator, dtype=torch.float64) + 0.5
    budget = Budget(torch.ones(9, dtype=torch.bool), weight, limit)
    s = budget.project(z, 0.0, 1.0)
    room = limit * float(weight.sum())
    assert s.min() >= 0 and s.max() <= 1 and float((weight * s).sum()) <= room * (1 + 1e-9)
    for _ in range(200):
        other = torch.rand(9, generator=generator, dtype=torch.float64)
        other *= min(1.0, room / float((weight * other).sum()))
        assert float((z - s) @ (other - s)) <= 1e-9
    inside = torch.full((9,), limit / 2, dtype=torch.float64)
    assert torch.equal(budget.project(inside, 0.0, 1.0), inside)


@pytest.fixture
def small():
    model = build("Llama")
    blocks = discover(model, TEXT[:1, :8])
    return model, blocks, find_units(model, blocks)


def test_scores_become_probabilities_in_the_budget(small):
    _, _, units = small
    scores = torch.rand(len(units), generator=torch.Generator().manual_seed(0)).double()
    groups = Groups.by_score(units, scores, 8)
    assert groups.count == 6 + 3 * 6  # two KV groups and 48 channels in each of three layers
    for shape, joint in (("free", False), ("free", True), ("uniform", False)):
        keep = choose(units, scores, 0.3, shape=shape, budgets="joint" if joint else "separate")
        allowed = budgets(units, groups, keep, shape, joint)
        for across in ("block", "model"):
            start = sigmoid_norm(units, groups, scores, allowed, across=across, sharpness=2.0)
            for budget in allowed:
                share = float((start * budget.weight)[budget.members].sum() / budget.weight[budget.members].sum())
                assert share == pytest.approx(budget.limit, abs=1e-6)
        order = [start[groups.number[units.part == 1]], scores[units.part == 1]]
        assert (order[0].diff()[order[1].diff() > 0.5] >= 0).all()
    constant = score_const(Groups.by_score(units, scores, 1), keep)
    assert sorted({round(each, 6) for each in constant.tolist()}) == [0.2, 0.8]


def test_one_outlier_does_not_make_layers_alike():
    """Layer perplexity is tenfold without the first layer; the order of the others still tells which to try."""
    model = build("Llama", settings=SETTINGS["Llama"] | {"num_hidden_layers": 8})
    units = find_units(model, discover(model, TEXT[:1, :8]), ["layers"])
    scores = torch.tensor([900.0, 3.1, 2.2, 2.4, 2.0, 2.3, 2.1, 5.0]).double()
    groups = Groups.by_score(units, scores, 1)
    keep = choose(units, scores, 0.4)
    allowed = budgets(units, groups, keep, "free", False)
    norm, rank = (
        sigmoid_norm(units, groups, scores, allowed, across="model", sharpness=8.0, ranks=ranks)
        for ranks in (False, True)
    )
    assert float(norm[2:7].max() - norm[2:7].min()) < 0.01
    assert torch.equal(rank.argsort(), scores.argsort()) and float(rank[1] - rank[4]) > 0.9
    for start in (norm, rank):
        assert float((start * allowed[0].weight).sum() / allowed[0].weight.sum()) == pytest.approx(allowed[0].limit)
    for across in ("block", "best"):
        options = {"across": across, "projection": "sigmoid-rank", "sharpness": 8.0, "learning_rate": 0.0}
        module = learn((model, discover(model, TEXT[:1, :8]), units), 1, score=lambda: scores, remove=0.4, **options)
        torch.testing.assert_close(module.probabilities.detach(), rank.float())


def learner(small, steps=30, score=None, testing=TEXT[:2], **options):
    settings = {"remove": 0.3, "masks": 2, "batch": 2, "learning_rate": 0.05, "baseline": "leave-one-out"}
    settings |= {"say": lambda _: None, **options}
    return PolicyGradient(*small, TEXT[2:], testing, score=score, steps=steps, **settings)


def learn(small, steps=30, loader=None, callbacks=(), resume=None, loss=None, **options):
    module = learner(small, steps, **options)
    if loss is not None:
        module._losses = lambda tokens, masks: torch.tensor([loss(tokens, each) for each in masks], dtype=torch.float64)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader or DataLoader(range(steps)), ckpt_path=resume, weights_only=True if resume else None)
    return module


@pytest.mark.parametrize("baseline", ["leave-one-out", "moving-average", "initial"])
def test_it_finds_the_units_that_matter(small, baseline):
    """The loss counts which of every third unit are dropped; nothing else matters, and the start is blind."""
    units = small[2]
    matters = torch.arange(len(units)) % 3 == 0

    def loss(tokens, kept):
        return float((~kept.bool() & matters).sum()) / 10

    options = {"scaling": "natural", "normalize": True, "learning_rate": 0.2, "floor": 0.01, "masks": 4}
    module = learn(small, 400, loss=loss, baseline=baseline, testing=TEXT[:0], **options)
    kept = choose(units, module.scores, 0.3)
    lost = int((~kept & matters).sum()) / int(matters.sum())
    assert lost < 0.12  # at random, 0.3
    assert len(module.curve) == 400 and module.notes["steps"] == 400


def test_the_start_wins_where_nothing_is_learned(small):
    """Held-out text judges start, way and end."""
    units = small[2]
    scores = torch.arange(len(units)).double()

    def loss(tokens, kept):  # the mask of the start is the best there is
        best = choose(units, scores, 0.3)
        return float((kept.bool() != best).sum())

    module = learn(small, 8, loss=loss, score=lambda: scores, learning_rate=5.0, scaling="natural", across="model")
    assert torch.equal(choose(units, module.scores, 0.3), choose(units, scores, 0.3))
    assert module.notes["held_out"][0] == min(module.notes["held_out"])


def test_projection_holds_on_the_way_and_progressive_budgets_shrink(small):
    module = learn(small, 12, progressive=True, learning_rate=0.5, remove=0.3)
    limits = [module._limit(module.allowed[0], step) for step in range(12)]
    assert limits[0] == pytest.approx(1 - (1 - module.allowed[0].limit) * 0.05 / 0.3) and limits == sorted(limits)[::-1]
    assert limits[-1] == pytest.approx(module.allowed[0].limit)
    for budget in module.allowed:
        share = float((module.probabilities.detach().double() * budget.weight)[budget.members].sum())
        assert share <= budget.limit * float(budget.weight[budget.members].sum()) * (1 + 1e-5)


class Stop(Exception):
    pass


class Kill(Checkpoints):
    """Dies after a step, once the checkpoint is written."""

    step = 5

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        if module.global_step == self.step:
            raise Stop


@pytest.mark.parametrize("step", [5, 12])
def test_it_resumes_bit_for_bit(small, tmp_path, monkeypatch, step):
    """Also after its last step, before what it decided is on disk."""
    monkeypatch.setattr(Kill, "step", step)
    options = {"scaling": "natural", "normalize": True, "baseline": "moving-average", "score": None}
    whole = learn(small, 12, **options)
    with pytest.raises(Stop):
        learn(small, 12, callbacks=[Kill(tmp_path, pause=0)], **options)
    resumed = learn(small, 12, resume=last_checkpoint(tmp_path), **options)
    assert torch.equal(whole.probabilities, resumed.probabilities) and torch.equal(whole.scores, resumed.scores)
    assert whole.notes["held_out"] == resumed.notes["held_out"]
    assert whole.curve == resumed.curve and len(whole.curve) == 12


def test_the_model_is_left_as_it_was(small):
    model = small[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(TEXT[:2]).logits
        learn(small, 3)
        assert torch.equal(model(TEXT[:2]).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"initial": "wandasp"}, "unknown initial `wandasp`, did you mean `wanda-sp`?"),
        ({"baseline": "mean"}, 'option `baseline` is "mean", must be "leave-one-out"'),
        ({"masks": 1}, "give at least 2 as masks"),
        ({"steps": 0}, "option `steps` is 0, must be at least 1"),
        ({"remove": "130%"}, "option `remove` is '130%'; it must be a share"),
        ({"units": ["heads", "layers"]}, "units are heads, layers; they can be heads, channels"),
        ({"shape": "round"}, 'option `shape` is "round", must be null or "free" or "uniform"'),
        ({"shape": "uniform", "budgets": "joint"}, "budgets cannot be joint with it"),
        ({"length": 1000}, "length is 1000, but the calibration has sequences of 16"),
        ({"floor": 0.7}, "option `floor` is 0.7, must be at least 0 and below 0.5"),
        ({"held_out": 0.0}, "across: best is decided on held-out text"),
        ({"learning_rate": 0.0}, "option `learning_rate` is 0.0, must be above 0"),
        ({"units": "layers", "compensate": True}, "makes up for heads, channels and mamba, not for layers"),
        ({"bias": True, "compensate": False}, "bias: true is part of least squares"),
        ({"damping": 0.0}, "option `damping` is 0.0, must be above 0"),
        ({"units": "layers", "initial": "flap"}, "'flap', which has no scores for layers"),
        ({"initial": "block-influence"}, "'block-influence', which has no scores for channels and heads"),
    ],
)
def test_mistakes(small, options, said, tmp_path):
    work = context(small[0], TEXT, tmp_path, batch=2)
    with pytest.raises(ValueError) as error:
        begin(policy_gradient, work, **{"remove": "30%", "length": 16} | options)
    assert said in str(error.value)
