"""Types of options, with their ranges: what a recipe may say is checked against them before anything runs."""

import math
import re
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator

Count = Annotated[int, Ge(1)]
NotNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]


def share(given: Any) -> float:
    """A share as a number, from a text such as "30%" or from 0.3; ValueError unless it is above 0 and below 1."""
    text = str(given).strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise ValueError(f'remove is {given!r}; it must be a share above 0 and below 1, such as "30%"')
    return value


def _kept_as_written(given: str | float) -> str | float:
    try:
        share(given)
    except ValueError as error:
        raise ValueError(str(error).partition("remove ")[2]) from error
    return given


Share = Annotated[str | float, AfterValidator(_kept_as_written)]

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SPEED = {"on": "decode", "backend": "transformers", "batch": 1, "prompt": 128, "new": 32}  # beside `speedup`


def goal(given: Any) -> dict[str, Any] | None:
    """What `remove` aims at where it is no share, in full; None where it is one.

    {"speedup": 1.5, "on": "decode" | "prefill", "backend", "batch", "prompt", "new"}: times as fast as the source there
    {"parameters": n}, {"memory": bytes}: what is left of the whole model, its weights' bytes in their dtype

    Raises:
        ValueError: a mapping that is none of these.
    """
    if not isinstance(given, dict):
        return None
    forms = "{speedup: 1.5}, {parameters: 100M} or {memory: 6GB}"
    said = f'is {given!r}, must be a share such as "30%", or one of {forms}'
    keys = {"speedup", "parameters", "memory"} & given.keys()
    if len(keys) != 1 or given.keys() - keys - (SPEED.keys() if keys == {"speedup"} else set()):
        raise ValueError(said)
    [key] = keys
    if key == "speedup":
        full = SPEED | given
        times, whole = full["speedup"], [full[each] for each in ("batch", "prompt", "new")]
        if isinstance(times, bool) or not isinstance(times, int | float) or not 1 < times < 100:
            raise ValueError(f"is {given!r}: speedup is how many times as fast, above 1, such as 1.5")
        if full["on"] not in ("decode", "prefill") or not all(type(each) is int and each > 0 for each in whole):
            raise ValueError(
                f"is {given!r}: `on` is decode or prefill, and batch, prompt, new are whole numbers above 0"
            )
        return full
    units = COUNTS if key == "parameters" else BYTES
    found = re.fullmatch(r"(\d+\.?\d*)\s*([A-Za-z]*)", str(given[key]).strip())
    if found is None or found[2].upper() not in units or not float(found[1]) > 0:
        raise ValueError(said)
    return {key: int(float(found[1]) * units[found[2].upper()])}


def _share_or_goal(given: Any) -> Any:
    return given if goal(given) is not None else _kept_as_written(given)


Amount = Annotated[str | float | dict[str, Any], AfterValidator(_share_or_goal)]
