"""Clients that people have, each in an environment of its own, which `make test-clients` builds for these tests."""

import json
import os
import subprocess
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PLACE = Path(os.environ.get("SPARSEKIT_CLIENTS", ROOT / ".clients"))

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def client() -> Callable[..., Run]:
    """client(NAME, packages...) builds an environment once and gives run(script, *arguments): what it prints, JSON.

    A package behind a minus sign is taken out again.
    """

    def build(name: str, *packages: str) -> Run:
        home = PLACE / name
        told = home / "ready"
        python = home / "bin" / "python"
        if not told.is_file() or told.read_text() != "\n".join(packages):
            venv.create(home, with_pip=True, clear=True)
            wanted = [package for package in packages if not package.startswith("-")]
            unwanted = [package[1:] for package in packages if package.startswith("-")]
            put, take = ["install", "--constraint", str(_pinned(home))], ["uninstall", "--yes"]
            # torch by itself: the tested one, and not what packages ask for
            for step in ([*put, "torch"], [*put, *wanted], *([[*take, *unwanted]] if unwanted else [])):
                command = [str(python), "-m", "pip", *step, "--quiet"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"{name} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
            told.write_text("\n".join(packages))

        def run(script: str, *arguments: str) -> Any:
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
            environment.pop("PYTHONPATH", None)
            command: Sequence[str] = [str(python), str(Path(__file__).with_name(script)), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
            assert done.returncode == 0, done.stderr[-2000:]
            return json.loads(done.stdout.strip().splitlines()[-1])

        return run

    return build


def _pinned(home: Path) -> Path:
    """The tested torch alone: other clients want other versions of the rest."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    file = home / "constraints.txt"
    file.write_text("\n".join(line for line in lines if line.startswith("torch==")) + "\n")
    return file


def pytest_ignore_collect(collection_path: Any, config: pytest.Config) -> bool | None:
    """They are asked for by `-m clients`."""
    return None if config.getoption("markexpr") == "clients" else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """They are what was asked for; the hook is given all tests of the session."""
    for item in items if config.getoption("markexpr") == "clients" else ():
        item.add_marker(pytest.mark.clients)
