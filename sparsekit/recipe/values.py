"""Single values of a recipe: a function returns the value as it is kept, or raises ValueError with what it must be."""

import re
from pathlib import Path
from typing import Any

from sparsekit.contracts import show

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def pattern(value: Any) -> Any:
    """What `sparsekit.pattern.parse` reads, told apart here without torch."""
    if value is None:
        return None
    text = str(value).strip()
    if type(value) in (str, int, float):
        percent, nm = re.fullmatch(r"(\d+\.?\d*)\s*%", text), re.fullmatch(r"(\d+)\s*:\s*(\d+)\s*(p?)", text)
        fraction = re.fullmatch(r"0?\.\d+|0", text)
        groups = nm and 1 <= int(nm[1]) < int(nm[2]) and not (nm[3] and (int(nm[1]) % 2 or int(nm[2]) % 2))
        if (percent and float(percent[1]) < 100) or groups or fraction:
            return text
    raise ValueError(
        f'is {show(value)}, must be the share to remove, such as "50%" or 0.5, or n:m (keep n of m), such as "2:4", or '
        '"4:8p", in pairs'
    )


def patterns(value: Any) -> Any:
    """A pattern, or one for each target."""
    if not isinstance(value, dict):
        return pattern(value)
    if not value:
        raise ValueError('is {}, must be a pattern, or one for each target, such as {attention: "50%", mlp: "2:4"}')
    return {str(target): _of_target(target, each) for target, each in value.items()}


def _of_target(target: Any, value: Any) -> Any:
    try:
        if value is None:
            raise ValueError('is null, must be a pattern, such as "50%"')
        return pattern(value)
    except ValueError as error:
        raise ValueError(f"of `{target}` {error}") from None


def some(names: list[str]) -> list[str]:
    """A list that is not empty."""
    if not names:
        raise ValueError("is [], so nothing would be pruned: name linears, or leave it out for all")
    return names


def in_bytes(value: Any) -> Any:
    """A number of bytes from a text such as "4GB"; a number stays."""
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", value.strip())
    if not parts or parts[2].upper() not in UNITS:
        raise ValueError(f'is {show(value)}, must be a number of bytes or a text such as "4GB", "512MB" or "4GiB"')
    return int(float(parts[1]) * UNITS[parts[2].upper()])


def devices(value: Any) -> Any:
    """How many devices, which, or "auto", as Lightning takes them."""
    numbers = value if isinstance(value, list) else [value]
    if value == "auto" or (numbers and all(type(n) is int and n >= 0 for n in numbers) and value != 0):
        return value
    raise ValueError(f'is {show(value)}, must be how many, a list of device numbers such as [0, 1], or "auto"')


def a_file(name: str) -> str:
    """A path to a file that is there."""
    if not Path(name).is_file():
        raise ValueError(f"there is no file {name} (looked for from the current directory)")
    return name


def a_run(name: str) -> str:
    """The folder of a finished run."""
    if not (Path(name) / "report.json").is_file():
        raise ValueError(f"there is no finished run in {name} (no report.json; looked for from the current directory)")
    return name


def task_name(name: str) -> str:
    """A task of lm-eval, or a YAML file that is there."""
    return a_file(name) if name.endswith((".yaml", ".yml")) else name


def texts(value: Any) -> Any:
    """A template, or a list of texts."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(each, str) for each in value)):
        return value
    raise ValueError(f"is {show(value)}, must be a template or a list of texts")


def label(value: Any) -> Any:
    """A template, or a number from 0."""
    if isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise ValueError(f"is {show(value)}, must be a template or a number from 0")
