"""The tutorials run as they stand, cell by cell, on a small model in place of the real one."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda file: file.stem)
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
