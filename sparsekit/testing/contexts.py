"""A small real context: what a run would give a stage or a criterion, around a model in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsekit.maths import Pattern, parse
from sparsekit.model import discover
from sparsekit.run import Context
from sparsekit.walk import Commits


class Kept:
    """Masks of an earlier stage, held in memory: a linear's name -> kept (out, in)."""

    def __init__(self, masks: Mapping[str, Tensor]):
        self.kept = dict(masks)

    def masks(self, block: Any) -> dict[str, Tensor]:
        """A block's masks as packed bits, as committed blocks give them."""
        from sparsekit.system import pack

        return {name: pack(self.kept[name]) for name in block.linears if name in self.kept}


def context(
    model: nn.Module,
    tokens: Tensor,
    folder: str | Path,
    *,
    pattern: str | Pattern | None = None,
    masks: Mapping[str, Tensor] | None = None,
    tokenizer: Any = None,
    **fields: Any,
) -> Context:
    """A context around a model in memory, whose blocks are discovered here.

    tokens: calibration tokens (sequences, length). folder: of the run; a stage may write there
    pattern: that every linear is to get. masks: of an earlier stage, by linear's name (out, in)
    fields: others of `sparsekit.run.Context`, such as seed, batch, calibration or error_correction
    """
    blocks = discover(model, tokens[:1, :8])
    names = [name for block in blocks for name in block.linears]
    if tokenizer is not None:
        fields["load_tokenizer"] = lambda: tokenizer
    if masks is not None:
        fields |= {"before": Kept(masks), "index": 1}
    return Context(
        model,
        blocks,
        tokens,
        Path(folder),
        patterns=dict.fromkeys(names, parse(pattern)) if pattern is not None else {},
        commits=Commits(Path(folder) / "blocks"),
        **fields,
    )
