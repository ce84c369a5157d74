"""The walk against plain forward passes of the whole model."""

import copy
from functools import partial

import pytest
import torch
from families import SETTINGS, build, committing
from lightning.pytorch import Trainer

from sparsekit.maths import NM, Unstructured, chain
from sparsekit.model import discover, split_experts
from sparsekit.solvers.refit import refit
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.solvers.wanda import wanda
from sparsekit.system import ActivationStore, unpack
from sparsekit.walk import BlockStream, Commit, OneShot, Walk
from sparsekit.walk.stream import ERROR_CORRECTIONS

HALF = NM(2, 4)
TOKENS = torch.randint(1, 96, (5, 24), generator=torch.Generator().manual_seed(1))


def prune(model, solver, pattern=HALF, *, mode="prefix", budget=10**9, commits=None, batch=2, stop_after=None, **more):
    """Walk over the model in memory; returns its blocks."""
    blocks = discover(model, TOKENS[:1, :8])
    options = {"batch": batch, "budget": budget, "error_correction": mode, "commits": commits}
    stream = BlockStream.over(model, blocks, TOKENS, **options, **more)
    patterns = {name: pattern for block in blocks for name in block.linears}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        max_steps=stop_after or -1,
        logger=False,
        callbacks=[OneShot(solver, patterns)] + ([Commit(commits)] if commits else []),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Walk(stream), stream)
    assert trainer.global_step == (stop_after or len(stream))  # a step is a block
    return blocks


def same_bits(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def inputs_of(model, names):
    """What enters each linear in a forward pass of the whole model, (tokens, in)."""
    seen = {}
    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0].detach()))
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: x.reshape(-1, x.shape[-1]) for name, x in seen.items()}


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
def test_inputs_and_targets_are_what_the_mode_says(mode):
    """Gram, cross-Gram and dense Gram, rebuilt from whole models that are pruned as far as the mode says."""
    model = build("Llama")
    dense = copy.deepcopy(model)
    seen = {}

    def spy(weight, stats, pattern):
        seen[len(seen)] = stats
        return wanda(weight, stats, pattern)

    blocks = prune(model, spy, mode=mode)
    order = [name for block in blocks for group in block.groups for name in group]
    dense_inputs = inputs_of(dense, order)
    for position, name in enumerate(order):
        block = next(b for b in blocks if name in b.linears)
        group = next(g for g in block.groups if name in g)
        state = copy.deepcopy(dense)  # pruned as far as it is when this linear is reached
        pruned_modules, state_modules = dict(model.named_modules()), dict(state.named_modules())
        inside = [n for g in block.groups[: block.groups.index(group)] for n in g]
        before = [n for b in blocks[: block.index] for n in b.linears]
        written = {"prefix": before, "none": [], "block": inside}.get(mode, before + inside)
        for other in written:
            state_modules[other].weight.data.copy_(pruned_modules[other].weight)
        x = inputs_of(state, [name])[name]
        target = x if mode in ("prefix", "sequential", "none") else dense_inputs[name]
        stats = seen[position]
        torch.testing.assert_close(stats.gram, x.T @ x, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(stats.cross, target.T @ x, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(stats.dense_gram, target.T @ target, rtol=1e-3, atol=1e-2)
        v, w = pruned_modules[name].weight.detach(), dict(dense.named_modules())[name].weight.detach()
        expected = ((x @ v.T - target @ w.T).square().sum() / (target @ w.T).square().sum()).item()
        assert block.records[name]["error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_every_family_gets_its_pattern(family):
    model = build(family)
    dense = copy.deepcopy(model)
    split_experts(dense)
    untouched = {n: p.clone() for n, p in dense.named_parameters()}
    blocks = prune(model, sparsegpt)
    names = {f"{n}.weight" for block in blocks for n in block.linears}
    for block in blocks:
        for name, linear in block.linears.items():
            assert NM(2, 4).satisfied(linear.weight)
            assert torch.equal(linear.weight != 0, block.masks[name])
            assert block.records[name]["zeros"] * 2 == block.records[name]["parameters"]
    for name, parameter in model.named_parameters():
        assert (name in names) != torch.equal(parameter, untouched[name]), name
    with torch.no_grad():
        a, b = dense(TOKENS).logits, model(TOKENS).logits
    assert 0 < (a - b).square().mean() < a.square().mean()


def test_the_order_that_theory_demands():
    """For one mask, on the layer's own objective: refit <= OBS update <= mask only."""
    errors = {}

    def all_three(weight, stats, pattern):
        updated = sparsegpt(weight, stats, pattern)
        best = refit(weight, stats, pattern, updated)
        errors[len(errors)] = [stats.error(v, weight) for v in (best, updated, weight * (updated != 0))]
        return best

    prune(build("Mistral"), all_three)
    assert len(errors) == 21
    for best, updated, masked in errors.values():
        assert best <= updated * (1 + 1e-3) <= masked * (1 + 2e-3)
    assert sum(e[0] for e in errors.values()) < 0.99 * sum(e[1] for e in errors.values())


def test_chained_solvers_share_the_capture_and_keep_the_dense_weight():
    calls = []

    def spy(weight, stats, pattern, init=None):
        calls.append((weight.clone(), stats, init))
        return init if init is not None else wanda(weight, stats, pattern)

    model = build("Llama")
    dense = copy.deepcopy(model)
    prune(model, chain(wanda, spy, refit))
    name = "model.layers.0.self_attn.q_proj"
    weight, stats, init = calls[0]
    assert torch.equal(weight, dense.get_submodule(name).weight)
    assert int((init == 0).sum()) * 2 == init.numel()
    assert all(call[1] is stats for call in calls[:3]) and calls[3][1] is not stats  # q, k, v | o


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
def test_the_budget_changes_nothing(mode):
    one, two = build("Llama"), build("Llama")
    prune(one, sparsegpt, mode=mode)
    prune(two, sparsegpt, mode=mode, budget=3000)
    assert same_bits(one, two)


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
@pytest.mark.parametrize("stop_after", [1, 2])
def test_resuming_from_committed_blocks_gives_the_same_bits(mode, stop_after, tmp_path):
    whole, first, second = build("GPT2"), build("GPT2"), build("GPT2")
    expected = prune(whole, sparsegpt, mode=mode)
    prune(first, sparsegpt, mode=mode, commits=committing(tmp_path, first), stop_after=stop_after)
    assert committing(tmp_path, first).done() == set(range(stop_after))
    blocks = prune(second, sparsegpt, mode=mode, commits=committing(tmp_path, second))
    assert same_bits(whole, second)
    for a, b in zip(expected, blocks, strict=True):
        masks = committing(tmp_path, second).masks(b)
        assert a.masks.keys() == masks.keys()
        assert all(torch.equal(a.masks[n], unpack(masks[n], a.masks[n].shape)) for n in masks)
        assert [r["error"] for r in a.records.values()] == [r["error"] for r in b.records.values()]


def test_a_kept_weight_that_underflows_stays_in_the_mask():
    model = build("Llama").half()

    def tiny(weight, stats, pattern):
        return torch.where(pattern.keep(weight.abs()), torch.full_like(weight, 1e-12), torch.zeros_like(weight))

    blocks = prune(model.float().half(), tiny)
    name, mask = next(iter(blocks[0].masks.items()))
    assert blocks[0].linears[name].weight.abs().sum() == 0 and mask.sum() * 2 == mask.numel()


def test_not_a_number_is_named():
    model = build("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"the weight of model\.layers\.1\.mlp\.up_proj contains NaN or Inf"):
        prune(model, wanda)
    model = build("Llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("inf")
    with pytest.raises(
        ValueError, match=r"activations entering model\.layers\.1\.self_attn\.q_proj contain NaN or Inf"
    ):
        prune(model, wanda)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda weight, stats, pattern: weight.clone(), "0 zeros, which is not 2:4"),
        (lambda weight, stats, pattern: weight[:, :4], "not a finite tensor of shape"),
        (lambda weight, stats, pattern: weight * float("nan"), "not a finite tensor"),
    ],
)
def test_a_plugins_mistake_does_not_reach_the_model(broken, said):
    with pytest.raises(ValueError, match=said):
        prune(build("Llama"), broken)


def test_a_solver_that_draws_numbers_resumes_with_the_same_bits(tmp_path):
    def drawn(weight, stats, pattern):
        return weight.masked_fill(~pattern.keep(torch.rand_like(weight)), 0)

    whole, first, second = build("Llama"), build("Llama"), build("Llama")
    prune(whole, drawn)
    prune(first, drawn, commits=committing(tmp_path, first), stop_after=1)
    prune(second, drawn, commits=committing(tmp_path, second))
    assert same_bits(whole, second)


def test_far_too_many_zeros_are_said():
    blocks = prune(build("Llama"), lambda weight, stats, pattern: torch.zeros_like(weight))
    assert all(r["warnings"] == ["50% more zeros than 2:4 asks for"] for b in blocks for r in b.records.values())


def test_what_a_solver_warns_of_is_recorded():
    import warnings

    def warner(weight, stats, pattern):
        warnings.warn("damping raised", stacklevel=1)
        return wanda(weight, stats, pattern)

    blocks = prune(build("Llama"), warner, Unstructured(0.5))
    assert all(r["warnings"] == ["damping raised"] for b in blocks for r in b.records.values())


def test_options_of_the_stream_are_checked():
    with pytest.raises(ValueError, match="prefix, sequential, none, block, model"):
        BlockStream([], ActivationStore(0), error_correction="intra")
    with pytest.raises(ValueError, match="dense_inputs"):
        BlockStream([], ActivationStore(0), error_correction="model")


def test_options_of_a_partial_solver_count():
    one, two = build("Llama"), build("Llama")
    prune(one, sparsegpt)
    prune(two, partial(sparsegpt, damping=0.5))
    assert not same_bits(one, two)
