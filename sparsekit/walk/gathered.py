"""Statistics that several runs would gather alike, kept on disk by the first of them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sparsekit.maths import Norms, Stats
from sparsekit.model import Block
from sparsekit.system import commit, committed, write_tensors

SAID = "of.json"


class Gathered:
    """What the linears of a walk are given where they see dense inputs: whatever the pattern, it is the same.

    folder: a file for each block; one that holds what is of something else is emptied
    of: what it is of, JSON; stats: what is gathered
    whole: all blocks were there at the beginning, so that nothing needs to be run
    """

    def __init__(self, folder: Path, of: Mapping[str, Any], blocks: Sequence[Block], stats: type[Norms] = Stats):
        self.folder, self.stats = folder, stats
        said = json.dumps({**of, "statistics": stats.__name__}, sort_keys=True)
        file = folder / SAID
        if not committed(file) or file.read_text(encoding="utf-8") != said:
            shutil.rmtree(folder, ignore_errors=True)
            commit(file, lambda aside: aside.write_text(said, encoding="utf-8"))
        self.whole = all(committed(self._file(block)) for block in blocks)

    def write(self, block: Block, collected: Mapping[int, Norms]) -> None:
        """Keep a block's statistics, by the numbers of its groups.

        Raises OSError where there is no room.
        """
        tensors = {f"{group}.{name}": t for group, each in collected.items() for name, t in each.tensors().items()}
        commit(self._file(block), lambda aside: write_tensors(aside, tensors))

    def read(self, block: Block, device: torch.device) -> dict[int, Norms]:
        """A block's statistics by the numbers of its groups, bit for bit as they were gathered."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        with safe_open(self._file(block), framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                group, _, name = key.partition(".")
                found.setdefault(int(group), {})[name] = handle.get_tensor(key).to(device)
        return {group: self.stats.of_tensors(tensors) for group, tensors in sorted(found.items())}

    def _file(self, block: Block) -> Path:
        return self.folder / f"{block.index:05d}.safetensors"
