"""Where a run's curves go: the loggers of the ecosystem, by name, through Lightning."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = {"csv": "lightning", "tensorboard": "tensorboard", "wandb": "wandb"}  # name in a recipe -> what it needs


def missing_loggers(names: Sequence[str]) -> list[str]:
    """A sentence for each logger whose package is not installed."""
    return [
        f"logger `{name}` needs a package that is not installed: pip install {PACKAGES[name]}"
        for name in names
        if importlib.util.find_spec(PACKAGES[name]) is None
    ]


def make_loggers(names: Sequence[str], output: Path, index: int, stage: str) -> list[Any]:
    """Lightning's loggers for one stage of a run. index: of it, counted from 0, among those that run one by one.

    The first stage's curves are output/metrics.csv; those of a later one are in output/metrics/NUMBER-STAGE.
    """
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

    home = output / "metrics" / f"{index + 1}-{stage}" if index else output
    made: list[Any] = []
    for name in names:
        if name == "csv":
            made.append(CSVLogger(home, name="", version="", flush_logs_every_n_steps=1))
        elif name == "tensorboard":
            made.append(TensorBoardLogger(output / "tensorboard", name=stage, version=str(index + 1)))
        else:
            made.append(WandbLogger(project="sparsekit", name=f"{output.name}-{index + 1}-{stage}", save_dir=output))
    return made
