"""What this machine can do, and what would let it do more: `sparsekit doctor`."""

import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparsekit import registry
from sparsekit.system import PACKAGES, hardware, human_size, versions

OPTIONAL = {  # a package -> what it is for
    "gguf": "reads GGUF sources and writes `export: [gguf]`",
    "xllamacpp": "runs what was exported in llama.cpp, and `bench --backend llama.cpp`",
    "onnxscript": "writes `export: [onnx]`",
    "onnxruntime": "runs what was exported as ONNX",
    "openvino": "writes and runs `export: [openvino]`",
    "compressed-tensors": "loads packed checkpoints of 4 and 8 bits",
    "pillow": "reads images, for vision models",
    "cryptography": "signs manifests: `fit --sign`",
    "triton": "one launch for a strip of sparsegpt's columns, on CUDA",
    "tensorboard": "`loggers: [tensorboard]`",
    "wandb": "`loggers: [wandb]`",
}


def examine() -> dict[str, Any]:
    """What was found: {"hardware", "versions", "optional", "plugins", "network", "remarks"}; plain types."""
    machine = hardware() | {"disk_free_bytes": shutil.disk_usage(Path.cwd()).free}
    machine["memory_free_bytes"] = _free_memory()
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        machine["accelerator_type"] = accelerator.type
        machine["accelerators"] = torch.accelerator.device_count()
    optional: dict[str, dict[str, str | None]] = {}
    for package, use in OPTIONAL.items():
        try:
            optional[package] = {"version": version(package), "use": use}
        except PackageNotFoundError:
            optional[package] = {"version": None, "use": use}
    entries = [entry for group in registry.GROUPS for entry in registry.entries(group)]
    plugins = sorted({registry.package(entry) for entry in entries} - {registry.package(_own())})
    caches = {"hub": os.environ.get("HF_HOME") or "~/.cache/huggingface"}
    caches["sparsekit"] = os.environ.get("SPARSEKIT_CACHE") or "~/.cache/sparsekit"
    found = {
        "hardware": machine,
        "versions": versions(),
        "optional": optional,
        "plugins": plugins,
        "network": {"offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"), "caches": caches},
    }
    return found | {"remarks": _remarks(found)}


def _own() -> Any:
    return registry.find("solvers", "wanda")


def _free_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _remarks(found: dict[str, Any]) -> list[str]:
    """What somebody would want to know before a long run, in sentences."""
    machine, said = found["hardware"], []
    if machine["accelerator"] is None:
        said.append("no accelerator: everything runs on the CPU")
    if machine["disk_free_bytes"] < 20 * 10**9:
        said.append(f"{human_size(machine['disk_free_bytes'])} free on this disk: a run needs twice the model's size")
    if machine["memory_free_bytes"] < 4 * 10**9:
        said.append(
            f"{human_size(machine['memory_free_bytes'])} of memory are free: give `memory: {{budget: ...}}`, and "
            "`fit --dry-run` says whether it can be kept"
        )
    if found["network"]["offline"]:
        said.append("HF_HUB_OFFLINE is set: models and texts are read from the caches alone")
    if not os.access(tempfile.gettempdir(), os.W_OK):
        said.append(f"{tempfile.gettempdir()} cannot be written to: set TMPDIR")
    missing = [package for package in PACKAGES if package not in found["versions"]]
    said += [f"{package} is not installed, and sparsekit needs it" for package in missing]
    return said


def report_of(found: dict[str, Any]) -> str:
    """The same as text."""
    machine = found["hardware"]
    where, count = machine["accelerator"] or "none", machine.get("accelerators", 1)
    cores = f"{machine['cores']} cores, {machine['threads']} threads"
    lines = [
        f"machine      {machine['system']} {machine['machine']}, {cores}",
        f"memory       {human_size(machine['memory_free_bytes'])} free of {human_size(machine['memory_bytes'])}",
        f"disk here    {human_size(machine['disk_free_bytes'])} free",
        f"accelerator  {where}" + (f", {count} of them" if count > 1 else ""),
        f"caches       {', '.join(f'{name} {place}' for name, place in found['network']['caches'].items())}",
        f"versions     {', '.join(f'{name} {number}' for name, number in found['versions'].items())}",
        f"plugins      {', '.join(found['plugins']) or 'none'}",
        "",
        "optional packages",
    ]
    width = max(map(len, found["optional"]))
    for package, told in found["optional"].items():
        state = told["version"] or f"not there: pip install {package}"
        lines.append(f"  {package:<{width}}  {state}  ({told['use']})")
    if found["remarks"]:
        lines += ["", *(f"- {remark}" for remark in found["remarks"])]
    return "\n".join(lines)
