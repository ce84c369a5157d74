"""Training text: rows of equal length for training and validation, in an order that depends on the seed alone."""

import hashlib
import math
import random
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from sparsekit.data import CALIBRATION, Corpus, corpus, load_rows, resolve
from sparsekit.data import FORMATS as FILES
from sparsekit.system import Team
from sparsekit.train.records import FORMATS, IGNORED, Example, end, example, format_of

PIECE = 2**20  # characters that are tokenised at once
Row = tuple[list[int], ...]  # tokens and labels, and for records positions
OPEN = 16  # rows that are filled at the same time: records of any length find a place


@dataclass(frozen=True)
class Rows:
    """Sequences of equal length. ids, labels: (rows, length) int64; a label of -100 is not predicted.

    Of images ids are the pixels (rows, channels, height, width), float32, and labels mean nothing.

    positions: (rows, length), which begin again with every record of a row: by them transformers keeps records from
        attending to one another; None: a row is one text
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, chosen: Any) -> "Rows":
        return Rows(*(None if part is None else part[chosen] for part in (self.ids, self.labels, self.positions)))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "Rows":
        """The same on a device."""
        return Rows(*(None if part is None else part.to(device) for part in (self.ids, self.labels, self.positions)))  # type: ignore[arg-type]


def forward(model: nn.Module, ids: Tensor, positions: Tensor | None, **options: Any) -> Any:
    """A model's outputs for tokens (sequences, length), as transformers gives them. positions: as in `Rows`"""
    if positions is not None:
        options["position_ids"] = positions
    return model(input_ids=ids, use_cache=False, **options)


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether positions that begin again keep the records of a row apart in this model: tried on a few tokens."""
    device = next(model.parameters()).device
    pair = torch.arange(1, 9, device=device)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    try:
        together = forward(model, pair, positions).logits[:, 4:].float()
    except TypeError:  # it takes none
        return False
    alone = forward(model, pair[:, 4:], None).logits.float()
    return bool((together - alone).abs().max() <= 0.02 * alone.std())  # half precision rounds otherwise


class Batches:
    """The batches of a whole run, in one epoch: what Trainer.fit takes as its loader.

    Passes over the rows, each in an order of its own, until `count` batches are full. Which rows a batch has depends on
    its number and the seed alone, so a resumed run goes on where it was left. Of several processes (`team`) each takes
    its share of every batch.
    """

    def __init__(self, rows: Rows, *, count: int, batch: int, seed: int = 0, team: Team = Team()):  # noqa: B008
        self.rows, self.count, self.batch, self.seed, self.team = rows, count, batch, seed, team
        self.position = 0  # batches that were given out

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Tokens and labels (batch, length), the numbers of their rows (batch,), and positions where there are any."""
        while self.position < self.count:
            self.position += 1
            chosen = self.chosen(self.position - 1)
            rows = self.rows[chosen]
            numbers = torch.tensor(chosen)
            yield (rows.ids, rows.labels, numbers, *(() if rows.positions is None else (rows.positions,)))
        self.position = 0

    def chosen(self, number: int) -> list[int]:
        """The rows of a batch, of those that this process takes."""
        wide = self.batch * self.team.size
        places = range(number * wide + self.team.rank, (number + 1) * wide, self.team.size)
        orders = {turn: self._order(turn) for turn in {place // len(self.rows) for place in places}}
        return [orders[place // len(self.rows)][place % len(self.rows)] for place in places]

    def _order(self, turn: int) -> list[int]:
        return random.Random(f"{self.seed} {turn}").sample(range(len(self.rows)), len(self.rows))

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoints."""
        return {"position": self.position, "text": self._digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was left.

        Raises:
            ValueError: the rows are others.
        """
        if state["text"] != self._digest():
            raise ValueError("the training text is not what the interrupted run read; restore it, or start a new run")
        self.position = state["position"]

    def _digest(self) -> str:
        parts = (self.rows.ids, self.rows.labels, self.rows.positions)
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts if part is not None)).hexdigest()


def check_training_source(settings: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """What an option `source` says as a mapping; no text is read. ValueError where it cannot be."""
    if settings is None:
        return {}
    known = {"source": settings} if isinstance(settings, str) else dict(settings)
    if known.get("format", "auto") not in FORMATS:
        format_of([], known["format"])
    resolve(known, ("format", *CALIBRATION, "batch"))
    return known


def _known_source(settings: str | dict[str, Any]) -> str | dict[str, Any]:
    check_training_source(settings)
    return settings


TrainingSource = Annotated[str | dict[str, Any], AfterValidator(_known_source)]  # the type of an option `source`


def training_rows(
    settings: Mapping[str, Any],
    tokenizer: Any,
    *,
    length: int,
    rows: int,
    validation: float,
    seed: int,
    first: int | None = None,
    together: bool = True,
) -> tuple[Rows, Rows]:
    """Rows to train on, at most `rows` of them, and rows of other text to validate on, a share `validation` of them.

    settings: {source: a name or a local file, its options..., format: auto, text, instruction or chat}. A local JSON or
    Parquet file with `messages`, or with `instruction` and `output`, is read as records of which the answers alone are
    predicted (see `records`); everything else as text. Rows of text follow one another without a gap; records are not
    divided, what of one is longer than a row is cut off, and rows are filled up with the end of text.
    together: several records may share a row, each with positions of its own; else each has a row
    first: a token that stands before every row of text and is counted in its length, as in `data.sample`; records have
    what their format says.
    Documents come in random order, text that is one piece (WikiText) from its beginning.
    Raises ValueError if settings or text do not serve, or there is less than two rows of it.
    """
    documents, divided = _documents(check_training_source(settings), tokenizer, seed, first)
    held_out = max(1, math.ceil(validation * rows))
    packed = _divided(documents, length, first) if divided else _whole(documents, length, end(tokenizer), together)
    found = list(islice(packed, rows + held_out))
    packed.close()
    if len(found) < 2:
        raise ValueError(
            f"{settings['source']} gives {len(found)} rows of {length} tokens, and recovery needs at least 2, one of "
            "them for validation: take more text or a smaller `length`"
        )
    both = Rows(*(torch.tensor(part) for part in zip(*found, strict=True)))  # a row has two parts, or three
    held_out = min(held_out, max(1, math.ceil(validation * len(both) / (1 + validation))))
    return both[held_out:], both[:held_out]


def _documents(
    settings: dict[str, Any], tokenizer: Any, seed: int, first: int | None
) -> tuple[Iterator[Example], bool]:
    """Tokens and labels of each document, and whether they are text that may be divided between rows."""
    records = _records(settings)
    if records is not None:
        kind = format_of(records.column_names, settings.get("format", "auto"))
        if kind != "text":
            return (example(records[i], kind, tokenizer) for i in _shuffled(len(records), seed)), False
    found = corpus(settings, "calibration", ("format", *CALIBRATION, "batch"))
    if found.sampling == "windows":
        return _pieces(found, tokenizer, special=first is None), True
    texts = (found.documents[i] for i in _shuffled(len(found.documents), seed))
    special = first is None
    ended = (_encoded(tokenizer, text, special)[0] + end(tokenizer) for text in texts)
    return ((ids, ids) for ids in ended), True


def _pieces(corpus: Corpus, tokenizer: Any, special: bool) -> Iterator[Example]:
    """The joined text in pieces of some million characters: no more of a large corpus is read than is needed."""
    held, size = list[str](), 0
    for text in corpus.documents:
        held.append(text)
        size += len(text)
        if size >= PIECE:
            yield _encoded(tokenizer, corpus.separator.join([*held, ""]), special)
            special, held, size = False, [], 0
    yield _encoded(tokenizer, corpus.separator.join(held), special)


def _encoded(tokenizer: Any, text: str, special: bool) -> Example:
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids, ids


def _records(settings: dict[str, Any]) -> Any:
    """The rows of a local file that may hold records; None for what is text by its kind or by what was asked."""
    path = Path(str(settings.get("path", settings["source"])))
    kind = FILES.get(path.suffix.lower())
    asked = settings.get("format", "auto")
    if kind not in ("jsonl", "parquet") or not path.is_file() or asked == "text" or "field" in settings:
        if asked in ("instruction", "chat"):
            raise ValueError(f"format {asked} needs a local JSON or Parquet file of records, and no `field`")
        return None
    return load_rows("json" if kind == "jsonl" else kind, path)


def _shuffled(count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


def _divided(documents: Iterator[Example], length: int, first: int | None) -> Generator[Row, None, None]:
    """Rows cut from one stream of tokens; the tail is dropped."""
    before = [] if first is None else [first]
    length -= len(before)
    ids: list[int] = []
    labels: list[int] = []
    for more, said in documents:
        ids, labels = ids + more, labels + said
        full = len(ids) // length * length
        for start in range(0, full, length):
            yield before + ids[start : start + length], before + labels[start : start + length]
        ids, labels = ids[full:], labels[full:]


def _whole(documents: Iterator[Example], length: int, filler: list[int], together: bool) -> Generator[Row, None, None]:
    """Rows of whole documents: each goes into the first of the open rows that has room; the fullest makes place."""
    rows: list[Row] = []
    cut = mute = 0
    try:
        for ids, labels in documents:
            cut += len(ids) > length
            ids, labels = ids[:length], labels[:length]
            if not any(label != IGNORED for label in labels):
                mute += 1
                continue
            place = next((row for row in rows if together and len(row[0]) + len(ids) <= length), None)
            if place is None:
                if len(rows) == (OPEN if together else 1):
                    yield _filled(rows.pop(max(range(len(rows)), key=lambda i: len(rows[i][0]))), length, filler)
                place = ([], [], [])
                rows.append(place)
            # nothing before a record's first token predicts it, where another record stands before it
            for part, more in zip(place, (ids, [IGNORED, *labels[1:]], range(len(ids))), strict=True):
                part.extend(more)
        for row in rows:
            yield _filled(row, length, filler)
    finally:  # also where no more rows are asked for
        if cut:
            warnings.warn(f"{cut} records are longer than {length} tokens and were cut", stacklevel=3)
        if mute:
            warnings.warn(f"{mute} records have no answer within {length} tokens and were left out", stacklevel=3)


def _filled(row: Row, length: int, filler: list[int]) -> Row:
    missing = length - len(row[0])
    return row[0] + (filler or [0]) * missing, row[1] + [IGNORED] * missing, row[2] + list(range(missing))
