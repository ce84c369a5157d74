"""Structural recipes from the command line: cut, stored, proved, reported, gone on with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_run import fit

import sparsekit
from sparsekit.cli import main
from sparsekit.model import Checkpoint, find_blocks
from sparsekit.run.one_shot import one_shot

MODELS = Path(__file__).parent / "models"
POLICY = '{policy_gradient: {remove: "30%", steps: 6, masks: 2, batch: 2, group: 16}}'


def recipe(folder: Path, stages: str, model: str = "tiny-llama", more: str = "") -> Path:
    file = folder / "recipe.yaml"
    file.write_text(
        f"model: {MODELS / model}\n"
        "calibration: {source: python-docs, samples: 16, length: 128, seed: 0}\n"
        f"stages: [{stages}]\n"
        "evaluate: {perplexity: [{source: python-docs, windows: 4}], length: 64, dense: false}\n"
        f"output: {folder / 'run'}\n{more}"
    )
    return file


def report_of(folder: Path) -> dict:
    return json.loads((folder / "run" / "report.json").read_text())


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-opt"])
def test_policy_gradient_from_the_command_line(tmp_path: Path, model: str) -> None:
    done = fit(recipe(tmp_path, POLICY, model))
    assert done.returncode == 0, done.stderr
    assert "6 steps of 2 forward passes over 2 x 128 tokens" in " ".join(done.stdout.split())
    report = report_of(tmp_path)
    assert report["verified"] is True
    structure = report["structure"]
    assert structure["removed"][0] == pytest.approx(0.3, abs=0.01) and len(structure["blocks"]) == 4
    assert structure["layout"] == ("generated" if model == "tiny-llama" else "own")
    assert len(report["notes"]["policy_gradient"]["held_out"]) == 5
    loaded, _ = sparsekit.load(tmp_path / "run")
    assert sum(p.numel() for p in loaded.parameters()) == structure["parameters"]["pruned"]
    for block, seen in zip(find_blocks(loaded), structure["blocks"], strict=True):
        output = next(linear for name, linear in block.linears.items() if name.endswith(("down_proj", "fc2")))
        assert (
            output.shape[1] == seen["channels"][0] < seen["channels"][1] or seen["channels"][0] == seen["channels"][1]
        )
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "of its parameters removed" in card and "parameters are left" in card
    assert main(["verify", str(tmp_path / "run"), "--against", str(MODELS / model)]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0


def test_a_damaged_cut_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(recipe(tmp_path, '{wanda-sp: {remove: "30%"}}')).returncode == 0
    from safetensors.torch import load_file, save_file

    file = tmp_path / "run" / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run"), "--against", str(MODELS / "tiny-llama")]) == 1
    assert "model.safetensors is not what the run left" in capsys.readouterr().out
    bare = shutil.copytree(tmp_path / "run" / "model", tmp_path / "bare")  # by itself it has no manifest
    assert main(["verify", str(bare), "--against", str(MODELS / "tiny-llama")]) == 1
    assert name.removesuffix(".weight") in capsys.readouterr().out


def test_solvers_go_on_with_the_smaller_model(tmp_path: Path) -> None:
    """Heads and channels, then layers, then 2:4 of what is left; a kill between costs nothing that is finished."""
    stages = '{wanda-sp: {remove: "30%", compensate: true}}, {block-influence: {remove: "25%"}}, sparsegpt'
    whole = fit(recipe(tmp_path, stages, more='pattern: "2:4"\n'))
    assert whole.returncode == 0, whole.stderr
    report = report_of(tmp_path)
    assert report["verified"] is True and report["structure"]["layers"] != [0, 1, 2, 3]
    assert len(report["structure"]["removed"]) == 2 and report["sparsity"]["total"] == 0.5
    (tmp_path / "again").mkdir()
    file = recipe(tmp_path / "again", stages, more='pattern: "2:4"\n')
    real = one_shot
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: object) -> None:
            raise OSError("no space left")

        patch.setattr("sparsekit.run.sequence.one_shot", killed)
        assert fit(file).returncode == 1
    assert one_shot is real
    assert fit(file, "--resume").returncode == 0
    one, other = (Checkpoint(folder / "run" / "model") for folder in (tmp_path, tmp_path / "again"))
    assert list(one) == list(other) and all(torch.equal(one.tensor(name), other.tensor(name)) for name in one)


def test_least_squares_may_give_biases_to_linears_that_had_none(tmp_path: Path) -> None:
    done = fit(recipe(tmp_path, '{flap: {remove: "30%", compensate: true, bias: true}}'))
    assert done.returncode == 0, done.stderr
    cut = Checkpoint(tmp_path / "run" / "model")
    biases = [name for name in cut if name.endswith(("o_proj.bias", "down_proj.bias"))]
    assert biases and all(cut.tensor(name).count_nonzero() for name in biases)
    assert report_of(tmp_path)["verified"] is True


def test_a_dry_run_shows_what_there_is(tmp_path: Path) -> None:
    done = fit(recipe(tmp_path, POLICY), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "mlp.down_proj" in done.stdout and "weights on disk: " in done.stdout
    assert "forward work" not in done.stdout and not (tmp_path / "run").exists()


def test_a_model_that_was_never_pruned_may_be_trained(tmp_path: Path) -> None:
    stages = "{lora: {steps: 3, rank: 2, length: 64, targets: [q_proj]}}, {lora: {steps: 2, rank: 2, length: 64}}"
    done = fit(recipe(tmp_path, stages))
    assert done.returncode == 0, done.stdout
    report = report_of(tmp_path)
    assert report["verified"] is True and list(report["notes"]) == ["lora", "lora 2"]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ('wanda, {wanda-sp: {remove: "30%"}}', "removes structures, which must come before `wanda`"),
        ("wanda-sp", "option `remove` is required"),
        ('{wanda-sp: {remove: "0%"}}', "option `remove` is '0%'; it must be a share"),
        ('{wanda-sp: {remove: "99%"}}', "can give up"),
        ("{wanda-sp: {remove: half}}", "option `remove` is 'half'; it must be a share"),
        ('{policy_gradient: {remove: "30%", baseline: mean}}', 'option `baseline` is "mean", must be "leave-one-out"'),
        ('{policy_gradient: {remove: "30%", masks: 1}}', "give at least 2 as masks"),
        ('{policy_gradient: {remove: "30%", units: [heads, layers]}}', "units are heads, layers; they can be"),
        ('{wanda-sp: {remove: "30%"}}, wanda', "missing key `pattern`, which `wanda` prunes to"),
    ],
)
def test_mistakes(tmp_path: Path, stages: str, said: str) -> None:
    more = 'pattern: "50%"\n' if stages.startswith("wanda,") else ""
    done = fit(recipe(tmp_path, stages, more=more))
    assert done.returncode == 2 and said in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ('{wanda-sp: {remove: "30%", shape: free}}, wanda', "any number of channels in a block, which the groups of 4"),
        ('{wanda-sp: {remove: "31%", shape: uniform}}, wanda', "after stage 1, `wanda-sp`"),
        ('{wanda-sp: {remove: "30%", units: [rows]}}, wanda', "units are rows"),
        ('{block-influence: {remove: "99%"}}', "layers can give up 75.0% of the blocks' parameters at most"),
    ],
)
def test_what_a_cut_leaves_is_looked_at_by_the_dry_run(tmp_path: Path, capsys, stages: str, said: str) -> None:
    more = 'pattern: "2:4"\n' if "wanda" in stages.split("}, ")[-1] else ""
    assert main(["fit", "--recipe", str(recipe(tmp_path, stages, more=more)), "--dry-run"]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_uniform_cut_that_groups_divide_passes_the_dry_run(tmp_path: Path) -> None:
    """256 channels, of which a quarter and some go; and whole layers, whatever the pattern."""
    for stages in ('{block-influence: {remove: "25%"}}, wanda', '{wanda-sp: {remove: "5%", units: [heads]}}, wanda'):
        more = 'pattern: "2:4"\n'
        assert main(["fit", "--recipe", str(recipe(tmp_path, stages, more=more)), "--dry-run"]) == 0, stages
