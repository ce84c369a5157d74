"""Models built from a config alone, without weights, and how one that was built differs from another."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparsekit.model.expert_forms import split_experts

# what modules hold that says nothing about a model's structure, or is not kept right by cutting
STALE = (
    *("training", "intermediate_size", "gradient_checkpointing", "name_or_path", "p", "tokens", "watched"),
    "layers_are_rescaled",  # RWKV's weights, once it has run
)
FREQUENCIES = re.compile(r"([a-z]+_attention)_(?:original_)?inv_freq$")  # buffers of one kind of attention


def build(config: dict[str, Any], device: str | None = None) -> nn.Module:
    """The model of a transformers config (JSON), of the class that its `architectures` names, in eval mode, empty.

    device: "meta" for everything; None: parameters on "meta", buffers computed, so that only weights are wanting

    Raises:
        ValueError: transformers has no such model, or refuses the config.
    """
    import transformers

    given = decoded(config)
    kind = str(given.pop("model_type", None))
    try:
        made = transformers.AutoConfig.for_model(kind, **given)
        with torch.device(device) if device else unfilled():
            model: nn.Module = _opener(made)(made).eval()
    except Exception as error:  # a config's numbers may be anything, and so is what its class then raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"transformers cannot build a {kind} of this config: {reason}") from error
    split_experts(model)
    return model


def _opener(config: Any) -> Callable[[Any], nn.Module]:
    """What builds a model of a config: the class that its architectures name, or the family's own."""
    opens = class_of(config.model_type, (config.architectures or [None])[0])
    build: Callable[[Any], nn.Module] = getattr(opens, "from_config", None) or opens._from_config
    return build


def class_of(kind: Any, name: str | None) -> Any:
    """The class of transformers that opens a checkpoint, by its config: `model_type`, and the first architecture."""
    import transformers
    from transformers.models.auto import modeling_auto as known

    tasks = (
        (known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
        (known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, transformers.AutoModelForImageClassification),
        (known.MODEL_FOR_MASK_GENERATION_MAPPING_NAMES, transformers.AutoModelForMaskGeneration),
    )
    for classes, auto in tasks:
        own = classes.get(kind) if isinstance(kind, str) else None
        if own is not None and (name is None or name == own or name in (own if isinstance(own, tuple | list) else ())):
            return auto
    found = getattr(transformers, name, None) if name is not None else None
    ours = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    if ours and getattr(getattr(found, "config_class", None), "model_type", None) == kind:
        return found
    return next((auto for classes, auto in tasks if kind in classes), transformers.AutoModelForCausalLM)


def decoded(config: dict[str, Any]) -> dict[str, Any]:
    """A config as JSON has it, with the infinities that its class is given."""
    found: dict[str, Any] = json.loads(json.dumps(config), object_hook=_number)
    return found


def _number(found: dict[str, Any]) -> Any:
    """JSON has no infinity; transformers writes {"__float__": "Infinity"}, which no class of configs reads."""
    return float(found["__float__"]) if found.keys() == {"__float__"} else found


def config_of(model: Any) -> dict[str, Any]:
    """A model's config as JSON has it, without a path of this machine."""
    config: dict[str, Any] = json.loads(model.config.to_json_string())
    config.pop("_name_or_path", None)
    return config | {"dtype": str(model.dtype).removeprefix("torch."), "architectures": [type(model).__name__]}


def build_from(folder: Path) -> nn.Module:
    """The model of a folder, without weights, by transformers and the modeling file in the folder, which is run."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with unfilled():
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    split_experts(model)
    return model


class unfilled(TorchFunctionMode):
    """While this lasts, what torch.empty makes, as it makes parameters, takes no memory; buffers are computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def difference(built: nn.Module, model: nn.Module, spare: str | None = None) -> str | None:
    """The first thing, as words, in which a model that was built differs from `model`; None if only weights may.

    Modules, the numbers and texts they hold, the shapes of parameters and the values of buffers are compared.

    spare: the end of names of parameters that only `built` may have
    """
    one, other = dict(built.named_modules()), dict(model.named_modules())
    if one.keys() != other.keys():
        return f"{min(one.keys() ^ other.keys())} is in one of them only"
    for name in other:
        mine, theirs = _plain(one[name]), _plain(other[name])
        for key in sorted(mine.keys() & theirs.keys()):
            if mine[key] != theirs[key] and not _rounded(mine[key], theirs[key]):
                return f"{name}.{key} is {theirs[key]}, and would be {mine[key]}"
    return _parameters(built, model, spare) or _buffers(built, model)


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None)
        and key not in STALE
        and not key.startswith("_")
        and "dropout" not in key
    }


def _rounded(one: Any, other: Any) -> bool:
    """Whether two numbers differ as a product and its parts do, which a config has."""
    return isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=1e-12)


def _parameters(built: nn.Module, model: nn.Module, spare: str | None) -> str | None:
    one, other = ({n: tuple(p.shape) for n, p in m.named_parameters(remove_duplicate=False)} for m in (built, model))
    for name in sorted(one.keys() | other.keys()):
        extra = name not in other and spare is not None and name.endswith(spare)
        if one.get(name) != other.get(name) and not extra:
            return f"{name} is {other.get(name, 'absent')}, and would be {one.get(name, 'absent')}"
    return None


def _buffers(built: nn.Module, model: nn.Module) -> str | None:
    one, other = dict(built.named_buffers()), dict(model.named_buffers())
    stored = model.state_dict().keys()  # these have what is in the file
    kinds = set(getattr(getattr(model, "config", None), "layer_types", None) or ())
    for name in sorted(one.keys() | other.keys()):
        kind = FREQUENCIES.search(name)
        if kind and kinds and kind[1] not in kinds:
            continue  # angles of a kind of attention of which no layer is left
        if name not in one or name not in other or (name not in stored and not _same(one[name], other[name])):
            return f"the buffer {name} would be another"
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return one.shape == other.shape
    return torch.equal(one.to(other), other)  # a model that was cast has its buffers cast too
