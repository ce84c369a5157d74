"""Families of transformers through every kind of stage: a few always, all of them as a long test."""

import shutil
from pathlib import Path

import pytest

from tests.matrix import families
from tests.matrix.__main__ import RECIPES, cell

FEW = {
    "qwen3_moe": ("sparsegpt", "reap"),
    "gpt_oss": ("sparsegpt", "lora"),
    "gemma3n_text": ("sparsegpt",),
    "falcon_h1": ("sparsegpt", "layers"),
    "deepseek_v3": ("lamp", "layers"),
    "jetmoe": ("sparsegpt",),
    "gpt_neo": ("wanda-sp",),
}
RIGHT = {"works", "own", "refused"}


def outcome(family: str, recipe: str, home: Path, source: Path) -> dict:
    found = cell(family, source, recipe, home)
    assert found["cell"] in RIGHT, found
    assert found.get("share", 1.0) > 0.97, found
    return found


@pytest.fixture
def source(request, tmp_path):
    folder = tmp_path / "source"
    try:
        families.save(request.param, folder)
    except Exception as error:
        pytest.skip(f"no tiny model of {request.param}: {error}")
    return folder


@pytest.mark.parametrize(("source", "family"), [(name, name) for name in FEW], indirect=["source"])
def test_a_few_families(source, family, tmp_path):
    for recipe in FEW[family]:
        assert outcome(family, recipe, tmp_path, source)["cell"] == "works"


@pytest.mark.long
@pytest.mark.parametrize(("source", "family"), [(name, name) for name in families.names()], indirect=["source"])
def test_every_family(source, family, tmp_path):
    for recipe in RECIPES:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        outcome(family, recipe, tmp_path, source)
