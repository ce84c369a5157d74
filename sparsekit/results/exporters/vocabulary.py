"""A tokenizer as llama.cpp has it: byte-level BPE whose way of splitting text has a name there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.model import read_tokenizer, skeleton

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# what splits text before byte pairs are joined, as tokenizer.json has it -> its name in llama.cpp
KNOWN = {
    "gpt-2": [GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, GPT2],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}, BYTES],
    "qwen2": [{"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}, BYTES],
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens in a GGUF file


@dataclass(frozen=True)
class Vocabulary:
    """pre: the name of its way to split text; tokens and kinds by id; begins: whether a text begins with `bos`."""

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    bos: int | None
    eos: int | None
    pad: int | None
    begins: bool
    template: str | None

    @classmethod
    def read(cls, folder: Path, size: int) -> "Vocabulary":
        """The tokenizer of a checkpoint with `size` rows of embeddings.

        Raises:
            ValueError: llama.cpp has no name for it that is known here.
        """
        tokenizer = transformers_tokenizer(folder)
        told = json.loads(tokenizer.backend_tokenizer.to_str())  # as it works, which may not be as the file has it
        model = told["model"]
        if model.get("type") != "BPE" or model.get("byte_fallback"):
            kind = f"{model.get('type')} with byte fallback" if model.get("byte_fallback") else model.get("type")
            raise ValueError(
                f"its tokenizer is a {kind}; the exporter writes byte-level BPE, as GPT-2, Llama 3 and Qwen have it"
            )
        pre = _pre(told)
        tokens: list[str | None] = [None] * max(size, 1 + max(model["vocab"].values(), default=0))
        for token, place in model["vocab"].items():
            tokens[place] = token
        kinds = [NORMAL if token is not None else UNUSED for token in tokens]
        for added in told.get("added_tokens", []):
            while len(tokens) <= added["id"]:
                tokens.append(None)
                kinds.append(UNUSED)
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if len(tokens) > size:
            raise ValueError(f"its tokenizer has {len(tokens)} tokens, and the model {size} embeddings")
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        filled = [f"[PAD{place}]" if token is None else token for place, token in enumerate(tokens)]
        return cls(pre, filled, kinds, merges, *_special(tokenizer))


def _pre(told: dict[str, Any]) -> str:
    given = told.get("pre_tokenizer") or {}
    steps = given["pretokenizers"] if given.get("type") == "Sequence" else [given]
    steps = [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]
    normalizer = (told.get("normalizer") or {}).get("type")
    for name, known in KNOWN.items():
        if steps == known and (normalizer is None or (normalizer, name) == ("NFC", "qwen2")):
            return name
    raise ValueError(
        "its tokenizer splits text in a way that the exporter knows no name of llama.cpp for; it knows "
        f"{', '.join(KNOWN)}"
    )


def transformers_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint as transformers opens it; ValueError where it is none of the fast ones."""
    tokenizer = read_tokenizer(folder, skeleton(folder).config)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(f"its tokenizer, {type(tokenizer).__name__}, has no tokenizer.json")
    return tokenizer


def _special(tokenizer: Any) -> tuple[int | None, int | None, int | None, bool, str | None]:
    """Ids of the first, last and padding token, whether a text begins with the first, and the template of chats."""
    ids = tokenizer("a")["input_ids"]
    template = getattr(tokenizer, "chat_template", None)
    begins = bool(ids) and ids[0] == tokenizer.bos_token_id
    named = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return *named, begins, template if isinstance(template, str) else None
