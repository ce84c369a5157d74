"""LAMP: what the two streams carry, what it is worth on trained models, and resuming."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from families import GROUPED, build, committing
from lightning.pytorch import Trainer

import sparsekit
from sparsekit.data import calibration_tokens
from sparsekit.maths import parse
from sparsekit.measure import perplexity, perplexity_windows
from sparsekit.model import discover, load_plain
from sparsekit.solvers.quantize import quantize
from sparsekit.solvers.sparsegpt import sparsegpt
from sparsekit.stages.lamp import Lamp, LampStream, lamp, rate_for
from sparsekit.system import Team
from sparsekit.testing import begin, context
from sparsekit.train import channel_weights
from sparsekit.walk import BlockStream, Commit, OneShot, Walk
from tests.matrix.towers import pictures

MODELS = Path(__file__).parent / "models"
TOKENS = torch.randint(1, 96, (12, 16), generator=torch.Generator().manual_seed(1))


def prune(
    model,
    pattern="2:4",
    *,
    tokens=TOKENS,
    trained=True,
    commits=None,
    stop_after=None,
    solver=sparsegpt,
    bits=None,
    leave=(),
    **options,
):
    """Walk over the model in memory with LAMP, or without; returns its blocks."""
    blocks = discover(model, tokens[:1, :8])
    for block in blocks:
        block.skipped |= {name: "to be ignored" for name in block.linears if name.endswith(tuple(leave))}
        block.keep_only(block.linears.keys() - block.skipped.keys())
    patterns = {name: parse(pattern) for block in blocks for name in block.linears}
    pruner = OneShot(solver, patterns)
    if bits is not None:
        options["quantize"] = OneShot(partial(quantize, bits=bits), patterns, continues=True)
    kind = LampStream if trained else BlockStream
    mode = "model" if trained else "prefix"
    stream = kind.over(model, blocks, tokens, batch=2, error_correction=mode, commits=commits)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        max_steps=stop_after or -1,
        logger=False,
        callbacks=[Lamp(pruner, **options) if trained else pruner] + ([Commit(commits)] if commits else []),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Walk(stream), stream)
    return blocks


def same_bits(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def hidden_states(model):
    """What enters each block of a model, and what leaves the last, (sequences, length, hidden)."""
    seen = []
    layers = model.get_submodule("model.layers")
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for m in layers]
    hooks.append(
        layers[-1].register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    )
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_both_streams_are_those_of_whole_models(monkeypatch):
    """What each training is given, against forward passes of the dense model and of the one pruned so far."""
    model = build("Llama")
    dense = copy.deepcopy(model)
    expected = hidden_states(dense)
    calls = []

    def spy(block, inputs, targets, *, masks=None, **options):
        calls.append((block.index, masks is not None, torch.cat(list(inputs)), torch.cat(list(targets))))
        with torch.no_grad():  # a stand-in for training that can be told from none
            block.module.input_layernorm.weight.mul_(1.1)
        return {"best_epoch": 1}

    monkeypatch.setattr("sparsekit.stages.lamp.reconstruct", spy)
    weights = []

    def solver(weight, stats, pattern):
        weights.append(weight.clone())
        return sparsegpt(weight, stats, pattern)

    blocks = prune(model, solver=solver)
    assert [call[:2] for call in calls] == [(0, True), (1, False), (1, True), (2, False), (2, True)]
    sparse = hidden_states(model)  # blocks before the one in question are as the walk left them
    for index, _, inputs, targets in calls:
        torch.testing.assert_close(inputs, sparse[index], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(targets, expected[index + 1], rtol=1e-4, atol=1e-4)
    names = [name for block in blocks for group in block.groups for name in group]
    for name, weight in zip(names, weights, strict=True):  # the spy trains norms only: linears come dense to the solver
        assert torch.equal(weight, dense.get_submodule(name).weight)


def test_a_training_that_betters_nothing_is_done_again_at_a_lower_rate(monkeypatch):
    rates = []

    def spy(block, *_, learning_rate, **options):
        rates.append(learning_rate)
        return {"best_epoch": int(len(rates) == 2), "epochs": 3}

    monkeypatch.setattr("sparsekit.stages.lamp.reconstruct", spy)
    prune(build("Llama"), learning_rate=1.6e-3)
    assert rates == pytest.approx([1.6e-3, 4e-4] + [1.6e-3, 4e-4, 1e-4] * 4)  # the first was better at its second try


def test_the_learning_rate_follows_sparsity_and_the_size_of_weights():
    block = discover(build("Llama"), TOKENS[:1, :8])[0]
    rates = [rate_for(block, dict.fromkeys(block.linears, parse(p))) for p in ("50%", "70%", "2:4")]
    assert rates[1] / rates[0] == pytest.approx(1.4**3) and rates[2] == rates[0]
    assert rates[0] == pytest.approx(1.1e-3, rel=0.02)  # weights of 0.1 and more
    for linear in block.linears.values():
        linear.write(torch.full(linear.shape, 0.006))
    assert rate_for(block, dict.fromkeys(block.linears, parse("50%"))) == pytest.approx(rates[0] / 10, rel=1e-3)


def test_it_has_an_error_correction_of_its_own():
    work = context(build("Llama"), TOKENS, Path(), pattern="2:4", error_correction="block")
    with pytest.raises(ValueError, match=r"error_correction is 'block'; lamp .* needs prefix"):
        lamp(work)


def test_the_rule_for_the_learning_rate_is_for_adamw():
    with pytest.raises(ValueError, match=r"optimizer is sgd, and the rule .* give a learning_rate"):
        begin(lamp, context(build("Llama"), TOKENS, Path(), pattern="2:4"), optimizer="sgd")


def test_the_solver_prunes_the_trained_weight():
    model = build("OPT")
    dense = copy.deepcopy(model)
    seen = {}

    def solver(weight, stats, pattern):
        seen[len(seen)] = (weight.clone(), stats)
        return sparsegpt(weight, stats, pattern)

    blocks = prune(model, solver=solver, after=False)
    names = [name for block in blocks for group in block.groups for name in group]
    for (weight, stats), name in zip(seen.values(), names, strict=True):
        block = next(b for b in blocks if name in b.linears)
        assert torch.equal(weight, dense.get_submodule(name).weight) == (block.index == 0)
        pruned = block.linears[name].weight
        solved = torch.equal(pruned, sparsegpt(weight, stats, parse("2:4")))
        assert solved and stats.drift_cross is None
    assert "before" not in blocks[0].notes["lamp"] and blocks[1].notes["lamp"]["before"]["best_epoch"] > 0


def test_the_reported_error_is_against_the_dense_model():
    """Against what forward passes of the dense and of the finished model give each linear, for the last sequence."""
    model = build("OPT")
    dense = copy.deepcopy(model)
    blocks = prune(model, bits=4, epochs=2)
    for block in blocks:
        for name in block.linears:
            x, x_d = (_entering(each, name).flatten(0, -2) for each in (model, dense))
            v, w = (each.get_submodule(name).weight for each in (model, dense))
            expected = float((x @ v.t() - x_d @ w.t()).square().sum() / (x_d @ w.t()).square().sum())
            assert block.records[name]["error"] == pytest.approx(expected, rel=1e-3)


def _entering(model, name):
    """What enters a linear, for the chunk that no training sees."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS[-2:])
    hook.remove()
    return seen[0]


def test_what_the_recipe_leaves_is_not_trained():
    """A short convolution, and linears that are ignored, with their biases; norms are trained."""
    settings = GROUPED | {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True}
    model = build("Lfm2", settings=settings)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = prune(model, epochs=2, learning_rate=1e-3, leave=["self_attn.out_proj", "1.feed_forward.w1"])
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, dense[name])}
    convolutions = {name for name in dense if ".conv.conv." in name}
    assert convolutions and convolutions <= same
    assert {f"model.layers.1.{name}.weight" for name in ("self_attn.out_proj", "feed_forward.w1")} <= same
    assert "model.layers.1.operator_norm.weight" not in same
    assert all(not blocks[0].left(name) for name in ("operator_norm.weight", "conv.in_proj.weight"))


@pytest.mark.parametrize("family", ["OPT", "GPT2"])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_resuming_from_committed_blocks_gives_the_same_bits(family, stop_after, tmp_path):
    """Biases and norms too, which committed blocks must bring back, and the dense stream, which must not see them."""
    whole, first, second = build(family), build(family), build(family)
    expected = prune(whole)
    prune(first, commits=committing(tmp_path, first), stop_after=stop_after)
    blocks = prune(second, commits=committing(tmp_path, second))
    assert same_bits(whole, second) and not same_bits(whole, build(family))
    for a, b in zip(expected, blocks, strict=True):
        assert a.trained == b.trained and any("bias" in name for name in a.trained)
        assert [r["error"] for r in a.records.values()] == [r["error"] for r in b.records.values()]
        assert a.notes["lamp"]["after"]["after"] == b.notes["lamp"]["after"]["after"]


@pytest.mark.parametrize("trainable", ["all", "low-rank", "norms-and-biases"])
def test_the_pattern_holds(trainable):
    model = build("GPT2")
    untouched = {name: p.clone() for name, p in model.named_parameters()}
    blocks = prune(model, trainable=trainable)
    for block in blocks:
        for name, linear in block.linears.items():
            assert parse("2:4").satisfied(linear.weight)
            assert not linear.weight[~block.masks[name]].any()
    trained = {f"{block.name}.{name}" for block in blocks for name in block.trained}
    trained |= {f"{name}.weight" for block in blocks for name in block.linears}
    assert {n for n, p in model.named_parameters() if not torch.equal(p, untouched[n])} <= trained


@pytest.mark.parametrize("pattern", ["50%", "70%"])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_it_is_better_than_its_solver_alone(name, pattern, models):
    """Perplexity on text of other topics; each part of it pays."""
    found = []
    for options in ({"trained": False}, {"after": False}, {}):
        model, tokenizer = load_plain(models / name)
        settings = {"source": "python-docs", "samples": 24, "length": 128, "seed": 0}
        tokens = calibration_tokens(settings, tokenizer, 256, 768)
        prune(model, pattern, tokens=tokens, epochs=3, **options)
        texts = perplexity_windows(
            {"perplexity": [{"source": "python-docs", "windows": 60}], "length": 128}, tokenizer, 256
        )
        found.append(perplexity(model, *texts.values(), batch=16))
    alone, paper, both = found
    assert both < paper < alone, found


def test_the_recipes_batch_changes_nothing():
    """How many sequences are computed together elsewhere: a step of training has as many as `lamp` says."""
    models = [build("Llama"), build("Llama")]
    for model, together in zip(models, (1, 4), strict=True):
        work = context(model, TOKENS, Path(), pattern="70%", batch=together)
        module, data, callbacks = lamp(work, epochs=2, batch=2)
        assert [len(chunk) for chunk in data.inputs] == [2] * (len(TOKENS) // 2) + [1] * (len(TOKENS) % 2)
        Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, data)
    assert same_bits(*models)


def test_channels_count_by_the_loss(tmp_path):
    """From the recipe to the proof; a resumed run has the weights that the first one had, of the whole dense model."""
    given = {
        "model": str(MODELS / "tiny-llama"),
        "pattern": "2:4",
        "calibration": {"source": "python-docs", "samples": 8, "length": 32},
        "stages": [{"lamp": {"epochs": 1, "channels": "loss"}}],
        "output": str(tmp_path / "run"),
    }
    assert sparsekit.fit(given, quiet=True).verified
    model = build("Llama")
    blocks = discover(model, TOKENS[:1, :8])
    cpu = torch.device("cpu")
    first = channel_weights(tmp_path / "kept.safetensors", model, blocks, TOKENS, cpu, Team())
    assert all(float(each.mean()) == pytest.approx(1, rel=1e-5) for each in first)
    prune(model)
    again = channel_weights(tmp_path / "kept.safetensors", model, blocks, TOKENS, cpu, Team())
    others = channel_weights(tmp_path / "other.safetensors", model, blocks, TOKENS, cpu, Team())
    for one, two, three in zip(first, again, others, strict=True):
        assert torch.equal(one, two) and not torch.equal(one, three)


def test_what_predicts_no_text_has_no_such_loss(tmp_path):
    given = {
        "model": str(MODELS / "tiny-vit"),
        "pattern": "2:4",
        "calibration": {"source": "images", "path": str(pictures(tmp_path / "pictures")), "samples": 4},
        "stages": [{"lamp": {"epochs": 1, "channels": "loss"}}],
        "output": str(tmp_path / "run"),
    }
    with pytest.raises(ValueError, match="stage 1, `lamp`, reads text alone with epochs, channels"):
        sparsekit.fit(given, quiet=True)
