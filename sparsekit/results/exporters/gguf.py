"""GGUF files, which llama.cpp runs, and what is built on it: Ollama, LM Studio."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsekit.contracts import Exporter, Finished
from sparsekit.model import Checkpoint
from sparsekit.results.exporters import llamacpp
from sparsekit.results.exporters.vocabulary import Vocabulary
from sparsekit.system import write_json

Precision = Literal["source", "f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"]
FILE = "model.gguf"
PROOF = "proof.json"
# a config's model_type -> the architecture in llama.cpp, and whether its rotary halves are interleaved there
FAMILIES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q5_0": 8, "bf16": 32}
BLOCK = 32  # weights of a quantized type that share a scale; a row must be made of whole ones
OURS = "sparsekit_"  # before the family's name in the config of a model whose layers differ in width


def gguf(*, precision: Precision = "source") -> Exporter:
    """A GGUF file, as llama.cpp, Ollama and LM Studio run it; layers of unequal widths too, as the architecture deci.

    For LLaMA, Mistral, Qwen 2 and Qwen 3 and what is built like them, with byte-level BPE. Zeros stay zeros in every
    precision. Where the package xllamacpp is installed the file is run in llama.cpp: tokens of real text, their
    log-probabilities and what the model goes on with must be those of the model; proof.json says what was compared.

    precision: of the weights: source, as they are; f32, f16, bf16; or q8_0, q5_0, q4_0, a scale for 32 weights, of
        which linears with other widths stay f16. Norms and biases are f32

    Source: the GGUF format and llama.cpp's converter, github.com/ggml-org/llama.cpp; the package gguf writes the file.
    """
    return Exporter(
        lambda finished: _why_not(finished),
        lambda finished, target: _write(finished.folder, target, precision),
        lambda finished, target: _differences(finished, target, precision),
    )


@dataclass(frozen=True)
class Shape:
    """A model as llama.cpp counts it; numbers by layer. permuted: whether its rotary halves are interleaved there."""

    architecture: str
    permuted: bool
    heads: list[int]
    key_heads: list[int]
    widths: list[int]
    head: int
    config: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        """Of a checkpoint. ValueError, a sentence, for what llama.cpp is not known to run."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = str(config.get("model_type"))
        family = kind.removeprefix(OURS)
        if family not in FAMILIES:
            raise ValueError(f"models of type {kind} are not written as GGUF; {', '.join(FAMILIES)} are")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"llama.cpp runs this family with silu, and the config has {config['hidden_act']}")
        architecture, permuted = FAMILIES[family]
        count = config["num_hidden_layers"]
        layers = config.get("per_layer_config") or {}

        def by_layer(key: str) -> list[int]:
            return [int((layers.get(str(index)) or {}).get(key, config[key])) for index in range(count)]

        heads, key_heads, widths = map(by_layer, ("num_attention_heads", "num_key_value_heads", "intermediate_size"))
        if len({*zip(heads, key_heads, widths, strict=True)}) > 1:
            if architecture != "llama":
                raise ValueError(
                    f"llama.cpp has layers of unequal widths for LLaMA alone (as deci), not for {family}: cut with "
                    "`shape: uniform`"
                )
            if not heads[0]:
                raise ValueError(
                    "the first layer has no attention left, from which llama.cpp reads the size of a head: let it keep one"
                )
            architecture = "deci"
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        found = cls(architecture, permuted, heads, key_heads, widths, int(head), config)
        found.rope()
        if config.get("use_sliding_window") or (config.get("sliding_window") and family not in ("mistral", "qwen2")):
            raise ValueError("llama.cpp would not slide the window of its attention, so longer texts would differ")
        return found

    @property
    def context(self) -> int:
        """Tokens that it may be given; no more than the window of its attention, which llama.cpp does not slide."""
        positions = int(self.config["max_position_embeddings"])
        window = self.config.get("sliding_window")
        if window is None or not self.config.get("use_sliding_window", True):
            return positions
        return min(positions, int(window))

    def rope(self) -> tuple[float, dict[str, Any]]:
        """The base of the rotary embedding, and the scaling of its frequencies."""
        told = dict(self.config.get("rope_parameters") or self.config.get("rope_scaling") or {})
        base = told.pop("rope_theta", None) or self.config.get("rope_theta") or 10000.0
        kind = told.get("rope_type", told.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise ValueError(f"the rotary embedding is scaled by {kind}, which the exporter does not write")
        return float(base), told | {"rope_type": kind}

    def factors(self) -> Tensor | None:
        """What llama3 divides each frequency by (head / 2,); None without that scaling (Llama 3.1's own formula)."""
        base, told = self.rope()
        if told["rope_type"] != "llama3":
            return None
        frequency = 1.0 / base ** (torch.arange(0, self.head, 2, dtype=torch.float64) / self.head)
        length = 2 * math.pi / frequency
        low, high = (
            told["original_max_position_embeddings"] / told[key] for key in ("low_freq_factor", "high_freq_factor")
        )
        share = (told["original_max_position_embeddings"] / length - told["low_freq_factor"]) / (
            told["high_freq_factor"] - told["low_freq_factor"]
        )
        between = 1 / ((1 - share) / told["factor"] + share)
        found = between.where(length <= low, torch.as_tensor(float(told["factor"]), dtype=torch.float64))
        return found.where(length >= high, torch.ones((), dtype=torch.float64)).float()


def _why_not(finished: Finished) -> str:
    try:
        version("gguf")
        shape = Shape.read(finished.folder)
        Vocabulary.read(finished.folder, int(shape.config["vocab_size"]))
        named = set(_names(Checkpoint(finished.folder), shape).values())
    except PackageNotFoundError:
        return "the package gguf, which writes the file, is not installed: pip install gguf"
    except ValueError as error:
        return str(error)
    return "" if named else "it holds no tensors"


def _names(stored: Checkpoint, shape: Shape) -> dict[str, str]:
    """A tensor's name on disk -> in the file. ValueError for one that llama.cpp has no place for."""
    import gguf as package

    architecture = getattr(package.MODEL_ARCH, shape.architecture.upper())
    known = package.get_tensor_name_map(architecture, len(shape.heads))
    found = {}
    for name in stored:
        called = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is not None and _gone(called, shape):
            continue
        if called is None:
            raise ValueError(f"llama.cpp has no place for {name} in the architecture {shape.architecture}")
        found[name] = called
    return found


def _gone(called: str, shape: Shape) -> bool:
    """Whether a tensor is the norm before an attention or MLP that was removed: llama.cpp has no place for it."""
    part = called.split(".")
    if part[0] != "blk":
        return False
    norms = {"attn_norm": shape.heads, "ffn_norm": shape.widths}
    return part[2] in norms and norms[part[2]][int(part[1])] == 0


def _tensors(folder: Path, shape: Shape, precision: str) -> Iterator[tuple[str, str, Callable[[], Tensor], str]]:
    """Name on disk, name in the file, how to get it as it stands there, its precision."""
    stored = Checkpoint(folder)
    for name, called in _names(stored, shape).items():
        size = stored.shape(name)
        kind = _source_precision(stored, name) if precision == "source" else precision
        if len(size) == 1:
            kind = "f32"
        elif kind.startswith("q") and size[-1] % BLOCK:
            kind = "f16"

        def get(name: str = name) -> Tensor:
            return shape_of_rotary(stored.tensor(name), name, shape)

        yield name, called, get, kind


def _source_precision(stored: Checkpoint, name: str) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(stored.tensor(name).dtype, "f32")


def shape_of_rotary(tensor: Tensor, name: str, shape: Shape) -> Tensor:
    """Queries and keys as llama.cpp has them: the two halves of each head's rotary pairs side by side."""
    if not shape.permuted or not name.endswith((".q_proj.weight", ".k_proj.weight", ".q_proj.bias", ".k_proj.bias")):
        return tensor
    layer = int(name.split(".layers.")[1].split(".")[0])
    heads = (shape.heads if ".q_proj." in name else shape.key_heads)[layer]
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest).transpose(1, 2).reshape(tensor.shape)


def _array(tensor: Tensor, kind: str) -> Any:
    """A tensor as numpy has it in the file."""
    import gguf as package
    import numpy

    if kind in ("f32", "f16"):
        return tensor.to(torch.float32 if kind == "f32" else torch.float16).contiguous().numpy()
    values = tensor.float().contiguous().numpy()
    return numpy.ascontiguousarray(package.quants.quantize(values, _type(kind)))


def _type(kind: str) -> Any:
    import gguf as package

    return getattr(package.GGMLQuantizationType, kind.upper())


def _write(folder: Path, target: Path, precision: str) -> None:
    import gguf as package
    import numpy

    shape = Shape.read(folder)
    target.mkdir(parents=True)
    writer = package.GGUFWriter(target / FILE, shape.architecture)
    _describe(writer, shape, folder, precision)
    stored = Checkpoint(folder)
    tensors = list(_tensors(folder, shape, precision))
    for name, called, _, kind in tensors:
        size, dtype = stored.shape(name), numpy.dtype({"f32": "float32", "f16": "float16"}.get(kind, "uint8"))
        if dtype == numpy.uint8:
            size = package.quants.quant_shape_to_byte_shape(size, _type(kind))
        writer.add_tensor_info(called, size, dtype, math.prod(size) * dtype.itemsize, _type(kind))
    factors = shape.factors()
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, numpy.dtype("float32"), 4 * len(factors))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, get, kind in tensors:  # one in memory at a time
        array = _array(get(), kind)
        writer.write_tensor_data(array if kind in ("f32", "f16") else array.view(numpy.uint8))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()


def _describe(writer: Any, shape: Shape, folder: Path, precision: str) -> None:
    """Everything but the tensors."""
    import gguf as package

    config, equal = shape.config, shape.architecture != "deci"
    kind = _source_precision(Checkpoint(folder), next(iter(Checkpoint(folder)))) if precision == "source" else precision
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_block_count(len(shape.heads))
    writer.add_context_length(shape.context)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(shape.widths[0] if equal else shape.widths)
    writer.add_head_count(shape.heads[0] if equal else shape.heads)
    writer.add_head_count_kv(shape.key_heads[0] if equal else shape.key_heads)
    writer.add_key_length(shape.head)
    writer.add_value_length(shape.head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    base, rope = shape.rope()
    writer.add_rope_dimension_count(shape.head)
    writer.add_rope_freq_base(base)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(package.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    words = Vocabulary.read(folder, int(config["vocab_size"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    writer.add_token_merges(words.merges)
    writer.add_add_bos_token(words.begins)
    for value, add in (
        (words.bos, writer.add_bos_token_id),
        (words.eos, writer.add_eos_token_id),
        (words.pad, writer.add_pad_token_id),
        (words.template, writer.add_chat_template),
    ):
        if value is not None:
            add(value)


def _differences(finished: Finished, target: Path, precision: str) -> list[str]:
    """What the file holds other than the model; and what llama.cpp makes of it, where it is installed."""
    shape = Shape.read(finished.folder)
    found = _read_back(finished.folder, target / FILE, shape, precision)
    kept = [called for _, called, _, kind in _tensors(finished.folder, shape, precision) if kind == "f16"]
    proof: dict[str, Any] = {"architecture": shape.architecture, "precision": precision}
    if precision.startswith("q") and kept:
        proof["stays f16, its rows are no multiple of 32"] = kept
    exact = precision in ("source", "f32") or precision == _source_precision(
        Checkpoint(finished.folder), next(iter(Checkpoint(finished.folder)))
    )
    told, wrong = llamacpp.compare(finished, target / FILE, exact=exact)
    write_json(target / PROOF, proof | told)
    return found + wrong


def _read_back(folder: Path, file: Path, shape: Shape, precision: str) -> list[str]:
    """Where a tensor of the file is not the model's: rounded where the precision rounds, and zero where it is zero."""
    import gguf as package

    there = {tensor.name: tensor for tensor in package.GGUFReader(file).tensors}
    found = []
    for name, called, get, kind in _tensors(folder, shape, precision):
        if called not in there:
            found.append(f"{name} is not in the file")
            continue
        values = torch.from_numpy(package.quants.dequantize(there[called].data, there[called].tensor_type).copy())
        mine = get()
        rounded = torch.from_numpy(_array(mine, kind)) if kind in ("f32", "f16") else None
        if kind == "bf16":
            rounded = mine.to(torch.bfloat16)
        if values.shape != mine.shape:
            found.append(f"{name} has the shape {tuple(values.shape)} in the file")
        elif rounded is not None and not torch.equal(values.float(), rounded.float()):
            found.append(f"{name} has other values in the file")
        elif rounded is None and bool(values[mine == 0].count_nonzero()):
            found.append(f"{name} has weights in the file where the model has zeros")
    return found
