"""`pattern` as a list: a run for each entry, of one reading and one measurement of the dense model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import sparsekit
from sparsekit import cli
from sparsekit.maths import Stats
from sparsekit.model import discover
from sparsekit.recipe import RecipeError, load_recipe, load_recipes
from sparsekit.run import fitting
from sparsekit.walk import Gathered

RECIPE = {
    "calibration": {"source": "python-docs", "samples": 8, "length": 32},
    "stages": ["wanda"],
    "evaluate": {"perplexity": [{"source": "python-docs", "windows": 2}], "length": 32},
    "loggers": [],
}


@pytest.fixture
def recipe(models, tmp_path):
    return RECIPE | {"model": str(models / "tiny-llama"), "output": str(tmp_path / "runs")}


def test_each_is_the_run_of_its_pattern_alone(recipe, tmp_path, monkeypatch):
    """The same weights and figures as one at a time; texts are read, and the dense model is measured, once."""
    counted = {"calibration_of": 0, "ready_for": 0, "measure_model": 0}
    for name in counted:
        original = getattr(fitting, name)

        def counting(*args, name=name, original=original):
            counted[name] += 1
            return original(*args)

        monkeypatch.setattr(fitting, name, counting)
    found = sparsekit.fit_each(recipe | {"pattern": ["50%", 0.3, "2:4"]}, quiet=True)
    assert list(found) == ["50%", "30%", "2:4"]
    assert counted == {"calibration_of": 1, "ready_for": 1, "measure_model": 4}  # the dense one, and three
    for name, pattern, folder in (("50%", "50%", "50"), ("30%", 0.3, "30"), ("2:4", "2:4", "2-4")):
        assert found[name].verified
        assert found[name].folder == tmp_path / "runs" / folder
        alone = sparsekit.fit(recipe | {"pattern": pattern, "output": str(tmp_path / f"alone-{folder}")}, quiet=True)
        assert alone.report["evaluation"] == found[name].report["evaluation"]
        weights = [each / "model" / "model.safetensors" for each in (tmp_path / f"alone-{folder}", found[name].folder)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    page = (tmp_path / "runs" / "patterns.html").read_text()
    assert "2-4" in page and "<script" not in page
    board = json.loads((tmp_path / "runs" / "patterns.json").read_text())
    assert {Path(row["run"]).name for row in board["runs"]} == {"50", "30", "2-4"}


@pytest.fixture
def counted(monkeypatch):
    """How often statistics were written and read."""
    found = {"write": 0, "read": 0}
    for name in found:
        original = getattr(Gathered, name)

        def counting(*args, name=name, original=original):
            found[name] += 1
            return original(*args)

        monkeypatch.setattr(Gathered, name, counting)
    return found


@pytest.mark.parametrize("stages", [["wanda"], ["sparsegpt"], ["wanda", "refit"]], ids=str)
def test_one_capture_serves_all_where_inputs_are_dense(recipe, tmp_path, counted, stages):
    """The same weights as of a capture each, and no block of the later walks is run."""
    recipe |= {"stages": stages, "error_correction": "none", "evaluate": {}}
    found = sparsekit.fit_each(recipe | {"pattern": ["50%", "2:4", "70%"]}, quiet=True)
    blocks = len(sparsekit.load(recipe["model"])[0].model.layers)
    assert counted == {"write": blocks, "read": 2 * blocks}
    for pattern, result in found.items():
        folder = tmp_path / f"alone-{result.folder.name}"
        sparsekit.fit(recipe | {"pattern": pattern, "output": str(folder)}, quiet=True)
        weights = [each / "model" / "model.safetensors" for each in (folder, result.folder)]
        assert weights[0].read_bytes() == weights[1].read_bytes(), pattern
        errors = [json.loads((each / "report.json").read_text())["sparsity"] for each in (folder, result.folder)]
        assert errors[0] == errors[1]
    assert counted["write"] == blocks  # one pattern alone keeps nothing
    assert not (tmp_path / "runs" / "shared" / "statistics").exists()


def test_a_capture_that_broke_off_goes_on(recipe, counted, monkeypatch):
    recipe |= {"stages": ["wanda"], "error_correction": "none", "evaluate": {}, "pattern": ["50%", "2:4"]}
    write = Gathered.write

    def fails(self, block, collected):
        if block.index == 2:
            raise OSError("the disk is full")
        write(self, block, collected)

    with monkeypatch.context() as patched, pytest.raises(OSError, match=r"2 of . blocks are committed"):
        patched.setattr(Gathered, "write", fails)
        sparsekit.fit_each(recipe, quiet=True)
    blocks = len(sparsekit.load(recipe["model"])[0].model.layers)
    found = sparsekit.fit_each(recipe, resume=True, quiet=True)
    assert all(result.verified for result in found.values())
    assert counted == {"write": blocks, "read": blocks}


def test_statistics_of_something_else_are_not_used(models, tmp_path):
    """What is in the folder says what it is of."""
    model, _ = sparsekit.load(models / "tiny-llama")
    tokens = torch.arange(8)[None]
    blocks = discover(model, tokens)
    stats = Stats.of(torch.randn(5, 3))
    first = Gathered(tmp_path / "kept", {"text": 1}, blocks[:1])
    first.write(blocks[0], {0: stats})
    same = Gathered(tmp_path / "kept", {"text": 1}, blocks[:1])
    assert same.whole and not first.whole
    assert torch.equal(same.read(blocks[0], torch.device("cpu"))[0].gram, stats.gram)
    assert not Gathered(tmp_path / "kept", {"text": 1}, blocks).whole
    assert not Gathered(tmp_path / "kept", {"text": 2}, blocks[:1]).whole
    drifted = Stats.of(torch.randn(2000, 1100), torch.randn(2000, 1100))
    with pytest.raises(ValueError, match="inputs that drifted"):
        drifted.tensors()


def test_it_goes_on_where_it_was(recipe, tmp_path, capsys):
    file = tmp_path / "several.yaml"
    file.write_text(json.dumps(recipe | {"pattern": ["50%", "2:4"]}))
    assert cli.main(["fit", "--recipe", str(file), "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()
    assert cli.main(["fit", "--recipe", str(file), "--set", 'pattern=["50%"]']) == 0
    assert cli.main(["fit", "--recipe", str(file)]) == 2  # the first is there
    capsys.readouterr()
    assert cli.main(["fit", "--recipe", str(file), "--resume"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "is finished, nothing to do" in said and "2 patterns, 50%, 2:4: the texts are read" in said
    assert cli.main(["verify", str(tmp_path / "runs" / "2-4")]) == 0


def test_the_dense_figures_are_of_the_model_that_is_asked(recipe, models, tmp_path):
    """Also where an earlier model's figures lie in the same output, and its runs are gone."""
    first = sparsekit.fit_each(recipe | {"pattern": ["50%"]}, quiet=True)["50%"].report["evaluation"]["dense"]
    shutil.rmtree(tmp_path / "runs" / "50")
    other = recipe | {"pattern": ["50%"], "model": str(models / "tiny-opt")}
    found = sparsekit.fit_each(other, quiet=True)["50%"].report["evaluation"]["dense"]
    alone = sparsekit.fit(other | {"pattern": "50%", "output": str(tmp_path / "alone")}, quiet=True)
    assert found == alone.report["evaluation"]["dense"] != first


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ([], "`pattern` is an empty list"),
        (["50%", 0.5], "`pattern` has 50% twice"),
        (["50%", "150%"], "150%"),
        (["50%", ["2:4"]], "pattern"),
    ],
)
def test_mistakes(pattern, said, recipe):
    with pytest.raises(RecipeError) as raised:
        load_recipes(recipe | {"pattern": pattern})
    assert said in str(raised.value)


def test_one_run_is_not_several(recipe):
    with pytest.raises(RecipeError, match="each entry of it is a run of its own"):
        load_recipe(recipe | {"pattern": ["50%", "2:4"]})
    with pytest.raises(ValueError, match=r"several patterns run in one process, and trainer.devices is 2"):
        sparsekit.fit_each(recipe | {"pattern": ["50%", "2:4"], "trainer": {"devices": 2, "accelerator": "cpu"}})
    assert list(load_recipes(recipe | {"pattern": [{"mlp": "2:4", "attention": "50%"}]})) == ["mlp 2:4, attention 50%"]
