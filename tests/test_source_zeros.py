"""Recovery of a checkpoint that is sparse already: its zeros stay, or it is said that they do not."""

import json
from pathlib import Path

import pytest
import torch
from test_run import TINY, fit

from sparsekit.maths import NM, parse
from sparsekit.model import Checkpoint, discover, load
from sparsekit.run.allocation import sample_input
from sparsekit.run.zeros import SourceZeros

RECIPE = """\
model: {model}
calibration: {{source: python-docs, samples: 16, length: 64}}
stages: {stages}
evaluate: {{perplexity: [{{source: python-docs, windows: 4}}], length: 64, dense: false, samples: false}}
output: {output}
{more}
"""
TRAIN = "{tokens: 4096, length: 32, batch: 8, learning_rate: 1.0e-3, checks: 2, source: python-docs}"


def run(folder: Path, name: str, stages: str, model: object = TINY, more: str = ""):
    file = folder / f"{name}.yaml"
    file.write_text(RECIPE.format(model=model, stages=stages, output=folder / name, more=more))
    done = fit(file)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / name / "report.json").read_text()), " ".join(done.stdout.split())


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    stored = Checkpoint(folder / "model")
    return {name: stored.tensor(name) == 0 for name in stored if "_proj" in name}


@pytest.mark.parametrize(("pattern", "told"), [("2:4", "2:4"), pytest.param("50%", "50%", marks=pytest.mark.long)])
@pytest.mark.parametrize("stage", ["finetune", "lora"])
def test_zeros_of_a_source_stay(stage, pattern, told, tmp_path):
    run(tmp_path, "sparse", "[wanda]", more=f"pattern: {pattern}")
    report, said = run(tmp_path, "better", f"[{{{stage}: {TRAIN}}}]", tmp_path / "sparse" / "model")
    before, after = zeros(tmp_path / "sparse"), zeros(tmp_path / "better")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "the source is 50.0% sparse (28 linears): its zeros are kept" in said
    assert report["verified"] is True and report["sparsity"]["total"] == pytest.approx(0.5, abs=1e-3)
    assert {each["pattern"] for each in report["sparsity"]["per_linear"].values()} == {told}
    assert report["notes"][stage]["after"] < report["notes"][stage]["before"]


def test_a_stage_that_fills_the_zeros_is_found_out(tmp_path, monkeypatch):
    """What was kept is noted before anything is trained, so a recovery cannot move what it is held to."""
    from sparsekit.stages import finetune as module

    run(tmp_path, "sparse", "[wanda]", more="pattern: 50%")
    monkeypatch.setattr(module, "_pruned", lambda blocks, masks: [])  # gradients of zeros reach the optimizer
    file = tmp_path / "f.yaml"
    stages = f"[{{finetune: {TRAIN}}}]"
    file.write_text(RECIPE.format(model=tmp_path / "sparse" / "model", stages=stages, output=tmp_path / "f", more=""))
    done = fit(file)
    assert done.returncode == 2 and "finetune" in done.stderr and not (tmp_path / "f" / "model").exists()


def test_none_says_what_it_does(tmp_path):
    run(tmp_path, "sparse", "[wanda]", more="pattern: 50%")
    report, said = run(tmp_path, "dense", f"[{{finetune: {TRAIN}}}]", tmp_path / "sparse" / "model", "masks: none")
    assert "masks is none, so `finetune`" in said and "makes it dense again" in said
    assert not report["sparsity"]["per_linear"]
    assert sum(int(each.sum()) for each in zeros(tmp_path / "dense").values()) < 100


def test_a_dense_source_has_none(tmp_path):
    report, said = run(tmp_path, "trained", f"[{{finetune: {TRAIN}}}]")
    assert "its zeros" not in said and not (tmp_path / "trained" / "masks.safetensors").exists()
    assert report["verified"] is True and not report["sparsity"]["per_linear"]


def test_cut_recover_prune_recover_is_one_recipe(tmp_path):
    cut = "{wanda-sp: {remove: 5%, shape: uniform, units: [heads]}}"
    stages = f"[{cut}, {{finetune: {TRAIN}}}, wanda, {{lora: {TRAIN}}}]"
    report, _ = run(tmp_path, "all", stages, more='pattern: "2:4"')
    assert report["verified"] is True and report["sparsity"]["total"] == pytest.approx(0.5, abs=1e-3)
    assert {"finetune", "lora"} <= report["notes"].keys() and report["structure"]["parameters"]["pruned"] < 221760
    gently = TRAIN.replace("1.0e-3", "1.0e-5")
    trained, _ = run(tmp_path, "one", f"[{{finetune: {gently}}}, wanda]", more="pattern: 50%")
    plain, _ = run(tmp_path, "two", "[wanda]", more="pattern: 50%")
    values = [each["evaluation"]["pruned"]["perplexity"]["python-docs"] for each in (trained, plain)]
    assert (values[0] != values[1]) == (trained["notes"]["finetune"]["best_step"] > 0)  # what was trained is pruned


def test_which_linears_count():
    model, _ = load(TINY)
    blocks = discover(model, sample_input(model))
    assert not SourceZeros(blocks)
    names = list(blocks[0].linears)
    for name, pattern in zip(names, ("2:4", "1:4", "4:8", "30%", "3%"), strict=False):
        linear = blocks[0].linears[name]
        linear.write_pruned(linear.weight * parse(pattern).keep(linear.weight.abs(), per="row"))
    found = SourceZeros(blocks).patterns
    assert [found.get(name) for name in names[:3]] == ["2:4", "1:4", "4:8"]
    assert float(found[names[3]].rstrip("%")) == pytest.approx(30, abs=1)
    assert names[4] not in found and NM(2, 4).satisfied(blocks[0].linears[names[0]].weight)
