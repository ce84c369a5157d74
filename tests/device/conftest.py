"""A second device, for tests of where tensors are. Only here: once torch has it, the process has an accelerator."""

import shutil
from typing import Any

import pytest


def pytest_ignore_collect(collection_path: Any, config: pytest.Config) -> bool | None:
    """They are asked for by `-m device`, in a process of their own."""
    return None if config.getoption("markexpr") == "device" else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They are all about the device."""
    for item in items:
        item.add_marker(pytest.mark.device)


@pytest.fixture(scope="session")
def card() -> Any:
    """The module of the device, once it is compiled and known to torch and Lightning."""
    if shutil.which("c++") is None:
        pytest.skip("no compiler: the test device is a piece of C++")
    import card

    card.make()
    return card


@pytest.fixture
def counting(card) -> Any:
    """`with counting() as counts:`, see card.Counting."""
    from sparsekit.maths import sums

    sums._tried.cache_clear()  # whether it has float64 is up to each test
    return card.Counting
