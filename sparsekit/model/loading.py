"""Plain checkpoints, opened by transformers."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekit.model.checkpoint import Checkpoint, read_json
from sparsekit.model.hearing import HEARD, SoundReader
from sparsekit.model.modeling import PREFIX
from sparsekit.model.rebuild import class_of, unfilled

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")


def load_plain(folder: Path, *, dtype: str | None = None, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """The model and its tokenizer, or image processor, by plain transformers; dtype None keeps the checkpoint's.

    Raises:
        ValueError: a parameter has no tensor in the checkpoint (transformers would fill it with random numbers).
    """
    model, info = auto_class(folder).from_pretrained(
        folder, output_loading_info=True, dtype=dtype or "auto", trust_remote_code=trust_remote_code
    )
    refuse_lost(folder, model, _lost(info))
    return model.eval(), load_tokenizer(folder, trust_remote_code=trust_remote_code)


def plain_structure(folder: Path, *, dtype: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The same model without its weights: parameters on the meta device, in the dtypes that they are loaded in.

    Buffers that no file holds are computed, as from_pretrained computes them: in float32, then cast.

    Raises:
        ValueError: see `load_plain`.
    """
    import transformers

    opens = auto_class(folder)
    options = {"dtype": dtype or "auto", "trust_remote_code": trust_remote_code}
    model, info = opens.from_pretrained(folder, output_loading_info=True, device_map={"": "meta"}, **options)
    refuse_lost(folder, model, _lost(info))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with unfilled():
        if hasattr(opens, "from_config"):
            computed = opens.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        else:
            computed = opens._from_config(config, dtype=torch.float32)
    for name, buffer in computed.named_buffers():
        inner, _, own = name.rpartition(".")
        module = model.get_submodule(inner)
        module._buffers[own] = buffer.to(module._buffers[own].dtype)
    return model.eval()


def _lost(info: dict[str, Any]) -> list[str]:
    """Names without a tensor, by what from_pretrained tells of its loading."""
    return sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))


def refuse_lost(folder: Path, model: nn.Module, lost: list[str]) -> None:
    """Raise ValueError where tensors of a model are not in its folder."""
    if lost:
        raise ValueError(f"{folder} lacks {len(lost)} tensors of {type(model).__name__}, the first is {lost[0]}")


def auto_class(folder: Path) -> Any:
    """The class of transformers that opens a checkpoint: the one that its config's `architectures` names.

    A causal language model is opened by AutoModelForCausalLM, a vision model that classifies or makes masks (SAM) by
    the class for these; where nothing is named, the family's own task decides in this order.
    """
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        kind, named = config.get("model_type"), config.get("architectures")
        kind = kind.removeprefix(f"{PREFIX}_") if isinstance(kind, str) else kind
    except (OSError, ValueError, AttributeError):
        kind = named = None  # for transformers to complain about
    return class_of(kind, named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies beside the weights; of a vision model its image processor, of one that hears both.

    Raises:
        ValueError: there is none.
    """
    import transformers

    opens = auto_class(folder)
    images = (transformers.AutoModelForImageClassification, transformers.AutoModelForMaskGeneration)
    if opens in images or getattr(opens, "main_input_name", "") == "pixel_values":
        return image_processor(folder)
    if getattr(opens, "main_input_name", "") in HEARD:
        return sound_reader(folder)
    kind = read_json(folder / "config.json").get("model_type", "")
    known = not kind.startswith(PREFIX)  # a type of ours tells transformers nothing of the tokenizer
    config = None if known else transformers.PreTrainedConfig()
    return read_tokenizer(folder, config, trust_remote_code=trust_remote_code)


def read_tokenizer(folder: Path, config: Any = None, **options: Any) -> Any:
    """A folder's tokenizer. Told the family by its config, transformers does not read config.json for it.

    Raises:
        ValueError: there is none that transformers can read.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, config=config, **options)
    except Exception as error:  # the tokenizers library raises no other type for a file that is damaged
        raise ValueError(f"{folder} holds no tokenizer that transformers can read: {error}") from error


def image_processor(folder: Path) -> Any:
    """The image processor that lies beside the weights. Raises ValueError where there is none."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(folder)
    except ImportError as error:
        raise ValueError(
            "images are read by pillow, which is not installed: pip install 'sparsekit-lightning[vision]'"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no image processor that transformers can read: {error}") from error


def sound_reader(folder: Path) -> SoundReader:
    """What makes of sound what a model hears, and of words tokens. Raises ValueError where the former is not there."""
    import transformers

    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{folder} holds no feature extractor that transformers can read: {error}") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # models that write nothing down have none; of no other type where it is damaged
        tokenizer = None
        if any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file():
            warnings.warn(
                f"{folder} has a tokenizer that transformers cannot read, so it has none here: {error}", stacklevel=2
            )
    return SoundReader(extractor, tokenizer)


def check_layers(folder: Path) -> None:
    """Raise ValueError for a config of more layers than tensors are stored: building them could take all day.

    Nothing is said of a folder without weights.
    """
    try:
        stored = Checkpoint(folder)
    except ValueError:
        return
    for key in LAYERS:
        count = stored.config.get(key)
        if count is not None and (type(count) is not int or not 0 <= count <= len(stored.where)):
            raise ValueError(
                f"{folder / 'config.json'} says {key}: {count!r}, and there are {len(stored.where)} tensors; it is not "
                "the config of these weights"
            )


def plain_skeleton(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The model's structure on the meta device: modules and shapes, no weights read, no memory used.

    Raises:
        ValueError: config.json names no model that transformers knows.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        opens = auto_class(folder)
        with torch.device("meta"):
            if hasattr(opens, "from_config"):
                model = opens.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = opens._from_config(config)
    except Exception as error:  # a config's numbers may be anything, and so is what its class then raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"{folder} holds no language model, and no vision model, that transformers can build: {reason}"
        ) from error
    return model.eval()
