"""Where calibration and test text comes from.

A *source* is a function `(split, *, options...) -> Corpus` found through the entry-point group `sparsekit.sources`;
`split` is "calibration" or "test"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsekit import registry
from sparsekit.contracts import Count


@dataclass(frozen=True)
class Corpus:
    """Text, and how it is to be cut.

    documents: any sequence of texts; it may read them as they are asked for.
    separator: what joins them.
    sampling: "windows" draws windows from the joined text, "documents" from single documents (the C4 protocol).
    limit: number of test windows to keep, None for all.
    name: what an error calls it.
    """

    documents: Sequence[str]
    separator: str = "\n\n"
    sampling: Literal["windows", "documents"] = "windows"
    limit: int | None = None
    name: str = "the text"


def wikitext2(split: str) -> Corpus:
    """WikiText-2 raw: the train split joined by one blank for calibration, the test split joined by two newlines."""
    part, separator = {"calibration": ("train", " "), "test": ("test", "\n\n")}[split]
    path = _download("Salesforce/wikitext", f"wikitext-2-raw-v1/{part}-00000-of-00001.parquet")
    return Corpus(_rows("parquet", path, "text"), separator, name="wikitext2")


def ptb(split: str) -> Corpus:
    """Penn Treebank sentences, train for calibration and test for testing, both joined by one blank (SparseGPT).

    Others use the validation split or two newlines: their figures are not comparable.
    """
    part = {"calibration": "train", "test": "test"}[split]
    # The hub's own conversion of a data set whose script no longer runs.
    path = _download("ptb-text-only/ptb_text_only", f"penn_treebank/{part}/0000.parquet", "refs/convert/parquet")
    return Corpus(_rows("parquet", path, "sentence"), " ", name="ptb")


def c4(split: str, *, pack: bool = False) -> Corpus:
    """C4: windows of random documents of the first training shard; for testing 256 windows of the first 1100
    documents of the first validation shard, joined by one blank.

    pack: join the documents for calibration too, so that short ones serve as well.
    """
    part = {"calibration": "train.00000-of-01024", "test": "validation.00000-of-00008"}[split]
    documents = _rows("json", _download("allenai/c4", f"en/c4-{part}.json.gz"), "text")
    if split == "test":
        return Corpus(documents[:1100], " ", limit=256, name="c4")
    return Corpus(documents, " ", "windows" if pack else "documents", name="c4")


def python_docs(split: str) -> Corpus:
    """The language reference that every Python carries (`pydoc_data.topics`): needs no network and no file.

    Every fourth topic in alphabetical order (the 4th, 8th, ...) is test text, the others are calibration text.
    Topics quote one another, so a paragraph that a test topic has is left out of the calibration topics.
    The text differs a little between Python versions.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    test = names[3::4]
    if split == "test":
        return Corpus([topics[name] for name in test], name="python-docs")
    held_out = {paragraph.strip() for name in test for paragraph in topics[name].split("\n\n")}
    documents = []
    for name in names:
        if name not in test:
            kept = [part for part in topics[name].split("\n\n") if part.strip() not in held_out]
            documents.append("\n\n".join(kept))
    return Corpus([document for document in documents if document.strip()], name="python-docs")


def text(split: str, *, path: str, separator: str | None = "\n\n") -> Corpus:
    """A local text file, the same for both splits. `wiki.test.raw` gives what `wikitext2` gives from the hub.

    separator: joins the rows, which are lines as the hub's WikiText has them: with their line break, a blank line
        being an empty row. null takes the file as it stands instead.
    """
    file = _file(path)
    rows = load_rows("text", file, sample_by="document" if separator is None else "line", keep_linebreaks=True)["text"]
    if separator is None:
        return Corpus(rows, "", name=file.name)
    return Corpus(["" if row.isspace() else row for row in rows], separator, name=file.name)


def jsonl(split: str, *, path: str, field: str = "text", separator: str = " ", pack: bool = False) -> Corpus:
    """A local JSON-lines file (or one JSON list) of documents, the same for both splits, cut as C4 is.

    field: the name of the text in a record. separator: joins the documents for testing, and for packing.
    pack: join the documents for calibration too, so that short ones serve as well.
    """
    file = _file(path)
    return Corpus(_rows("json", file, field), separator, "windows" if pack else "documents", name=file.name)


def parquet(split: str, *, path: str, field: str = "text", separator: str = " ", pack: bool = False) -> Corpus:
    """A local Parquet file of documents; options as those of `jsonl`."""
    file = _file(path)
    return Corpus(_rows("parquet", file, field), separator, "windows" if pack else "documents", name=file.name)


def csv(split: str, *, path: str, field: str = "text", separator: str = " ", pack: bool = False) -> Corpus:
    """A local CSV file with a line of names; options as those of `jsonl`."""
    file = _file(path)
    return Corpus(
        _rows("csv", file, field, keep_default_na=False), separator, "windows" if pack else "documents", name=file.name
    )


PARTS = {"calibration": ("train",), "test": ("test", "validation")}  # of data sets, the first that is there


def hub(
    split: str,
    *,
    id: str,
    config: str | None = None,
    part: str | None = None,
    field: str = "text",
    rows: Count | None = None,
    streaming: bool = False,
    separator: str = " ",
    pack: bool = False,
) -> Corpus:
    """Any data set on the Hugging Face hub, or a local folder that `datasets` reads.

    id, config: its name, and that of its configuration. part: its split; null: train for calibration, test or else
        validation for testing, or the only one. field: the column of texts; one of chat messages is written out as
        "role: content", a line each. rows: only the first so many. streaming: read `rows` (or 10,000) without fetching
        all. separator: joins the documents for testing, and for packing. pack: as in `jsonl`.
    """
    import datasets

    try:
        with no_bars():
            found = datasets.load_dataset(id, config, streaming=streaming)
    except Exception as error:  # data sets and the hub are other people's and raise anything
        reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
        raise ValueError(f"the data set `{id}` cannot be had ({reason}): give a local file instead") from error
    name = part_of(id, list(found), part, split)
    table = found[name]
    count = rows or (10_000 if streaming else None)
    if streaming:
        table = datasets.Dataset.from_list(list(table.take(count)), features=table.features)
    elif count is not None:
        table = table.select(range(min(count, len(table))))
    return Corpus(_texts(table, field, id), separator, "windows" if pack else "documents", name=id)


def part_of(source: str, parts: list[str], part: str | None, split: str) -> str:
    """Which part of a data set is meant: the one that is named, or the first that is there of those for `split`.

    Raises ValueError where it cannot be told.
    """
    if part is not None and part not in parts:
        raise ValueError(f"{source} has no part `{part}`, {registry.suggest(part, parts)}")
    known = [each for each in (part, *PARTS[split]) if each in parts]
    if not known and len(parts) > 1:
        raise ValueError(f"{source} has the parts {', '.join(parts)}; say which by `part`")
    return str((known or parts)[0])


def _texts(table: Any, field: str, source: str) -> Sequence[str]:
    """A column of texts, or of chat messages, written out."""
    if field not in table.column_names:
        raise ValueError(f"`{source}` has no column `{field}`, {registry.suggest(field, list(table.column_names))}")
    first = table[0][field] if len(table) else None
    if isinstance(first, str):
        return table[field]  # type: ignore[no-any-return]
    if isinstance(first, list) and first and isinstance(first[0], dict) and {"role", "content"} <= first[0].keys():
        return ["\n".join(f"{each['role']}: {each['content']}" for each in row) for row in table[field]]
    raise ValueError(f"`{source}` has neither texts nor chat messages in the column `{field}`: name another one")


def _file(path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no file `{path}`")
    if file.stat().st_size == 0:
        raise ValueError(f"the file `{path}` is empty")
    return file


def load_rows(kind: str, path: Path, **options: Any) -> Any:
    """All rows of a local file as a data set with one split; kind as `datasets` names its readers."""
    import datasets

    try:
        with no_bars():
            rows = datasets.load_dataset(kind, data_files=str(path), split="train", **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        reason = str(cause).strip().partition("\n")[0]
        raise ValueError(f"`{path}` cannot be read as {kind} ({type(cause).__name__}: {reason})") from error
    if len(rows) == 0:
        raise ValueError(f"the file `{path}` has no rows")
    return rows


@contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars of `datasets` meanwhile: a local file is read in a moment."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _rows(kind: str, path: Path, field: str, **options: Any) -> Sequence[str]:
    """One text column of a local file, read as it is asked for."""
    rows = load_rows(kind, path, **options)
    texts = [key for key, value in rows.features.items() if getattr(value, "dtype", "") in ("string", "large_string")]
    if field not in texts:
        valid = ", ".join(f"`{each}`" for each in texts) or "none"
        raise ValueError(f"`{path.name}` has no text field `{field}`: set `field` to one that holds text ({valid})")
    if rows.data.column(field).null_count:
        raise ValueError(f"`{path.name}` has {rows.data.column(field).null_count} records without a `{field}`")
    return rows[field]


def _download(repository: str, name: str, revision: str | None = None) -> Path:
    """A file of a data set on the hub, from the local cache if it is there (these data sets do not change)."""
    import huggingface_hub as hub

    where: dict[str, Any] = {"repo_id": repository, "filename": name, "repo_type": "dataset", "revision": revision}
    try:
        return Path(hub.hf_hub_download(**where, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError:
        pass
    try:
        # One question with a short time limit first: a download of its own accord tries for up to a minute.
        hub.get_hf_file_metadata(hub.hf_hub_url(**where), timeout=5)
        return Path(hub.hf_hub_download(**where))
    except Exception as error:  # network, proxy, certificate, permission: each library below raises its own
        reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
        raise ValueError(
            f"the data set {repository} cannot be had from the Hugging Face hub ({reason}): give a local file instead, "
            "as in {source: jsonl, path: FILE} (text and parquet are read as well)"
        ) from error
