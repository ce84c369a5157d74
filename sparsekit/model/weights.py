"""A model's weights on their way to the disk: output files laid out once, then block after block put in its place."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.model.blocks import Block
from sparsekit.model.checkpoint import Checkpoint
from sparsekit.model.expert_forms import joined
from sparsekit.model.shards import Shards, digest_of
from sparsekit.model.tensors import Tensors, stored_form
from sparsekit.system import disk_errors


class Weights:
    """The folder of a checkpoint that is written block by block. Once all blocks are in it, transformers can load it.

    folder: is made by `lay_out`; model: in memory, whose blocks are written and read
    original: whether names and layout of tensors are those of the family's files, or the model's own
    zeros: tensors to store that the model does not have; describe: writes further files into the folder
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        *,
        original: bool = True,
        zeros: Mapping[str, Tensor] | None = None,
        describe: Callable[[Path], Any] = lambda folder: None,
    ):
        self.folder, self.model, self.original, self.describe = folder, model, original, describe
        self.zeros = dict(zeros or {})
        self._shards: Shards | None = None
        self._stored: Tensors | None = None

    def lay_out(self, blocks: Iterable[str]) -> dict[str, Any]:
        """Begin anew: the config, room for all tensors, and what is outside of these blocks (by their names).

        Returns:
            what `intact` takes: the stored names of what was written, and its digest

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        with disk_errors(self.folder), _default_generation(self.model):
            self.model.save_pretrained(self.folder, state_dict={})  # all but the weights: its config, and its code
        self.describe(self.folder)
        with joined(self.model):
            state = self.model.state_dict(keep_vars=True)
        bare = {name: torch.empty_like(tensor, device="meta") for name, tensor in (state | self.zeros).items()}
        self._shards, self._stored = Shards.lay_out(self.folder, self._form(bare)), None
        inside = tuple(f"{name}." for name in blocks)
        outside = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
        return self._write(self._form(outside | self.zeros))

    def write(self, block: Block) -> dict[str, Any]:
        """Put a block's tensors in their places and on the disk; what `intact` takes is returned.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        with joined(block.module):
            state = block.module.state_dict(keep_vars=True)
        return self._write(self._form({f"{block.name}.{name}": tensor for name, tensor in state.items()}))

    @torch.no_grad()
    def read(self, block: Block) -> None:
        """Give a block the tensors that were written."""
        for inner, tensor in block.module.state_dict(keep_vars=True).items():
            if (name := f"{block.name}.{inner}") in self.stored:  # else it is a copy of what is stored elsewhere
                tensor.copy_(self.stored[name])

    @property
    def stored(self) -> Tensors:
        """What is on the disk, by the names of the model."""
        if self._stored is None:
            self._stored = Tensors(Checkpoint(self.folder), self.model)
        return self._stored

    def intact(self, written: Mapping[str, Any]) -> bool:
        """Whether what is on the disk is what `lay_out` or `write` put there."""
        try:
            return self._shards_there().digest(written["names"]) == written["digest"]
        except (OSError, ValueError):
            return False

    def _form(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return stored_form(self.model, tensors, original=self.original)

    def _write(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        self._shards_there().write(tensors)
        return {"names": sorted(tensors), "digest": digest_of(tensors)}

    def _shards_there(self) -> Shards:
        if self._shards is None:
            self._shards = Shards(self.folder)
        return self._shards


@contextmanager
def _default_generation(model: Any) -> Iterator[None]:
    """While this lasts, the model has a generation config that is valid: transformers refuses to write another."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    try:
        if own is not None:
            model.generation_config = GenerationConfig()
        yield
    finally:
        if own is not None:
            model.generation_config = own
