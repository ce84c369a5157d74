"""OpenVINO's files, for Intel's processors: a forward pass, without a cache."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparsekit.contracts import Exporter, Finished
from sparsekit.results.exporters.forward import forward_of, logits_apart, why_no_forward

FILE = "openvino_model.xml"


def openvino(*, precision: Literal["f32", "f16"] = "f32") -> Exporter:
    """OpenVINO's form of a language model's forward pass: input_ids and attention_mask (sequences, length) to logits.

    By torch.export, so that layers of unequal widths are no special case. It has no cache of keys and values: for
    scoring and classifying, not for fast generation. The file is run: logits of three texts side by side, the shorter
    ones padded, must be the model's; proof.json says what was compared.

    precision: of the weights in the file; OpenVINO computes in what the processor is best at, unless it is told

    Source: openvino.convert_model of what torch.export gives; the package openvino writes and runs the file.
    """
    return Exporter(
        lambda finished: why_no_forward(finished, ["openvino"]),
        lambda finished, target: write_openvino(finished, target, precision),
        lambda finished, target: logits_apart(finished, target, precision, "openvino", open_openvino(target, 0, "f32")),
    )


def write_openvino(finished: Finished, target: Path, precision: str) -> None:
    """Write the files into a folder that is made."""
    import openvino as vendor

    model, given, free = forward_of(finished, "f32")  # the file's precision is made where it is written
    target.mkdir(parents=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of what is deprecated inside the converter
        program = torch.export.export(model, given, dynamic_shapes=free)
        made = vendor.convert_model(program)
    for place, name in zip(made.inputs, ("input_ids", "attention_mask"), strict=True):
        place.get_tensor().set_names({name})
    made.outputs[0].get_tensor().set_names({"logits"})
    vendor.save_model(made, target / FILE, compress_to_fp16=precision == "f16")


def open_openvino(target: Path, threads: int = 0, hint: str = "") -> Callable[[Tensor, Tensor], Tensor]:
    """OpenVINO with the file: ids and mask (sequences, length) -> logits.

    threads: 0 leaves it to the runtime. hint: what it computes in; empty: bfloat16 where the processor has it
    """
    import openvino as vendor

    told = {"INFERENCE_PRECISION_HINT": hint} if hint else {}
    told |= {"INFERENCE_NUM_THREADS": str(threads)} if threads else {}
    compiled = vendor.Core().compile_model(str(target / FILE), "CPU", told)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = torch.from_numpy(compiled({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["logits"])
        return found

    return run
