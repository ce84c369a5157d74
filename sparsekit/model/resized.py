"""Models whose width between blocks a stage has changed: written with the stage's name, rebuilt by it.

No config of transformers can say what such a model is. Its config.json has a type that transformers does not know, and
under `resized` the stage, whose function `rebuild(model, tensors)` turns the family's model into the stored one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit import registry
from sparsekit.model import rebuild
from sparsekit.model.checkpoint import Checkpoint
from sparsekit.system import write_tensors

KEY = "resized"
PREFIX = "sparsekit"


def resized_by(folder: str | Path) -> str:
    """The stage that changed the width of a checkpoint's model; empty where none did."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(config[KEY]["stage"]) if isinstance(config.get(KEY), dict) and "stage" in config[KEY] else ""


def write_resized(model: Any, folder: Path, stage: str) -> None:
    """Write config.json and the weights of a model that a stage has resized."""
    config = json.loads(model.config.to_json_string())
    config.pop("_name_or_path", None)  # a path of this machine
    told = {
        KEY: {"stage": stage, "model_type": config["model_type"]},
        "model_type": f"{PREFIX}_{registry.normal(stage)}_{config['model_type']}",
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | told, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def build_resized(folder: Path, *, weights: bool = True) -> nn.Module:
    """The model of a folder, in eval mode. weights: False gives its structure on the meta device.

    Raises:
        ValueError: the stage's package is not installed, or what it builds has not the tensors that are stored.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told = config.pop(KEY)
    function: Any = registry.load("stages", told["stage"])
    stored = Checkpoint(folder)
    tensors: Mapping[str, Tensor] = (
        stored.tensors(stored) if weights else {name: torch.empty(stored.shape(name), device="meta") for name in stored}
    )
    model = rebuild.build(config | {"model_type": told["model_type"]}, None if weights else "meta")
    restore_resized(model, tensors, function)
    return model.eval()


def restore_resized(model: nn.Module, tensors: Mapping[str, Tensor], stage: Any) -> None:
    """Have a stage make a model of its family the one that these tensors are of, in place.

    Raises:
        ValueError: it has no `rebuild`, or the model has other tensors then.
    """
    function = getattr(stage, "rebuild", None)
    if function is None:
        raise ValueError(
            f"the stage `{stage.__name__}` declares that it resizes, and has no `rebuild`, so what it makes could not "
            f"be opened again: set {stage.__name__}.rebuild to a function (model, tensors)"
        )
    function(model, tensors)
    if other := model.state_dict().keys() ^ tensors.keys():
        raise ValueError(f"a model rebuilt by `{stage.__name__}` has other tensors than are stored: {min(other)}")
    wrong = [name for name, tensor in model.state_dict().items() if tensor.shape != tensors[name].shape]
    if wrong:
        raise ValueError(f"a model rebuilt by `{stage.__name__}` has {wrong[0]} in another shape than is stored")
