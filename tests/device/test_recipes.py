"""Whole runs on a device that is not the CPU, as far as one can be had anywhere: nothing is mixed, and the result is
that of the CPU. With float64 and without, as on Apple's devices.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparsekit

pytest.importorskip("pydantic", reason="recipes need pydantic")

TEXT = """\
model: {models}/{model}
calibration: {{source: python-docs, samples: 4, length: 32}}
evaluate: {{perplexity: [{{source: python-docs, windows: 2}}], length: 32}}
output: {output}
trainer: {{accelerator: {accelerator}}}
"""
CLOSE = 1e-3  # relative difference of a tensor: sums in another order, of products in float32
TRAINED = 2e-2  # the same after steps in bfloat16, which an accelerator has and the CPU is not asked for

WALKS = {
    "wanda": "pattern: '2:4'\nstages: [wanda]",
    "sparsegpt 2:4": "pattern: '2:4'\nstages: [sparsegpt]",
    "sparsegpt 50%": "pattern: 50%\nstages: [sparsegpt]",
    "sparsegpt int4": "pattern: '2:4'\nstages: [{sparsegpt: {quantize: {bits: 4}}}]",
    "alps": "pattern: 50%\nstages: [alps]",
    "fista": "pattern: '2:4'\nstages: [wanda, fista]",
    "swaps": "pattern: 50%\nstages: [wanda, swaps]",
    "refit": "pattern: '2:4'\nstages: [wanda, refit]",
    "quantize": "pattern: '2:4'\nstages: [wanda, {quantize: {bits: 4}}]",
    "block": "pattern: 50%\nstages: [fista]\nerror_correction: block",
    "model": "pattern: 50%\nstages: [sparsegpt]\nerror_correction: model",
    "none": "pattern: 50%\nstages: [sparsegpt]\nerror_correction: none",
    "owl": "pattern: 50%\nstages: [wanda]\nallocation: owl",
    "sensitivity": "pattern: 50%\nstages: [sparsegpt]\nallocation: sensitivity",
    "sparsellm": "pattern: 50%\nstages: [sparsellm]",
    "lamp": "pattern: '2:4'\nstages: [{lamp: {epochs: 2}}]",
}
CUTS = {
    "wanda-sp": "stages: [{wanda-sp: {remove: 30%}}]",
    "flap": "stages: [{flap: {remove: 30%}}]",
    "least squares": "stages: [{flap: {remove: 30%, compensate: true}}]",
    "llm-pruner": "stages: [{llm-pruner: {remove: 30%}}]",
    "fisher": "stages: [{fisher: {remove: 30%, rounds: 2}}]",
    "policy_gradient": "stages: [{policy_gradient: {remove: 30%, steps: 3, masks: 2, batch: 2, length: 32}}]",
    "block-influence": "stages: [{block-influence: {remove: 20%}}]",
    "layer-perplexity": "stages: [{layer-perplexity: {remove: 20%}}]",
}
TRAINING = {
    "lora": "pattern: '2:4'\nstages: [wanda, {lora: {steps: 3, batch: 2}}]",
    "finetune": "pattern: '2:4'\nstages: [wanda, {finetune: {steps: 3, batch: 2}}]",
}
EXPERTS = {
    "experts": "pattern: '2:4'\nstages: [sparsegpt]",
    "reap": "stages: [{reap: {remove: 25%}}]",
}


def prune(folder: Path, models: Path, rest: str, accelerator: str, model: str) -> dict[str, torch.Tensor]:
    """The tensors that a recipe ends with, computed on the CPU or the card."""
    file, output = folder / f"{accelerator}.yaml", folder / accelerator
    settings = {"models": models, "model": model, "output": output, "accelerator": accelerator}
    file.write_text(TEXT.format(**settings) + rest)
    sparsekit.fit(file, quiet=True)
    return {name: each for part in (output / "model").glob("*.safetensors") for name, each in load_file(part).items()}


@pytest.fixture
def compare(tmp_path, models, accelerator, counting):
    """A recipe on the CPU and on the accelerator: the same tensors but for rounding."""

    def run(rest: str, close: float = CLOSE, model: str = "tiny-llama", double: bool = True) -> None:
        cpu = prune(tmp_path, models, rest, "cpu", model)
        with counting(double=double) as counts:
            there = prune(tmp_path, models, rest, accelerator, model)
        if counts.launches is not None:
            assert counts.launches["mm"] + counts.launches["addmm"] > 100  # it did compute there
        assert cpu.keys() == there.keys()
        for name, tensor in cpu.items():
            assert (there[name].float() - tensor.float()).norm() <= close * tensor.float().norm(), name

    return run


@pytest.mark.parametrize("name", WALKS)
def test_walks(name, compare):
    compare(WALKS[name])


@pytest.mark.parametrize("name", CUTS)
def test_cuts(name, compare):
    compare(CUTS[name])


@pytest.mark.parametrize("name", TRAINING)
def test_training(name, compare):
    compare(TRAINING[name], TRAINED)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, compare):
    compare(EXPERTS[name], model="tiny-moe")


@pytest.mark.parametrize("name", ["wanda", "sparsegpt 2:4", "refit", "model", "owl", "sparsellm", "lamp"])
def test_walks_without_float64(name, compare):
    compare(WALKS[name], double=False)


@pytest.mark.parametrize("name", ["least squares", "policy_gradient", "llm-pruner"])
def test_cuts_without_float64(name, compare):
    compare(CUTS[name], double=False)


def test_training_without_float64(compare):
    compare(TRAINING["lora"], TRAINED, double=False)


def test_experts_without_float64(compare):
    compare(EXPERTS["reap"], model="tiny-moe", double=False)
