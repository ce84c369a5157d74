"""One part of a model as what is pruned: the tower that sees images of a model that reads text too, and the like."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparsekit.model.patched import beside_patches

# names of what reads no text
TOWERS = re.compile(r"(^|[._])(vision|visual|image|video|audio|speech|vit|vqmodel|qformer|resampler|connector)([._]|$)")
SEES = re.compile(r"(^|[._])(vision|visual|image|vit)([._]|$)")  # and of these, what sees images
_CHOSEN = "_sparsekit_tower"  # the attribute of a model that holds the name of its chosen tower


def towers_of(model: Any) -> dict[str, str]:
    """The towers of a model that can be run by themselves: `vision` -> its name, of one that is given images alone;
    `text` -> its name, of a model that compares texts with images (CLIP), whose whole needs both."""
    from transformers import PreTrainedModel

    found: dict[str, list[tuple[str, Any]]] = {"vision": [], "text": []}
    compares = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
    for name, module in model.named_modules():
        if not name or not isinstance(module, PreTrainedModel):
            continue
        kind = "vision" if sees(module) else "text"
        if kind == "text" and (not compares or TOWERS.search(name) or "input_ids" not in _takes(module)):
            continue
        if not any(name.startswith(f"{other}.") for other, _ in found[kind]):
            found[kind].append((name, module))
    if not found["vision"] or (getattr(model, "main_input_name", "") == "pixel_values" and not model.can_generate()):
        return {}

    def size(item: tuple[str, Any]) -> int:
        return sum(parameter.numel() for parameter in item[1].parameters())

    return {kind: max(items, key=size)[0] for kind, items in found.items() if items}


def _other_tower(model: Any) -> str:
    """The name of what sees images in a model and cannot be run by itself; empty: nothing does."""
    from transformers import PreTrainedModel

    inside = [name for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    return next((name for name in inside if SEES.search(name)), "")


def _takes(module: Any) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _given(module: Any) -> list[str]:
    """What a module's forward cannot do without."""
    known = inspect.signature(module.forward).parameters.values()
    asked = [each.name for each in known if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    first = _takes(module)[:1]
    return asked or (first if first == ["pixel_values"] else [])


def choose_tower(model: Any, part: str | None) -> None:
    """From now on a tower is what is looked at, run and pruned of this model; None: the whole.

    part: a recipe's `prune`: text, vision, encoder, decoder or all. An encoder and a decoder are parts of the whole.

    Raises:
        ValueError: the model has no such part.
    """
    name, known = type(model).__name__, towers_of(model)
    two = bool(getattr(model.config, "is_encoder_decoder", False))
    compares = "text" in known and "vision" in known
    parts = [
        *(["encoder", "decoder", "all"] if two else []),
        *(known if compares else ["text", *known] if known else []),
    ]
    if part is None and compares:
        raise ValueError(f"{name} compares texts with images, each by a tower of its own: give `prune: text` or vision")
    if part == "all" and known and not two:
        raise ValueError(
            f"{name} is calibrated on text in one part and on images in the other, so a run prunes one of them: give "
            "`prune: text` or vision, and the other in a second recipe whose model is the first one's result"
        )
    if part is not None and part != "all" and part not in parts:
        if part == "vision" and (own := _other_tower(model)):
            raise ValueError(
                f"{own} of {name} is given more than images ({', '.join(_takes(model.get_submodule(own))[:2])}), and "
                "cannot be walked through yet: leave `prune` out to have its text part pruned"
            )
        has = f"has {', '.join(parts)}" if parts else "is of one part"
        raise ValueError(f"prune is {part}, and {name} {has}: {'give one of them' if parts else 'leave it out'}")
    object.__setattr__(model, _CHOSEN, known[part] if part in known and (compares or part == "vision") else "")


def same_tower(model: Any, like: Any) -> None:
    """Have the same tower chosen of a model as of another copy of it; None: the whole model."""
    object.__setattr__(model, _CHOSEN, tower_name(like))


@contextmanager
def with_tower(model: Any, part: str | None) -> Iterator[None]:
    """While this lasts, a tower is chosen of a model as `choose_tower` does."""
    choose_tower(model, part)
    try:
        yield
    finally:
        same_tower(model, None)


def tower_name(model: Any) -> str:
    """The name of the chosen tower inside a model; empty: the whole model."""
    return str(getattr(model, _CHOSEN, "") or "")


def chosen_tower(model: Any) -> Any:
    """The chosen tower of a model, or the model itself."""
    name = tower_name(model)
    return model.get_submodule(name) if name else model


def sees(tower: Any) -> bool:
    """Whether a tower is given pixels."""
    return bool(beside_patches(tower)) or _given(tower) == ["pixel_values"]
