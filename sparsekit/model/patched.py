"""Towers that are given an image's patches, and beside them where each patch lies: Qwen-VL's, GLM-4V's, Gemma 4's."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIDE = 12  # patches along a side of the image that shows what a tower consists of: merged by 2 or by 3


def _grids(images: int, side: int) -> Tensor:
    return torch.tensor([[1, side, side]]).repeat(images, 1)


def _places(images: int, side: int) -> Tensor:
    """Column and row of every patch (images, patches, 2), row after row."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([columns.flatten(), rows.flatten()], dim=1).repeat(images, 1, 1)


# what a tower is given beside patches -> the same for so many square images of `side` times `side` patches
BESIDE: dict[str, Callable[[int, int], Tensor]] = {
    "grid_thw": _grids,
    "merge_sizes": lambda images, side: torch.ones(images, dtype=torch.long),
    "pixel_position_ids": _places,
    "pixel_attention_mask": lambda images, side: torch.ones(images, side * side, dtype=torch.long),
    "spatial_shapes": lambda images, side: torch.tensor([[side, side]]).repeat(images, 1),
}
# kinds of towers that are given every patch as a small image -> whether all of them come as one batch
SMALL_IMAGES = {"kimi_k25_vision": False, "paddleocr_vl_vision": True}
FIRST = ("pixel_values", "hidden_states")  # what patches are called


def _parameters(tower: Any) -> dict[str, inspect.Parameter]:
    known = inspect.signature(tower.forward).parameters
    return {name: each for name, each in known.items() if each.kind is each.POSITIONAL_OR_KEYWORD}


def beside_patches(tower: Any) -> list[str]:
    """What a tower is given beside patches; empty: it is given images as they are, or something else altogether."""
    given = _parameters(tower)
    first = next(iter(given), "")
    found = [name for name in given if name in BESIDE]
    needed = [name for name, each in given.items() if each.default is each.empty and name != first]
    return found if first in FIRST and found and set(needed) <= set(found) else []


def given_patches(tower: Any, patches: Tensor) -> dict[str, Tensor]:
    """What a tower's forward is given for patches of square images (images, patches, values).

    Raises:
        ValueError: these are other patches than the tower takes.
    """
    width = _embedder(tower).weight[0].numel()
    if patches.dim() != 3 or patches.shape[2] != width or math.isqrt(patches.shape[1]) ** 2 != patches.shape[1]:
        raise ValueError(
            f"{type(tower).__name__} is given patches of square images (images, patches, {width}), and here is "
            f"{tuple(patches.shape)}: give the image processor that the model came with"
        )
    count, side = len(patches), math.isqrt(patches.shape[1])
    names = beside_patches(tower)
    if "grid_thw" in names:  # the patches of all images are one sequence
        patches = patches.flatten(0, 1)
    if (kind := tower.config.model_type) in SMALL_IMAGES:
        patches = patches.unflatten(-1, _embedder(tower).weight.shape[1:])
        patches = patches[None] if SMALL_IMAGES[kind] else patches
    first = next(iter(_parameters(tower)))
    beside = {name: BESIDE[name](count, side).to(patches.device) for name in names}
    return {first: patches, **beside}


def sample_patches(tower: Any) -> Tensor:
    """Patches of one small image, all zeros (1, patches, values), on the tower's device and in its dtype.

    Raises ValueError where the tower does not begin with a linear or a convolution of patches.
    """
    width = _embedder(tower).weight[0].numel()
    return torch.zeros(1, SIDE * SIDE, width, dtype=tower.dtype, device=tower.device)


def _embedder(tower: Any) -> Any:
    """The layer that patches enter."""
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    found = [(name, module) for name, module in tower.named_modules() if isinstance(module, kinds)]
    if not found:
        raise ValueError(f"{type(tower).__name__} has no layer that takes patches, so it cannot be run yet")
    return next((module for name, module in found if "patch_embed" in name), found[0][1])
