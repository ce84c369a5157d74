"""What older readers look for in a checkpoint: settings under the names that they had before transformers 5.

mlx-lm, CTranslate2, transformers 4 and others take the base of rotary positions from `rope_theta`. Where that is
missing, as in what transformers 5 writes, they take 10,000 and compute something else without a word.
"""

import copy
import json
import operator
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer_config.json"
SCALED = ("linear", "dynamic", "yarn", "longrope", "llama3")  # what transformers 4 knew
NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def tell_older_readers(folder: Path) -> None:
    """Add to config.json and tokenizer_config.json what readers older than transformers 5 need."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if (told := with_older_names(config)) != config:
        file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    file = folder / TOKENIZER
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":  # the same under the name that both know
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        if settings.get("extra_special_tokens") == []:  # transformers 4 asks for a mapping
            del settings["extra_special_tokens"]
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def with_older_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with `rope_theta` and its like beside `rope_parameters`.

    What transformers itself reads stays the same: an addition that it would read otherwise is left out.
    """
    told, read = copy.deepcopy(dict(config)), _as_read(config)
    for place, key, value in _additions(config):
        inside = reduce(operator.getitem, place, told)
        inside[key] = value
        if read is None or _as_read(told) != read:
            del inside[key]
    return told


def _additions(config: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Where, under which name and what stands beside `rope_parameters` for older readers, in configs inside too."""
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield from _additions(value, (*place, key))
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if isinstance(rope.get("full_attention"), dict):  # by kind of layer, as in Gemma 3
        found = _older(rope["full_attention"])
        local = (rope.get("sliding_attention") or {}).get("rope_theta")
        found |= {} if local is None else {"rope_local_base_freq": local}
    else:
        found = _older(rope)
    names = NEOX if config.get("model_type") == "gpt_neox" else {}
    for key, value in found.items():
        if names.get(key, key) not in config:
            yield place, names.get(key, key), value


def _older(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings as configs had them side by side."""
    found = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    if rope.get("rope_type") in SCALED:
        found["rope_scaling"] = {key: value for key, value in rope.items() if key not in found}
    return found


def _as_read(config: Mapping[str, Any]) -> str | None:
    """What transformers makes of a config; None: it does not know the type, or refuses it."""
    from transformers import AutoConfig

    try:
        read = AutoConfig.for_model(**json.loads(json.dumps(config)))
    except Exception:  # configs of other people raise anything
        return None
    return str(read.to_json_string(use_diff=False))
