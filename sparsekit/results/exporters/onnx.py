"""ONNX files, which ONNX Runtime and what is built on it run: a forward pass, without a cache."""

import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsekit.contracts import Exporter, Finished
from sparsekit.results.exporters.llamacpp import TEXTS
from sparsekit.system import write_json

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript")
LIMITS = {"f32": 1e-3, "f16": 0.1}  # how far logits may be from the model's, relative to their root mean square


def onnx(*, precision: Literal["f32", "f16"] = "f32") -> Exporter:
    """An ONNX file of a language model's forward pass: input_ids and attention_mask (sequences, length) to logits.

    By torch.export, so that layers of unequal widths are no special case. It has no cache of keys and values: for
    scoring and classifying, not for fast generation. Where the package onnxruntime is installed the file is run: logits
    of three texts side by side, the shorter ones padded, must be the model's; proof.json says what was compared.

    precision: of the weights and of all that is computed

    Source: torch.onnx.export by way of torch.export; the packages onnx and onnxscript write the file.
    """
    return Exporter(
        _why_not,
        lambda finished, target: _write(finished, target, precision),
        lambda finished, target: _differences(finished, target, precision),
    )


class _Forward(nn.Module):
    """Token ids and mask to logits, and nothing else."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (sequences, length, vocabulary)."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def _why_not(finished: Finished) -> str:
    for package in PACKAGES:
        try:
            version(package)
        except PackageNotFoundError:
            return f"the package {package}, which writes the file, is not installed: pip install {' '.join(PACKAGES)}"
    from sparsekit.model import auto_class

    if getattr(auto_class(finished.folder), "__name__", "") != "AutoModelForCausalLM":
        return "it is no causal language model, and the file has token ids for its input"
    return ""


def _opened(finished: Finished, precision: str) -> tuple[Any, Any]:
    from sparsekit.model import load

    model, tokenizer = load(finished.folder, dtype={"f32": "float32", "f16": "float16"}[precision])
    return model, tokenizer


def _write(finished: Finished, target: Path, precision: str) -> None:
    model, _ = _opened(finished, precision)
    target.mkdir(parents=True)
    ids = torch.arange(2, 26).reshape(2, 12) % model.config.get_text_config().vocab_size
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is deprecated inside the converter
        program = torch.onnx.export(
            _Forward(model).eval(),
            (ids, torch.ones_like(ids)),
            dynamo=True,
            dynamic_shapes=(free, free),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            verbose=False,
        )
        assert program is not None
        program.save(str(target / FILE), external_data=True)  # a file of weights beside it: one file may have 2 GB


def _differences(finished: Finished, target: Path, precision: str) -> list[str]:
    try:
        client = f"onnxruntime {version('onnxruntime')}"
    except PackageNotFoundError:
        said = "not run in ONNX Runtime: onnxruntime is not installed"
        write_json(target / "proof.json", {"precision": precision, "client": None, "said": said})
        return []
    import onnxruntime

    model, tokenizer = _opened(finished, precision)
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    session = onnxruntime.InferenceSession(str(target / FILE), providers=["CPUExecutionProvider"])
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    found = torch.from_numpy(session.run(None, given)[0]).float()
    there = mask.bool()
    apart = float((found - expected)[there].abs().max() / expected[there].square().mean().sqrt())
    proof = {"precision": precision, "client": client, "texts": len(texts), "logits within": round(apart, 6)}
    write_json(target / "proof.json", proof | {"said": f"in {client} logits within {apart:.1e} of their size"})
    if not apart <= LIMITS[precision]:
        return [f"logits in ONNX Runtime are {apart:.2g} of their size from the model's, beyond {LIMITS[precision]}"]
    return []
