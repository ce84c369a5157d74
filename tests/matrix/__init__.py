"""Tiny random models of the families and classes of transformers."""

from pathlib import Path


def save(name: str, folder: Path) -> None:
    """Write a tiny model of a text family, or of `task/type` (see `towers.TASKS`)."""
    from tests.matrix import families, towers

    task, _, kind = name.rpartition("/")
    if task:
        towers.save(task, kind, folder)
    else:
        families.save(name, folder)
