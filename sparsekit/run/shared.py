"""What several runs of one recipe, that differ in their pattern, need not read or measure twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STATISTICS = "statistics"


class Common(NamedTuple):
    """Where runs that differ in their pattern keep what is the same in all, and what it is of (JSON)."""

    folder: Path
    of: dict[str, Any]


class Shared:
    """What such runs have in common, in memory; what is measured lies in a folder, for runs that are resumed.

    folder: None: there is one run, which keeps it in its own
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._kept: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gave the first time."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]
