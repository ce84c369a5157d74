"""Finished blocks on disk: each is committed whole or not at all, so that a kill costs one block."""

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from sparsekit.model import Block, Weights, may_rest, settle
from sparsekit.system import commit, committed, forget, pack, write_tensors

LAYOUT = "layout.json"  # that weights were laid out, and what is outside the blocks


class Commits:
    """The folder of committed blocks: NNNNN.safetensors with masks (packed bits), records and notes.

    A block's weights are in the checkpoint that the run writes, in their places, before its file is here; that file
    holds their digest, and its appearing is the commit.

    weights: where they are
    """

    def __init__(self, folder: str | Path, weights: Weights):
        self.folder, self.weights = Path(folder), weights
        self._intact: dict[int, bool] = {}  # those whose digests were looked at
        self._ready = False  # whether the weights are laid out

    def done(self) -> set[int]:
        """The indices of the committed blocks; one that is damaged is named in a warning and is none."""
        found = {int(file.stem) for file in self.folder.glob("[0-9]*.safetensors")}
        if not found or not self._laid_out():
            return set()
        for index in found - self._intact.keys():
            self._intact[index] = self._found(index)
        return {index for index in found if self._intact[index]}

    def recorded(self) -> bool:
        """Whether the masks and records of all blocks are here, wherever the weights may be."""
        if not committed(self._layout):
            return False
        count = json.loads(self._layout.read_text(encoding="utf-8"))["blocks"]
        return all(committed(self._file(index)) for index in range(count))

    def whole(self) -> bool:
        """Whether every block is committed, and nothing of it was damaged since."""
        return self.weights.folder.is_dir() and self.recorded() and len(self.done()) == count_committed(self.folder)

    def prepare(self, blocks: list[Block]) -> None:
        """Lay out the weights, unless they are; blocks that were committed into others are forgotten then.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        if self._laid_out():
            return
        self.forget()
        told = self.weights.lay_out(block.name for block in blocks) | {"blocks": len(blocks)}
        commit(self._layout, lambda aside: aside.write_text(json.dumps(told), encoding="utf-8"))
        self._ready = True

    def look_again(self) -> None:
        """Forget what was seen: another process has changed it."""
        self._intact.clear()
        self._ready = False

    def commit(self, block: Block) -> None:
        """Put a finished block's weights in their places, and then its masks and records here.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        written = self.weights.write(block)
        masks = {name: pack(block.masks[name]) for name in block.linears}
        said = {key: json.dumps(getattr(block, key)) for key in ("records", "notes")}
        said |= {"trained": json.dumps(sorted(block.trained)), "weights": json.dumps(written)}
        commit(self._file(block.index), lambda aside: write_tensors(aside, masks, said))
        self._intact[block.index] = True

    def forget(self) -> None:
        """Remove the committed blocks; their weights will be overwritten."""
        for file in self.folder.glob("[0-9]*.safetensors"):
            forget(file)
        self._intact.clear()

    def recall(self, block: Block) -> None:
        """Put a committed block's records back; its masks stay on disk."""
        said = self._said(block.index)
        block.records, block.notes, block.trained = said["records"], said["notes"], set(said["trained"])

    def restore(self, block: Block) -> None:
        """Put a committed block's records and weights back; a block that may rest is settled on them, and empty."""
        self.recall(block)
        if may_rest(block):
            settle(block, self.weights.stored)
        else:
            self.weights.read(block)

    def masks(self, block: Block) -> dict[str, Tensor]:
        """A committed block's masks as packed bits, by the names of its linears."""
        with safe_open(self._file(block.index), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in block.linears}

    def _laid_out(self) -> bool:
        if not self._ready and committed(self._layout):
            told = json.loads(self._layout.read_text(encoding="utf-8"))
            self._ready = self._right(told, "what is outside the blocks")
        return self._ready

    def _found(self, index: int) -> bool:
        return committed(self._file(index)) and self._right(self._said(index)["weights"], f"block {index}")

    def _right(self, written: dict[str, Any], what: str) -> bool:
        if self.weights.intact(written):
            return True
        warnings.warn(f"{self.weights.folder}: {what} is not what was committed; it is made again", stacklevel=2)
        return False

    def _said(self, index: int) -> dict[str, Any]:
        with safe_open(self._file(index), framework="pt") as handle:
            return {key: json.loads(value) for key, value in handle.metadata().items()}

    @property
    def _layout(self) -> Path:
        return self.folder / LAYOUT

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"


def count_committed(folder: Path) -> int:
    """How many blocks have been committed in a folder, whole or not, for messages."""
    return len(list(folder.glob("[0-9]*.safetensors")))
