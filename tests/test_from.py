"""Recipes that go on from a finished run, and recovery within a recipe."""

import json
from pathlib import Path

import pytest
import torch
from test_run import fit

from sparsekit.model import Checkpoint

TINY = Path(__file__).parent / "models" / "tiny-llama"
MORE = """\
calibration: {source: python-docs, samples: 24, length: 64, seed: 0}
evaluate: {perplexity: [{source: python-docs, windows: 6}], length: 64, samples: false}
"""
LORA = "{lora: {steps: 6, rank: 4, length: 64, learning_rate: 2.0e-3}}"


def run(folder: Path, name: str, text: str) -> dict:
    file = folder / f"{name}.yaml"
    file.write_text(text + MORE + f"output: {folder / name}\n")
    done = fit(file)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / name / "report.json").read_text())


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    stored = Checkpoint(folder / "model")
    return {name: stored.tensor(name) == 0 for name in stored if "_proj" in name}


def test_one_pruning_feeds_a_recovery_and_that_a_quantization(tmp_path: Path) -> None:
    pruned = run(tmp_path, "pruned", f'model: {TINY}\npattern: "2:4"\nstages: [wanda]\n')
    better = run(tmp_path, "better", f"from: {tmp_path / 'pruned'}\nstages: [{LORA}]\n")
    coarse = run(tmp_path, "coarse", f"from: {tmp_path / 'better'}\nstages: [{{quantize: {{bits: 4, group: 32}}}}]\n")
    assert [report["verified"] for report in (pruned, better, coarse)] == [True] * 3
    first, second, third = (zeros(tmp_path / name) for name in ("pruned", "better", "coarse"))
    assert all(torch.equal(first[name], second[name]) for name in first)  # masks, bit for bit
    assert all((third[name] | ~first[name]).all() for name in first)  # rounding may add some
    values = [report["evaluation"]["pruned"]["perplexity"]["python-docs"] for report in (pruned, better)]
    assert values[1] < values[0]
    dense = [report["evaluation"]["dense"]["perplexity"]["python-docs"] for report in (pruned, better, coarse)]
    assert dense[0] == dense[1] == dense[2]  # of the model that was never pruned
    assert better["recipe"]["model"]["path"] == str(TINY) and better["recipe"]["pattern"] == "2:4"
    assert better["notes"]["lora"]["after"] <= better["notes"]["lora"]["before"]


def test_a_cut_model_is_gone_on_with(tmp_path: Path) -> None:
    cut = run(tmp_path, "cut", f'model: {TINY}\nstages: [{{wanda-sp: {{remove: "30%"}}}}]\n')
    better = run(tmp_path, "better", f"from: {tmp_path / 'cut'}\nstages: [{LORA}]\n")
    assert better["verified"] is True
    assert better["structure"]["parameters"]["pruned"] == cut["structure"]["parameters"]["pruned"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from: nowhere\nstages: [lora]\n", "there is no finished run in nowhere"),
        ("from: {run}\nstages: [sparsegpt]\n", "cannot start from the answer of `from: "),
        ("from: {run}\nstages: [{{lora: {{rank: 0}}}}]\n", "rank"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, said: str) -> None:
    folder = tmp_path / "pruned"
    folder.mkdir()
    report = {"recipe": {"model": {"path": str(TINY)}, "pattern": "2:4"}}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "masks.safetensors").touch()
    file = tmp_path / "x.yaml"
    file.write_text(text.format(run=folder) + MORE)
    done = fit(file)
    assert done.returncode == 2 and said in " ".join(done.stderr.split())


def test_an_update_that_is_not_merged_is_not_left_behind_unsaid(tmp_path: Path) -> None:
    lora = LORA.replace("lora: {", "lora: {merge: false, ")
    run(tmp_path, "apart", f'model: {TINY}\npattern: "2:4"\nstages: [wanda, {lora}]\n')
    report = json.loads((tmp_path / "apart" / "report.json").read_text())
    assert "without the update in adapter/" in report["notes"]["adapter"]["figures"]  # the figures are not of it
    file = tmp_path / "on.yaml"
    file.write_text(f"from: {tmp_path / 'apart'}\nstages: [{LORA}]\n{MORE}output: {tmp_path / 'on'}\n")
    done = fit(file)
    assert done.returncode == 2 and "keeps its update unmerged" in done.stderr and not (tmp_path / "on").exists()
