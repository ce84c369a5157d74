"""Exporters: other forms of a finished model, written beside it.

An exporter is a function `(*, options...) -> Exporter`, found through the entry-point group `sparsekit.exporters` and
named by a recipe's `export`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from sparsekit.maths import Quantization


@dataclass(frozen=True)
class Finished:
    """A model that is on disk and proved.

    folder: of the checkpoint; patterns: a pruned linear's name -> its pattern as text
    quantization: a linear's name -> the grid that its weights lie on; empty where nothing was quantized
    masks: reads the masks: a linear's name -> the weights (out, in) that are kept
    report: what is known so far of the run (docs/design.md)
    """

    folder: Path
    patterns: "Mapping[str, str]"
    quantization: "Mapping[str, Quantization]"
    masks: "Callable[[], dict[str, Tensor]]"
    report: Mapping[str, Any]
    trust_remote_code: bool = False


class Exporter(NamedTuple):
    """What an exporter gives: three functions.

    why_not: why this model cannot be written so, as a sentence; empty where it can
    write: writes it to a folder that does not exist yet, which the run moves into place when it is complete
    differences: what reading that folder would give other than the model has, as sentences; none if nothing is
    """

    why_not: Callable[[Finished], str]
    write: Callable[[Finished, Path], None]
    differences: Callable[[Finished, Path], list[str]]
