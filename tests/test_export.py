"""Packed checkpoints: unpacked bit for bit, and the same logits from plain transformers."""

import importlib.util
import json
from itertools import product

import pytest
import torch
import transformers

from sparsekit.maths import Quantization
from sparsekit.model import Checkpoint, find_blocks
from sparsekit.results import export_packed, packed_differences
from sparsekit.results.exporters.packed import pack, read_packed, unpack

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
SYMMETRIC = [Quantization(bits, group) for bits, group in product((4, 8), (8, 32, "channel"))]
ASYMMETRIC = [Quantization(4, 16, False), Quantization(8, "channel", False)]


def simulated(folder, source, kind_of, dtype=torch.float32):
    """The model with half of its linears' weights zero, the others on their grids; name -> Quantization."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    kinds = {}
    for block in find_blocks(model):
        for name, linear in block.linears.items():
            kind = kind_of(name)
            if kind is not None:
                weight = linear.weight.float()
                weight = weight * (weight.abs() > weight.abs().median())
                linear.write_pruned(kind.fit(weight).nearest(weight))
                kinds[name] = kind
    model.save_pretrained(folder)
    return kinds


def logits(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        return model(torch.arange(48)[None] * 7 % 700).logits, model


def check(tmp_path, source, kind_of, dtype):
    """Pack, compare with the simulated model on disk and through transformers; returns the two folders."""
    dense, packed = tmp_path / "model", tmp_path / "model-packed"
    kinds = simulated(dense, source, kind_of, dtype)
    export_packed(dense, packed, kinds)
    assert packed_differences(packed, dense) == []
    expected, _ = logits(dense)
    seen, model = logits(packed)
    assert seen.dtype == expected.dtype == dtype
    assert torch.equal(seen, expected)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.data_ptr() == head.data_ptr()  # tied
    return dense, packed


@needs_package
@pytest.mark.parametrize("kind", SYMMETRIC + ASYMMETRIC, ids=str)
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_transformers_gives_the_same_logits(tmp_path, models, name, kind):
    dense, packed = check(tmp_path, models / name, lambda _: kind, torch.float32)
    size = {folder: sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (dense, packed)}
    assert size[packed] < 0.6 * size[dense]


@needs_package
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [SYMMETRIC[1], SYMMETRIC[-1], *ASYMMETRIC], ids=str)
def test_in_half_precision_too(tmp_path, models, kind, dtype):
    check(tmp_path, models / "tiny-llama", lambda _: kind, dtype)


@needs_package
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-opt"])
def test_each_linear_may_have_its_own_grid(tmp_path, models, name):
    """Groups of 64 do not divide 160; 8 bits for attention; one linear stays dense."""

    def kind_of(linear):
        if "layers.2." in linear and linear.endswith(("down_proj", "fc2")):
            return None
        return Quantization(8, "channel") if "attn" in linear else Quantization(4, 16 if "down" in linear else 64)

    _, packed = check(tmp_path, models / name, kind_of, torch.float32)
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert [entry for entry in config["ignore"] if "layers.2." in entry]
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {4, 8}


@needs_package
def test_one_setting_for_some_of_the_linears(tmp_path, models):
    check(tmp_path, models / "tiny-llama", lambda name: Quantization(4, 32) if "mlp" in name else None, torch.float32)


@pytest.mark.parametrize("kind", SYMMETRIC + ASYMMETRIC, ids=str)
def test_unpacked_bit_for_bit_and_nothing_else_touched(tmp_path, models, kind):
    kinds = simulated(tmp_path / "model", models / "tiny-llama", lambda _: kind, torch.bfloat16)
    export_packed(tmp_path / "model", tmp_path / "packed", kinds)
    dense, packed = Checkpoint(tmp_path / "model"), Checkpoint(tmp_path / "packed")
    unpacked = dict(read_packed(tmp_path / "packed"))
    assert unpacked.keys() == kinds.keys()
    for name, (weight, grid) in unpacked.items():
        assert torch.equal(weight, dense.tensor(f"{name}.weight")) and weight.dtype == torch.bfloat16
        assert grid.satisfied(weight)
        assert (grid.bits, grid.symmetric) == (kind.bits, kind.symmetric)
        assert f"{name}.weight" not in packed
    for key in set(dense) - {f"{name}.weight" for name in kinds}:
        assert torch.equal(packed.tensor(key), dense.tensor(key))
    assert not (tmp_path / ".packed.part").exists()


def test_a_difference_is_found(tmp_path, models):
    kinds = simulated(tmp_path / "model", models / "tiny-opt", lambda _: Quantization(4, 32))
    export_packed(tmp_path / "model", tmp_path / "packed", kinds)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        other.model.decoder.layers[1].fc1.weight[3, 5] += 1
        other.model.decoder.final_layer_norm.bias[0] += 1
    other.save_pretrained(tmp_path / "other")
    found = packed_differences(tmp_path / "packed", tmp_path / "other")
    assert len(found) == 2 and "layers.1.fc1.weight unpacks to other values" in found[0]
    assert "final_layer_norm.bias differs" in found[1]


def test_shards_stay_shards(tmp_path, models):
    kinds = simulated(tmp_path / "one", models / "tiny-llama", lambda _: Quantization(4, 32))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    export_packed(tmp_path / "model", tmp_path / "packed", kinds)
    assert packed_differences(tmp_path / "packed", tmp_path / "one") == []
    export_packed(tmp_path / "model", tmp_path / "packed", kinds)  # over an earlier one
    assert packed_differences(tmp_path / "packed", tmp_path / "one") == []


@pytest.mark.parametrize(("bits", "count"), [(4, 8), (4, 13), (8, 4), (8, 7)])
def test_packing_puts_the_first_column_in_the_lowest_bits(bits, count):
    levels = torch.randint(2**bits, (5, count), generator=torch.Generator().manual_seed(0))
    words = pack(levels, bits)
    assert words.dtype == torch.int32 and words.shape == (5, -(-count * bits // 32))
    for row in range(5):
        whole = sum(int(level) << (bits * i) for i, level in enumerate(levels[row]))
        assert [int(word) & 0xFFFFFFFF for word in words[row]] == [
            whole >> (32 * i) & 0xFFFFFFFF for i in range(words.shape[1])
        ]
    assert torch.equal(unpack(words, bits, count), levels.int())


def test_mistakes(tmp_path, models):
    source, target = models / "tiny-llama", tmp_path / "packed"
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=f"{name} has 3 bits: the packed layout is for 4 and 8; .* simulated only"):
        export_packed(source, target, {name: {"bits": 3}})
    with pytest.raises(ValueError, match=f"{name} is on no symmetric 4-bit grid of groups of 32"):
        export_packed(source, target, {name: {"bits": 4, "group": 32}})
    with pytest.raises(ValueError, match="has 64 input columns, which groups of 48 do not divide"):
        export_packed(source, target, {name: {"bits": 4, "group": 48}})
    with pytest.raises(ValueError, match="the model has no linear model"):
        export_packed(source, target, {"model.nothing": {"bits": 4}})
    with pytest.raises(ValueError, match="nothing to pack"):
        export_packed(source, target, {})
    with pytest.raises(ValueError, match="asymmetric and the linears have 2 different settings"):
        export_packed(source, target, {name: {"symmetric": False}, "model.layers.1.mlp.up_proj": {"bits": 4}})
    with pytest.raises(ValueError, match="holds no weights in the pack-quantized layout"):
        list(read_packed(source))
    assert not list(tmp_path.iterdir())
