"""Fixtures of all tests. No test asks the network for anything."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # small tensors: threads would only wait for one another

from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekit.system import begin_vector_maths

begin_vector_maths()  # as every way into sparsekit does; tests compute without one


@pytest.fixture
def shared() -> Path:
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("../shared is absent: real text and models are not here")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny random model by its name in tests/matrix, written once."""
    from tests.matrix import save

    home = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        if not (home / name / "config.json").exists():
            save(name, home / name)
        return home / name

    return folder


@pytest.fixture
def models() -> Path:
    """The folder of the tiny trained models, tiny-llama and tiny-opt."""
    return Path(__file__).parent / "models"
