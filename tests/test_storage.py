"""Cut models on disk: what is loaded computes what the masked model computes, in every layout and family."""

import json
import os
import subprocess
import sys
import textwrap

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sparsekit.model import Checkpoint, find_blocks, loading_code, save_model, skeleton
from sparsekit.model import load as load_model
from sparsekit.model import modeling as modeling_file
from sparsekit.model.structure import Removal, Shape, find_units, masking
from sparsekit.results import prove_structure

SETTINGS = {name: given for name, given in families.SETTINGS.items() if name != "Mixtral"} | {
    "Qwen2": families.GROUPED,
    "Gemma2": families.GROUPED | {"head_dim": 8, "sliding_window": 8},
}
GENERATED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")
OTHERS = (
    *("Apertus", "Arcee", "Cohere", "Cohere2", "Ernie4_5", "Exaone4", "Granite", "HunYuanDenseV1", "Ministral", "Olmo"),
    *("SeedOss", "SmolLM3", "Starcoder2"),
)
TOKENS = torch.randint(1, 96, (2, 12), generator=torch.Generator().manual_seed(1))  # longer than sliding windows


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """Code that transformers copies from checkpoints stays in the test's folder."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])


@pytest.fixture
def tokenizer(models):
    return transformers.AutoTokenizer.from_pretrained(models / "tiny-llama")


def kept_of(units, how):
    """A mask: free, uniform over the layers, with whole parts gone, or with layers gone."""
    generator = torch.Generator().manual_seed(3)
    free = torch.rand(len(units), generator=generator) > 0.4
    first_of_parts = torch.cat([torch.arange(part.count) == 0 for part in units.parts])
    if how == "free":
        return free | first_of_parts
    if how == "uniform":
        return torch.cat([torch.arange(part.count) % 2 == 0 for part in units.parts])
    if how == "channels":
        return torch.cat([(torch.arange(part.count) % 2 == 0) | (part.kind == "heads") for part in units.parts])
    if how == "parts":  # the first attention and the last MLP are gone, and some more
        return (free | first_of_parts) & (units.part != 0) & (units.part != len(units.parts) - 1)
    return units.block != 0  # layers: the first is gone


def build(family, settings=None, dtype=None):
    """A model with parameters in `dtype`; tables of rotary embeddings stay in float32, as when it is loaded."""
    model = families.build(family, settings=settings or SETTINGS[family])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype or torch.float32)
    return model


def made(family, how, kinds=None, dtype=None, kept=None, settings=None):
    """A cut model, its cuts, and the logits and greedy tokens of the masked one, which is not cut."""
    source, model = (build(family, settings, dtype) for _ in range(2))
    kinds = kinds or (["layers"] if how == "layers" else ["heads", "channels"])
    blocks = find_blocks(model)
    units = find_units(model, blocks, kinds)
    removal = Removal(kinds, kept_of(units, how) if kept is None else kept)
    with masking(blocks, units) as masked:
        masked(removal.kept)
        expected = logits(model), greedy(model, use_cache=False)
    removal.apply(model, blocks)
    return source, model, [(units, removal)], expected


@torch.no_grad()
def logits(model):
    return model(TOKENS.to(next(model.parameters()).device)).logits


def greedy(model, use_cache=True):
    return model.generate(TOKENS, max_new_tokens=10, do_sample=False, use_cache=use_cache, pad_token_id=0)


def layout_of(family, how):
    """The layout that must be found."""
    if how in ("channels", "layers") or (how == "uniform" and family in (*GENERATED, "Phi")):
        return "plain"
    return "generated" if family in GENERATED else "own"


def saved(tmp_path, tokenizer, family, how, **options):
    """A cut model on disk, with its source; returns the folders, the cuts and what the masked model computed."""
    source, model, cuts, expected = made(family, how, **options)
    source.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    shape = save_model(model, tokenizer, tmp_path / "model", Shape.of(model, cuts), source=tmp_path / "source")
    return tmp_path / "model", tmp_path / "source", cuts, expected, shape, model


def same(model, expected):
    wanted, tokens = expected
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=0)
    assert wanted.std() > 1e-3  # or 1e-5 would say nothing
    assert torch.equal(greedy(model), tokens)


@pytest.mark.parametrize("how", ["free", "uniform", "channels", "parts", "layers"])
@pytest.mark.parametrize("family", SETTINGS)
def test_what_is_loaded_computes_what_the_masked_model_computes(tmp_path, tokenizer, family, how):
    folder, source, cuts, expected, shape, model = saved(tmp_path, tokenizer, family, how)
    assert shape.layout == layout_of(family, how)
    loaded, read = load_model(folder)
    same(loaded, expected)
    assert not loaded.training and read("a b").input_ids == tokenizer("a b").input_ids
    assert {name: tuple(p.shape) for name, p in skeleton(folder).named_parameters()} == {
        name: tuple(p.shape) for name, p in loaded.named_parameters()
    }
    assert all(p.is_meta for p in skeleton(folder).parameters())
    assert prove_structure(folder, source, cuts) == [] == prove_structure(folder, source)
    assert Shape.read(folder) == shape
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    if shape.layout == "own":
        with pytest.raises(ValueError, match=f"sparsekit_{loaded.config.model_type}.*does not recognize"):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(Exception, match="per-layer attribute"):
            type(loaded).from_pretrained(folder)
        return
    trust = shape.layout == "generated"
    if trust:
        with pytest.raises(ValueError, match="trust_remote_code"):
            transformers.AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(Exception, match="per-layer attribute"):
            type(loaded).from_pretrained(folder)
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust, output_loading_info=True
    )
    assert not any(info.values())
    same(plain, expected)


FRESH = """
    import sys
    sys.modules["sparsekit"] = None  # cannot be imported
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    torch.set_num_threads(1)
    tokens = torch.tensor({tokens})
    for family in {families}:
        model = AutoModelForCausalLM.from_pretrained(family, trust_remote_code=True)
        assert type(model).__name__.startswith("Sparsekit")
        AutoTokenizer.from_pretrained(family, trust_remote_code=True)
        bare = AutoModel.from_pretrained(family, trust_remote_code=True)
        with torch.no_grad():
            seen = {{"logits": model(tokens).logits, "hidden": bare(tokens).last_hidden_state}}
            seen["of model"] = model.model(tokens).last_hidden_state
            model.set_attn_implementation("eager")
            seen["eager"] = model(tokens).logits
        seen["tokens"] = model.generate(tokens, max_new_tokens=10, do_sample=False, pad_token_id=0)
        seen["static"] = model.generate(
            tokens, max_new_tokens=10, do_sample=False, pad_token_id=0, cache_implementation="static"
        )
        save_file(seen, f"{{family}}.seen")
        model.save_pretrained(f"{{family}}-again")
        again = AutoModelForCausalLM.from_pretrained(f"{{family}}-again", trust_remote_code=True)
        with torch.no_grad():
            assert torch.equal(again.eval()(tokens).logits, AutoModelForCausalLM.from_pretrained(
                family, trust_remote_code=True)(tokens).logits)
"""


def test_the_modeling_file_needs_no_sparsekit(tmp_path, tokenizer):
    """In a process of its own; stored again by transformers, it is still the same model."""
    expected = {}
    for family in GENERATED:
        (tmp_path / family).mkdir()
        folder, _, _, wanted, shape, _ = saved(tmp_path / family, tokenizer, family, "parts")
        folder.rename(tmp_path / f"{family}-model")
        expected[f"{family}-model"] = wanted
        assert shape.layout == "generated"
    code = textwrap.dedent(FRESH).format(tokens=TOKENS.tolist(), families=list(expected))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "fresh"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for family, (wanted, tokens) in expected.items():
        seen = load_file(tmp_path / f"{family}.seen")
        torch.testing.assert_close(seen["logits"], wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen["eager"], wanted, atol=1e-5, rtol=0)
        assert torch.equal(seen["hidden"], seen["of model"])
        assert torch.equal(seen["tokens"], tokens) and torch.equal(seen["static"], tokens)


@pytest.mark.parametrize(
    ("family", "how"), [("Llama", "free"), ("OPT", "parts"), ("GPT2", "free"), ("Llama", "uniform")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_bit_for_bit(tmp_path, tokenizer, family, how, dtype):
    folder, source, cuts, _, _, model = saved(tmp_path, tokenizer, family, how, dtype=dtype)
    loaded, _ = load_model(folder)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype == loaded.get_parameter(name).dtype
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert torch.equal(logits(loaded), logits(model))
    assert prove_structure(folder, source, cuts) == []
    wide, _ = load_model(folder, dtype="float32")
    assert wide.dtype == torch.float32
    for name, buffer in loaded.named_buffers():
        assert torch.equal(buffer, dict(wide.named_buffers())[name])


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="memory maps are told by Linux alone")
def test_a_file_is_mapped_once(tmp_path, tokenizer):
    """With a map for each tensor, pages of a large file counted several times in the memory of the process."""
    folder, *_ = saved(tmp_path, tokenizer, "Llama", "free")
    model, _ = load_model(folder)
    assert next(model.parameters()).device.type == "cpu"
    with open("/proc/self/maps") as maps:
        assert sum(str(folder / "model.safetensors") in line for line in maps) == 1


@pytest.mark.parametrize("how", ["free", "uniform"])
def test_tied_embeddings_stay_tied(tmp_path, tokenizer, how):
    folder, *_ = saved(tmp_path, tokenizer, "Llama", how)
    assert "lm_head.weight" not in Checkpoint(folder)
    loaded, _ = load_model(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_numbers_of_heads_that_llama_refuses_are_stored_as_mistral(tmp_path, tokenizer):
    """Three of four heads do not divide a hidden size of 32; LlamaConfig wants that, MistralConfig does not."""
    settings = SETTINGS["Llama"] | {"num_key_value_heads": 4}
    units = find_units(model := families.build("Llama", settings=settings), find_blocks(model))
    kept = torch.cat([torch.arange(part.count) < part.count * 3 // 4 for part in units.parts])
    folder, source, cuts, expected, shape, _ = saved(tmp_path, tokenizer, "Llama", "", kept=kept, settings=settings)
    assert shape.layout == "plain" and "stored as mistral" in shape.load and "3 heads" in shape.load
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(plain, transformers.MistralForCausalLM)
    same(plain, expected)
    same(load_model(folder)[0], expected)
    assert prove_structure(folder, source, cuts) == []


@pytest.mark.parametrize(
    ("family", "how", "layout"),
    [
        ("Llama", "uniform", "plain"),
        ("Llama", "free", "generated"),
        ("Mistral", "uniform", "generated"),
        ("Qwen3", "parts", "generated"),
        ("OPT", "free", "own"),
    ],
)
def test_biases_that_the_family_does_not_have(tmp_path, tokenizer, family, how, layout):
    """A step that makes up for what is removed may add biases, and change weights."""
    settings = SETTINGS[family] | ({"enable_bias": False} if family == "OPT" else {})
    source, model, [(units, removal)], _ = made(family, how, settings=settings)
    generator = torch.Generator().manual_seed(0)
    changed = {}
    for part, kept in zip(units.parts, units.split(removal.kept), strict=True):
        if kept.any() and part.block != 1:  # the middle layer's linears get none
            weight = source.get_parameter(f"{part.output}.weight")
            changed[f"{part.output}.weight"] = weight.detach() + torch.randn(weight.shape, generator=generator) * 0.1
            changed[f"{part.output}.bias"] = torch.randn(weight.shape[0], generator=generator)
    source.save_pretrained(tmp_path / "source")
    removal = Removal(removal.kinds, removal.kept, changed)
    removal.apply(source, find_blocks(source))
    shape = save_model(source, tokenizer, tmp_path / "model", Shape.of(source, [(units, removal)]))
    assert shape.layout == layout
    assert len(shape.biases) == sum(name.endswith(".bias") for name in changed)
    loaded, _ = load_model(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(source))
    assert torch.equal(greedy(loaded), greedy(source))
    assert not torch.allclose(logits(source), logits(model), atol=1e-2)  # without changes it is another model
    if layout != "own":
        plain = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", trust_remote_code=layout == "generated"
        )
        assert torch.equal(logits(plain), logits(source))
    assert prove_structure(tmp_path / "model", tmp_path / "source", [(units, removal)]) == []
    assert set(changed) == set(shape.changed)
    assert prove_structure(tmp_path / "model", tmp_path / "source") == []
    found = prove_structure(tmp_path / "model", tmp_path / "source", [(units, Removal(removal.kinds, removal.kept))])
    assert len(found) == len(changed)  # all of it is seen where it was not said
    free = {f"{name}.weight" for name, _ in loaded.named_modules()} | {f"{name}.bias" for name in shape.biases}
    untold = [(units, Removal(removal.kinds, removal.kept))]
    assert prove_structure(tmp_path / "model", tmp_path / "source", untold, changed=free) == []


def test_layers_of_a_family_whose_roles_are_not_known(tmp_path, tokenizer):
    """Mixtral's experts cannot be cut, its layers can."""
    folder, source, cuts, expected, shape, _ = saved(
        tmp_path, tokenizer, "Mixtral", "layers", settings=families.SETTINGS["Mixtral"]
    )
    assert shape.layout == "plain" and [layer.index for layer in shape.layers] == [1, 2]
    assert all(layer.channels is None for layer in shape.layers)
    assert prove_structure(folder, source) == []
    same(load_model(folder)[0], expected)
    assert prove_structure(folder, source, cuts) == []


@pytest.mark.parametrize(("family", "how"), [("Llama", "uniform"), ("Llama", "free"), ("OPT", "free")])
def test_a_cut_model_can_be_cut_again(tmp_path, tokenizer, family, how):
    """In one run, or in another that begins with the folder of the first."""
    _, _, cuts, _, shape, model = saved(tmp_path, tokenizer, family, how)
    loaded, _ = load_model(tmp_path / "model")
    for again, before, first in ((model, None, cuts), (loaded, shape, [])):
        blocks = find_blocks(again)
        units = find_units(again, blocks, ["layers"])
        removal = Removal(["layers"], torch.tensor([True, False, True]))
        removal.apply(again, blocks)
        blocks = find_blocks(again)
        narrower = find_units(again, blocks, ["channels"])
        less = Removal(["channels"], kept_of(narrower, "free"))
        less.apply(again, blocks)
        made_ = [*first, (units, removal), (narrower, less)]
        found = Shape.of(again, made_, before)
        assert [layer.index for layer in found.layers] == [0, 2]
        assert [layer.heads for layer in found.layers] == [shape.layers[0].heads, shape.layers[2].heads]
        assert [layer.channels.of for layer in found.layers] == [48, 48]
        for position, old in enumerate((0, 2)):  # numbered as in the source
            mask = less.kept[narrower.part == position]
            was = torch.tensor(shape.layers[old].channels.units)
            assert found.layers[position].channels.units == tuple(was[mask].tolist())
        begun = tmp_path / ("source" if before is None else "model")
        save_model(again, tokenizer, tmp_path / "twice", found)
        assert torch.equal(logits(load_model(tmp_path / "twice")[0]), logits(again))
        assert (
            prove_structure(tmp_path / "twice", begun, made_)
            == []
            == prove_structure(tmp_path / "twice", tmp_path / "source")
        )
        with pytest.raises(ValueError, match="is cut itself"):
            prove_structure(tmp_path / "twice", tmp_path / "model")


def test_structure_json_tells_what_is_left(tmp_path, tokenizer):
    folder, _, cuts, *_ = saved(tmp_path, tokenizer, "Llama", "parts")
    [(units, removal)] = cuts
    told = json.loads((folder / "structure.json").read_text())
    counts = [int(kept.sum()) for kept in units.split(removal.kept)]
    assert [layer["layer"] for layer in told["layers"]] == [0, 1, 2]
    assert [layer["heads"] for layer in told["layers"]] == [[count, 2] for count in counts[::2]]
    assert [layer["channels"] for layer in told["layers"]] == [[count, 48] for count in counts[1::2]]
    assert told["layers"][0]["heads"][0] == 0 == told["layers"][2]["channels"][0]
    for layer, kept in zip(told["layers"], units.split(removal.kept)[::2], strict=True):
        bits = int(layer.get("heads_kept", "0x3"), 16)
        assert [bool(bits >> unit & 1) for unit in range(2)] == kept.tolist()
    assert told["version"] == 1 and told["layout"] == "generated" and "trust_remote_code=True" in told["load"]
    assert str(tmp_path) not in (folder / "structure.json").read_text() + (folder / "config.json").read_text()
    assert "trust_remote_code=True" in loading_code(folder)


@pytest.mark.parametrize(("family", "how"), [("Llama", "free"), ("Llama", "uniform"), ("OPT", "free")])
def test_nothing_in_the_folder_is_a_pickle(tmp_path, tokenizer, family, how):
    folder, *_ = saved(tmp_path, tokenizer, family, how)
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "structure.json"} <= names
    for file in folder.iterdir():
        assert file.suffix in (".json", ".safetensors", ".jinja") or file.name.startswith("modeling_sparsekit_")
        assert not file.read_bytes().startswith((b"PK", b"\x80"))  # archives of torch.save, and bare pickles
    assert not (tmp_path / ".model.part").exists()


def damaged(folder, change):
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NAME = {
    "Llama": ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    "OPT": ("model.decoder.layers.1.self_attn.k_proj.weight", "model.decoder.layers.1.fc2.weight"),
}


@pytest.mark.parametrize(("family", "how"), [("Llama", "free"), ("Llama", "uniform"), ("OPT", "free")])
def test_what_is_missing_or_damaged_is_said(tmp_path, tokenizer, family, how):
    folder, source, cuts, *_ = saved(tmp_path, tokenizer, family, how)
    rows, columns = NAME[family]
    whole = (folder / "model.safetensors").read_bytes()

    damaged(folder, lambda tensors: tensors.pop(rows))
    with pytest.raises(ValueError, match=rf"lacks 1 tensors of \w+, the first is {rows}"):
        load_model(folder)
    [failure] = prove_structure(folder, source, cuts)
    assert failure == f"{rows} is missing: loading would fill it with random numbers"

    (folder / "model.safetensors").write_bytes(whole)
    damaged(folder, lambda tensors: tensors.update({rows: tensors[rows][:-8].clone()}))
    with pytest.raises((ValueError, RuntimeError), match=rows if how == "free" else "mismatch"):
        load_model(folder)
    assert len([failure for failure in prove_structure(folder, source, cuts) if rows in failure]) == 2

    (folder / "model.safetensors").write_bytes(whole)
    damaged(folder, lambda tensors: tensors[columns].view(-1)[5].add_(1e-3))
    assert prove_structure(folder, source, cuts) == [f"{columns} is not what was kept of {source}"]
    assert prove_structure(folder, source, cuts, changed={columns}) == []

    (folder / "model.safetensors").write_bytes(whole)
    damaged(folder, lambda tensors: tensors[columns].view(-1)[5].fill_(float("nan")))
    assert f"{columns} contains NaN or Inf" in prove_structure(folder, source, cuts, changed={columns})

    (folder / "model.safetensors").write_bytes(whole)
    damaged(folder, lambda tensors: tensors.update(other=torch.ones(3)))
    assert any("other is stored and no tensor of" in failure for failure in prove_structure(folder, source, cuts))

    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_model(folder)


def test_other_kept_units_than_were_decided_are_seen(tmp_path, tokenizer):
    folder, source, [(units, removal)], *_ = saved(tmp_path, tokenizer, "Llama", "free")
    kept = removal.kept.clone()
    channels = (units.part == 1).nonzero().flatten()
    first, gone = channels[kept[channels]][0], channels[~kept[channels]][0]
    kept[first], kept[gone] = False, True  # as many, but others
    found = prove_structure(folder, source, [(units, Removal(removal.kinds, kept))])
    assert found == [
        *(f"model.layers.0.mlp.{name}_proj.weight is not what was kept of {source}" for name in ("down", "gate", "up")),
        "structure.json does not have the channels of layer 0 that were kept",
    ]
    kept[first] = True  # one more
    found = prove_structure(folder, source, [(units, Removal(removal.kinds, kept))])
    assert any("channels of layer 0" in failure for failure in found)
    layers = find_units(skeleton(source), find_blocks(skeleton(source)), ["layers"])
    cuts = [(units, removal), (layers, Removal(["layers"], torch.tensor([True, True, False])))]
    assert "structure.json has the layers 0, 1, 2 of the source, those kept are 0, 1" in prove_structure(
        folder, source, cuts
    )


def test_files_that_say_something_else_are_seen(tmp_path, tokenizer):
    folder, source, cuts, *_ = saved(tmp_path, tokenizer, "Llama", "free")
    [modeling] = folder.glob("modeling_*.py")
    text = modeling.read_text()
    modeling.write_text(text + "\nprint('hello')\n")
    assert prove_structure(folder, source, cuts) == [
        f"{modeling.name} is not the file that sparsekit writes for this family"
    ]
    modeling.write_text(text)
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"]["0"]["intermediate_size"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    assert prove_structure(folder, source, cuts) == ["config.json does not say what structure.json says"]
    assert prove_structure(source, source) == [f"{source} has no structure.json"]


def test_loading_runs_no_code_of_the_folder(tmp_path, tokenizer):
    folder, _, _, expected, *_ = saved(tmp_path, tokenizer, "Llama", "free")
    [modeling] = folder.glob("modeling_*.py")
    modeling.write_text("raise RuntimeError('was run')")
    same(load_model(folder)[0], expected)


def test_a_structure_json_that_cannot_be_read(tmp_path, tokenizer):
    folder, *_ = saved(tmp_path, tokenizer, "Llama", "free")
    told = json.loads((folder / "structure.json").read_text())
    for change, message in (
        ({"version": 9}, "version 9 is later than 1; update sparsekit"),
        ({"layers": [{"heads": [1, 2]}]}, "does not describe a model: KeyError: 'layer'"),
        ({"config": {**told["config"], "model_type": "nothing"}}, "transformers cannot build a nothing"),
        ({"layers": [{"layer": 0, "heads": [1, 2]}] * 3}, "layer 0 keeps 1 heads, and by heads_kept 2"),
        ({"layers": [{"layer": 0, "heads": [5, 9], "heads_kept": "0x1f"}] * 3}, "keep 5 heads, its config has 2"),
    ):
        (folder / "structure.json").write_text(json.dumps(told | change))
        with pytest.raises(ValueError, match=message):
            load_model(folder)


def test_a_model_that_is_not_what_its_shape_says_is_refused(tokenizer):
    _, model, cuts, _ = made("Llama", "free")
    model.model.layers[1].self_attn.q_proj = torch.nn.Linear(32, 24, bias=False)
    with pytest.raises(ValueError, match=r"is not what its config and widths say: .*q_proj"):
        Shape.of(model, cuts)
    with pytest.raises(ValueError, match="3 layers, and by its cuts 2"):
        units = find_units(model, find_blocks(model), ["layers"])
        before = Shape.of(families.build("Llama"))
        Shape.of(families.build("Llama"), [(units, Removal(["layers"], torch.tensor([1, 0, 1]).bool()))], before)


def test_checkpoints_that_were_not_cut_are_loaded_as_ever(tmp_path, models):
    loaded, tokenizer = load_model(models / "tiny-opt")
    plain = transformers.AutoModelForCausalLM.from_pretrained(models / "tiny-opt")
    assert torch.equal(logits(loaded), logits(plain))
    shape = save_model(loaded, tokenizer, tmp_path / "model", source=models / "tiny-opt")
    assert shape.layout == "plain" and [(layer.heads.kept, layer.heads.of) for layer in shape.layers] == [(4, 4)] * 4
    assert prove_structure(tmp_path / "model", models / "tiny-opt") == []
    assert "trust_remote_code" not in loading_code(tmp_path / "model")
    generation = "generation_config.json"
    assert (tmp_path / "model" / generation).read_text() == (models / "tiny-opt" / generation).read_text()


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_with_layers_like_llama(tmp_path, tokenizer, family):
    """They are stored as their families: all of it is proved for the first ones above."""
    settings = families.GROUPED | {"head_dim": 8}
    folder, source, cuts, expected, shape, _ = saved(tmp_path, tokenizer, family, "parts", settings=settings)
    assert shape.layout == "generated"
    same(load_model(folder)[0], expected)
    same(transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), expected)
    assert prove_structure(folder, source, cuts) == []


def test_every_family_that_can_be_generated_is_tested():
    types = {families.build(name, "meta", SETTINGS[name]).config.model_type for name in GENERATED}
    others = families.GROUPED | {"head_dim": 8}
    types |= {families.build(name, "meta", others).config.model_type for name in OTHERS}
    assert types == set(modeling_file.FAMILIES)


def test_a_modeling_file_that_builds_another_model_is_seen(tmp_path, tokenizer, monkeypatch):
    """Helium's output linear is as wide as the model whatever the heads; it would be in FAMILIES by mistake."""
    monkeypatch.setattr(modeling_file, "FAMILIES", ("helium",))
    settings = families.GROUPED | {"head_dim": 8}
    folder, source, cuts, expected, shape, _ = saved(tmp_path, tokenizer, "Helium", "free", settings=settings)
    assert shape.layout == "generated"
    [failure] = prove_structure(folder, source, cuts)
    assert "modeling_sparsekit_helium.py builds another model" in failure and "o_proj" in failure
    same(load_model(folder)[0], expected)
