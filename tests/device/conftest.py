"""Tests on an accelerator: `-m gpu` takes the one that torch finds; `-m device` makes a second device of CPU memory, of
which everything that is done on it can be counted. In a process of their own: once torch has the device, it is there.
"""

import shutil
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch


def pytest_ignore_collect(collection_path: Any, config: pytest.Config) -> bool | None:
    """They are asked for by `-m device` or `-m gpu`."""
    return None if _asked(config) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """They are what was asked for; the hook is given all tests of the session."""
    for item in items if _asked(config) else ():
        item.add_marker(getattr(pytest.mark, _asked(config)))


def _asked(config: pytest.Config) -> str:
    asked = config.getoption("markexpr")
    return asked if asked in ("device", "gpu") else ""


@pytest.fixture(scope="session")
def card(request: pytest.FixtureRequest) -> Any:
    """The module of the counted device, once it is compiled and known to torch and Lightning."""
    if request.config.getoption("markexpr") == "gpu":
        pytest.skip("counts what is done on the device that is CPU memory: -m device")
    if shutil.which("c++") is None:
        pytest.skip("no compiler: the test device is a piece of C++")
    import card

    card.make()
    return card


@pytest.fixture(scope="session")
def accelerator(request: pytest.FixtureRequest) -> str:
    """The type of the device that tests are on."""
    if request.config.getoption("markexpr") == "gpu":
        if not torch.accelerator.is_available():
            pytest.skip("torch finds no accelerator here")
        return str(torch.accelerator.current_accelerator().type)
    return str(request.getfixturevalue("card").NAME)


@pytest.fixture
def counting(accelerator: str, request: pytest.FixtureRequest) -> Any:
    """`with counting(double=True) as counts:`, see card.Counting; on an accelerator nothing is counted."""
    from sparsekit.maths import sums

    sums._tried.cache_clear()  # whether the device has float64 is up to each test
    if accelerator != "card":
        return nothing
    return request.getfixturevalue("card").Counting


@contextmanager
def nothing(double: bool = True) -> Any:
    """On an accelerator nothing is counted, and float64 is there or not."""
    if not double:
        pytest.skip("whether this device has float64 is its own affair")
    yield SimpleNamespace(launches=None, syncs=Counter())
