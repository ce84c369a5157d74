"""Whether a value fits the type of an option, its range included: what a recipe is checked by before anything runs."""

import json
import math
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

SIMPLE: dict[str, type] = {t.__name__: t for t in (bool, int, float, str, list, dict)} | {"None": types.NoneType}
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
WORDS |= {dict: "a mapping", types.NoneType: "null"}


def show(value: Any) -> str:
    """A value as it would stand in YAML, shortened."""
    text = json.dumps(value, default=repr, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def misfit(annotation: Any, value: Any) -> str | None:
    """Why a value does not fit an annotation ("is -1, must be at least 0"); None where it fits or nobody can tell.

    Simple types are known (bool, int, float, str, list, dict, None, Literal, and unions of them; a whole number is a
    number, and a number is finite), with the bounds of annotated-types and pydantic's AfterValidator in Annotated.
    """
    parts = list(_parts(annotation))
    if not all(known for _, _, known in parts):
        bounds = [metadata for _, metadata, _ in parts if metadata]
        return _out_of_range(bounds[0], value) if bounds and len(parts) == 1 else None
    kinds = {each: metadata for each, metadata, _ in parts if isinstance(each, type)}
    literals = [each for each, _, _ in parts if not isinstance(each, type)]
    kind = type(value) if type(value) in kinds else float if type(value) is int and float in kinds else None
    if kind is not None:
        return _out_of_range(kinds[kind], value)
    if value in literals:
        return None
    words = [WORDS[each] for each in WORDS if each in kinds] + [show(each) for each in literals]
    return f"is {show(value)}, must be {' or '.join(words)}"


def _parts(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterable[tuple[Any, tuple[Any, ...], bool]]:
    """The members of a union: type or literal value, what Annotated says of it, whether the type is simple."""
    if isinstance(annotation, str):  # from __future__ import annotations, of what could not be looked up
        for part in annotation.split("|"):
            yield SIMPLE.get(part.strip(), object), (), part.strip() in SIMPLE
        return
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *more = typing.get_args(annotation)
        yield from _parts(inner, (*metadata, *more))
    elif origin in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            yield from _parts(part, metadata)
    elif origin is typing.Literal:
        yield from ((value, metadata, True) for value in typing.get_args(annotation))
    else:
        kind = origin or annotation
        yield kind, metadata, kind in WORDS


def _out_of_range(metadata: tuple[Any, ...], value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, must be a finite number"
    bounds = [each for each in metadata if isinstance(each, Ge | Gt | Le | Lt)]
    if isinstance(value, int | float) and not all(map(_holds, bounds, [value] * len(bounds))):
        return f"is {show(value)}, must be {' and '.join(map(_said, bounds))}"
    for each in metadata:
        if callable(check := getattr(each, "func", None)):
            try:
                check(value)
            except ValueError as error:
                return str(error) if str(error).startswith("is ") else f"is {show(value)}: {error}"
    return None


def _holds(bound: Any, value: Any) -> bool:
    match bound:
        case Ge():
            return bool(value >= bound.ge)
        case Gt():
            return bool(value > bound.gt)
        case Le():
            return bool(value <= bound.le)
        case _:
            return bool(value < bound.lt)


def _said(bound: Any) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    name = next(name for name in words if hasattr(bound, name))
    return f"{words[name]} {getattr(bound, name):g}"
