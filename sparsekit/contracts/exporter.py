"""Exporters: other forms of a finished model, beside it."""

from pathlib import Path
from typing import Any, Protocol


class Exporter(Protocol):
    """Another form of a finished model, written beside it: three functions in one object."""

    def why_not(self, folder: Path, **facts: Any) -> str:
        """Why this model cannot be written so; empty where it can."""
        ...

    def write(self, folder: Path, target: Path, **facts: Any) -> None:
        """Write it to `target`."""
        ...

    def differences(self, target: Path, folder: Path) -> list[str]:
        """What loading `target` would give other than `folder` holds, as sentences; none if nothing is."""
        ...
