"""What a structural stage decided, as it lies on disk: which units stay, and what was changed to make up for them."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sparsekit.model.blocks import Block
from sparsekit.model.structure.cutting import cut
from sparsekit.model.structure.finding import find_units
from sparsekit.model.structure.units import Units
from sparsekit.system import commit, committed, write_tensors

FILE = "removal.safetensors"


@dataclass
class Removal:
    """kinds: of units, as `units.find` takes them; kept: mask (units,); changed: parameters by name, of the model as it
    was before the cut (weights as stored; a bias may be new); scores (units,): what was decided by; notes: JSON."""

    kinds: list[str]
    kept: Tensor
    changed: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Commit it: whole or not at all."""
        tensors = {f"changed.{name}": tensor.contiguous() for name, tensor in self.changed.items()}
        tensors["kept"] = self.kept.to(torch.uint8)
        if self.scores is not None:
            tensors["scores"] = self.scores.contiguous()
        said = {"kinds": json.dumps(self.kinds), "notes": json.dumps(self.notes)}
        commit(folder / FILE, lambda aside: write_tensors(aside, tensors, said))

    @classmethod
    def read(cls, folder: Path) -> "Removal | None":
        """The one that is committed in a folder; None if there is none, or it is damaged."""
        if not committed(folder / FILE):
            return None
        with safe_open(folder / FILE, framework="pt") as handle:
            said = {key: json.loads(value) for key, value in handle.metadata().items()}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no dictionary)
        changed = {name.removeprefix("changed."): t for name, t in tensors.items() if name.startswith("changed.")}
        return cls(said["kinds"], tensors["kept"].bool(), changed, tensors.get("scores"), said["notes"])

    @torch.no_grad()
    def apply(self, model: nn.Module, blocks: list[Block]) -> Units:
        """Write what changed and cut the model; returns the units of the model as it was."""
        units = find_units(model, blocks, self.kinds)
        for name, tensor in self.changed.items():
            home, _, last = name.rpartition(".")
            module = model.get_submodule(home)
            if getattr(module, last, None) is None:
                weight: Any = module.weight
                setattr(module, last, nn.Parameter(torch.zeros(tensor.shape, dtype=weight.dtype, device=weight.device)))
            module.get_parameter(last).copy_(tensor)
        cut(model, blocks, units, self.kept)
        return units
