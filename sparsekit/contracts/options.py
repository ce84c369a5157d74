"""Types of options, with their ranges: what a recipe may say is checked against them before anything runs."""

import math
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator

Count = Annotated[int, Ge(1)]
NotNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]


def share(given: str | float) -> float:
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
