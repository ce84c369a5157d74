"""Taking whole layers out of a model in memory, and out of what its config says of layers by their numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.blocks import Block
from sparsekit.model.discovery import find_blocks
from sparsekit.model.vision import described

PER_LAYER = {  # fields of configs with an entry for each layer
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "sliding_windows",
    "layer_rope_theta",
    "rope_scaling_layers",
    "activation_sparsity_pattern",
    "indexer_types",
    "attention_layers",
    "intermediate_size",
}
# fields with the numbers of some layers: those of SAM that see the whole image, those with an attention, with experts
NUMBERED = {"global_attn_indexes", "attn_layer_indices", "moe_layers", "mlp_only_layers"}
# fields that count layers at the beginning: the dense ones before experts
BEFORE = {"first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"}
UP_TO = {"moe_layer_end_index"}  # fields that are the number of a last layer
AT_END = {"num_kv_shared_layers"}  # fields that count layers at the end
OVERRIDES = "per_layer_config"  # fields of some layers by their numbers
COUNTS = ("num_layers", "n_layer", "num_hidden_layers")  # what the module around the layers calls their number
SHARING = "first_kv_shared_layer_idx"  # where the layers begin that read the keys of others
NUMBERS = ("layer_idx", "layer_id")  # what modules of a layer call its place in the cache
# of models whose layers have inputs of their own (Gemma 3n and 4): the modules that make those of all layers at once
INPUTS = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}  # -> the dimension with a stretch for each


@dataclass(frozen=True, eq=False)
class Stretch:
    """What of a parameter outside the layers is one layer's own. mask: of the places (size,) of the dimension `dim`."""

    dim: int
    mask: Tensor


def stretches(model: Any, block: Block) -> dict[str, Stretch]:
    """The parameters outside a model's layers that have a stretch for each layer, by name, and which is this one's."""
    size = getattr(described(model), "hidden_size_per_layer_input", None) or 0
    home = block.name.rpartition(".")[0].rpartition(".")[0]
    found: dict[str, Stretch] = {}
    for name, dim in INPUTS.items() if size else ():
        module: Any = getattr(model.get_submodule(home), name, None)
        if module is not None:
            places = torch.arange(module.weight.shape[dim]) // size
            found[f"{home}.{name}.weight".lstrip(".")] = Stretch(dim, places == block.index)
    return found


def places_left(gone: Sequence[Mapping[str, Stretch]]) -> dict[str, tuple[int, Tensor]]:
    """The dimension, and the places in it, that are left of each parameter when layers with these stretches go."""
    left: dict[str, tuple[int, Tensor]] = {}
    for each in gone:
        for name, stretch in each.items():
            before = left[name][1] if name in left else torch.ones_like(stretch.mask)
            left[name] = stretch.dim, before & ~stretch.mask
    return {name: (dim, mask.nonzero().flatten()) for name, (dim, mask) in left.items()}


def drop_layers(
    model: nn.Module, blocks: Sequence[Block], gone: set[int], own: Sequence[Mapping[str, Stretch]]
) -> None:
    """Remove layers, and have the config tell of those that are left, which are numbered anew.

    own: what parameters outside have of each of these layers
    """
    path = blocks[0].name.rpartition(".")[0]
    parent, _, name = path.rpartition(".")
    home = model.get_submodule(parent)
    layers = getattr(home, name)
    left = [index for index in range(len(layers)) if index not in gone]
    setattr(home, name, nn.ModuleList(layers[index] for index in left))
    for count in COUNTS:
        if getattr(home, count, None) == len(layers):
            setattr(home, count, len(left))  # type: ignore[arg-type]
    for parameter, (dim, places) in places_left(own).items():
        _keep(model.get_submodule(parameter.rpartition(".")[0]), dim, places)
    config = described(model)
    _tell(config, len(layers), left)
    if hasattr(home, SHARING):
        setattr(home, SHARING, len(left) - config.num_kv_shared_layers)
    for block in find_blocks(model):
        for module in block.module.modules():
            for number in NUMBERS:
                if getattr(module, number, None) is not None:
                    setattr(module, number, block.index)


def entries_left(fields: Mapping[str, Any], count: int, left: Sequence[int]) -> dict[str, Any]:
    """The fields of a config of `count` layers, by name, that say something else when these layers are left."""
    found: dict[str, Any] = {}
    for key, value in fields.items():
        listed = key in PER_LAYER or key.endswith("_per_layer")  # others, such as several ends of text, may be as long
        if listed and isinstance(value, list) and len(value) == count:
            found[key] = [value[index] for index in left]
        elif key in NUMBERED and isinstance(value, list):
            found[key] = [left.index(index) for index in value if index in left]
        elif key in BEFORE and isinstance(value, int):
            found[key] = sum(index < value for index in left)
        elif key in UP_TO and isinstance(value, int) and value >= 0:
            found[key] = sum(index <= value for index in left) - 1
        elif key in AT_END and isinstance(value, int):
            found[key] = sum(index >= count - value for index in left)
        elif key == "block_types" and isinstance(value, list):  # repeated until there is one for each layer
            found[key] = [value[index % len(value)] for index in left]
        elif key == "scale_depth" and isinstance(value, int | float):
            # a branch is multiplied by it, over the root of the number of layers
            found[key] = value * (len(left) / count) ** 0.5
        elif key == OVERRIDES and isinstance(value, dict):
            own = {int(number): dict(said) for number, said in value.items()}
            found[key] = {place: own[index] for place, index in enumerate(left) if index in own}
    return found


def _tell(config: Any, count: int, left: Sequence[int]) -> None:
    """Have a config of `count` layers tell of those that are left."""
    overrides = getattr(getattr(config, "_heterogeneity_spec", None), "per_layer_overrides", None)
    fields = vars(config) | ({OVERRIDES: overrides} if overrides else {})
    config.num_hidden_layers = len(left)
    for key, value in entries_left(fields, count, left).items():
        setattr(config, key, value)


def _keep(module: Any, dim: int, places: Tensor) -> None:
    """Only these rows of a linear, or columns of an embedding."""
    weight = module.weight.detach().index_select(dim, places.to(module.weight.device))
    module.weight = nn.Parameter(weight, module.weight.requires_grad)
    if isinstance(module, nn.Linear):
        module.out_features = len(places)
    else:
        module.embedding_dim = len(places)
