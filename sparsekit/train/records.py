"""Records of instructions and conversations as tokens, with loss on the answers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

IGNORED = -100  # the label of a token that is read but not predicted
Example = tuple[list[int], list[int]]  # tokens and labels of one document
FORMATS = ("auto", "text", "instruction", "chat")
PROMPT = {  # the Alpaca format, with and without an input
    True: "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    False: "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
}


def format_of(fields: Sequence[str], name: str = "auto") -> str:
    """The format of records with these fields: `name` itself where it is not "auto".

    "chat" is `messages`, each with role and content; "instruction" is instruction, perhaps input, and output; all else
    is "text". Raises ValueError for a format that the fields do not serve, or that is not known.
    """
    if name not in FORMATS:
        raise ValueError(f"`format` is {name!r}; it can be {', '.join(FORMATS)}")
    fits = ["chat"] * ("messages" in fields) + ["instruction", "chat"] * ({"instruction", "output"} <= {*fields})
    if name == "auto":
        return fits[0] if fits else "text"
    if name not in ("text", *fits):
        needs = "`messages`, or `instruction` and `output`" if name == "chat" else "`instruction` and `output`"
        raise ValueError(f"format {name} needs records with {needs}; these have {', '.join(sorted(fields))}")
    return name


def example(record: Mapping[str, Any], kind: str, tokenizer: Any) -> Example:
    """Tokens and labels of a record; kind: "instruction" or "chat".

    An instruction becomes the Alpaca prompt, its answer and the end of text. A conversation is laid out by the
    tokenizer's chat template, and what the assistant says is predicted; an instruction serves as one of two turns.
    """
    if kind == "instruction":
        given = str(record.get("input") or "").strip()
        prompt = PROMPT[bool(given)].format(instruction=str(record["instruction"] or "").strip(), input=given)
        return _joined(tokenizer, prompt, str(record["output"] or "").strip())
    messages = record.get("messages") or [
        {"role": "user", "content": "\n\n".join(map(str, filter(None, (record["instruction"], record.get("input")))))},
        {"role": "assistant", "content": str(record["output"] or "")},
    ]
    return _conversation(tokenizer, messages)


def _joined(tokenizer: Any, prompt: str, answer: str) -> Example:
    asked = tokenizer(prompt, verbose=False)["input_ids"]
    said = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"] + end(tokenizer)
    return asked + said, [IGNORED] * len(asked) + said


def end(tokenizer: Any) -> list[int]:
    """The token that ends a text, if the tokenizer has one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _conversation(tokenizer: Any, messages: list[dict[str, str]]) -> Example:
    """Turn by turn: what the template adds for an answer, after what asks for it, is the answer."""
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template; use records with instruction and output, or text")
    ids = _laid_out(tokenizer, messages)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = _laid_out(tokenizer, messages[:index], add_generation_prompt=True)
            said = _laid_out(tokenizer, messages[: index + 1])
            if ids[: len(said)] == said and said[: len(asked)] == asked:  # else it writes earlier turns otherwise
                labels[len(asked) : len(said)] = said[len(asked) :]
    return ids, labels


def _laid_out(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
