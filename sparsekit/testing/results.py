"""The contracts of a metric and of an exporter, for the one-line tests of anybody's."""

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsekit import registry
from sparsekit.contracts import Exporter, Figure, Finished
from sparsekit.maths import Quantization, parse
from sparsekit.measure import Subject, prepare_metric
from sparsekit.model import find_blocks
from sparsekit.testing.contexts import tiny_model
from sparsekit.walk import digests


class Letters:
    """A tokenizer that knows letters alone, for the tiny model's 96 tokens."""

    eos_token_id = 1
    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """{"input_ids": one number a letter}."""
        return {"input_ids": [ord(letter) % 94 + 2 for letter in text]}

    def save_pretrained(self, folder: Any) -> None:
        """Nothing."""


def check_metric(metric: Callable[..., Any], **options: Any) -> None:
    """Raise AssertionError, with a sentence, for the first clause of the contract that `metric` breaks.

    A metric is `(preparation, *, options...) -> measure` with a docstring and options with defaults, and
    `measure(subject)` gives finite figures by name, the same twice, with settings that JSON can hold; the model is not
    changed.

    options: of the metric, such as few windows
    """
    import json
    import math

    _check_function(metric, "metric")
    model, tokenizer = tiny_model(), Letters()
    before = digests(model)
    measure = prepare_metric(metric, tokenizer, model.config, length=32, **options)
    found = [measure(Subject(model, tokenizer)) for _ in range(2)]
    assert found[0] and isinstance(found[0], dict), "it must give figures by name"
    for name, figure in found[0].items():
        assert isinstance(name, str) and isinstance(figure, Figure), f"{name!r} is not the name of a Figure"
        assert math.isfinite(figure.value), f"{name} is {figure.value}"
        assert figure.better in ("higher", "lower"), f"{name}: better is {figure.better!r}"
        json.dumps(figure.settings)
    assert found[0] == found[1], "measuring twice gave different figures"
    assert digests(model) == before, "the metric changed the model"


def check_exporter(exporter: Callable[..., Any], **options: Any) -> None:
    """Raise AssertionError, with a sentence, for the first clause of the contract that `exporter` breaks.

    An exporter is `(*, options...) -> Exporter` with a docstring and options with defaults. It says in a sentence why a
    model cannot be written, or writes it to the folder that it is given and nowhere else, reads it back without a
    difference, and sees one where the model is another. It is tried on a tiny model that is 2:4, and on a 4-bit grid.

    options: of the exporter
    """
    _check_function(exporter, "exporter")
    made = exporter(**options)
    assert isinstance(made, Exporter), f"it must return sparsekit.contracts.Exporter, not a {type(made).__name__}"
    written = False
    for quantized in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            finished = _finished(Path(folder) / "model", quantized)
            why = made.why_not(finished)
            assert isinstance(why, str), "why_not must give a text, empty where the model can be written"
            if why:
                continue
            written = True
            stored = {file.name: file.read_bytes() for file in finished.folder.iterdir()}
            target = Path(folder) / "target"
            made.write(finished, target)
            assert target.is_dir() and any(target.iterdir()), "write left nothing in its folder"
            now = {file.name: file.read_bytes() for file in finished.folder.iterdir()}
            assert stored == now, "write changed the model itself"
            found = made.differences(finished, target)
            assert found == [], f"what it wrote is not the model: {found[:1]}"
    assert written, "it writes neither a sparse model nor a quantized one"


def _check_function(function: Callable[..., Any], what: str) -> None:
    assert (inspect.getdoc(function) or "").strip(), f"the {what} has no docstring"
    for parameter in registry.options(function).values():
        assert parameter.default is not parameter.empty, f"option {parameter.name} has no default"


def _letters() -> Any:
    """A tokenizer as transformers has them, of one token a letter and one for "th": byte-level BPE, 96 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [chr(code) for code in range(33, 127) if chr(code) != "|"]
    tokens += ["\u0120", "\u010a", "th"]  # what stands for a blank and for a new line, and the only merge
    made = Tokenizer(models.BPE({token: place for place, token in enumerate(tokens)}, [("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="~")


def _finished(folder: Path, quantized: bool) -> Finished:
    model, pattern = tiny_model(), parse("2:4")
    masks: dict[str, Tensor] = {}
    kind = Quantization(4, 16)
    linears = {name: linear for block in find_blocks(model) for name, linear in block.linears.items()}
    for name, linear in linears.items():
        masks[name] = pattern.keep(linear.weight.abs())
        weight: Tensor = linear.weight * masks[name]
        linear.write_pruned(kind.fit(weight).nearest(weight) if quantized else weight)
    saved: Any = model
    saved.save_pretrained(folder)
    _letters().save_pretrained(folder)
    grids = dict.fromkeys(linears, kind) if quantized else {}
    return Finished(folder, dict.fromkeys(linears, "2:4"), grids, lambda: masks, {})
