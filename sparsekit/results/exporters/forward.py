"""A language model's forward pass as another runtime's file: what is exported, and the texts that it is proved on."""

from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.contracts import Finished
from sparsekit.results.exporters.llamacpp import TEXTS
from sparsekit.system import write_json

DTYPES = {"f32": "float32", "f16": "float16"}
LIMITS = {"f32": 1e-3, "f16": 0.1}  # how far logits may be from the model's, relative to their root mean square


class Forward(nn.Module):
    """Token ids and mask to logits, and nothing else."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (sequences, length, vocabulary)."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def forward_of(finished: Finished, precision: str) -> tuple[Forward, tuple[Tensor, Tensor], tuple[dict, dict]]:
    """The forward pass, what it can be traced with, and which sizes of that are free; as torch.export has them."""
    from sparsekit.model import load

    model: Any = load(finished.folder, dtype=DTYPES[precision])[0]
    ids = torch.arange(2, 26).reshape(2, 12) % model.config.get_text_config().vocab_size
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return Forward(model).eval(), (ids, torch.ones_like(ids)), (free, dict(free))


def why_no_forward(finished: Finished, packages: Iterable[str]) -> str:
    """Why a model has no such file: packages that write it are missing, or it has other inputs; empty: it has."""
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            return f"the package {package}, which writes the file, is not installed: pip install {' '.join(packages)}"
    from sparsekit.model import auto_class

    if getattr(auto_class(finished.folder), "__name__", "") != "AutoModelForCausalLM":
        return "it is no causal language model, and the file has token ids for its input"
    return ""


def logits_apart(
    finished: Finished, target: Path, precision: str, client: str, run: Callable[[Tensor, Tensor], Tensor] | None
) -> list[str]:
    """How far a runtime's logits are from the model's, into proof.json; a sentence where that is too far.

    client: what runs the file, by its package. run: ids and mask (sequences, length) -> logits; None: it is not there
    """
    if run is None:
        said = f"not run in {client}: it is not installed"
        write_json(target / "proof.json", {"precision": precision, "client": None, "said": said})
        return []
    from sparsekit.model import load

    model, tokenizer = load(finished.folder, dtype=DTYPES[precision])
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    found = run(ids, mask).float()
    there = mask.bool()
    apart = float((found - expected)[there].abs().max() / expected[there].square().mean().sqrt())
    named = f"{client} {version(client)}"
    proof = {"precision": precision, "client": named, "texts": len(texts), "logits within": round(apart, 6)}
    write_json(target / "proof.json", proof | {"said": f"in {named} logits within {apart:.1e} of their size"})
    if not apart <= LIMITS[precision]:
        return [f"logits in {named} are {apart:.2g} of their size from the model's, beyond {LIMITS[precision]}"]
    return []


def installed(package: str) -> bool:
    """Whether a package is there."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
