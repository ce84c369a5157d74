"""A checkpoint's tensors by the names that its model has: what `from_pretrained` of transformers would load."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.model.checkpoint import Checkpoint
from sparsekit.model.expert_forms import joined, pieces_of

WHOLES = 4  # fused parameters of one module of experts: two weights, two biases


class Tensors(Mapping[str, Tensor]):
    """The tensors of a model in a checkpoint, by their names in the model, read and converted one at a time.

    Families whose files have other names than the model (ViT), or other tensors (experts one by one on disk, fused in
    memory), go through the renamings and conversions of transformers itself. Tied copies are left out unless they are
    stored.

    model: as the checkpoint's config says, on the meta device
    doubled: names that several stored tensors would become; unused: stored names that become no tensor of the model,
    without those that its class says it ignores, or computes, which are in `ignored`

    Raises:
        ValueError: stored tensors cannot be converted.
    """

    def __init__(self, stored: Checkpoint, model: Any):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        self.stored, self.model = stored, model
        with joined(model):
            needed = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        renamings: list[Any] = [each for each in transforms if not isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        self.parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # the rest are buffers
        self.direct: dict[str, str] = {}  # name in the model -> stored name
        self.made: dict[str, str] = {}  # name in the model -> the group it is made with
        self.groups: dict[str, _Group] = {}
        self.unused: list[str] = []
        self.doubled: list[str] = []
        for key in sorted(stored, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, needed)
            if name not in needed and key in needed:  # renamed already, as sparsekit's own layouts are
                name, pattern = rename_source_key(key, [], [], model.base_model_prefix, needed)
            if name not in needed:
                self.unused.append(key)
            elif pattern is not None:
                group = self.groups.setdefault(name, _Group(by_pattern[pattern], name))
                group.parts.append((key, pattern))
            elif name in self.direct:
                self.doubled.append(name)
            else:
                self.direct[name] = key
        self.sizes = {name: stored.shape(key) for name, key in self.direct.items()}
        for first, group in self.groups.items():
            for name, tensor in group.convert(lambda key: torch.empty(stored.shape(key), device="meta"), model).items():
                if name in self.made or name in self.direct:
                    self.doubled.append(name)
                self.made[name], self.sizes[name] = first, tuple(tensor.shape)
        self.parts: dict[str, tuple[str, Any]] = {}  # name of an expert's tensor -> what it is a part of, and which
        self._split()
        patterns = [re.compile(each) for each in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        computed = {name for name, _ in model.named_buffers()}  # numbers of positions, which older files hold
        self.ignored = [key for key in self.unused if key in computed or any(each.search(key) for each in patterns)]
        self.unused = [key for key in self.unused if key not in set(self.ignored)]
        self._kept: tuple[str, dict[str, Tensor]] = ("", {})  # the group that was made last
        self._wholes: dict[str, Tensor] = {}  # what was taken apart last

    def _split(self) -> None:
        """Name the parts of fused experts, as the model has them, and not the whole."""
        for whole, parts in pieces_of(self.model).items():
            if whole not in self.sizes:
                continue
            size = self.sizes.pop(whole)
            for name, pick in parts:
                self.parts[name] = (whole, pick)
                try:
                    self.sizes[name] = tuple(pick(torch.empty(size, device="meta")).shape)
                except (IndexError, RuntimeError):
                    self.sizes[name] = ()  # of a whole that has another form

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name, in the dtype of the file."""
        if name in self.parts:
            whole, pick = self.parts[name]
            if whole not in self._wholes:
                while len(self._wholes) >= WHOLES:
                    del self._wholes[next(iter(self._wholes))]
                self._wholes[whole] = self._one(whole)
            part: Tensor = pick(self._wholes[whole])
            return part
        return self._one(name)

    def stores(self, name: str) -> bool:
        """Whether there is a tensor of that name in the model, or in what experts are fused in."""
        return name in self.direct or name in self.made

    def several(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several at once, by their names in the model or those of what experts are fused in.

        Those that are stored as the model has them are mapped from the disk; the map lasts as long as any of them.

        Raises:
            KeyError: there is no such tensor.
        """
        wanted = list(names)
        keys = {self.direct[name]: name for name in wanted if name in self.direct}
        found = {keys[key]: tensor for key, tensor in self.stored.tensors(keys).items()}
        found |= {name: self._one(name) for name in wanted if name not in found}
        self._kept = ("", {})  # what is given away may be written to
        return found

    def _one(self, name: str) -> Tensor:
        if name in self.direct:
            return self.stored.tensor(self.direct[name])
        first = self.made[name]
        if self._kept[0] != first:
            self._kept = ("", {})
            self._kept = (first, self.groups[first].convert(self.stored.tensor, self.model))
        return self._kept[1][name]

    def __iter__(self) -> Iterator[str]:
        yield from self.sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __contains__(self, name: object) -> bool:
        return name in self.sizes

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; no weight is read."""
        return self.sizes[name]

    @property
    def missing(self) -> list[str]:
        """Names of the model that nothing is stored for; transformers would fill them with random numbers."""
        tied = tied_names(self.model)
        partners = {*tied, *tied.values()}
        lost = [name for name in self.model.state_dict() if name not in self and name not in partners]
        return lost + [copied for copied, kept in tied.items() if copied not in self and kept not in self]


class _Group:
    """Stored tensors that are converted together. first: the name in the model that leads to them."""

    def __init__(self, converter: Any, first: str):
        self.converter, self.first = converter, first
        self.parts: list[tuple[str, str]] = []  # stored name, pattern of the converter

    def convert(self, read: Any, model: nn.Module) -> dict[str, Tensor]:
        """What is made of them, by names in the model. read: gives a stored tensor by its name."""
        work = copy.deepcopy(self.converter)
        try:
            for key, pattern in self.parts:
                work.add_tensor(self.first, key, pattern, lambda key=key: read(key))
            with joined(model):  # some conversions look at the model's own parameters
                found: dict[str, Any] = work.convert(self.first, model=model, config=model.config)
        except (RuntimeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"the tensors from {self.parts[0][0]} to {self.parts[-1][0]} do not make {self.first}: {error}"
            ) from error
        return {name: each[0] if isinstance(each, list) else each for name, each in found.items()}


def tied_names(model: Any) -> dict[str, str]:
    """The parameters of a model that are copies: name -> the name of what they are tied to."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def stored_form(model: Any, tensors: Mapping[str, Tensor], *, original: bool = True) -> dict[str, Tensor]:
    """Tensors of a model, by its names, as a checkpoint stores them: without tied copies and what its class leaves out.

    Whole blocks can be given one after another: what is converted together lies in one block.

    original: by the names, and in the form, of the family's files (transformers' own conversion, backwards); else as
        the model has them
    """
    from transformers.core_model_loading import revert_weight_conversion

    left_out = {*tied_names(model), *(getattr(model, "_keys_to_ignore_on_save", None) or ())}
    stored = {name: tensor.detach() for name, tensor in tensors.items() if name not in left_out}
    if not original:
        return stored
    with joined(model):
        return dict(revert_weight_conversion(model, stored))
