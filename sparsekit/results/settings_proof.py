"""Proof that what lies beside the weights is the source's: config, tokenizer, generation config."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsekit.model import GENERATION, LAYERS, Checkpoint, decoded, load_tokenizer, read_json
from sparsekit.model.structure import Shape, entries_left

UNSAID = {"transformers_version", "_name_or_path", "torch_dtype", "_attn_implementation", "_commit_hash"}
PARTS = ("text_config", "vision_config")  # of a config, that may describe the layers
TOKENIZER = (  # attributes of a tokenizer that decide what a model reads
    *("chat_template", "special_tokens_map", "model_max_length", "padding_side", "truncation_side"),
    *("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "added_tokens_decoder"),
)


def prove_settings(
    folder: Path, source: Path, *, cast: bool = False, cut: bool = False, trust_remote_code: bool = False
) -> list[str]:
    """What differs from the source beside the weights, as sentences.

    cast: the run changed the dtype; cut: layers may be fewer and narrower, as structure.json says
    """
    options = {"trust_remote_code": trust_remote_code}
    return [
        *_config(folder, source, cast, cut, trust_remote_code),
        *_tokenizer(folder, source, options),
        *_generation(folder, source),
    ]


def _config(folder: Path, source: Path, cast: bool, cut: bool, trust: bool) -> Iterator[str]:
    made, begun = Shape.read(folder) if cut else None, Shape.read(source)
    one = dict(made.config) if made is not None else _read(folder, trust)
    other = dict(begun.config) if begun is not None and begun.layout != "plain" else _read(source, trust)
    free = UNSAID | ({"dtype"} if cast else set())
    if made is not None:
        from transformers import AutoConfig

        one = _plain(AutoConfig.for_model(**{str(k): v for k, v in decoded(one).items()}))
        if begun is not None and begun.layout != "plain":
            other = _plain(AutoConfig.for_model(**{str(k): v for k, v in decoded(other).items()}))
        free |= {"architectures", *LAYERS}
        kept = [layer.index for layer in made.layers]
        before = [layer.index for layer in begun.layers] if begun is not None else None
        both = [part for part in PARTS if isinstance(one.get(part), dict) and isinstance(other.get(part), dict)]
        described = [part for part in both if one[part] != other[part]]  # that of the layers that were cut
        for mine, theirs in [(one, other), *((one[part], other[part]) for part in described)]:
            told = next((theirs[key] for key in LAYERS if isinstance(theirs.get(key), int)), 0)
            told = told or len(theirs.get("layers_block_type") or ())
            count = len(before) if before is not None else told
            known = set(before) if before is not None else set(range(count)) if count else set(kept)
            if unknown := set(kept) - known:
                yield f"structure.json keeps layer {min(unknown)}, which {source} has not"
                return
            _leave(mine, theirs, [before.index(index) for index in kept] if before is not None else kept, count)
        for part in described:
            counts = {*LAYERS, "layers"}  # Kosmos 2.5
            one[part], other[part] = ({k: v for k, v in each[part].items() if k not in counts} for each in (one, other))
    if other.get("architectures") in (None, []):
        free |= {"architectures"}
    if other.get("dtype") is None and one.get("dtype") is not None:
        other["dtype"] = _stored_dtype(source)
    yield from _different("config.json", one, other, free, source)


def _leave(one: dict[str, Any], other: dict[str, Any], left: list[int], count: int) -> None:
    """Make a config's entries for each of `count` layers, in `other`, those of the layers that are left."""
    told = entries_left(other, count, left)
    for key, value in other.items():
        if isinstance(value, list) and len(value) == count and len(one.get(key) or []) == len(left):
            other[key] = [value[index] for index in left]
        elif key in told:
            other[key] = json.loads(json.dumps(told[key]))
            if isinstance(told[key], float) and math.isclose(told[key], one.get(key) or 0, rel_tol=1e-12):
                other[key] = one[key]  # a product of two cuts


def _read(folder: Path, trust: bool) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return _plain(AutoConfig.from_pretrained(folder, trust_remote_code=trust))
    except Exception as error:  # configs of other people raise anything
        raise ValueError(
            f"{folder / 'config.json'} cannot be read by transformers: {str(error).splitlines()[0]}"
        ) from error


def _plain(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = _said_only(json.loads(config.to_json_string(use_diff=False)))
    return found


def _said_only(value: Any) -> Any:
    """Without what says nothing about the model, in configs inside configs too."""
    if not isinstance(value, dict):
        return value
    inside = {key: _said_only(each) for key, each in value.items() if key not in UNSAID}
    for part in inside.values():
        if isinstance(part, dict):
            part.pop("dtype", None)  # transformers writes the whole model's into every part when it saves
    return inside


def _stored_dtype(folder: Path) -> str:
    stored = Checkpoint(folder)
    kinds = (stored.tensor(name).dtype for name in stored)
    return str(next((kind for kind in kinds if kind.is_floating_point), "")).removeprefix("torch.")


def _different(
    file: str, one: Mapping[str, Any], other: Mapping[str, Any], free: Collection[str], source: Path
) -> Iterator[str]:
    for key in sorted(one.keys() | other.keys()):
        if key not in free and one.get(key) != other.get(key):
            yield f"{file}: {key} is {_short(one.get(key))}, in {source} {_short(other.get(key))}"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _tokenizer(folder: Path, source: Path, options: dict[str, Any]) -> Iterator[str]:
    try:
        other = load_tokenizer(source, **options)
    except ValueError:
        return  # there is nothing to compare with
    try:
        one = load_tokenizer(folder, **options)
    except ValueError as error:
        yield str(error)
        return
    if hasattr(one, "image_mean") or hasattr(other, "image_mean"):
        yield from _different("the image processor", one.to_dict(), other.to_dict(), UNSAID, source)
        return
    if hasattr(one, "extractor") and hasattr(other, "extractor"):  # of sound
        yield from _different(
            "the feature extractor", one.extractor.to_dict(), other.extractor.to_dict(), UNSAID, source
        )
        one, other = one.tokenizer, other.tokenizer
        if one is None or other is None:
            if one is not other:
                yield f"the tokenizer is {'missing' if one is None else 'new'}, and not so in {source}"
            return
    mine, theirs = ({name: _said(getattr(each, name, None)) for name in TOKENIZER} for each in (one, other))
    yield from _different("the tokenizer", mine, theirs, (), source)
    if _cuts(one) != _cuts(other):
        yield f"the tokenizer cuts text into other tokens than that of {source}"


def _said(value: Any) -> Any:
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else value


def _cuts(tokenizer: Any) -> Any:
    """How a tokenizer cuts text, as something to compare."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    content = json.loads(backend.to_str())
    return {key: value for key, value in content.items() if key not in ("version", "truncation", "padding")}


def _generation(folder: Path, source: Path) -> Iterator[str]:
    one, other = folder / GENERATION, source / GENERATION
    if other.is_file():
        if not one.is_file():
            yield f"{GENERATION} is missing, and {source} has one"
        else:
            yield from _different(GENERATION, read_json(one), read_json(other), (), source)
    elif one.is_file():
        from transformers import GenerationConfig

        usual = json.loads(GenerationConfig().to_json_string())
        yield from _different(GENERATION, read_json(one), usual, {*UNSAID, "_from_model_config"}, source)
