"""Packed checkpoints: quantized linears in 4 or 8 bits a weight, in the layout that compressed-tensors calls
pack-quantized, which transformers (with the package compressed-tensors) and vLLM read.

A linear `name.weight` (out, in) becomes
    weight_packed      int32 (out, ceil(in bits / 32)): levels, the first column in the lowest bits
    weight_scale       (out, in / group), in the weight's dtype
    weight_shape       int64 (2,): out, in
    weight_zero_point  int32 (ceil(out bits / 32), in / group), packed along out; only of an asymmetric grid
and all other tensors stay as they are, in the same files.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit.contracts import Exporter, Finished
from sparsekit.maths import Grid, Quantization
from sparsekit.model import Checkpoint, Tensors, is_linear, opened
from sparsekit.results.exporters.rewriting import rewrite
from sparsekit.system import sync, write_json

_BITS = (4, 8)


def packed() -> Exporter:
    """Quantized linears in 4 or 8 bits a weight, as compressed-tensors packs them: transformers and vLLM read it.

    Source: the layout pack-quantized of compressed-tensors, github.com/neuralmagic/compressed-tensors.
    """
    return Exporter(_why_not, _write, lambda finished, target: packed_differences(target, finished.folder))


def _why_not(finished: Finished) -> str:
    if not finished.quantization:
        return "no stage left weights on a quantization grid: end the recipe with one, such as {quantize: {bits: 4}}"
    try:
        check_packable(finished.folder, finished.quantization, trust_remote_code=finished.trust_remote_code)
    except ValueError as error:
        return str(error)
    return ""


def _write(finished: Finished, target: Path) -> None:
    export_packed(finished.folder, target, finished.quantization, trust_remote_code=finished.trust_remote_code)


def check_packable(
    source: str | Path, quantizations: Mapping[str, Quantization], *, trust_remote_code: bool = False
) -> None:
    """Raise ValueError where `export_packed` would, by shapes alone."""
    stored = opened(source, trust_remote_code=trust_remote_code)
    modules = {name: module for name, module in stored.model.named_modules() if is_linear(module)}
    for name, kind in quantizations.items():
        _check(name, kind, modules)
        _key(stored, name)
    _config(dict(quantizations), list(modules))


def export_packed(
    source: str | Path,
    target: str | Path,
    quantizations: Mapping[str, Quantization | Mapping[str, Any]],
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write the checkpoint `source`, whose linears lie on their grids, to the folder `target` in packed form.

    quantizations: name of a linear -> the options that it was quantized with. The grids are recovered from the weights
        themselves, so unpacking gives the same weights bit for bit. Linears that are not named stay dense.
    The folder is written aside and renamed, one file of weights in memory at a time; an earlier one is replaced.

    Raises:
        ValueError: nothing is named, a linear is not there, is on no such grid, has bits other than 4 and 8, or is
            stored transposed (GPT-2).
        OSError: the disk is full or the folder cannot be written.
    """
    stored, target = opened(source, trust_remote_code=trust_remote_code), Path(target)
    checkpoint = stored.stored
    kinds = {name: Quantization.of(given) for name, given in quantizations.items()}
    modules = {name: module for name, module in stored.model.named_modules() if is_linear(module)}
    keys = {}
    for name, kind in kinds.items():
        _check(name, kind, modules)
        keys[_key(stored, name)] = name
    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _config(kinds, list(modules))
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)

    def packed_or_same(key: str, tensor: Tensor) -> dict[str, Tensor]:
        return _packed(key, tensor, kinds[keys[key]], keys[key]) if key in keys else {key: tensor}

    try:
        rewrite(checkpoint.folder, aside, packed_or_same, without=["config.json"])
        write_json(aside / "config.json", config)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _key(stored: Tensors, name: str) -> str:
    """The stored name of a linear's weight, which must be the model's own but for the prefix of a bare model."""
    full = f"{name}.weight"
    key = stored.direct.get(full)
    if key is None or not full.endswith(key):
        raise ValueError(
            f"{stored.stored.folder} holds no tensor {full}; its layers must be stored under the model's own names"
        )
    return key


def read_packed(folder: str | Path) -> Iterator[tuple[str, tuple[Tensor, Grid]]]:
    """Unpack: the name of every packed linear, as it is stored, with its weight (out, in) and grid, one at a time.

    The weight is in the dtype that the scale has. `dict(read_packed(folder))` holds all of them in memory.
    Raises ValueError when the folder holds no packed weights.
    """
    checkpoint = Checkpoint(folder)
    groups = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    names = [key.removesuffix(".weight_packed") for key in checkpoint if key.endswith(".weight_packed")]
    if not names or not groups or groups.get("format") != "pack-quantized":
        raise ValueError(f"{folder} holds no weights in the pack-quantized layout")
    for name in names:
        scale = checkpoint.tensor(f"{name}.weight_scale")
        out, width = checkpoint.tensor(f"{name}.weight_shape").tolist()
        bits = _bits(name, groups)
        symmetric = f"{name}.weight_zero_point" not in checkpoint
        if symmetric:
            zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.float32)
        else:
            packed = checkpoint.tensor(f"{name}.weight_zero_point")
            zero = unpack(packed.t().contiguous(), bits, out).t().float().contiguous()
        grid = Grid(bits, symmetric, width, scale.float(), zero)
        levels = unpack(checkpoint.tensor(f"{name}.weight_packed"), bits, width)
        yield name, (grid.values(levels).to(scale.dtype), grid)


def packed_differences(packed: str | Path, dense: str | Path) -> list[str]:
    """What loading `packed` would give other than the checkpoint `dense` holds, as sentences; none if nothing is."""
    one, other = Checkpoint(packed), Checkpoint(dense)
    found = []
    unpacked = set()
    for name, (weight, _) in read_packed(packed):
        unpacked.add(f"{name}.weight")
        stored = other.tensor(f"{name}.weight") if f"{name}.weight" in other else None
        if stored is None or stored.dtype != weight.dtype or not torch.equal(stored, weight):
            found.append(f"{name}.weight unpacks to other values than {dense} holds")
    for key in other:
        if key not in unpacked and not (key in one and torch.equal(one.tensor(key), other.tensor(key))):
            found.append(f"{key} differs from {dense}")
    return found


def pack(levels: Tensor, bits: int) -> Tensor:
    """Levels (rows, n), whole numbers from 0 below 2^bits, as int32 (rows, ceil(n bits / 32)); bits 4 or 8."""
    each = 32 // bits
    padded = torch.nn.functional.pad(levels.to(torch.int64), (0, -levels.shape[1] % each))
    shifts = torch.arange(0, 32, bits, device=levels.device)
    words = (padded.unflatten(1, (-1, each)) << shifts).sum(2)  # below 2^32
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The levels (rows, count) that `pack` was given, as int32."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(2) >> shifts) & (2**bits - 1)).flatten(1)[:, :count]


def _packed(key: str, weight: Tensor, kind: Quantization, name: str) -> dict[str, Tensor]:
    grid = kind.recover(weight, name)
    stem = key.removesuffix(".weight")
    tensors = {
        f"{stem}.weight_packed": pack(grid.levels(weight), kind.bits),
        f"{stem}.weight_scale": grid.scale.to(weight.dtype),
        f"{stem}.weight_shape": torch.tensor(weight.shape),
    }
    if not kind.symmetric:
        tensors[f"{stem}.weight_zero_point"] = pack(grid.zero.t(), kind.bits).t().contiguous()
    return tensors


def _check(name: str, kind: Quantization, modules: dict[str, torch.nn.Module]) -> None:
    if name not in modules:
        raise ValueError(f"the model has no linear {name}, so it cannot be packed; name the model's own modules")
    if not isinstance(modules[name], torch.nn.Linear):
        raise ValueError(f"{name} is a {type(modules[name]).__name__}, which the packed layout has no place for")
    if kind.bits not in _BITS:
        raise ValueError(
            f"{name} has {kind.bits} bits: the packed layout is for 4 and 8; other numbers are simulated only, "
            "that is, they stay in the dense checkpoint as weights of few values"
        )


def _config(kinds: dict[str, Quantization], linears: list[str]) -> dict[str, Any]:
    """The quantization_config of config.json: every linear if all have one setting, else each by its name."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, kind in kinds.items():
        groups.setdefault((kind.bits, kind.group, kind.symmetric), []).append(name)
    if not groups:
        raise ValueError("no linear was quantized, so there is nothing to pack")
    asymmetric = [names for (_, _, symmetric), names in groups.items() if not symmetric]
    if asymmetric and len(groups) > 1:
        raise ValueError(
            f"{asymmetric[0][0]} is asymmetric and the linears have {len(groups)} different settings: transformers "
            "reads zero points only where all linears share one; give all the same options, or symmetric: true"
        )
    # compressed modules in transformers have no place for packed zero points; unpacking while it loads has
    return ({"dequantize": True} if asymmetric else {}) | {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if group == "channel" else "group",
                    "group_size": None if group == "channel" else group,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for number, ((bits, group, symmetric), names) in enumerate(groups.items())
        },
        "ignore": [name for name in linears if name not in kinds],
    }


def _bits(name: str, config: dict[str, Any]) -> int:
    groups = list(config["config_groups"].values())
    named = [group for group in groups if name in group["targets"]] or groups
    return int(named[0]["weights"]["num_bits"])
