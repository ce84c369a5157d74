"""What `prune` and `fit` give back in Python: the model, its masks, the report, and the proof."""

import tempfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.maths import parse
from sparsekit.model import as_linears, load, opened, tied_names
from sparsekit.model.structure import Shape
from sparsekit.results import REPORT, read_report, seal, verify_run, write_manifest
from sparsekit.results import masks as read_masks
from sparsekit.run import result
from sparsekit.system import session, unpack, write_json
from sparsekit.walk import check_zeros, digests


class Result:
    """A finished run, in its folder. `prune` gives a `Pruned`, which is the same for a model in memory."""

    def __init__(self, folder: str | Path):
        self.folder: Path | None = Path(folder)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What report.json holds (docs/design.md)."""
        assert self.folder is not None
        return read_report(self.folder)

    @cached_property
    def model(self) -> Any:
        """The model, loaded from disk when it is first asked for."""
        assert self.folder is not None
        return load(self.folder / "model")[0]

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """A linear's name -> the weights (out, in) that were kept; empty where no stage pruned weights."""
        assert self.folder is not None
        return read_masks(self.folder) if self.report["sparsity"]["per_linear"] else {}

    @property
    def verified(self) -> bool:
        """Whether everything that was asked is proved."""
        return not self.verify()

    def verify(self) -> list[str]:
        """What is not as asked, as sentences, from the files of the run; none: it is proved."""
        assert self.folder is not None
        found = self.report["verified"]
        with session():
            return ([] if found is True else list(found)) + verify_run(self.folder).failures

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the model to the Hugging Face hub; its address. options: of huggingface_hub's upload_folder.

        Raises:
            ValueError: the result is not as asked.
        """
        if failures := self.verify():
            raise ValueError(f"the result is not as asked, so it is not uploaded: {failures[0]}")
        from huggingface_hub import HfApi

        assert self.folder is not None
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=self.folder / "model", **options))


class Pruned(Result):
    """A model that was pruned in memory.

    model: it; masks: a linear's name -> the weights (out, in) that are kept; report: what a run's report.json holds of
    the pruning. Nothing is on disk before `save`.
    """

    def __init__(
        self,
        planned: Any,
        model: nn.Module,
        tokenizer: Any,
        outcome: Any,
        report: dict[str, Any],
        before: Mapping[str, str],
        held: Any,
    ):
        self.folder = None
        self._planned, self._tokenizer, self._outcome, self._before = planned, tokenizer, outcome, before
        self._held = held  # the folder of committed blocks lives as long as this
        self.__dict__ |= {"model": model, "report": report}
        self.__dict__["masks"] = {
            name: kept for block in outcome.blocks for name, kept in _kept(outcome, block).items()
        }

    def verify(self) -> list[str]:
        """What is not as asked, as sentences; none: it is proved.

        The masks hold and have the pattern, everything that no stage says it changed has the hash that it came with,
        and, once saved, the checkpoint read back from disk is this model bit for bit. Of a model that structures were
        cut out of, tensors inside the blocks, and those that have a stretch for each layer, are not compared with those
        that came, whose shapes they no longer have.
        """
        with as_linears(self.model):
            return self._failures()

    def _failures(self) -> list[str]:
        failures = []
        now = digests(self.model)
        changed = result.changed(self._outcome)
        inside = tuple(f"{block.name.rpartition('.')[0]}." for block in self._outcome.blocks[:1])
        told = {name for units, _ in self._outcome.cuts for part in units.parts for name in part.outside}
        for name, digest in now.items():
            free = name in changed or name in told or (self._outcome.cuts and name.startswith(inside))
            if not free and self._before.get(name) != digest:
                failures.append(f"{name} is not what it was when the model came, and no stage says that it changed it")
        patterns = {name: parse(each["pattern"]) for name, each in self.report["sparsity"]["per_linear"].items()}
        for block in self._outcome.blocks:
            for name, linear in block.linears.items():
                if name not in self.masks:
                    continue
                weight = linear.weight
                if int(weight[~self.masks[name].to(weight.device)].count_nonzero()):
                    failures.append(f"{name} has weights where its mask says zero")
                failures += _wrong_pattern(name, weight, patterns[name])
        if self.folder is not None:
            with session():
                stored = opened(self.folder / "model")
                state, copies = self.model.state_dict(), tied_names(self.model)
                failures += [
                    f"{name} is another on disk than in memory"
                    for name in sorted({*state, *stored} - (copies.keys() - set(stored)))
                    if name not in state or name not in stored or not _same_bits(state[name], stored[name])
                ]
        return failures

    def save(self, folder: str | Path) -> Path:
        """Write the model, its masks and its report, as `sparsekit fit` leaves them, and prove it from disk.

        `folder/model` loads by from_pretrained of transformers, `sparsekit verify folder` proves it again.

        Raises:
            ValueError: the folder holds something already, or what was written is not this model.
            OSError: the disk is full.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty; give a folder that does not exist yet")
        folder.mkdir(parents=True, exist_ok=True)
        with session(), as_linears(self.model):
            result.save(self._planned, self.model, self._tokenizer or _NoTokenizer(), self._outcome, folder)
        self.folder = folder
        failures = self.verify()
        self.report["verified"] = failures or True
        shape = Shape.read(folder / "model")
        claims = result.claims(self._planned, self.report, result.changed(self._outcome), shape)
        self.report["manifest"] = write_manifest(folder, None, claims, self.report["versions"])
        write_json(folder / REPORT, self.report)
        seal(folder)
        if failures:
            raise ValueError(f"what was written to {folder} is not as asked: {failures[0]}")
        return folder

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """As `Result.push_to_hub`; what was not saved yet is saved to a temporary folder first."""
        if self.folder is not None:
            return super().push_to_hub(repository, **options)
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / "run")
            try:
                return super().push_to_hub(repository, **options)
            finally:
                self.folder = None


class _NoTokenizer:
    """Stands for the tokenizer of a model that came without one: there is nothing to write."""

    def save_pretrained(self, folder: Any) -> None:
        """Nothing."""


def _kept(outcome: Any, block: Any) -> dict[str, Tensor]:
    if outcome.masks is None:
        return {}
    bits = outcome.masks.masks(block)
    return {name: unpack(bits[name], block.linears[name].shape) for name in bits if name in block.records}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(a, b)


def _wrong_pattern(name: str, weight: Tensor, pattern: Any) -> list[str]:
    try:
        check_zeros(name, (weight != 0).cpu(), pattern)
    except ValueError as error:
        return [str(error)]
    return []
