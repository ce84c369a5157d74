"""ONNX files, which ONNX Runtime and what is built on it run: a forward pass, without a cache."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparsekit.contracts import Exporter, Finished
from sparsekit.results.exporters.forward import forward_of, installed, logits_apart, why_no_forward

FILE = "model.onnx"
PACKAGES = ("onnx", "onnxscript")


def onnx(*, precision: Literal["f32", "f16"] = "f32") -> Exporter:
    """An ONNX file of a language model's forward pass: input_ids and attention_mask (sequences, length) to logits.

    By torch.export, so that layers of unequal widths are no special case. It has no cache of keys and values: for
    scoring and classifying, not for fast generation. Where the package onnxruntime is installed the file is run: logits
    of three texts side by side, the shorter ones padded, must be the model's; proof.json says what was compared.

    precision: of the weights and of all that is computed

    Source: torch.onnx.export by way of torch.export; the packages onnx and onnxscript write the file.
    """
    return Exporter(
        lambda finished: why_no_forward(finished, PACKAGES),
        lambda finished, target: write_onnx(finished, target, precision),
        lambda finished, target: logits_apart(finished, target, precision, "onnxruntime", _client(target)),
    )


def write_onnx(finished: Finished, target: Path, precision: str) -> None:
    """Write the file into a folder that is made."""
    model, given, free = forward_of(finished, precision)
    target.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is deprecated inside the converter
        program = torch.onnx.export(
            model,
            given,
            dynamo=True,
            dynamic_shapes=free,
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            verbose=False,
        )
        assert program is not None
        program.save(str(target / FILE), external_data=True)  # a file of weights beside it: one file may have 2 GB


def _client(target: Path) -> Callable[[Tensor, Tensor], Tensor] | None:
    return open_onnx(target) if installed("onnxruntime") else None


def open_onnx(target: Path, threads: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """ONNX Runtime with the file: ids and mask (sequences, length) -> logits. threads: 0 leaves it to the runtime"""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(target / FILE), options, providers=["CPUExecutionProvider"])

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        found: Tensor = torch.from_numpy(session.run(None, given)[0])
        return found

    return run
