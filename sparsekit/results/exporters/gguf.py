"""GGUF files, which llama.cpp runs, and what is built on it: Ollama, LM Studio."""

import math
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsekit.contracts import Exporter, Finished
from sparsekit.model import Checkpoint
from sparsekit.results.exporters import llamacpp
from sparsekit.results.exporters.layers import BLOCK, Shape
from sparsekit.results.exporters.vocabulary import Vocabulary
from sparsekit.system import write_json

Precision = Literal["source", "f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"]
FILE = "model.gguf"
PROOF = "proof.json"
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q5_0": 8, "bf16": 32}


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
        lambda finished, target: write_gguf(finished.folder, target / FILE, precision),
        lambda finished, target: _differences(finished, target, precision),
    )


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
    return {"BF16": "bf16", "F16": "f16"}.get(stored.dtypes[name], "f32")


def _own_precision(stored: Checkpoint) -> str:
    """Of the first tensor, which stands for all."""
    return _source_precision(stored, next(iter(stored)))


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


def write_gguf(folder: Path, file: Path, precision: str = "source") -> None:
    """Write a checkpoint as a GGUF file; its folder is made. ValueError for what `gguf` refuses."""
    import gguf as package
    import numpy

    shape = Shape.read(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = package.GGUFWriter(file, shape.architecture)
    _describe(writer, shape, folder, precision)
    stored = Checkpoint(folder)
    tensors = list(_tensors(folder, shape, precision))
    for name, called, _, kind in tensors:
        size, dtype = stored.shape(name), numpy.dtype({"f32": "float32", "f16": "float16"}.get(kind, "uint8"))
        if dtype == numpy.uint8:
            size = package.quants.quant_shape_to_byte_shape(size, _type(kind))
        writer.add_tensor_info(called, size, dtype, math.prod(size) * dtype.itemsize, _type(kind))
    more = {called: torch.zeros(size) for called, size in shape.zeros.items()}
    if (factors := shape.factors()) is not None:
        more["rope_freqs.weight"] = factors
    for called, tensor in more.items():
        writer.add_tensor_info(called, tensor.shape, numpy.dtype("float32"), tensor.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, _, get, kind in tensors:  # one in memory at a time
        array = _array(get(), kind)
        writer.write_tensor_data(array if kind in ("f32", "f16") else array.view(numpy.uint8))
    for tensor in more.values():
        writer.write_tensor_data(tensor.numpy())
    writer.close()


def _describe(writer: Any, shape: Shape, folder: Path, precision: str) -> None:
    """Everything but the tensors."""
    import gguf as package

    config, equal = shape.config, shape.architecture != "deci"
    kind = _own_precision(Checkpoint(folder)) if precision == "source" else precision
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
    exact = precision in ("source", "f32", _own_precision(Checkpoint(finished.folder)))
    told, wrong = llamacpp.compare(finished, target / FILE, exact=exact, context=shape.context)
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
