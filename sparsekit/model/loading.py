"""Plain checkpoints, opened by transformers."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.checkpoint import Checkpoint


def load_plain(folder: Path, *, dtype: str | None = None, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """The model and its tokenizer, or image processor, by plain transformers; dtype None keeps the checkpoint's.

    Raises:
        ValueError: a parameter has no tensor in the checkpoint (transformers would fill it with random numbers).
    """
    model, info = _load(folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if lost:
        raise ValueError(f"{folder} lacks {len(lost)} tensors of {type(model).__name__}, the first is {lost[0]}")
    return model.eval(), load_tokenizer(folder, trust_remote_code=trust_remote_code)


def missing_tensors(folder: Path, trust_remote_code: bool = False) -> set[str]:
    """The parameters that transformers would fill with random numbers, found by loading the whole checkpoint."""
    return set(_load(folder, dtype="auto", trust_remote_code=trust_remote_code)[1]["missing_keys"])


def _load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    loader = auto_class(folder)
    return loader.from_pretrained(folder, output_loading_info=True, **options)  # type: ignore[no-any-return]


class Loaded(Checkpoint):
    """A checkpoint that is stored under other names than its model has, as ViT's are, by those that the model has."""

    def __init__(self, folder: str | Path, trust_remote_code: bool = False):
        super().__init__(folder)
        model, info = _load(self.folder, dtype="auto", trust_remote_code=trust_remote_code)
        lost = {*info["missing_keys"], *(str(key) for key in info.get("mismatched_keys", ()))}
        self.state = {name: tensor for name, tensor in model.state_dict().items() if name not in lost}
        self.where = dict.fromkeys(self.state, self.files[0])

    def tensor(self, name: str) -> Tensor:
        """As `Checkpoint.tensor`."""
        return self.state[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As `Checkpoint.tensors`."""
        return {name: self.state[name] for name in names}

    def shape(self, name: str) -> tuple[int, ...]:
        """As `Checkpoint.shape`."""
        return tuple(self.state[name].shape)


def auto_class(folder: Path) -> Any:
    """The class of transformers that opens a checkpoint: of causal language models, or for a vision model of image
    classification or mask generation (SAM)."""
    import transformers
    from transformers.models.auto import modeling_auto as known

    try:
        kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError):
        kind = None  # for transformers to complain about
    if kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    if kind in known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return transformers.AutoModelForImageClassification
    if kind in known.MODEL_FOR_MASK_GENERATION_MAPPING_NAMES:
        return transformers.AutoModelForMaskGeneration
    return transformers.AutoModelForCausalLM


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies beside the weights; of a vision model its image processor.

    Raises:
        ValueError: there is none.
    """
    import transformers

    if auto_class(folder) is not transformers.AutoModelForCausalLM:
        return _image_processor(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no tokenizer that transformers can read: {error}") from error


def _image_processor(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(folder)
    except ImportError as error:
        raise ValueError(
            "images are read by pillow, which is not installed: pip install 'sparsekit-lightning[vision]'"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no image processor that transformers can read: {error}") from error


def plain_skeleton(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The model's structure on the meta device: modules and shapes, no weights read, no memory used.

    Raises:
        ValueError: config.json names no causal language model, and no vision model, that transformers knows.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = auto_class(folder).from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{folder} holds no causal language model, and no vision model, that transformers can build: {reason}"
        ) from error
    return model.eval()
