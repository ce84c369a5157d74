"""Structural baselines: each score against its definition, what is decided, and what it is worth on trained models."""

import copy
import math
import threading
import typing
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from families import build
from torch.nn.functional import cosine_similarity, cross_entropy

from sparsekit import registry
from sparsekit.contracts import Decision
from sparsekit.criteria import block_influence, fisher, flap, gumbel, layer_perplexity, llm_pruner, wanda_sp
from sparsekit.data import calibration_tokens
from sparsekit.measure import perplexity, perplexity_windows
from sparsekit.model import discover, load_plain, load_tokenizer
from sparsekit.model.structure import Removal, choose, find_units, gating, masking
from sparsekit.recipe import Stage
from sparsekit.run.removing import remove_by
from sparsekit.system import Team
from sparsekit.testing import context
from sparsekit.train import backward
from sparsekit.walk import Moments

TOKENS = torch.randint(1, 96, (7, 12), generator=torch.Generator().manual_seed(1))
FINE = ["heads", "channels"]
PARTS = ["attention", "mlp"]
MODELS = Path(__file__).parent / "models"
SCORES = {
    "wanda-sp": (wanda_sp.wanda_sp, FINE),
    "flap": (flap.flap, FINE),
    "llm-pruner": (llm_pruner.llm_pruner, FINE),
    "fisher": (fisher.fisher, FINE),
    "layer-perplexity": (layer_perplexity.layer_perplexity, ["layers"]),
    "block-influence": (block_influence.block_influence, ["layers"]),
}


def worked(model, tokens=TOKENS, folder=Path(), team=Team()):  # noqa: B008
    """A context around a model in memory."""
    return context(model, tokens, folder, batch=2, index=1, team=team)


def scored(criterion, work, units, remove, **options):
    """The scores (units,) of a criterion."""
    found = criterion(work, units, remove=remove, **options)
    return found.scores if isinstance(found, Decision) else found


def run(criterion, model, folder, tokens=TOKENS, **options):
    """Run a criterion as a stage and cut the model as it says; returns the units as they were and the removal."""
    work = worked(model, tokens, folder)
    if problems := registry.option_problems(criterion, options):
        raise ValueError("; ".join(problems.values()))
    remove_by(Stage(criterion.__name__, options), work)
    return applied(work)


def applied(work):
    removal = Removal.read(work.commits.folder)
    units = find_units(work.model, work.blocks, removal.kinds)
    removal.apply(work.model, work.blocks)
    return units, removal


def randomly(model, folder, tokens, *, remove, kinds, seed, shape):
    work = worked(model, tokens, folder)
    cutting = work.cutting(remove, kinds, shape=shape)
    scores = torch.rand(len(cutting.units), generator=torch.Generator().manual_seed(seed))
    cutting.finish(Decision(scores))
    return applied(work)


def entering(model, names, tokens=TOKENS):
    """What enters each of these linears, (tokens, in), float64."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().reshape(-1, args[0].shape[-1]).double())
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(each) for name, each in seen.items()}


def test_moments_are_pooled_over_batches_of_any_size():
    draw = numpy.random.default_rng(0)
    x = (1000 + 0.01 * draw.standard_normal((91, 5))).astype(numpy.float32)  # a difference of squares would be noise
    moments = Moments()
    for start, stop in ((0, 1), (1, 7), (7, 60), (60, 91)):
        moments.add(torch.from_numpy(x[start:stop])[None])
    wide = x.astype(numpy.float64)
    numpy.testing.assert_allclose(moments.variance.numpy(), wide.var(0, ddof=1), rtol=0.02)
    numpy.testing.assert_allclose(moments.mean.numpy(), wide.mean(0), rtol=1e-6)
    numpy.testing.assert_allclose(moments.size.numpy(), numpy.sqrt((wide**2).mean(0)), rtol=1e-6)
    exact = Moments()
    for chunk in torch.from_numpy(wide).split(13):
        exact.add(chunk)
    numpy.testing.assert_allclose(exact.variance.numpy(), wide.var(0, ddof=1), rtol=1e-9)


@pytest.mark.parametrize("family", ["Llama", "OPT", "GPT2", "Phi"])
def test_wanda_sp_by_hand(family):
    """Block after block in a copy of the model whose earlier blocks lose their columns."""
    model = build(family)
    pruned = copy.deepcopy(model)
    work = worked(model)
    units = find_units(model, work.blocks, FINE)
    scores = scored(wanda_sp.wanda_sp, work, units, 0.40)
    linears = {name: linear for block in discover(pruned, TOKENS[:1, :8]) for name, linear in block.linears.items()}
    for index in range(3):
        mine = [(n, part) for n, part in enumerate(units.parts) if part.block == index]
        inputs = entering(pruned, [part.output for _, part in mine])
        goal = 0.4 * sum(p.numel() for p in work.blocks[index].module.parameters())
        for number, part in mine:
            weight = linears[part.output].weight
            norms = inputs[part.output].square().mean(0).sqrt()
            expected = [
                sum(float(weight[:, j].double().abs().mean() * norms[j]) for j in columns)
                for columns in part.columns.tolist()
            ]
            numpy.testing.assert_allclose(scores[units.part == number].numpy(), expected, rtol=1e-4)
        gone = 0
        for _, part in mine:  # heads by the nearest number, channels until the parameters are there
            order = scores[units.part == _].argsort()
            count = round(0.4 * part.count) if part.kind == "heads" else math.ceil((goal - gone) / part.parameters)
            gone += count * part.parameters
            linears[part.output].weight[:, part.columns[order[:count]].flatten()] = 0


def test_groups_of_queries_count_together():
    """With one key head for two query heads a unit's score is the sum over both heads' columns."""
    model = build("Llama")
    work = worked(model)
    units = find_units(model, work.blocks, FINE)
    part = units.parts[0]
    assert part.count == 2 and part.columns.shape == (2, 16)  # 4 query heads of 8
    scores = scored(wanda_sp.wanda_sp, work, units, 0.40)
    inputs = entering(model, [part.output])[part.output]
    each = model.get_submodule(part.output).weight.abs().double().mean(0) * inputs.square().mean(0).sqrt()
    heads = each.reshape(4, 8).sum(1)  # of each query head
    torch.testing.assert_close(scores[:2].double(), torch.stack([heads[:2].sum(), heads[2:].sum()]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["Llama", "OPT", "GPT2"])
def test_flap_by_hand(family):
    model = build(family)
    work = worked(model)
    units = find_units(model, work.blocks, FINE)
    scores = scored(flap.flap, work, units, 0.30)
    inputs = entering(model, [part.output for part in units.parts])
    for number, part in enumerate(units.parts):
        weight = work.blocks[part.block].linears[part.output].weight.double().numpy()
        metric = inputs[part.output].numpy().var(0, ddof=1) * (weight**2).sum(0)
        if part.kind == "heads":
            metric = metric**2
        standard = (metric - metric.mean()) / metric.std(ddof=1)
        expected = [standard[columns].mean() for columns in part.columns.tolist()]
        numpy.testing.assert_allclose(scores[units.part == number].numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("remove", [0.2, 0.35, 0.5])
@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_the_joint_budget_is_that_of_flap(family, remove):
    """The published rule: units in descending order, each weighing as many channels as it has parameters; cut where the
    sum is nearest to what is kept. Ours is the same but for a head at the cut, which would remove too much or too
    little: channels next to it in the order go, or stay, in its place."""
    model = build(family)
    units = find_units(model, worked(model).blocks, FINE)
    scores = torch.randn(len(units), generator=torch.Generator().manual_seed(3))
    kept = choose(units, scores, remove, budgets="joint", least=0)
    order = scores.argsort(descending=True)
    weights = units.parameters[order].double() / units.parameters[units.of("channels")][0]
    goal = weights.sum() - remove * units.total / units.parameters[units.of("channels")][0]
    count = int((weights.cumsum(0) - goal).abs().argmin()) + 1
    published = torch.zeros(len(units), dtype=torch.bool)
    published[order[:count]] = True
    other = (published != kept)[order].nonzero().flatten()
    assert len(other) <= 1 + int(units.parameters.max() / units.parameters.min())
    assert len(other) == 0 or (other - count).abs().max() <= len(other) + 2  # next to the cut
    over = units.parameters[~kept].sum() - remove * units.total
    assert 0 <= over < units.parameters.min()


@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_flap_biases_give_the_mean_back(family, tmp_path):
    """The first attention's inputs are those of the dense model, so its mean output is too; an own bias stays in."""
    model = build(family)
    dense = copy.deepcopy(model)
    units, removal = run(flap.flap, model, tmp_path / "run", remove="35%", shape="uniform")
    part = units.parts[0]
    mask = removal.kept[units.part == 0]
    assert not mask.all() and mask.any()
    inputs = entering(dense, [part.output])[part.output]
    before, after = dense.get_submodule(part.output), model.get_submodule(part.output)
    narrow = inputs[:, part.columns[mask].flatten()]
    means = [
        (x @ linear.weight.double().t() + (linear.bias.double() if linear.bias is not None else 0)).mean(0)
        for x, linear in ((inputs, before), (narrow, after))
    ]
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)
    assert after.bias is not None and (before.bias is None) == (family == "Llama")
    assert set(removal.changed) == {
        f"{part.output}.bias" for number, part in enumerate(units.parts) if not removal.kept[units.part == number].all()
    }


def test_flap_without_biases_changes_nothing(tmp_path):
    model = build("Llama")
    _, removal = run(flap.flap, model, tmp_path / "run", remove="35%", bias=False)
    assert removal.changed == {} and not any(name.endswith("bias") for name, _ in model.named_parameters())
    _, removal = run(flap.flap, build("Llama"), tmp_path / "other", remove="35%", bias=False, compensate=True)
    assert removal.changed and all(name.endswith("weight") for name in removal.changed)


@pytest.mark.parametrize("taylor", typing.get_args(llm_pruner.Taylor))
@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX"])
def test_llm_pruner_by_hand(family, taylor):
    """Gradients of one sequence after another, and loops over rows and columns."""
    model = build(family)
    work = worked(model)
    units = find_units(model, work.blocks, FINE)
    scores = scored(llm_pruner.llm_pruner, work, units, 0.30, taylor=taylor)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    other = copy.deepcopy(model)
    gradients = []
    for sequence in TOKENS:
        other.zero_grad()
        logits = other(input_ids=sequence[None], use_cache=False).logits[0, :-1]
        cross_entropy(logits, sequence[1:]).backward()
        gradients.append({name: p.grad.clone() for name, p in other.named_parameters()})
    upright = {
        name: (lambda t, linear=linear: t.t() if linear.transposed else t)
        for block in work.blocks
        for name, linear in block.linears.items()
    }

    def worth(name):
        each = torch.stack([upright[name](g[f"{name}.weight"]) for g in gradients]).double()
        weight = upright[name](dict(other.named_parameters())[f"{name}.weight"]).detach().double()
        first, second = weight * each.mean(0), weight**2 * each.square().mean(0)
        return {"param_first": first, "param_second": second, "param_mix": first - second / 2}[taylor].abs()

    start = 0
    for part in units.parts:
        values = {name: worth(name) for name in (*part.inputs, part.output)}
        for unit in range(part.count):
            expected = sum(float(values[name][row].sum()) for name, rows in part.inputs.items() for row in rows[unit])
            expected += sum(float(values[part.output][:, column].sum()) for column in part.columns[unit])
            assert float(scores[start + unit]) == pytest.approx(expected, rel=1e-3), (part.output, unit)
        start += part.count


@pytest.mark.parametrize("kinds", [FINE, PARTS], ids="-".join)
@pytest.mark.parametrize("family", ["Llama", "GPT2", "GPTNeoX"])
def test_fisher_by_hand(family, kinds):
    """A gate's slope is the sum of w dL/dw over the columns behind it, each sequence's by transformers' own logits."""
    model = build(family)
    work = worked(model)
    units = find_units(model, work.blocks, kinds)
    given = fisher.gate_curvature(work, units, torch.ones(len(units), dtype=torch.bool))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    slopes = []
    for sequence in TOKENS:
        model.zero_grad()
        cross_entropy(model(input_ids=sequence[None], use_cache=False).logits[0, :-1], sequence[1:]).backward()
        slopes.append([])
        for part in units.parts:
            linear = next(block.linears[part.output] for block in work.blocks if part.output in block.linears)
            product = (linear.module.weight * linear.module.weight.grad).detach().double()
            columns = (product.t() if linear.transposed else product).sum(0)
            slopes[-1] += [float(columns[own].sum()) for own in part.columns]
    expected = torch.tensor(slopes, dtype=torch.float64).square().mean(0)
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_fisher_looks_again_in_every_round():
    """What went first stays below, and the second round's curvature is of the model without it."""
    model = build("Llama")
    work = worked(model)
    units = find_units(model, work.blocks, FINE)
    found = fisher.fisher(work, units, remove=0.4, rounds=2)
    first = fisher.gate_curvature(work, units, torch.ones(len(units), dtype=torch.bool)) / units.parameters
    half = choose(units, first, 0.2, budgets="joint")
    assert found[~half].max() < 2 <= found[half].min()
    second = (fisher.gate_curvature(work, units, half) / units.parameters)[half]
    assert found[half].argsort(stable=True).tolist() == second.argsort(stable=True).tolist()
    assert second.argsort(stable=True).tolist() != first[half].argsort(stable=True).tolist()


def test_gumbel_by_hand(monkeypatch):
    """One step: the slopes of gates at the drawn mask, by finite differences, carried over a sigmoid to the numbers."""
    model = build("Llama")
    work = worked(model)
    units = find_units(model, work.blocks, FINE)
    masks, seen = [], []
    with monkeypatch.context() as patched:
        patched.setattr(gumbel, "choose", lambda *args, **options: masks.append(choose(*args, **options)) or masks[-1])
        patched.setattr(gumbel, "backward", lambda model, rows: seen.append(rows) or backward(model, rows))
        found = gumbel.gumbel(work, units, remove=0.3, steps=1, batch=2, learning_rate=0.1, temperature=0.5)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    start = fisher.gate_curvature(work, units, torch.ones(len(units), dtype=torch.bool)) / units.parameters
    order = start.argsort(stable=True)
    first = torch.empty(len(units), dtype=torch.float64)
    first[order] = torch.special.ndtri((torch.arange(len(units), dtype=torch.float64) + 0.5) / len(units))
    [kept], rows = masks, torch.cat(seen)
    assert rows.shape == (2, 12) and 0 <= units.removed(kept) - 0.3 < 0.05
    slope = torch.zeros(len(units), dtype=torch.float64)
    model.double()
    with torch.no_grad(), gating(work.blocks, units, torch.device("cpu")) as gates:
        for unit in range(len(units)):
            losses = []
            for step in (1e-3, -1e-3):
                gates.copy_(kept)
                gates[unit] += step
                logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
                losses.append(cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) * len(rows))
            slope[unit] = (losses[0] - losses[1]) / 2e-3
    uniform = torch.rand(len(units), generator=torch.Generator().manual_seed(work.seed), dtype=torch.float64)
    noisy = first + 0.5 * torch.logit(uniform)
    assert torch.equal(kept, choose(units, noisy, 0.3, budgets="joint"))
    open_by = torch.sigmoid((noisy - (noisy[kept].min() + noisy[~kept].max()) / 2) / 0.5)
    change = slope * open_by * (1 - open_by) / units.parameters
    expected = -0.1 * change / change.square().mean().sqrt()
    torch.testing.assert_close(found - first, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("seed", [0, 1])
def test_what_gumbel_learns_is_better_than_where_it_begins(seed):
    """On other topics than it learned on; the start is the curvature of the whole model."""
    tokens, tests = texts("tiny-llama")
    found = {}
    for steps in (1, 100):
        model, _ = load_plain(MODELS / "tiny-llama")
        work = context(model, tokens, Path(), seed=seed)
        units = find_units(model, work.blocks, FINE)
        kept = choose(units, gumbel.gumbel(work, units, remove=0.5, steps=steps), 0.5, budgets="joint")
        with masking(work.blocks, units) as mask:
            mask(kept)
            found[steps] = perplexity(model, tests, batch=16)
    assert found[100] < 0.95 * found[1]


def test_a_gate_of_zero_is_a_mask(tmp_path):
    """Whatever the kind: the model under gates of 0 and 1 gives what it gives under the mask."""
    for kinds in (FINE, ["layers"]):
        model = build("Llama")
        work = worked(model)
        units = find_units(model, work.blocks, kinds)
        kept = torch.rand(len(units), generator=torch.Generator().manual_seed(2)) > 0.4
        with torch.no_grad():
            with masking(work.blocks, units) as mask:
                mask(kept)
                masked = model(input_ids=TOKENS, use_cache=False).logits
            with gating(work.blocks, units, torch.device("cpu")) as gates:
                gates.copy_(kept)
                gated = model(input_ids=TOKENS, use_cache=False).logits
            assert not torch.allclose(masked, model(input_ids=TOKENS, use_cache=False).logits)
        torch.testing.assert_close(gated, masked, rtol=1e-4, atol=1e-5)


def test_llm_pruner_spares_the_blocks_it_skips(tmp_path):
    model = build("Llama")
    units, removal = run(llm_pruner.llm_pruner, model, tmp_path / "run", remove="20%", skip_first=1, skip_last=1)
    assert removal.kept[units.block != 1].all()
    gone = int(units.parameters[~removal.kept].sum()) - 0.2 * units.total
    assert 0 <= gone < units.parameters.min()


def test_losses_without_layers_are_those_of_models_without_them():
    model = build("Llama")
    work = worked(model)
    units = find_units(model, work.blocks, ["layers"])
    scores = scored(layer_perplexity.layer_perplexity, work, units, 0.30)
    for index in range(3):
        shorter = copy.deepcopy(model)
        del shorter.model.layers[index]
        assert float(scores[index]) == pytest.approx(math.log(perplexity(shorter, TOKENS)), rel=1e-4)


@pytest.mark.parametrize("kinds", [["layers"], PARTS])
def test_greedy_removal_measures_anew(kinds):
    """Against a search of its own over what is left, one removal after another."""
    model = build("OPT")
    work = worked(model)
    units = find_units(model, work.blocks, kinds)
    scores = scored(layer_perplexity.layer_perplexity, work, units, 0.60, iterative=True)
    kept, order = torch.ones(len(units), dtype=torch.bool), []
    with masking(work.blocks, units) as mask:
        while units.removed(kept) < 0.6:
            losses = {}
            for index in kept.nonzero().flatten().tolist():
                trial = kept.clone()
                trial[index] = False
                mask(trial)
                losses[index] = perplexity(model, TOKENS)
            order.append(min(losses, key=losses.get))
            kept[order[-1]] = False
    assert scores.argsort()[: len(order)].tolist() == order
    gone = ~choose(units, scores, 0.6, budgets="joint")
    assert gone[order[:-1]].all()  # the last may be passed over for a smaller one that is enough
    assert 0.6 <= units.removed(~gone) <= units.removed(kept)


def test_block_influence_by_hand():
    model = build("Gemma")
    work = worked(model)
    units = find_units(model, work.blocks, ["layers"])
    scores = scored(block_influence.block_influence, work, units, 0.30)
    with torch.no_grad():
        states = []
        hooks = [m.register_forward_pre_hook(lambda _, a: states.append(a[0])) for m in model.model.layers]
        hooks.append(model.model.norm.register_forward_pre_hook(lambda _, a: states.append(a[0])))
        model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    expected = [1 - cosine_similarity(a.double(), b.double(), dim=-1).mean() for a, b in pairwise(states)]
    torch.testing.assert_close(scores.double(), torch.stack(expected), rtol=1e-3, atol=1e-5)


class Pair(Team):
    """Two threads that play two processes."""

    box: dict
    barrier = threading.Barrier(2)

    def sum(self, tensors):
        mine = list(tensors)
        self.box[self.rank] = [tensor.clone() for tensor in mine]
        self.barrier.wait()
        for tensor, other in zip(mine, self.box[1 - self.rank], strict=True):
            tensor += other
        self.barrier.wait()


@pytest.mark.parametrize("name", SCORES)
def test_two_processes_that_share_the_text_agree_with_one(name):
    criterion, kinds = SCORES[name]
    model = build("Llama")
    models = [copy.deepcopy(model) for _ in range(2)]
    work = worked(model)
    alone = scored(criterion, work, find_units(work.model, work.blocks, kinds), 0.30)
    Pair.box, found = {}, {}

    def process(rank):
        work = worked(models[rank], team=Pair(rank, 2))
        found[rank] = scored(criterion, work, find_units(work.model, work.blocks, kinds), 0.30)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=1e-5)


STAGES = {
    "wanda-sp": (wanda_sp.wanda_sp, FINE, {}),
    "flap": (flap.flap, FINE, {}),
    "llm-pruner": (llm_pruner.llm_pruner, FINE, {}),
    "fisher": (fisher.fisher, FINE, {"rounds": 3}),
    "gumbel": (gumbel.gumbel, FINE, {"steps": 20}),
    "layer-perplexity": (layer_perplexity.layer_perplexity, ["layers"], {}),
    "parts": (layer_perplexity.layer_perplexity, PARTS, {"units": "parts"}),
    "block-influence": (block_influence.block_influence, ["layers"], {}),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("family", ["Llama", "OPT", "GPT2", "GPTNeoX", "Phi"])
def test_what_is_asked_is_removed_and_little_more(name, family, tmp_path):
    stage, kinds, options = STAGES[name]
    model = build(family)
    before = sum(p.numel() for block in discover(model, TOKENS[:1, :8]) for p in block.module.parameters())
    units, removal = run(stage, model, tmp_path / "run", remove="33%", **options)
    after = sum(p.numel() for block in discover(model, TOKENS[:1, :8]) for p in block.module.parameters())
    assert removal.kinds == kinds and len(removal.scores) == len(units)
    surplus = (1 - removal.kept.float()) @ units.parameters.float() - 0.33 * units.total
    most = units.parameters.max() if "channels" not in kinds or name == "flap" else 3 * units.parameters.min()
    assert 0 <= surplus < most
    added = sum(t.numel() for n, t in removal.changed.items() if n.endswith("bias")) if family == "Llama" else 0
    assert before - after == pytest.approx(units.removed(removal.kept) * units.total - added, abs=1)


@cache
def texts(name):
    """A tiny model's calibration tokens, and test tokens of other topics."""
    tokenizer = load_tokenizer(MODELS / name)
    settings = {"source": "python-docs", "samples": 32, "length": 128, "seed": 0}
    tests = perplexity_windows(
        {"perplexity": [{"source": "python-docs", "windows": 48}], "length": 128}, tokenizer, 256
    )
    return calibration_tokens(settings, tokenizer, 256, 768), *tests.values()


def perplexity_after(stage, name, folder, **options):
    """Of a tiny model on the test topics."""
    tokens, tests = texts(name)
    model, _ = load_plain(MODELS / name)
    (randomly if stage is randomly else partial(run, stage))(model, folder, tokens, **options)
    return perplexity(model, tests, batch=16)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_every_method_beats_random_units(name, tmp_path):
    random = {}
    for method, (stage, kinds, options) in STAGES.items():
        found = perplexity_after(stage, name, tmp_path / method, remove="30%", **options)
        case = (tuple(kinds), "uniform" if method in ("wanda-sp", "llm-pruner") else "free")
        if case not in random:
            given = {"remove": "30%", "kinds": kinds, "shape": case[1]}
            drawn = [perplexity_after(randomly, name, tmp_path / f"{case}{i}", seed=i, **given) for i in range(4)]
            random[case] = sum(drawn) / len(drawn)
        assert found < 0.95 * random[case], (method, found, random[case])


@pytest.mark.parametrize("method", ["wanda-sp", "flap", "llm-pruner"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_least_squares_makes_up_for_what_is_removed(name, method, tmp_path):
    stage = STAGES[method][0]
    bare, better = (
        perplexity_after(stage, name, tmp_path / str(compensate), remove="40%", compensate=compensate)
        for compensate in (False, True)
    )
    assert better < 0.95 * bare


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_biases_are_worth_it(name, tmp_path):
    bare, better = (
        perplexity_after(flap.flap, name, tmp_path / str(bias), remove="50%", bias=bias) for bias in (False, True)
    )
    assert better < bare


def test_measuring_anew_is_better_for_parts(tmp_path):
    once, anew = (
        perplexity_after(
            layer_perplexity.layer_perplexity,
            "tiny-llama",
            tmp_path / str(iterative),
            remove="30%",
            units="parts",
            iterative=iterative,
        )
        for iterative in (False, True)
    )
    assert anew < once


@pytest.mark.parametrize(
    ("stage", "options", "said"),
    [
        (llm_pruner.llm_pruner, {"taylor": "second"}, 'option `taylor` is "second", must be "param_first" or'),
        (llm_pruner.llm_pruner, {"skip_first": 2, "skip_last": 1}, "leave one of the 3 blocks"),
        (llm_pruner.llm_pruner, {"skip_first": -1}, "option `skip_first` is -1, must be at least 0"),
        (llm_pruner.llm_pruner, {"remove": "60%", "skip_first": 2}, "leave 1 of 3 blocks, which cannot give up 60%"),
        (
            layer_perplexity.layer_perplexity,
            {"units": "heads"},
            "scores layers, attention, mlp, not heads",
        ),
        (flap.flap, {"shape": "round"}, 'option `shape` is "round", must be'),
        (wanda_sp.wanda_sp, {"remove": "130%"}, "option `remove` is '130%'"),
        (block_influence.block_influence, {"remove": 0}, "option `remove` is 0"),
    ],
)
def test_mistakes(stage, options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        run(stage, build("Llama"), tmp_path, **{"remove": "30%"} | options)


def test_scores_for_other_units_are_refused():
    work = worked(build("Llama"))
    layers = find_units(work.model, work.blocks, ["layers"])
    with pytest.raises(ValueError, match="flap scores heads, channels, mamba, not layers"):
        work.decide("flap", layers, 0.3)
    for method in ("wanda-sp", "llm-pruner"):
        with pytest.raises(ValueError, match=f"{method} scores heads, channels.*not layers"):
            work.decide(method, layers, 0.3)
    with pytest.raises(ValueError, match="block-influence scores layers, not"):
        work.decide("block-influence", find_units(work.model, work.blocks, FINE), 0.3)


def test_activations_that_are_not_finite_are_named():
    model = build("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.inf)
    work = worked(model)
    with pytest.raises(ValueError, match=r"entering model.layers.1.mlp.down_proj contain NaN or Inf"):
        scored(wanda_sp.wanda_sp, work, find_units(model, work.blocks, FINE), 0.3)
