"""A folder of safetensors as transformers would read it: which files, which tensors, read lazily one by one."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsekit.system import track

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


class Checkpoint:
    """A folder of safetensors: names and shapes from the headers, tensors one at a time.

    Which files are read is what transformers reads: the one that config.json names under `transformers_weights`, else
    model.safetensors, else the shards of its index.

    files: those, in the order in which transformers reads them; doubled: names that are in several of them, of which
    the last one counts; unread: other files of weights in the folder

    Raises:
        ValueError: the folder is no checkpoint, a shard is missing or outside of it, or a file is truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json", f"{self.folder} is no checkpoint: it has no config.json")
        self.files = self._resolved()
        self.where: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None  # the file that was read last
        self.doubled: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors call them: F32, BF16 ...
        for file in self.files:
            with _opened(file) as handle:
                names = handle.keys()
                self.doubled += [name for name in names if name in self.where]
                self.where.update(dict.fromkeys(names, file))
                slices = {name: handle.get_slice(name) for name in names}
                self.shapes.update({name: tuple(each.get_shape()) for name, each in slices.items()})
                self.dtypes.update({name: each.get_dtype() for name, each in slices.items()})

    def _resolved(self) -> list[Path]:
        named = self.config.get("transformers_weights")
        if named is None:
            named = SINGLE if (self.folder / SINGLE).is_file() else INDEX
            if not (self.folder / named).is_file():
                others = sorted(file.name for file in self.folder.glob("*.safetensors"))
                found = f"; {others[0]} is a file that transformers would not find by itself" if others else ""
                raise ValueError(
                    f"{self.folder} holds no safetensors under the names that transformers reads ({SINGLE} or "
                    f"{INDEX}); sparsekit reads weights from safetensors only{found}"
                )
        file = self._inside(named, "config.json")
        if not str(named).endswith(".index.json"):
            return [file]
        index = read_json(file, f"{self.folder} is incomplete: {named} is not there")
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{file} is no index: its weight_map must give the file of every tensor")
        return [self._inside(shard, "its index") for shard in sorted({str(each) for each in shards.values()})]

    def _inside(self, name: Any, who: str) -> Path:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"{self.folder}: {who} names {name!r}; weights must be files of the folder itself")
        if not (self.folder / name).is_file():
            raise ValueError(f"{self.folder} is incomplete: {who} names {name}, which is not there")
        return self.folder / name

    @property
    def unread(self) -> list[str]:
        """Files of weights in the folder and below it, by their paths in it, that neither transformers reads nor
        sentence-transformers behind it."""
        found = (file for file in self.folder.rglob("*") if file.suffix.lower() in WEIGHTS and file.is_file())
        read, behind = set(self.files), {self.folder / name for name in modules_behind(self.folder)}
        return sorted(
            str(file.relative_to(self.folder)) for file in found if file not in read and behind.isdisjoint(file.parents)
        )

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, read from disk now, on the CPU, in the dtype of the file."""
        file = self.where[name]
        with _damage(file):
            if self._open is None or self._open[0] != file:  # reading a header of thousands of tensors takes its time
                self._open = (file, safe_open(file, framework="pt"))
            tensor: Tensor = self._open[1].get_tensor(name)
        return tensor

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several at once, from one memory map of each file; with a map for each tensor, pages would count twice."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.where[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, inside in wanted.items():
            with _opened(file) as handle:
                found |= {name: handle.get_tensor(name) for name in inside}
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return self.shapes[name]

    def digest(self) -> str:
        """SHA-256 over all weight files: two checkpoints with the same digest hold the same bits."""
        return _digest(self.files)


def modules_behind(folder: Path) -> list[str]:
    """The folders of the modules that sentence-transformers puts behind a model, by its modules.json."""
    try:
        told = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        names = [each["path"] for each in told if each["path"]]
        home = folder.resolve()
        return [name for name in names if (folder / name).is_dir() and home in (folder / name).resolve().parents]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read_json(file: Path, absent: str = "") -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        ValueError: it is not there (with the sentence `absent`), is no JSON, or something else than a mapping.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{absent or f'there is no {file}'}; give a folder that has one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as JSON ({type(error).__name__}); restore it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, must be a mapping; restore it")
    return content


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in track(files, "hashing"):
        with file.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    with _damage(file), safe_open(file, framework="pt") as handle:
        yield handle


@contextmanager
def _damage(file: Path) -> Iterator[None]:
    """A sentence for what safetensors says of a file that is no file of tensors any more."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or truncated ({os.path.getsize(file):,} bytes: {error}); fetch or write it again"
        ) from error
