"""Names to functions: what is installed under the entry points `sparsekit.solvers`, `allocators`, `stages`, `sources`.

Built-in methods come through the same door as anybody's plugin, and a module is imported only when its name is used.
In names hyphen and underscore are the same letter; the published spelling is what is shown. An option of a method is
a keyword-only parameter of its function.
"""

import ast
import difflib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import entrypoints

from sparsekit.contracts import WORDS, misfit, removing, said_elsewhere

GROUPS = ("solvers", "allocators", "stages", "criteria", "sources", "metrics", "exporters")
BOUNDS = {"Ge": "at least", "Gt": "above", "Le": "at most", "Lt": "below"}
OPTIONS = {  # the types of contracts, in words
    "Count": "int, at least 1",
    "Fraction": "float, at least 0 and below 1",
    "NotNegative": "float, at least 0",
    "Positive": "float, above 0",
    "Amount": "str | float | dict",
    "Share": "str | float",
}
Start = Literal["none", "optional", "required"]


class UnknownName(ValueError):
    """A name that no installed package offers; the message has the nearest name and all valid ones."""


@dataclass(frozen=True)
class Option:
    """An option as its source text has it; default is None where the option is required."""

    name: str
    type: str
    default: str | None


@dataclass(frozen=True)
class Description:
    """What the source text of a method says, read without importing it; doc says why where it could not be read."""

    doc: str
    options: tuple[Option, ...] = ()
    start: Start = "none"
    file: str = ""
    line: int = 0

    @property
    def summary(self) -> str:
        """The first sentence of the docstring."""
        first = " ".join(self.doc.split("\n\n")[0].split())
        return re.split(r"(?<=[.!?]) ", first)[0]

    @property
    def source(self) -> str:
        """What the docstring says after "Source:", the paper; empty if it does not say."""
        said = re.search(r"^Source: (.*?)(?=^\w+: |\n\n|\Z)", self.doc, re.MULTILINE | re.DOTALL)
        return " ".join(said[1].split()).rstrip(".") if said else ""


def normal(name: str) -> str:
    """The form in which names are compared: hyphens are underscores."""
    return name.replace("-", "_")


def suggest(name: str, valid: Iterable[str]) -> str:
    """The end of a sentence: what the name is, where it is another library's; else the nearest of the valid names, if
    one is near, and the list of them."""
    valid = list(valid)
    if known := said_elsewhere(normal(name).lower(), set(map(normal, valid))):
        return known
    spelling = {normal(each).lower(): each for each in valid}
    near = difflib.get_close_matches(normal(name).lower(), spelling, n=1)
    listed = f"valid: {', '.join(sorted(spelling.values())) or 'none'}"
    return f"did you mean `{spelling[near[0]]}`? ({listed})" if near else listed


def entries(group: str) -> list[entrypoints.EntryPoint]:
    """All entry points of a group ("solvers" or "sparsekit.solvers"), each target once, sorted by name."""
    short = group.removeprefix("sparsekit.")
    if short not in GROUPS:
        raise ValueError(f"unknown group `{group}`, {suggest(short, GROUPS)}")
    # The same distribution may be seen twice (dist-info and egg-info); that is not two packages offering a name.
    unique = {(normal(e.name), *_target(e)): e for e in reversed(_installed(f"sparsekit.{short}", tuple(sys.path)))}
    return [unique[key] for key in sorted(unique)]


@cache
def _installed(group: str, path: tuple[str, ...]) -> list[entrypoints.EntryPoint]:
    """What the distributions on a path offer; read once, since it opens a file of each of them."""
    try:
        return entrypoints.get_group_all(group, path)
    except Exception:  # somebody's metadata is broken: the others' is read one by one
        return list(_one_by_one(group, path))


def _one_by_one(group: str, path: tuple[str, ...]) -> Iterator[entrypoints.EntryPoint]:
    from importlib import metadata

    for found in metadata.distributions(path=list(path)):
        parser = entrypoints.CaseSensitiveConfigParser(delimiters=("=",))
        try:
            parser.read_string(found.read_text("entry_points.txt") or "")
            distro = entrypoints.Distribution(found.metadata["Name"] or "unknown", found.version)
            offers = parser.items(group) if group in parser else []
            made = [entrypoints.EntryPoint.from_string(text, name, distro) for name, text in offers]
        except Exception as error:  # other people's files may hold anything
            where = getattr(found, "_path", found)
            warnings.warn(f"the entry points of {where} cannot be read and are skipped ({error})", stacklevel=6)
            continue
        yield from made


def names(group: str) -> list[str]:
    """The names installed in a group, as published, sorted, each once."""
    return list({normal(entry.name): entry.name for entry in entries(group)}.values())


def find(group: str, name: str) -> entrypoints.EntryPoint:
    """The entry point of this name, without importing it.

    Raises UnknownName if nobody offers the name, ValueError if several packages do.
    """
    found = [entry for entry in entries(group) if normal(entry.name) == normal(name)]
    kind = group.removeprefix("sparsekit.").removesuffix("s")
    if not found:
        raise UnknownName(f"unknown {kind} `{name}`, {suggest(name, names(group))}")
    if len(found) > 1:
        offers = " and ".join(f"{package(e)} ({e.module_name}:{e.object_name})" for e in found)
        raise ValueError(f"{kind} `{name}` is offered by {offers}: uninstall all but one")
    return found[0]


def load(group: str, name: str) -> Callable[..., Any]:
    """The function itself. ValueError naming plugin and package if its module cannot be imported."""
    entry = find(group, name)
    offer = f"`{entry.name}` of {package(entry)}"
    try:
        function = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stranger's module may raise anything while it is imported, SystemExit too
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{offer} cannot be imported from {entry.module_name} ({reason})") from error
    if not callable(function):
        raise ValueError(f"{offer} is a {type(function).__name__}; an entry point must name a function")
    return function


def package(entry: entrypoints.EntryPoint) -> str:
    """The distribution an entry point comes from and its version, such as "sparsekit-lightning 0.1.0"."""
    if entry.distro is None:
        return "an unknown package"
    name, version = entry.distro.name.replace("_", "-"), entry.distro.version
    if version is None:  # an egg-info folder without a version in its name
        from importlib import metadata

        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            return name
    return f"{name} {version.split('-py')[0]}"


def options(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a method: its keyword-only parameters; a criterion has those of every structural stage too."""
    parameters = inspect.signature(function).parameters
    own = {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    if not hasattr(function, "scoring"):
        return own
    common = inspect.signature(removing).parameters
    return (
        {"remove": common["remove"]}
        | {n: p for n, p in own.items() if n != "remove"}
        | {n: p for n, p in common.items() if n not in own}
    )


def start(function: Callable[..., Any]) -> Start:
    """Whether a solver can start from an earlier answer: its parameter `init` is absent, has a default, or has none."""
    init = inspect.signature(function).parameters.get("init")
    if init is None:
        return "none"
    return "required" if init.default is init.empty else "optional"


def asks(function: Callable[..., Any]) -> tuple[str, ...]:
    """What an allocator wants to be given beside counts and sparsity: its positional parameters, of those here."""
    parameters = inspect.signature(function).parameters.keys() - options(function).keys()
    return tuple(name for name in ("groups", "dense", "curvature") if name in parameters)


def option_problems(function: Callable[..., Any], given: dict[str, Any], also: Iterable[str] = ()) -> dict[str, str]:
    """What is wrong with these options: option name -> sentence. Empty if nothing is.

    also: further names to show as valid where one is unknown.

    Types and ranges are those of the annotations (see `sparsekit.contracts.misfit`), or the type of the default where
    there is none. What only the method itself can tell, it says when it is called.
    """
    known, hints = options(function), _hints(function)
    spelling = {normal(name): name for name in known}
    problems = {}
    for name, value in given.items():
        if normal(name) not in spelling:
            problems[name] = f"unknown option `{name}`, {suggest(name, [*also, *known])}"
            continue
        parameter = known[spelling[normal(name)]]
        annotation = hints.get(parameter.name, parameter.annotation)
        if annotation is parameter.empty:
            annotation = type(parameter.default) if type(parameter.default) in WORDS else object
        if value is None and parameter.default is None:
            continue
        if wrong := misfit(annotation, value):
            problems[name] = f"option `{name}` {wrong}"
    there = {normal(name) for name in given}
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in there:
            problems[name] = f"option `{name}` is required"
    return problems


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Annotations that are texts (from __future__ import annotations) as what they name, where that can be had."""
    found: dict[str, Any] = {}
    for each in (removing, function) if hasattr(function, "scoring") else (function,):
        own = {name: p.annotation for name, p in inspect.signature(each).parameters.items()}
        scope = vars(sys.modules.get(getattr(each, "__module__", ""), types.ModuleType("")))
        for name, annotation in own.items():
            if isinstance(annotation, str):
                try:
                    own[name] = eval(annotation, dict(scope))  # the module's own text
                except Exception:  # a name for type checkers alone: the text is compared as it stands
                    continue
        found = (
            own
            | ({"remove": found["remove"]} if "remove" in found else {})
            | {name: value for name, value in found.items() if name not in own}
        )
    return {name: value for name, value in found.items() if value is not inspect.Parameter.empty}


def check_options(function: Callable[..., Any], given: dict[str, Any], where: str) -> list[str]:
    """The sentences of `option_problems`, each after `where`."""
    return [f"{where}: {problem}" for problem in option_problems(function, given).values()]


def describe(entry: entrypoints.EntryPoint) -> Description:
    """Docstring, options and place of a method, from its source text: nothing is imported, torch least of all."""
    found = _described(entry.module_name, entry.object_name or "")
    if not any(_target(entry) == _target(each) for each in entries("criteria")):
        return found
    common = _described(removing.__module__, removing.__name__)
    own = {option.name for option in found.options} - {"remove"}
    options_ = [option for option in common.options if option.name not in own]
    more = common.doc.partition("\n\n")[2]
    return replace(
        found,
        doc=f"{found.doc}\n\nAs a stage of its own:\n{more}",
        options=(options_[0], *(each for each in found.options if each.name != "remove"), *options_[1:]),
    )


def _described(module: str, name: str) -> Description:
    for _ in range(5):  # the name may be imported into its module from another one
        spec = _spec(module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            return Description(f"({module} is not there as a Python file)")
        try:
            body = ast.parse(Path(spec.origin).read_bytes()).body
        except (OSError, SyntaxError, ValueError) as error:
            return Description(f"({spec.origin} cannot be read: {error})")
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return _description(node, spec.origin)
        found = [
            (node, alias.name)
            for node in body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if name == (alias.asname or alias.name)
        ]
        if not found:
            break
        source, name = found[0]
        module = importlib.util.resolve_name("." * source.level + (source.module or ""), spec.parent)
    return Description(f"({module} has no function {name} at its top level)")


def _spec(module: str) -> importlib.machinery.ModuleSpec | None:
    """Like importlib.util.find_spec, which would import the packages that the module is in."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    for part in rest:
        if spec is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec


def _description(node: ast.FunctionDef, file: str) -> Description:
    arguments = node.args
    texts = [
        Option(a.arg, _told(a.annotation) if a.annotation else "", ast.unparse(d) if d else None)
        for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    positional = [a.arg for a in [*arguments.posonlyargs, *arguments.args]]
    begins: Start = "none"
    if "init" in positional:
        begins = "optional" if positional.index("init") >= len(positional) - len(arguments.defaults) else "required"
    return Description(
        inspect.cleandoc(ast.get_docstring(node) or "(no docstring)"), tuple(texts), begins, file, node.lineno
    )


def _told(annotation: ast.expr) -> str:
    """An annotation in words: "float, at least 0" for Annotated[float, Ge(0)], or for a type of contracts."""
    if isinstance(annotation, ast.BinOp):
        return " | ".join(map(_told, (annotation.left, annotation.right)))
    if isinstance(annotation, ast.Name) and annotation.id in OPTIONS:
        return OPTIONS[annotation.id]
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).endswith("Annotated"):
        inner, *more = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        bounds = [(ast.unparse(each.func), ast.unparse(each.args[0])) for each in more if isinstance(each, ast.Call)]
        said = [f"{BOUNDS[name]} {limit}" for name, limit in bounds if name in BOUNDS]
        return f"{_told(inner)}, {' and '.join(said)}" if said else _told(inner)
    return ast.unparse(annotation)


def _target(entry: entrypoints.EntryPoint) -> tuple[str, str]:
    return entry.module_name, entry.object_name or ""
