"""sparsekit: make large transformers sparse.

A scientist needs three names and no framework:

    stats = Stats.of(inputs)                              # (tokens, in)
    sparse = chain(wanda, partial(refit, damping=0.1))(weight, stats, NM(2, 4))

Everything here is loaded when first asked for, so that `import sparsekit` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsekit.blocks import Block as Block
    from sparsekit.blocks import discover as discover
    from sparsekit.pattern import NM as NM
    from sparsekit.pattern import Pattern as Pattern
    from sparsekit.pattern import Unstructured as Unstructured
    from sparsekit.pattern import parse as parse
    from sparsekit.solvers.chain import chain as chain
    from sparsekit.statistics import Stats as Stats
    from sparsekit.store import ActivationStore as ActivationStore
    from sparsekit.structure.storage import load as load

__version__ = "0.1.0"

_HOME = {
    "ActivationStore": "store",
    "Block": "blocks",
    "NM": "pattern",
    "Pattern": "pattern",
    "Stats": "statistics",
    "Unstructured": "pattern",
    "chain": "solvers.chain",
    "discover": "blocks",
    "load": "structure.storage",
    "parse": "pattern",
}
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"sparsekit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sparsekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
