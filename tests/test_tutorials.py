"""The tutorials run as they stand, cell by cell, on a small model in place of the real one."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def _marked(file: Path):
    """The one without a model always, the others with `make test-all`."""
    return pytest.param(file, id=file.stem, marks=() if file.stem == "write_a_method" else pytest.mark.long)


@pytest.mark.parametrize("file", [_marked(file) for file in TUTORIALS])
def test_a_tutorial_runs(file, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MODEL", str(ROOT / "tests" / "models" / "tiny-llama"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    known: dict = {"__name__": "tutorial"}
    for number, cell in enumerate(json.loads(file.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{file.name}, cell {number}", "exec"), known)
    assert capsys.readouterr().out


def test_there_are_tutorials():
    assert len(TUTORIALS) == 4


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda file: file.stem)
def test_a_tutorial_shows_what_it_prints(file):
    """The site shows kept outputs, which `python docs/executed.py` renews: none is missing, none is a notice."""
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        source = "".join(cell["source"])
        assert bool(cell["outputs"]) == ("print(" in source or "bench_table(" in source), source
        assert not [output for output in cell["outputs"] if output.get("name") == "stderr" or "ename" in output]
