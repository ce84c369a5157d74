"""LoRA that keeps zeros: its gradients, its merge, its adapter on disk, what it is worth, and resuming."""

import copy
import json
import math
from types import SimpleNamespace

import peft
import pytest
import torch
from families import build
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import nn
from torch.nn.functional import linear as product

from sparsekit.maths import parse
from sparsekit.model import discover, find_blocks, load_plain
from sparsekit.model import load as load_model
from sparsekit.run.allocation import sample_input
from sparsekit.stages.lora import computes_linear, lora, select
from sparsekit.testing import begin, context
from sparsekit.train import Checkpoints, attach_updates, detach_updates, last_checkpoint, recovery_text, save_adapter
from sparsekit.train.adapter import load_adapter
from sparsekit.train.lowrank import ADAPTER, _Product, factors

TOKENS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))
QUICK = {"tokens": 6 * 8 * 32, "length": 32, "batch": 8, "learning_rate": 2e-3}
VARIANTS = ["masked", "scale", "prune"]


def work_on(folder, output, *, pattern="50%", dtype=torch.float32):
    """What a stage is given of a model that magnitude has pruned; pattern None: nothing was."""
    model, tokenizer = load_plain(folder)
    model.to(dtype)
    blocks = discover(model, sample_input(model))
    masks = {}
    for block in blocks if pattern else ():
        for name, linear in block.linears.items():
            masks[name] = parse(pattern).keep(linear.weight.float().abs(), per="row")
            linear.write_pruned(linear.weight * masks[name])
    return context(
        model,
        torch.zeros(1, 8, dtype=torch.long),
        output,
        masks=masks,
        tokenizer=tokenizer,
        calibration={"source": "python-docs", "samples": 8, "length": 64, "seed": 0},
        load_dense=lambda: load_model(folder)[0],
        base=str(folder),
        console=Console(quiet=True),
    )


class StopAt(Callback):
    """Ends a run as a kill would: nothing that comes at its end is done."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def fit(stage, work, *, stop_at=None, resume=False, watching=(), **options):
    """Run a stage as a pipeline does; gives back its record."""
    module, batches, callbacks = stage(work, **options)
    for callback in callbacks:
        if isinstance(callback, Checkpoints):
            callback.pause = 0.0 if stop_at else math.inf
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[*callbacks, *watching, *([StopAt(stop_at)] if stop_at else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **module.trainer_options,
    )
    last = last_checkpoint(work.checkpoints)
    try:
        trainer.fit(module, batches, **({"ckpt_path": last, "weights_only": True} if resume else {}))
    except SystemExit:
        assert stop_at
    return work.notes[stage.__name__]


def linears_of(work):
    return {name: linear for block in work.blocks for name, linear in block.linears.items()}


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def same_bits(one, two):
    first, second = one.state_dict(), two.state_dict()
    return first.keys() == second.keys() and all(torch.equal(bits(first[key]), bits(second[key])) for key in first)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def attached(family="Llama", variant="masked", pattern="50%", **options):
    """A random model with random updates in all its linears; also its linears, masks and layers."""
    model = build(family)
    linears = [linear for block in find_blocks(model) for linear in block.linears.values()]
    masks = {}
    for linear in linears if pattern else ():
        masks[linear.name] = parse(pattern).keep(linear.weight.abs(), per="row")
        linear.write_pruned(linear.weight * masks[linear.name])
    before = copy.deepcopy(model)
    layers = attach_updates(model, linears, masks, rank=4, alpha=8.0, variant=variant, **options)
    with torch.no_grad():
        for layer in layers.values():
            factors(layer)[1].normal_(std=0.3)
            layer.eval()
    return SimpleNamespace(model=model, before=before, linears=linears, masks=masks, layers=layers)


# Gradients


@pytest.mark.parametrize("given", ["mask", "weights"])
@pytest.mark.parametrize("whole", [True, False])
def test_gradients_against_finite_differences(given, whole):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, down, up = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(shape != (5, 7))
        for shape in [(2, 3, 7), (5, 7), (5,), (2, 7), (5, 2)]
    )
    factor = torch.rand(5, 7, generator=generator) < 0.5 if given == "mask" else weight

    def ours(x, down, up, bias):
        return _Product.apply(x, weight if whole else None, bias if whole else None, factor, down, up, 0.7)

    assert torch.autograd.gradcheck(ours, (x, down, up, bias))
    made = product(x, (weight if whole else 0) + factor * 0.7 * (up @ down), bias if whole else None)
    torch.testing.assert_close(ours(x, down, up, bias), made)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["OPT", "GPT2", "Llama"])
def test_a_model_of_effective_weights_is_the_oracle(family, variant):
    """Logits and the factors' gradients, from plain linears that are given the effective weight."""
    made = attached(family, variant)
    weights, validated = {}, {}
    for linear in made.linears:
        layer, mask = made.layers[linear.name], made.masks[linear.name]
        down, up = factors(layer)
        update = layer.scaling[ADAPTER] * (up @ down)
        if variant == "scale":
            update = update * linear.weight / linear.weight[mask].square().mean().sqrt()
        masked = linear.weight + update * mask
        torch.testing.assert_close(layer.effective(), masked)
        validated[f"{linear.name}.weight"] = linear.stored(masked.detach())
        weights[f"{linear.name}.weight"] = linear.stored(linear.weight + update if variant == "prune" else masked)
    inputs = {"input_ids": TOKENS, "use_cache": False}
    expected = torch.func.functional_call(made.before, validated, (), inputs).logits
    torch.testing.assert_close(logits(made.model), expected, atol=1e-4, rtol=1e-4)
    for layer in made.layers.values():
        layer.train()
    expected = torch.func.functional_call(made.before, weights, (), inputs).logits
    found = made.model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    pairs = [factor for layer in made.layers.values() for factor in factors(layer)]
    wanted = torch.autograd.grad(expected.square().mean(), pairs)
    for mine, other in zip(torch.autograd.grad(found.square().mean(), pairs), wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4 * float(other.abs().max()), rtol=1e-3)


def test_dropout_leaves_the_base_alone():
    made = attached(dropout=0.5)
    name, layer = next(iter(made.layers.items()))
    x = torch.randn(3, layer.in_features)
    layer.train()
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5)
    base = made.before.get_submodule(name).weight
    torch.testing.assert_close(found, x @ base.t() + dropped @ (layer.effective() - base).t(), atol=1e-5, rtol=1e-4)


def test_under_autocast_products_are_half_and_gradients_are_not():
    made = attached()
    layer = next(iter(made.layers.values())).train()
    x = torch.randn(64, layer.in_features)
    found = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = layer(x)
        assert out.dtype == (torch.bfloat16 if half else torch.float32)
        found.append(torch.autograd.grad(out.float().square().mean(), factors(layer)))
    for exact, rough in zip(*found, strict=True):
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, exact, atol=0.02 * float(exact.abs().max()), rtol=0.05)


def test_components_of_the_scaled_variant_have_gradients_of_their_own():
    """In W * (B A) from constant factors all rows of A's gradient are the same."""
    made = attached(variant="scale")
    layer = next(iter(made.layers.values())).train()
    with torch.no_grad():
        factors(layer)[1].zero_()
    out = layer(torch.randn(64, layer.in_features)).square().mean()
    (gradient,) = torch.autograd.grad(out, factors(layer)[1])
    assert torch.linalg.matrix_rank(gradient) == 4


# Merging


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["OPT", "GPT2", "Llama"])
def test_merged_and_unmerged_are_the_same(family, variant):
    made = attached(family, variant)
    unmerged = logits(made.model)
    detach_updates(made.model, made.layers)
    assert torch.equal(logits(made.model), unmerged)
    assert [name for name, _ in made.model.named_parameters()] == [name for name, _ in made.before.named_parameters()]
    for linear in made.linears:
        assert made.model.get_submodule(linear.name) is linear.module
        old = made.before.get_submodule(linear.name).weight
        assert torch.equal(linear.module.weight == 0, old == 0) and not torch.equal(linear.module.weight, old)


def test_beginning_and_ending_without_a_step_changes_nothing():
    made = attached()
    for layer in made.layers.values():
        factors(layer)[1].data.zero_()
    assert torch.equal(logits(made.model), logits(made.before))
    detach_updates(made.model, made.layers)
    assert same_bits(made.model, made.before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_merges_the_same(variant):
    """Whoever calls peft's own merge gets the masked one."""
    made = attached("GPT2", variant)
    unmerged = logits(made.model)
    for linear in made.linears:
        expected = made.layers[linear.name].effective()
        made.layers[linear.name].merge(safe_merge=True)
        torch.testing.assert_close(linear.weight, expected)
        assert torch.equal(linear.weight == 0, ~made.masks[linear.name])
    torch.testing.assert_close(logits(made.model), unmerged, atol=1e-4, rtol=1e-4)
    if variant == "scale":
        with pytest.raises(RuntimeError, match="cannot be taken back"):
            next(iter(made.layers.values())).unmerge()
        return
    for linear in made.linears:
        made.layers[linear.name].unmerge()
        torch.testing.assert_close(linear.module.weight, made.before.get_submodule(linear.name).weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_zeros_are_kept_in_every_dtype(variant, dtype, models, tmp_path):
    """Bit for bit; a kept weight that is zero is not pruned; nothing but linears changes; all is as it was stored."""
    work = work_on(models / "tiny-llama", tmp_path, dtype=dtype, pattern="2:4")
    name, linear = next(iter(linears_of(work).items()))
    underflowed = torch.zeros(linear.shape, dtype=torch.bool)
    underflowed[0, work.masks()[name][0].nonzero()[0]] = True
    linear.write(linear.weight.masked_fill(underflowed, 0))
    before = copy.deepcopy(work.model)
    record = fit(lora, work, variant=variant, **QUICK)
    assert record["after"] < record["before"]
    for name, linear in linears_of(work).items():
        pruned = ~work.masks()[name]
        assert not bits(linear.weight.masked_select(pruned)).any() and linear.weight.dtype == dtype
        assert not torch.equal(linear.weight, before.get_submodule(name).weight)
    if variant == "masked":
        assert linears_of(work)[next(iter(work.masks()))].weight.masked_select(underflowed).count_nonzero() == 1
    for (name, old), new in zip(before.named_parameters(), work.model.parameters(), strict=True):
        assert new.requires_grad and new.dtype == dtype
        if name.removesuffix(".weight") not in work.masks():
            assert torch.equal(bits(old), bits(new)), name
    assert work.model.lm_head.weight is work.model.get_input_embeddings().weight
    for block in work.blocks:
        assert block.trained == {f"{name.removeprefix(block.name + '.')}.weight" for name in block.linears}


def test_what_was_validated_is_what_is_stored(models, tmp_path):
    """In half precision too: the loss in the record is that of the rounded weights."""
    work = work_on(models / "tiny-llama", tmp_path, dtype=torch.bfloat16)
    record = fit(lora, work, biases=True, norms=True, **QUICK)
    rows = recovery_text(
        work, source=None, steps=None, accumulate=1, validation=0.05, tokens=QUICK["tokens"], length=32, batch=8
    ).validation
    own = work.model.float()
    loss = torch.nn.functional.cross_entropy(logits(own, rows.ids)[:, :-1].flatten(0, 1), rows.ids[:, 1:].flatten())
    assert float(loss) == pytest.approx(record["after"], rel=1e-5)


# On disk


def test_an_adapter_with_masks_cannot_be_loaded_without_them(tmp_path):
    made = attached()
    save_adapter(tmp_path, made.layers, base="some/model")
    expected = logits(made.model)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(copy.deepcopy(made.before), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.up_proj" in config["target_modules"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        forced = peft.PeftModel.from_pretrained(copy.deepcopy(made.before), tmp_path)
    merged = forced.merge_and_unload()
    assert same_bits(merged, made.before) and not torch.equal(logits(merged), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_comes_back_with_its_masks(variant, tmp_path):
    made = attached("OPT", variant)
    save_adapter(tmp_path, made.layers, base="some/model")
    layers = load_adapter(made.before, tmp_path)
    assert torch.equal(logits(made.before), logits(made.model))
    detach_updates(made.before, layers)
    for linear in made.linears:
        assert torch.equal(made.before.get_submodule(linear.name).weight == 0, ~made.masks[linear.name])


def test_an_adapter_needs_the_model_it_was_made_for(tmp_path):
    made = attached()
    save_adapter(tmp_path, made.layers, base="some/model")
    with pytest.raises(ValueError, match="not zero outside its mask"):
        load_adapter(build("Llama"), tmp_path)
    with pytest.raises(ValueError, match="is no adapter"):
        load_adapter(build("Llama"), tmp_path / "nothing")


def test_without_masks_it_is_an_adapter_of_peft(models, tmp_path):
    """A model that is dense, or that structures were cut out of: plain LoRA, on disk too."""
    work = work_on(models / "tiny-opt", tmp_path, pattern=None)
    before = copy.deepcopy(work.model)
    merged = work_on(models / "tiny-opt", tmp_path, pattern=None)
    (tmp_path / "some.txt").write_text("\n".join(f"the {i}th line of a text of its own" for i in range(400)))
    options = QUICK | {"source": str(tmp_path / "some.txt")}
    fit(lora, work, merge=False, **options)
    record = fit(lora, merged, **options)
    assert same_bits(work.model, before) and record["best_step"] > 0
    found = peft.PeftModel.from_pretrained(before, tmp_path / "adapter")
    torch.testing.assert_close(logits(found), logits(merged.model), atol=1e-4, rtol=1e-4)
    assert not torch.equal(logits(found), logits(work.model))


# Training


def test_held_out_loss_falls_and_variants_rank_as_they_should(models, tmp_path):
    """The mask in training is worth more than a mask at the end; both beat the model as it was pruned."""
    records = {}
    for variant in VARIANTS:
        work = work_on(models / "tiny-llama", tmp_path)
        records[variant] = fit(lora, work, variant=variant, tokens=40_000, length=64, batch=16, learning_rate=1e-3)
    start = {record["before"] for record in records.values()}
    assert len(start) == 1
    after = {variant: record["after"] for variant, record in records.items()}
    assert after["masked"] < after["prune"] < min(start) - 0.1 and after["scale"] < after["prune"], after
    record = records["masked"]
    assert record["steps"] == 39 and record["tokens"] == 39 * 1024 and len(record["curve"]) == 40
    assert record["curve"][0][:2] == [0, None] and record["curve"][record["best_step"]][2] == record["after"]
    assert sum(validated is not None for *_, validated in record["curve"]) == 9


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-opt"])
@pytest.mark.parametrize("stop_at", [1, 3])
def test_resuming_gives_the_same_bits(family, stop_at, models, tmp_path):
    """With dropout, accumulation and more than one pass over the text."""
    options = {"biases": True, "norms": True, "dropout": 0.1, "steps": 5, "accumulate": 2, "length": 32, "batch": 4}
    options |= {"source": {"source": "text", "path": str(tmp_path / "some.txt")}, "checks": 2, "learning_rate": 1e-3}
    (tmp_path / "some.txt").write_text("\n".join(f"the {i}th line of a text of its own" for i in range(60)))
    whole, killed, resumed = (work_on(models / family, tmp_path / name) for name in ("whole", "rest", "rest"))
    expected = fit(lora, whole, **options)
    assert expected["passes"] > 1
    fit(lora, killed, stop_at=stop_at, **options)
    found = fit(lora, resumed, resume=True, **options)
    assert same_bits(whole.model, resumed.model)
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert [block.trained for block in resumed.blocks] == [block.trained for block in whole.blocks]


def test_a_checkpoint_holds_what_is_trained_alone(models, tmp_path):
    work = work_on(models / "tiny-llama", tmp_path)
    record = fit(lora, work, stop_at=2, **QUICK)
    size = last_checkpoint(tmp_path / "blocks" / "checkpoints").stat().st_size
    assert size < 4 * 4 * record["trained_parameters"] + 400_000  # itself, two moments, the best state; names


def test_it_never_ends_worse_than_it_began(models, tmp_path):
    work = work_on(models / "tiny-llama", tmp_path)
    before = copy.deepcopy(work.model)
    record = fit(lora, work, **QUICK | {"learning_rate": 10.0}, patience=1, norms=True)
    assert record["after"] == record["before"] and record["best_step"] == 0 and record["steps"] < 6
    assert same_bits(work.model, before)


def test_recomputed_activations_change_nothing(models, tmp_path):
    works = [work_on(models / "tiny-opt", tmp_path) for _ in range(2)]
    for work, checkpointing in zip(works, (False, True), strict=True):
        fit(lora, work, checkpointing=checkpointing, **QUICK)
        assert not any("forward" in vars(block.module) for block in work.blocks)
    assert same_bits(works[0].model, works[1].model)


def test_targets_biases_and_norms(models, tmp_path):
    work = work_on(models / "tiny-opt", tmp_path)
    before = dict(copy.deepcopy(work.model).named_parameters())
    options = QUICK | {"learning_rate": 3e-4}
    fit(lora, work, targets=["fc1", "layers.0.self_attn.q_proj"], biases=True, **options)
    changed = {name for name, parameter in work.model.named_parameters() if not torch.equal(parameter, before[name])}
    names = {linear.name for linear in linears_of(work).values()}
    weights = {f"{name}.weight" for name in names if name.endswith(("fc1", "0.self_attn.q_proj"))}
    assert weights <= changed
    k_biases = {name for name in changed if name.endswith("k_proj.bias")}  # a softmax does not see them
    assert changed - weights - k_biases == {f"{name}.bias" for name in names if not name.endswith("k_proj")}
    assert {f"{block.name}.{inner}" for block in work.blocks for inner in block.trained} >= changed - weights


def test_a_class_of_linears_that_computes_the_same_is_taken():
    """Falcon's has a forward pass of its own; one that scales its input is no linear that LoRA knows."""

    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    state = torch.random.get_rng_state()
    assert computes_linear(nn.Linear) and computes_linear(Same)
    assert not computes_linear(Scaled) and not computes_linear(nn.Module)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_part_of_a_name_is_a_whole_part():
    blocks = find_blocks(build("Llama"))
    assert [linear.name.split(".")[-1] for linear in select(blocks, ["mlp"])] == [
        "gate_proj",
        "up_proj",
        "down_proj",
    ] * 3
    assert len(select(blocks, ["layers.1"])) == 7 and len(select(blocks, None)) == 21
    with pytest.raises(ValueError, match="no linear is called `qproj`, did you mean `q_proj`"):
        select(blocks, ["qproj"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "option `rank` is 0, must be at least 1"),
        ({"learning_rate": 0.0}, "option `learning_rate` is 0.0, must be above 0"),
        ({"dropout": 1.0}, "option `dropout` is 1.0, must be at least 0 and below 1"),
        ({"warmup": -0.1}, "option `warmup` is -0.1, must be at least 0 and below 1"),
        ({"distill": 2.0}, "option `distill` is 2.0, must be at least 0 and at most 1"),
        ({"hidden": 1.0, "cache": 8}, "cache keeps the dense model's logits alone"),
        ({"tokens": 100}, "tokens is 100, less than the 1024 of one step"),
        ({"length": 512}, "recovery `length` is 512, but the model has 256 positions"),
        ({"merge": False, "norms": True}, "norms trained with it would be lost"),
        ({"source": "wikitext3"}, "did you mean `wikitext2`"),
        ({"targets": ["mpl"]}, "no linear is called `mpl`, did you mean `mlp`"),
    ],
)
def test_mistakes_are_said_before_the_model_is_touched(options, said, models, tmp_path):
    work = work_on(models / "tiny-llama", tmp_path)
    before = copy.deepcopy(work.model)
    with pytest.raises(ValueError, match=said):
        begin(lora, work, **options)
    assert same_bits(work.model, before) and all(p.requires_grad for p in work.model.parameters())


def test_a_mask_that_is_not_that_of_the_weights(models, tmp_path):
    work = work_on(models / "tiny-llama", tmp_path)
    next(iter(linears_of(work).values())).weight.fill_(1.0)
    with pytest.raises(ValueError, match="not zero outside its mask"):
        lora(work, **QUICK)
