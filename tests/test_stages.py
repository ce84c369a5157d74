"""Recipes of several stages and stages with a loop of their own, through the command line on the tiny real models."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_run import KILLER, TINY, bits, fit, process, recipe
from transformers import AutoModelForCausalLM

OPT = TINY.parent / "tiny-opt"
SHORT = ("calibration.samples=12", "calibration.length=64", "evaluate.perplexity.0.windows=12")
LAMP = "stages=[{lamp: {solver: sparsegpt, epochs: 2}}]"


def run(folder: Path, *settings: str, model: Path = TINY, name: str = "run") -> dict:
    """The report of a finished run, which must be as asked."""
    done = fit(recipe(folder, name, model), "--set", *SHORT, *settings)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((folder / name / "report.json").read_text())
    assert report["verified"] is True
    return report


def perplexity(report: dict) -> float:
    return report["evaluation"]["pruned"]["perplexity"]["python-docs"]


@pytest.mark.parametrize("model", [TINY, OPT], ids=["llama", "opt"])
def test_stages_beat_their_solver_at_high_sparsity(model, tmp_path):
    found = {
        name: perplexity(run(tmp_path, "pattern=70%", f"stages=[{stage}]", model=model, name=name))
        for name, stage in {
            "alone": "sparsegpt",
            "lamp": "{lamp: {epochs: 3}}",
            "sparsellm": "{sparsellm: {epochs: 2}}",
        }.items()
    }
    assert found["lamp"] < found["sparsellm"] < found["alone"], found


def test_a_run_says_what_else_it_trained(tmp_path):
    report = run(tmp_path, LAMP, model=OPT)
    assert set(report["blocks"]["model.decoder.layers.1"]["lamp"]) == {"before", "after"}
    source, result = load_file(OPT / "model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    changed = {name for name in result if not torch.equal(result[name], source[name])}
    assert any("layer_norm" in name for name in changed)
    assert not any("embed" in name or name == "final_layer_norm.weight" for name in changed)


def test_a_killed_lamp_goes_on_with_the_same_bits(tmp_path):
    run(tmp_path, LAMP, name="whole")
    file = recipe(tmp_path)
    how = "kill(walk.OneShot, 'on_train_batch_start', after=3)"
    file.write_text(
        file.read_text().replace("stages: [sparsegpt]", LAMP.replace("=", ": ")).replace("samples: 8", "samples: 12")
    )
    killed = process(KILLER.replace("{how}", how), file)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(list((tmp_path / "run" / "blocks").glob("0*.safetensors"))) == 2
    resumed = fit(file, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


def test_solvers_after_a_stage_start_from_what_it_leaves(tmp_path):
    before = run(tmp_path, LAMP, name="before")
    report = run(tmp_path, LAMP[:-1] + ", {quantize: {bits: 4, group: 32}}]", name="after")
    assert perplexity(before) < perplexity(report) < 1.5 * perplexity(before)
    one = load_file(tmp_path / "before" / "model" / "model.safetensors")
    two = load_file(tmp_path / "after" / "model" / "model.safetensors")
    for name in report["sparsity"]["per_linear"]:
        assert not two[f"{name}.weight"][one[f"{name}.weight"] == 0].any()  # the zeros are kept


def test_lamp_can_end_each_block_on_a_grid(tmp_path):
    quantize = "quantize: {bits: 4, group: 32}"
    joint = run(tmp_path, f"stages=[{{lamp: {{epochs: 2, {quantize}}}}}]", name="joint")
    alone = run(tmp_path, f"stages=[{{sparsegpt: {{{quantize}}}}}]", name="alone")
    assert "bytes" in joint["exports"]["packed"] and perplexity(joint) < perplexity(alone)
    done = fit(recipe(tmp_path, "not"), "--set", f"stages=[{{lamp: {{solver: {{sparsegpt: {{{quantize}}}}}}}}}]")
    assert done.returncode == 2 and "give `quantize` to lamp" in done.stderr


def test_a_quantized_run_is_packed_and_proved(tmp_path):
    report = run(tmp_path, "stages=[sparsegpt, {quantize: {bits: 4, group: 32}}]")
    assert report["exports"]["packed"]["bytes"] < 0.6 * report["exports"]["packed"]["model_bytes"]
    pytest.importorskip("compressed_tensors", reason="loading a packed checkpoint needs compressed-tensors")
    tokens = torch.arange(3, 40).unsqueeze(0)
    simulated, packed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / folder, dtype=torch.float32)(tokens).logits
        for folder in ("model", "model-packed")
    )
    assert torch.equal(simulated, packed)


def test_what_cannot_be_packed_stays_simulated_and_is_said(tmp_path):
    report = run(tmp_path, "stages=[{sparsegpt: {quantize: {bits: 3, group: 32}}}]")
    assert "simulated only" in report["exports"]["packed"]["why_not"]
    assert not (tmp_path / "run" / "model-packed").exists()


def test_half_of_the_blocks_may_stay_dense(tmp_path):
    report = run(tmp_path, "pattern=70%", "stages=[{sparsellm: {epochs: 1, first_half_only: true}}]")
    patterns = {name: entry["pattern"] for name, entry in report["sparsity"]["per_linear"].items()}
    assert {p for n, p in patterns.items() if ".layers.0." in n or ".layers.1." in n} == {"70%"}
    assert {p for n, p in patterns.items() if ".layers.2." in n or ".layers.3." in n} == {"0%"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stages=[{lamp: {solver: sparsgpt}}]", "did you mean `sparsegpt`"),
        ("stages=[{lamp: {solver: [sparsegpt, wanda]}}]", "cannot start from the answer of `sparsegpt`"),
        ("stages=[{lamp: {solver: {sparsegpt: {dampning: 1}}}}]", "damping"),
        ("stages=[{lamp: {solver: refit}}]", "improves the answer of an earlier stage"),
        ("stages=[wanda, lamp]", "prunes the dense model"),
        ("stages=[lamp, sparsegpt]", "cannot start from the answer of `lamp`"),
        ("stages=[sparsegpt, {quantize: {bits: 4, group: 48}}]", "groups of 48 do not divide"),
    ],
)
def test_mistakes_are_said_before_anything_runs(setting, said, tmp_path):
    done = fit(recipe(tmp_path), "--set", setting)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("epochs: -1", "option `epochs` is -1, must be at least 0"),
        ("held_out: 1.5", "option `held_out` is 1.5, must be at least 0 and below 1"),
    ],
)
def test_options_out_of_range_are_said_before_a_block_is_pruned(option, said, tmp_path):
    done = fit(recipe(tmp_path), "--set", f"stages=[{{lamp: {{{option}}}}}]", "evaluate={}")
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not list((tmp_path / "run").glob("blocks/0*"))


def test_a_stage_runs_in_one_process(tmp_path):
    done = fit(recipe(tmp_path), "--set", "stages=[maskllm]", "trainer.devices=2")
    assert done.returncode == 2 and "runs in one process" in done.stderr


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (
            "[{sparsegpt: {quantize: {bits: 4, group: 32}}}, lora]",
            "`lora`, moves weights off the grid that `sparsegpt` put them on",
        ),
        ("[wanda, {lora: {merge: false}}, quantize]", "`lora`, has merge: false, but later stages"),
    ],
)
def test_stages_that_would_undo_others_are_refused(stages, said, tmp_path):
    from sparsekit.recipe import RecipeError, load_recipe
    from sparsekit.run import make_plan

    file = tmp_path / "x.yaml"
    file.write_text(
        f"model: tests/models/tiny-llama\npattern: 50%\nstages: {stages}\n"
        "calibration: {source: python-docs, samples: 2, length: 16}\n"
    )
    with pytest.raises(RecipeError, match=said):
        make_plan(load_recipe(file))
