"""GGUF files run in llama.cpp and give what the model gives; bit masks lose nothing; by command and by recipe."""

import importlib.util
import json
import math
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparsekit
from sparsekit import cli
from sparsekit.contracts import Finished
from sparsekit.model import find_blocks, save_model
from sparsekit.model.structure import Removal, Shape, find_units
from sparsekit.results import unpack_bitmask
from sparsekit.results.exporters import llamacpp
from sparsekit.results.exporters.bitmask import bitmask
from sparsekit.results.exporters.gguf import FILE, gguf
from sparsekit.results.exporters.layers import Shape as Counted
from sparsekit.results.exporters.onnx import onnx
from sparsekit.results.exporters.openvino import openvino
from sparsekit.results.exporters.vocabulary import LLAMA3, QWEN2, Vocabulary
from sparsekit.testing import check_exporter

gguf_package = pytest.importorskip("gguf", reason="the package gguf, which writes the files, is not installed")
TINY = Path(__file__).parent / "models" / "tiny-llama"
CLIENT = importlib.util.find_spec("xllamacpp") is not None
client = pytest.mark.skipif(not CLIENT, reason="xllamacpp (llama.cpp) is not installed: make test-clients")
TEXT = {"source": "python-docs", "samples": 4, "length": 32}


def finished(folder: Path) -> Finished:
    return Finished(folder, {}, {}, dict, {})


def written(folder: Path, target: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Export a checkpoint; what its file holds, and the proof."""
    exporter = gguf(**options)
    assert exporter.why_not(finished(folder)) == ""
    exporter.write(finished(folder), target)
    assert exporter.differences(finished(folder), target) == []
    proof = json.loads((target / "proof.json").read_text())
    assert proof["ran"] if CLIENT else "not installed" in proof["said"]
    return gguf_package.GGUFReader(target / FILE), proof


def run(tmp_path: Path, *stages: Any, **more: Any) -> Path:
    settings = {"model": str(TINY), "calibration": TEXT, "stages": list(stages), "output": str(tmp_path / "run")}
    assert sparsekit.fit(settings | more, quiet=True).verified
    return tmp_path / "run"


def family(name: str, folder: Path, **settings: Any) -> Path:
    """A random model of a family, with the tiny tokenizer."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 96, "vocab_size": 768, "max_position_embeddings": 256, "eos_token_id": 0}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes | {"bos_token_id": 0, "pad_token_id": 1} | settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Llama", {"tie_word_embeddings": False, "mlp_bias": False, "attention_bias": True}),
        ("Llama", {"head_dim": 32}),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("Mistral", {"sliding_window": 128}),
        ("Qwen2", {"vocab_size": 800}),  # its class of tokenizers adds tokens
        ("Qwen3", {"head_dim": 32, "vocab_size": 800}),
    ],
)
def test_families_are_what_they_were_in_llama_cpp(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = family(name, tmp_path / "model", **settings)
    reader, proof = written(folder, tmp_path / "gguf")
    assert proof["architecture"] == {"Qwen2": "qwen2", "Qwen3": "qwen3"}.get(name, "llama")
    if CLIENT:
        assert proof["log-probabilities within"] < 0.01
    if name == "Mistral":  # llama.cpp does not slide the window
        assert int(reader.fields["llama.context_length"].contents()) == 128


def test_llama3_divides_frequencies_as_transformers_does(tmp_path: Path) -> None:
    told = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    told |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    folder = family("Llama", tmp_path / "model", rope_parameters=told)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = Counted.read(folder).factors()
    assert factors is not None and len(set(factors.tolist())) > 2
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    "stages",
    [
        [{"flap": {"remove": "30%", "bias": False, "compensate": True}}],
        [{"wanda-sp": {"remove": "30%", "shape": "uniform"}}],
    ],
    ids=["unequal", "uniform"],
)
def test_cut_models_run_with_layers_of_unequal_widths(stages: list[Any], tmp_path: Path) -> None:
    folder = run(tmp_path, *stages) / "model"
    _, proof = written(folder, tmp_path / "gguf")
    assert proof["architecture"] == ("llama" if "uniform" in str(stages) else "deci")
    if CLIENT:
        assert proof["log-probabilities within"] < 0.02


@pytest.mark.parametrize(
    "gone",
    [
        {("attention", 1), ("attention", 2), ("mlp", 2)},
        {("attention", 0), ("mlp", 3)},  # llama.cpp reads the first layer's, and passes over a layer without MLP
        {("attention", 0), ("mlp", 0), ("attention", 3)},
    ],
    ids=["others", "first", "whole layer"],
)
def test_whole_attentions_and_mlps_may_be_gone(gone: set[tuple[str, int]], tmp_path: Path) -> None:
    model, tokenizer = sparsekit.load(TINY)
    blocks = find_blocks(model)
    units = find_units(model, blocks, ["attention", "mlp"])
    kept = torch.tensor([(part.kind, part.block) not in gone for part in units.parts])
    removal = Removal(units.kinds, kept)
    removal.apply(model, blocks)
    folder = tmp_path / "model"
    save_model(model, tokenizer, folder, Shape.of(model, [(units, removal)]))
    _, proof = written(folder, tmp_path / "gguf")
    assert proof["architecture"] == "deci"


@pytest.mark.parametrize("precision", ["f16", "bf16", "q8_0", "q5_0", "q4_0"])
def test_zeros_stay_zeros_in_every_precision(precision: str, tmp_path: Path) -> None:
    folder = run(tmp_path, "wanda", pattern="2:4") / "model"
    reader, _ = written(folder, tmp_path / "gguf", precision=precision)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == precision.upper()
    values = gguf_package.quants.dequantize(
        *(getattr(tensors["blk.0.ffn_up.weight"], k) for k in ("data", "tensor_type"))
    )
    dense = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert (values[dense.numpy() == 0] == 0).all() and (dense == 0).float().mean() == 0.5


def test_queries_and_keys_are_turned_as_llama_cpp_pairs_them(tmp_path: Path) -> None:
    """By what the rotation does: row 2 i of a head is row i there, row 2 i + 1 is row i of its second half."""
    reader, _ = written(TINY, tmp_path / "gguf")
    there = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_k.weight").data
    own = load_file(TINY / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"].numpy().reshape(2, 16, -1)
    for head in range(2):
        for row in range(16):
            assert numpy.array_equal(there.reshape(2, 16, -1)[head, row], own[head, row // 2 + 8 * (row % 2)])


@client
def test_what_is_not_the_model_is_seen(tmp_path: Path) -> None:
    """A file of another model, and one with a tensor that was changed."""
    other = family("Llama", tmp_path / "other", tie_word_embeddings=True, num_hidden_layers=4, intermediate_size=160)
    exporter = gguf()
    exporter.write(finished(other), tmp_path / "gguf")
    wrong = exporter.differences(finished(TINY), tmp_path / "gguf")
    assert any("has other values in the file" in each for each in wrong)
    _, wrong = llamacpp.compare(finished(TINY), tmp_path / "gguf" / FILE, exact=True)
    assert any("other tokens than the model" in each or "log-probabilities" in each for each in wrong)
    (tmp_path / "gguf" / FILE).write_bytes(b"GGUF nothing")
    _, wrong = llamacpp.compare(finished(TINY), tmp_path / "gguf" / FILE, exact=True)
    assert "llama.cpp does not run it" in wrong[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bloom"}, "models of type bloom are not written as GGUF; llama, mistral, qwen2, qwen3 are"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "scaled by yarn"),
        ({"hidden_act": "gelu"}, "llama.cpp runs this family with silu"),
    ],
)
def test_what_llama_cpp_would_not_run_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = family("Llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    assert said in gguf().why_not(finished(folder))


def test_tokenizers_by_what_they_do(tmp_path: Path) -> None:
    folder = family("Llama", tmp_path / "model")
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    assert Vocabulary.read(folder, 768).pre == "gpt-2"
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    for name, regex in (("llama-bpe", LLAMA3), ("qwen2", QWEN2)):
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        file.write_text(json.dumps(told | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}}))
        assert Vocabulary.read(folder, 768).pre == name
    file.write_text(json.dumps(told | {"pre_tokenizer": {"type": "Whitespace"}}))
    assert "the exporter knows no name of llama.cpp for" in gguf().why_not(finished(folder))
    file.write_text(json.dumps(told | {"model": told["model"] | {"byte_fallback": True}}))
    assert "BPE with byte fallback" in gguf().why_not(finished(folder))


# ---- onnx

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not ONNX, reason="onnx, onnxscript or onnxruntime is not installed: make test-clients")


@needs_onnx
@pytest.mark.parametrize(
    ("stages", "precision"),
    [
        ([{"flap": {"remove": "30%", "bias": False, "compensate": True}}], "f32"),
        ([{"layer-perplexity": {"remove": "30%", "units": "parts"}}], "f32"),
        ([{"wanda-sp": {"remove": "30%", "shape": "uniform"}}], "f16"),
    ],
    ids=["unequal", "parts", "uniform"],
)
def test_onnx_runtime_gives_the_logits_of_the_model(stages: list[Any], precision: Any, tmp_path: Path) -> None:
    folder = finished(run(tmp_path, *stages) / "model")
    exporter = onnx(precision=precision)
    assert exporter.why_not(folder) == ""
    exporter.write(folder, tmp_path / "onnx")
    assert exporter.differences(folder, tmp_path / "onnx") == []
    assert json.loads((tmp_path / "onnx" / "proof.json").read_text())["client"].startswith("onnxruntime")
    other = finished(TINY)
    [said] = exporter.differences(other, tmp_path / "onnx")  # the file of another model
    assert "logits in onnxruntime" in said


@pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="openvino is not installed: make test-clients")
@pytest.mark.parametrize(
    ("stages", "precision"),
    [
        ([{"flap": {"remove": "30%", "bias": False, "compensate": True}}], "f32"),
        ([{"layer-perplexity": {"remove": "30%", "units": "parts"}}], "f16"),
    ],
    ids=["unequal", "parts"],
)
def test_openvino_gives_the_logits_of_the_model(stages: list[Any], precision: Any, tmp_path: Path) -> None:
    folder = finished(run(tmp_path, *stages) / "model")
    exporter = openvino(precision=precision)
    assert exporter.why_not(folder) == ""
    exporter.write(folder, tmp_path / "openvino")
    assert exporter.differences(folder, tmp_path / "openvino") == []
    assert json.loads((tmp_path / "openvino" / "proof.json").read_text())["client"].startswith("openvino")
    [said] = exporter.differences(finished(TINY), tmp_path / "openvino")  # the file of another model
    assert "logits in openvino" in said


def test_what_writes_onnx_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("sparsekit.results.exporters.forward.version", absent)
    assert "pip install onnx onnxscript" in onnx().why_not(finished(TINY))
    assert "pip install openvino" in openvino().why_not(finished(TINY))


@needs_onnx
def test_a_vision_model_has_no_token_ids() -> None:
    assert "no causal language model" in onnx().why_not(finished(TINY.parent / "tiny-vit"))


# ---- bit masks


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.57), ("70%", 0.38)])
@pytest.mark.parametrize("sharded", [False, True])
def test_bit_masks_are_smaller_and_lose_nothing(pattern: str, share: float, sharded: bool, tmp_path: Path) -> None:
    folder = run(tmp_path, "wanda", pattern=pattern, model={"path": str(TINY), "dtype": "bfloat16"}) / "model"
    if sharded:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path / "shards", max_shard_size="100kB")
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "shards")
        folder = tmp_path / "shards"
    exporter = bitmask()
    assert exporter.why_not(finished(folder)) == ""
    exporter.write(finished(folder), tmp_path / "packed")
    assert exporter.differences(finished(folder), tmp_path / "packed") == []
    sizes = {}
    for file in (tmp_path / "packed").glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            sizes |= {name: handle.get_tensor(name).nbytes for name in handle.keys()}  # noqa: SIM118
    linears = {name.rsplit(".", 1)[0] for name in sizes if name.endswith(".bits")}
    plain = sum(math.prod(load.shape) * 2 for name, load in _tensors(folder).items() if name in linears)
    assert len(linears) == 28
    assert sum(size for name, size in sizes.items() if name.rsplit(".", 1)[0] in linears) <= share * plain
    unpack_bitmask(tmp_path / "packed", tmp_path / "plain")
    for name, tensor in _tensors(folder).items():
        assert torch.equal(_tensors(tmp_path / "plain")[name].view(torch.int16), tensor.view(torch.int16)), name
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(each) for each in (folder, tmp_path / "plain"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_the_documented_reader_reads_it(tmp_path: Path) -> None:
    """That of the module's docstring, word for word; a zero with a sign is no zero."""
    weight = torch.randn(8, 16)
    weight[:, ::2] = 0.0
    weight[0, 0] = -0.0
    (tmp_path / "model").mkdir()
    save_file({"a.weight": weight}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "model" / "config.json").write_text("{}")
    folder = finished(tmp_path / "model")
    (big := torch.zeros(64, 64))[0, 0] = 1
    save_file({"a.weight": torch.cat([weight] * 16), "b.weight": big}, folder.folder / "model.safetensors")
    bitmask().write(folder, tmp_path / "packed")
    with safe_open(tmp_path / "packed" / "model.safetensors", framework="np") as file:
        values, bits = (file.get_tensor(f"a.weight.{part}") for part in ("values", "bits"))
        shape = file.get_tensor("a.weight.shape")
    kept = numpy.unpackbits(bits, count=shape.prod()).astype(bool)
    read = numpy.zeros(shape.prod(), values.dtype)
    read[kept] = values
    read = read.reshape(shape)
    assert numpy.array_equal(read.view(numpy.int32), torch.cat([weight] * 16).numpy().view(numpy.int32))


def test_contract() -> None:
    check_exporter(bitmask)


# ---- by command and by recipe


def test_a_finished_run_is_exported_and_proved_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, "wanda", pattern="2:4")
    assert cli.main(["export", str(folder), "--to", "gguf", "--set", "precision=q8_0"]) == 0
    assert cli.main(["export", str(folder), "--to", "bitmask"]) == 0
    said = capsys.readouterr().out
    assert "model-gguf" in said and ("in xllamacpp" in said if CLIENT else "not run in llama.cpp" in said)
    report = json.loads((folder / "report.json").read_text())
    assert report["exports"]["bitmask"]["bytes"] < 0.7 * report["exports"]["bitmask"]["model_bytes"]
    assert report["exports"]["gguf"]["proof"]["precision"] == "q8_0"
    assert cli.main(["verify", str(folder)]) == 0  # the manifest knows what was added
    assert cli.main(["unpack", str(folder / "model-bitmask"), str(tmp_path / "plain")]) == 0
    assert cli.main(["unpack", str(folder / "model-bitmask"), str(tmp_path / "plain")]) == 2
    assert "there is something at" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path / "plain"), "--pattern", "2:4"]) == 0


def test_a_recipe_exports(tmp_path: Path) -> None:
    folder = run(tmp_path, "wanda", pattern="50%", export=["bitmask", {"gguf": {"precision": "f16"}}])
    assert (folder / "model-bitmask").is_dir() and (folder / "model-gguf" / FILE).is_file()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["--to", "ggfu"], "did you mean `gguf`"),
        (["--to", "gguf", "--set", "precision=q3"], 'option `precision` is "q3", must be'),
        (["--to", "gguf", "--set", "precison=q8_0"], "unknown option `precison`, did you mean `precision`"),
        (["--to", "gguf", "--set", "q8_0"], "must be option=value"),
        (["--to", "packed"], "no stage left weights on a quantization grid"),
    ],
)
def test_mistakes(command: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, "magnitude", pattern="50%")
    assert cli.main(["export", str(folder), *command]) == 2
    told = capsys.readouterr()
    assert said in " ".join((told.out + told.err).split())


def test_what_is_no_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(TINY), "--to", "gguf"]) == 2
    assert "only a finished run has a report" in capsys.readouterr().err
