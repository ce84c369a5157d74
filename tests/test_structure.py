"""What can be removed, masking it and cutting it out: equal logits in every family, whatever is removed."""

import math
import random
from pathlib import Path

import families
import pytest
import torch
from torch import nn

from sparsekit.model import find_blocks
from sparsekit.model.structure import Removal, Shape, choose, find_units, masking
from sparsekit.model.structure.cutting import cut

SETTINGS = {name: given for name, given in families.SETTINGS.items() if name != "Mixtral"} | {
    "Qwen2": families.GROUPED,
    "Gemma2": families.GROUPED | {"head_dim": 8, "sliding_window": 8},
}
LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")
TOKENS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))  # longer than sliding windows
KINDS = [("heads", "channels"), ("heads",), ("channels",), ("attention", "mlp"), ("layers",)]


def built(family, kinds=("heads", "channels"), device="cpu"):
    model = families.build(family, device, SETTINGS[family])
    blocks = find_blocks(model)
    return model, blocks, find_units(model, blocks, kinds)


def some(units, seed=3):
    """A mask that removes two in five, and leaves something of each kind."""
    kept = torch.rand(len(units), generator=torch.Generator().manual_seed(seed)) > 0.4
    kept[-1] = True
    return kept


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def greedy(model, use_cache=True):
    return model.generate(TOKENS, max_new_tokens=10, do_sample=False, use_cache=use_cache, pad_token_id=0)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kinds", KINDS, ids=" ".join)
@pytest.mark.parametrize("family", SETTINGS)
def test_a_cut_model_computes_what_the_masked_one_computes(family, kinds):
    model, blocks, units = built(family, kinds)
    dense, kept = logits(model), some(units)
    with masking(blocks, units) as masked:
        assert torch.equal(logits(model), dense)  # all kept
        masked(kept)
        expected, tokens = logits(model), greedy(model, use_cache=False)
    assert torch.equal(logits(model), dense)  # no weight was touched
    assert (expected - dense).abs().max() > 0.01
    size = parameters(model)
    cut(model, blocks, units, kept)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    assert torch.equal(greedy(model), tokens)  # the cache of keys and values counts right
    gone = int(units.parameters[~kept].sum())
    assert size - parameters(model) == gone + _biases_of_lost_parts(family, units, kept)


def _biases_of_lost_parts(family, units, kept):
    """Heads and channels do not own the bias of their output linear, or norms of queries and keys; lost parts do."""
    norms = {"Qwen3": 2 * 8, "Gemma3": 2 * 8}.get(family, 0)
    biases = 32 if family in ("OPT", "GPT2", "GPTNeoX", "Phi") else 0
    lost = [part.kind for part, each in zip(units.parts, units.split(kept), strict=True) if not each.any()]
    return sum((biases if kind in ("heads", "channels") else 0) + (norms if kind == "heads" else 0) for kind in lost)


@pytest.mark.parametrize("family", SETTINGS)
def test_zeroing_the_weights_is_what_masking_does(family):
    """The oracle: rows and columns of removed units set to zero by hand, in the weights of the dense model."""
    model, blocks, units = built(family)
    kept = some(units) | torch.cat([torch.arange(part.count) == 0 for part in units.parts])
    with masking(blocks, units) as masked:
        masked(kept)
        expected = logits(model)
    linears = {name: linear for block in blocks for name, linear in block.linears.items()}
    for part, each in zip(units.parts, units.split(kept), strict=True):
        for name, rows in part.inputs.items():
            if part.kind == "channels" or not name.endswith(("q_proj", "k_proj")):  # zero scores are no silence
                linears[name].weight[rows[~each].flatten()] = 0
        linears[part.output].weight[:, part.columns[~each].flatten()] = 0
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", SETTINGS)
def test_units_are_what_the_config_says(family):
    model, _, units = built(family)
    heads, channels = (sum(part.count for part in units.parts if part.kind == kind) for kind in ("heads", "channels"))
    groups = 2 if family in LLAMA_LIKE else 4
    assert (heads, channels) == (3 * groups, 3 * (128 if family == "GPT2" else 48))
    assert len(units) == heads + channels and units.kinds == ["heads", "channels"]
    assert units.total == sum(p.numel() for block in find_blocks(model) for p in block.module.parameters())
    assert units.removed(torch.zeros(len(units), dtype=torch.bool)) < 1
    for part in units.parts:
        assert part.columns.flatten().sort().values.tolist() == list(range(part.columns.numel()))
        for rows in part.inputs.values():  # every row belongs to one unit
            assert rows.flatten().sort().values.tolist() == list(range(rows.numel()))
    meta, _, same = built(family, device="meta")
    assert torch.equal(same.parameters, units.parameters) and all(p.is_meta for p in meta.parameters())


def test_the_parameters_of_units_of_a_llama():
    """By hand: 4 query heads of 8, 2 groups, hidden size 32, 48 channels."""
    _, _, units = built("Llama")
    assert units.parameters[units.of("heads")].unique().tolist() == [32 * (2 * 8 + 8 + 8) + 2 * 8 * 32]
    assert units.parameters[units.of("channels")].unique().tolist() == [3 * 32]
    _, _, whole = built("Llama", ("attention", "mlp"))
    assert whole.parameters.tolist() == [2 * 32 * 32 + 2 * 16 * 32, 3 * 32 * 48] * 3
    _, _, layers = built("Llama", ("layers",))
    assert int(layers.parameters.sum()) == layers.total == whole.total
    assert layers.removed(torch.tensor([True, False, True])) == pytest.approx(1 / 3)
    assert units.block.tolist() == sorted(units.block.tolist()) and units.part.max() == 5


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "OPT", "GPT2"])
def test_every_attention_and_every_mlp_may_go(family):
    model, blocks, units = built(family, ("attention", "mlp"))
    with masking(blocks, units) as masked:
        masked(torch.zeros(len(units)))
        expected = logits(model)
    cut(model, blocks, units, torch.zeros(len(units), dtype=torch.bool))
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)
    assert greedy(model).shape == (2, 22)
    alone = logits(model)[:, -1]  # nothing looks at other tokens
    with torch.no_grad():
        mixed = model(torch.cat([TOKENS[:, :-1].flip(1), TOKENS[:, -1:]], 1)).logits[:, -1]
    torch.testing.assert_close(mixed, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Phi"])
@pytest.mark.parametrize("kinds", [("heads", "channels"), ("layers",)], ids=" ".join)
def test_cutting_works_on_the_meta_device(family, kinds):
    model, blocks, units = built(family, kinds)
    cut(model, blocks, units, some(units))
    meta, blocks, units = built(family, kinds, "meta")
    cut(meta, blocks, units, some(units))
    shapes = [{name: p.shape for name, p in each.named_parameters()} for each in (model, meta)]
    assert shapes[0] == shapes[1] and all(p.is_meta for p in meta.parameters())


@pytest.mark.parametrize("kinds", [("heads", "channels"), ("layers",)], ids=" ".join)
def test_a_mask_follows_another_without_a_trace(kinds):
    """Masks of 0 and 1 in float, as samples are, and of booleans."""
    model, blocks, units = built("Mistral", kinds)
    one, other = some(units), some(units, seed=4)
    assert not torch.equal(one, other)
    with masking(blocks, units) as masked:
        masked(one)
        first = logits(model)
        masked(other.float())
        second = logits(model)
        masked(one.float())
        assert torch.equal(logits(model), first) and not torch.allclose(first, second)


def test_gradients_reach_what_is_kept_only():
    """A masked model can be trained: removed columns get none."""
    model, blocks, units = built("Llama", ("channels",))
    kept = some(units)
    with masking(blocks, units) as masked:
        masked(kept)
        model(TOKENS, labels=TOKENS).loss.backward()
    for part, each in zip(units.parts, units.split(kept), strict=True):
        gradient = model.get_parameter(f"{part.output}.weight").grad
        assert torch.equal(gradient.abs().sum(0) > 0, each)


@pytest.mark.parametrize("family", ["Llama", "OPT"])
def test_what_a_part_needs_in_half_precision(family):
    model, blocks, units = built(family)
    model.to(torch.bfloat16)
    kept = some(units)
    with masking(blocks, units) as masked:
        masked(kept)
        expected = logits(model)
    cut(model, blocks, units, kept)
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "kinds", [("heads", "layers"), ("heads", "attention"), ("channels", "mlp"), ("rows",), ()], ids=" ".join
)
def test_kinds_that_cannot_be_removed_together_are_refused(kinds):
    model = families.build("Llama", "meta")
    with pytest.raises(
        ValueError, match="they can be heads, channels and mamba, attention and mlp, layers, or experts"
    ):
        find_units(model, find_blocks(model), kinds)


def test_families_whose_roles_are_not_known_are_refused():
    """Mixtral's fused experts: its heads and layers may go, its channels not."""
    model = families.build("Mixtral", "meta")
    blocks = find_blocks(model)
    assert len(find_units(model, blocks, ("heads",))) == 6 and len(find_units(model, blocks, ("layers",))) == 3
    with pytest.raises(ValueError, match=r"model.layers.0 has no MLP whose linears sparsekit knows: it has self_attn"):
        find_units(model, blocks, ("channels",))


def test_an_mlp_that_does_not_read_what_is_made_is_refused():
    model = families.build("Llama")
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj reads 48 channels"):
        find_units(model, find_blocks(model), ("channels",))


def test_what_goes_is_within_one_channel_of_what_was_asked():
    """200 random shapes, every kind of budget: never less, and more by less than the smallest unit that is left."""
    draw = random.Random(0)
    reached = 0
    for _ in range(200):
        groups, each, layers = draw.choice([1, 2, 3]), draw.choice([1, 2, 4]), draw.randint(2, 6)
        settings = {
            "hidden_size": 8 * groups * each,
            "intermediate_size": draw.randint(9, 90),
            "num_hidden_layers": layers,
            "num_attention_heads": groups * each,
            "num_key_value_heads": groups,
            "vocab_size": 16,
        }
        model = families.build("Llama", "meta", settings)
        units = find_units(model, find_blocks(model))
        scores = torch.rand(len(units), generator=torch.Generator().manual_seed(draw.randrange(999))).double()
        scores[units.of("heads")] *= draw.choice([0.1, 1.0, 10.0])
        remove = draw.uniform(0.03, 0.6)
        for shape, budgets in (("free", "separate"), ("free", "joint"), ("uniform", "separate")):
            try:
                kept = choose(units, scores, remove, shape=shape, budgets=budgets)
            except ValueError as error:
                assert "can give up" in str(error)
                continue
            over = int(units.parameters[~kept].sum()) - remove * units.total
            assert over >= -1e-6 * units.total
            sizes = {kind: int(units.parameters[units.of(kind)].min()) for kind in ("heads", "channels")}
            count = each if groups == 1 else groups
            most = {"heads": (count - 1) * layers or layers, "channels": (settings["intermediate_size"] - 1) * layers}
            step = layers if shape == "uniform" else 1
            reachable = min(
                heads * sizes["heads"] + channels * sizes["channels"] - remove * units.total
                for heads in range(0, (most["heads"] if shape == "free" or count > 1 else 0) + 1, step)
                for channels in [math.ceil((remove * units.total - heads * sizes["heads"]) / sizes["channels"] - 1e-9)]
                for channels in [max(0, -(-channels // step) * step)]
                if channels <= most["channels"]
            )
            within = over < sizes["channels"] * step
            assert within or over == pytest.approx(reachable), (settings, remove, shape, budgets)
            reached += within
    assert reached > 400


def test_only_lists_with_an_entry_for_each_layer_lose_one():
    """Three ends of text in a model of three layers are no entries of layers."""
    model = families.build("Llama")
    model.config.eos_token_id = [1, 2, 3]
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    blocks = find_blocks(model)
    units = find_units(model, blocks, ["layers"])
    cut(model, blocks, units, torch.tensor([True, False, True]))
    assert model.config.eos_token_id == [1, 2, 3]
    assert model.config.layer_types == ["full_attention", "full_attention"]


def test_layers_that_know_their_number_stay():
    settings = SETTINGS["GPT2"] | {"scale_attn_by_inverse_layer_idx": True}
    model = families.build("GPT2", "meta", settings)
    with pytest.raises(ValueError, match="divides attention by the layer's number"):
        find_units(model, find_blocks(model), ["layers"])
    assert len(find_units(model, find_blocks(model), ["heads"]))


def test_uniform_has_nothing_to_do_among_whole_parts():
    _, _, units = built("Llama", ("attention", "mlp"), "meta")
    with pytest.raises(ValueError, match="each has one: give shape: free"):
        choose(units, torch.rand(len(units)), 0.3, shape="uniform")


@pytest.mark.parametrize("shape", ["free", "uniform"])
@pytest.mark.parametrize("family", ["Llama", "Gemma", "Gemma3", "Qwen3"])
def test_queries_that_share_one_key_are_units_of_their_own(family, shape, tmp_path):
    """Four query heads, one KV head: 30 % of each attention can go; masked, cut, stored and opened are the same."""
    from transformers import AutoModelForCausalLM

    from sparsekit.model import load as load_model
    from sparsekit.model import load_tokenizer, save_model

    model = families.build(family, settings=SETTINGS[family] | {"num_key_value_heads": 1, "head_dim": 8})
    blocks = find_blocks(model)
    units = find_units(model, blocks)
    assert [part.count for part in units.parts if part.kind == "heads"] == [4] * len(blocks)
    scores = torch.rand(len(units), generator=torch.Generator().manual_seed(2)).double()
    kept = choose(units, scores, 0.3, shape=shape)
    gone = [int((~kept[units.part == n]).sum()) for n, part in enumerate(units.parts) if part.kind == "heads"]
    assert sum(gone) >= len(blocks) and max(gone) < 4
    with masking(blocks, units) as mask, torch.no_grad():
        mask(kept)
        expected = model(TOKENS, use_cache=False).logits
    removal = Removal(units.kinds, kept, {}, None, {})
    removal.apply(model, blocks)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)
        cached = model(TOKENS[:, 6:], past_key_values=model(TOKENS[:, :6], use_cache=True).past_key_values).logits
        torch.testing.assert_close(cached, expected[:, 6:], atol=1e-5, rtol=1e-4)
    tokenizer = load_tokenizer(Path(__file__).parent / "models" / "tiny-llama")
    stored = save_model(model, tokenizer, tmp_path / "model", Shape.of(model, [(units, removal)]))
    assert [layer.heads.of for layer in stored.layers] == [4] * len(blocks)
    loaded, _ = load_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)
    if stored.layout != "own":
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", trust_remote_code=stored.layout == "generated"
        )
        with torch.no_grad():
            assert torch.equal(theirs(TOKENS, use_cache=False).logits, model(TOKENS, use_cache=False).logits)
