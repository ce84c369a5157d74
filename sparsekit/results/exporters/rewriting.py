"""A checkpoint written anew, file by file, with some of its tensors in another form."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from sparsekit.model import Checkpoint
from sparsekit.system import sync, write_json, write_tensors

INDEX = "model.safetensors.index.json"


def rewrite(
    folder: Path,
    target: Path,
    change: Callable[[str, Tensor], Mapping[str, Tensor]],
    *,
    more: Mapping[str, Tensor] | None = None,
    without: Iterable[str] = (),
) -> None:
    """Write the checkpoint of `folder` to `target`, which does not exist, one file of weights in memory at a time.

    change: what stands for a tensor, by name
    more: tensors that stand for none, in the first file
    without: other files that are not copied
    """
    stored = Checkpoint(folder)
    shutil.copytree(stored.folder, target, ignore=shutil.ignore_patterns("*.safetensors", INDEX, *without))
    where: dict[str, str] = {}
    size = 0
    for file in stored.files:
        tensors: dict[str, Tensor] = dict(more or {}) if file == stored.files[0] else {}
        for name in (name for name, place in stored.where.items() if place == file):
            tensors |= change(name, stored.tensor(name))
        write_tensors(target / file.name, tensors, {"format": "pt"})
        sync(target / file.name)
        where |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if (stored.folder / INDEX).is_file():
        write_json(target / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
