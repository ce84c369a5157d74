"""Sound in, what a model hears out, and beside it the words that were said."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.contracts import Positive
from sparsekit.data.naming import drawn, resolve

KINDS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".au")
PARTS = {"calibration": ("train",), "test": ("test", "validation", "dev")}
SECONDS = 10.0


@dataclass(frozen=True)
class Sounds:
    """Files of sound. words: what is said in each, by its name; name: what an error calls them; seconds: of each"""

    files: Sequence[Path]
    words: Mapping[str, str]
    name: str
    seconds: float | None = None

    def __len__(self) -> int:
        return len(self.files)

    def heard(self, chosen: Sequence[int], extractor: Any) -> Tensor:
        """Some of the files as the model hears them (files, ...), float32, all of one length.

        The beginning of each is taken, or all of it where the model hears windows of one length (Whisper).
        Raises ValueError where one is shorter than that.
        """
        rate = int(extractor.sampling_rate)
        window = int(getattr(extractor, "n_samples", 0) or 0)  # of one length, to which silence is added
        length = int(self.seconds * rate) if self.seconds else window or int(SECONDS * rate)
        waves = [_read(self.files[index], rate)[:length] for index in chosen]
        short = [len(wave) / rate for wave in waves if len(wave) < length]
        if short and not window:
            raise ValueError(
                f"{len(short)} of {len(waves)} files of {self.name} are shorter than {length / rate:g} seconds, the "
                f"shortest has {min(short):.2g}: give a smaller `seconds`, or longer files"
            )
        made = extractor([wave.numpy() for wave in waves], sampling_rate=rate, return_tensors="pt")
        found: Tensor = made["input_features" if "input_features" in made else "input_values"]
        return found

    def said(self, chosen: Sequence[int]) -> list[str]:
        """The words of some of the files. Raises ValueError where they are not known."""
        silent = [self.files[index].name for index in chosen if self.files[index].name not in self.words]
        if silent:
            raise ValueError(
                f"what is said in {silent[0]} of {self.name} is not known: give the folder a metadata.csv or "
                "metadata.jsonl with the columns `file_name` and `text`"
            )
        return [self.words[self.files[index].name] for index in chosen]


def sounds(split: str, *, path: str, seconds: Positive | None = None) -> Sounds:
    """Sound for models that hear: a folder of files (wav, flac, ogg, mp3), or of folders train and test.

    What is said in them stands in metadata.csv or metadata.jsonl (`file_name`, `text`), as `datasets` has it.
    seconds: from the beginning of each file; null: the window that the model hears (Whisper: 30), else 10
    """
    home = Path(path)
    if not home.is_dir():
        raise ValueError(f"`{path}` is no folder: give one that holds files of sound ({', '.join(KINDS)})")
    inside = [home / name for name in PARTS["calibration" if split == "calibration" else "test"]]
    folder = next((each for each in inside if each.is_dir()), home)
    files = sorted(each for each in folder.rglob("*") if each.suffix.lower() in KINDS)
    if not files:
        raise ValueError(f"{folder} holds no files of sound ({', '.join(KINDS)})")
    return Sounds(files, _words(folder) or _words(home), home.name, seconds)


def _words(folder: Path) -> dict[str, str]:
    rows: list[dict[str, Any]] = []
    if (folder / "metadata.csv").is_file():
        with (folder / "metadata.csv").open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
    elif (folder / "metadata.jsonl").is_file():
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    return {Path(row["file_name"]).name: str(row["text"]) for row in rows if row.get("text") and row.get("file_name")}


def _read(file: Path, rate: int) -> Tensor:
    """A file's wave (values,), float32, the mean of its channels, at so many values a second."""
    try:
        import soundfile
    except ImportError:
        raise ValueError(
            "sound is read by soundfile, which is not installed: pip install 'sparsekit-lightning[sound]'"
        ) from None
    try:
        wave, own = soundfile.read(file, dtype="float32", always_2d=True)
    except Exception as error:  # of libsndfile's own making
        raise ValueError(f"{file} cannot be read as sound: {error}") from error
    wave = wave.mean(axis=1)
    if own != rate:
        import soxr

        wave = soxr.resample(wave, own, rate)
    return torch.from_numpy(wave)


def calibration_sounds(settings: Mapping[str, Any], extractor: Any) -> tuple[Tensor, Sounds, list[int]]:
    """Calibration sound as `Sounds.heard` gives it, `samples` different files drawn by `seed`; and which they are.

    settings: {source: sounds, samples, seed, the source's own options}; a `length` is passed over.
    Raises ValueError if the source gives no sound, or too little.
    """
    function, options = resolve(settings)
    found = function("calibration", **options)
    if not isinstance(found, Sounds):
        raise ValueError(
            f"the model hears, and the source `{settings['source']}` gives no sound: give calibration: "
            "{source: sounds, path: FOLDER}"
        )
    chosen = drawn(len(found), settings, found.name, "files")
    return found.heard(chosen, extractor), found, chosen
