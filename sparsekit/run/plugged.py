"""Callbacks and loggers that a recipe names by their class, as users of LightningCLI write them."""

import importlib
import inspect
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from sparsekit.recipe import TrainerOptions


def check_classes(trainer: TrainerOptions) -> None:
    """Find all classes that the recipe names, before anything is measured; code is imported here, so only `fit` asks.

    Raises:
        ValueError: a class is not there, is none of an installed package, is no Callback or Logger of Lightning, or
            does not take these arguments.
    """
    for key, base, entries in (("callbacks", Callback, trainer.callbacks), ("logger", Logger, trainer.logger)):
        for index, entry in enumerate(entries):
            try:
                inspect.signature(_find(entry.class_path, base)).bind(**entry.init_args)
            except (TypeError, ValueError) as error:
                raise ValueError(f"trainer.{key}[{index}]: {entry.class_path}: {error}") from error


def callbacks(trainer: TrainerOptions) -> list[Any]:
    """The recipe's callbacks, made anew for every stage."""
    return _made(trainer.callbacks, Callback)


def loggers(trainer: TrainerOptions) -> list[Any]:
    """The recipe's loggers, made anew for every stage."""
    return _made(trainer.logger, Logger)


def _made(entries: Sequence[Any], base: type) -> list[Any]:
    return [_find(entry.class_path, base)(**entry.init_args) for entry in entries]


def _find(path: str, base: type) -> Any:
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] not in metadata.packages_distributions():
        raise ValueError("this is not of an installed package; install the package that has it")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"it cannot be imported ({error})") from error
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(f"it is no {base.__name__} of Lightning; name a subclass of that")
    return found
