"""`sparsekit search`: short probes, of which the worst are dropped; a recipe of the best."""

import json
import math

import pytest

from sparsekit import cli
from sparsekit.recipe import load_recipe
from sparsekit.run import search
from sparsekit.run.searching import candidates

TRIED = {
    "magnitude": {"stages": ["magnitude"]},
    "wanda": {"stages": ["wanda"]},
    "sparsegpt": {"stages": ["sparsegpt"]},
    "alps": {"stages": ["alps"]},
}
CALIBRATION = {"source": "python-docs", "samples": 8, "length": 64}
TEXT = {"source": "python-docs", "windows": 4}


def test_the_best_goes_on(models, tmp_path):
    """Rounds with more samples and fewer methods; the order is that of the last round; the recipe runs as it is."""
    said = []
    found = search(
        str(models / "tiny-llama"),
        "70%",
        text=TEXT,
        calibration=CALIBRATION,
        budget=600,
        output=tmp_path / "found",
        length=64,
        tried=TRIED,
        say=said.append,
    )
    assert said[0] == "round 1: 4 methods, 2 samples"
    assert [len(each.losses) for each in found] == [2, 2, 1, 1] and {each.name for each in found} == set(TRIED)
    assert found[0].loss <= found[1].loss and found[0].name in ("sparsegpt", "alps")
    assert all(each.why for each in found[2:]) and "not among the best 2 of round 1" in found[-1].why
    recipe = load_recipe(tmp_path / "found" / "recipe.yaml")
    assert recipe.calibration.samples == 8 and recipe.stages[0].name == found[0].name
    told = json.loads((tmp_path / "found" / "search.json").read_text())
    assert told["best"] == found[0].name and math.isclose(math.log(told["methods"][0]["rounds"][-1]), found[0].loss)
    assert found[0].name in (tmp_path / "found" / "search.html").read_text()


def test_what_does_not_fit_into_the_time_is_left_out(models, tmp_path):
    """After the first probe, whatever would not end in time is said to be out; there is a best all the same."""
    given = {"text": TEXT, "calibration": CALIBRATION, "budget": 0.01, "length": 64, "tried": TRIED}
    said = []
    found = search(str(models / "tiny-llama"), "2:4", output=tmp_path / "found", say=said.append, **given)
    assert found[0].name == "magnitude" and all("no time in round 1" in each.why for each in found[1:])
    with pytest.raises(ValueError, match="exists; give a folder that does not"):
        search(str(models / "tiny-llama"), "2:4", output=tmp_path / "found", **given)


def test_a_method_that_the_model_refuses_is_out(models, tmp_path):
    """The others go on; where none can be tried, the reason is what is said."""
    tried = {"wanda": {"stages": ["wanda"]}, "reap": {"stages": [{"reap": {"remove": "20%"}}]}}
    given = {"text": TEXT, "calibration": CALIBRATION, "budget": 600, "length": 64, "say": lambda line: None}
    found = search(str(models / "tiny-llama"), "2:4", output=tmp_path / "one", tried=tried, **given)
    assert found[0].name == "wanda" and found[1].why
    with pytest.raises(ValueError, match="no method could be tried: "):
        search(str(models / "tiny-llama"), "1:3", output=tmp_path / "two", tried={"wanda": tried["wanda"]}, **given)


def test_candidates_are_recipes():
    """Each can be read; allocation by outliers is for shares alone."""
    for pattern in ("2:4", "60%"):
        for keys in candidates(pattern).values():
            load_recipe({"model": "x", "pattern": pattern, **keys})
    half = candidates("60%")
    assert "alps, sensitivity" in half and "alps, sensitivity" not in candidates("2:4")


def test_command(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sparsekit.run.searching.candidates", lambda pattern: {"wanda": {"stages": ["wanda"]}})
    told = ["search", "--model", str(models / "tiny-llama"), "--pattern", "2:4", "--calibration", "python-docs"]
    told += ["--text", "python-docs", "--samples", "4", "--length", "32", "--windows", "2"]
    assert cli.main([*told, "--budget", "5min", "--output", str(tmp_path / "s")]) == 0
    assert "best: wanda" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main([*told, "--budget", "soon", "--output", str(tmp_path / "t")])
    assert "give one such as 20min" in capsys.readouterr().err
