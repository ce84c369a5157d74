"""YAML 1.2 text to plain values that remember where they were written, and `--set key=value` on top of them.

YAML 1.2, because 2:4 is a text (not the number 124), 1e-4 a number and `no` a text. Nothing but texts, numbers, true,
false, null, lists and mappings with text keys is read: a recipe cannot run code. In keys hyphen and underscore are the
same letter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from sparsekit.contracts import show
from sparsekit.registry import normal

Keys = tuple[str | int, ...]
Expand = Callable[[Keys, Any, str | int], Any]
TAGS = "tag:yaml.org,2002:"
LARGEST = 1_000_000  # bytes of a file
MOST = 20_000  # values in a file, those that aliases repeat counted each time


@dataclass
class Tree:
    """A parsed file: its value, where each part of it was written, and what was wrong with the text."""

    source: str
    value: Any = None
    places: dict[Keys, str] = field(default_factory=dict)  # ("calibration", "samples") -> "x.yaml:7" or "--set ..."
    problems: list[str] = field(default_factory=list)
    count: int = 0  # of the values read

    def place(self, keys: Keys) -> str:
        """Where the value at these keys was written, or else what it would stand in."""
        while keys and keys not in self.places:
            keys = keys[:-1]
        return self.places.get(keys, self.source)


def dotted(keys: Keys) -> str:
    """("stages", 0) -> "stages.0", as in `--set`."""
    return ".".join(map(str, keys))


def read(path: str | Path) -> Tree:
    """Parse one file. Problems of its text (no such file, wrong YAML, a key twice) are in the tree, not raised."""
    tree = Tree(source=str(path))
    try:
        if Path(path).stat().st_size > LARGEST:
            tree.problems.append(f"{path}: has more than {LARGEST:,} bytes, which no recipe needs")
            return tree
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, UnicodeDecodeError) as error:
        reason = {FileNotFoundError: "no such file", UnicodeDecodeError: "not a text in UTF-8"}.get(type(error))
        tree.problems.append(f"{path}: {reason or 'not a file'}")
        return tree
    tree.value = _parse(text, tree, (), lambda line: f"{path}:{line}")
    if tree.value is None and not tree.problems:
        tree.problems.append(f"{path}: the file is empty")
    return tree


def option_of(setting: str) -> tuple[str, Any]:
    """A method's option from "name=value", the value read as in a recipe. ValueError for anything else."""
    name, equals, text = setting.partition("=")
    tree = Tree(f"--set {setting}")
    value = _parse(text, tree, (name,), lambda line: f"--set {setting}") if equals and name.strip() else None
    if not equals or not name.strip():
        tree.problems.append(f"--set {setting}: must be option=value, such as precision=q8_0")
    if tree.problems:
        raise ValueError("; ".join(tree.problems))
    return name.strip(), value


def override(tree: Tree, setting: str, expand: Expand) -> None:
    """Apply one "dotted.key=value" to the tree; the value is read by the same parser as the file.

    expand(keys, value, inner): the value at these keys with its short form written in full (a bare stage name as a
    mapping), because the override goes on to the key `inner` inside of it. ValueError if it cannot.
    """
    place = f"--set {setting}"
    key, equals, text = setting.partition("=")
    keys: Keys = tuple(int(part) if part.isdecimal() else normal(part) for part in key.strip().split("."))
    if not equals or "" in keys:
        tree.problems.append(f"{place}: must be key=value, such as calibration.samples=8 or stages.0=wanda")
        return
    before = len(tree.problems)
    value = _parse(text, tree, keys, lambda line: place)
    if len(tree.problems) > before:
        return
    try:
        tree.value = _put(tree.value, (), keys, value, expand)
    except ValueError as error:
        tree.problems.append(f"{place}: {error}")
        return
    tree.places = {k: v for k, v in tree.places.items() if k[: len(keys)] != keys}
    tree.places |= {keys[:i]: place for i in range(1, len(keys) + 1) if keys[:i] not in tree.places}


def _put(holder: Any, done: Keys, keys: Keys, value: Any, expand: Expand) -> Any:
    """A copy of `holder`, found at the keys `done`, with the value at the further `keys`."""
    if not keys:
        return value
    head, rest = keys[0], keys[1:]
    holder = expand(done, holder, head)
    if holder is None:
        holder = [] if isinstance(head, int) else {}
    if isinstance(holder, list):
        if not isinstance(head, int) or head > len(holder):
            raise ValueError(f"`{dotted(done)}` is a list, write an index from 0 to {len(holder)} in place of `{head}`")
        old = holder[head] if head < len(holder) else None
        return [*holder[:head], _put(old, (*done, head), rest, value, expand), *holder[head + 1 :]]
    if isinstance(holder, dict):
        return holder | {str(head): _put(holder.get(str(head)), (*done, head), rest, value, expand)}
    raise ValueError(f"`{dotted(done)}` is {show(holder)}, which has nothing called `{head}` inside")


def _parse(text: str, tree: Tree, keys: Keys, place: Callable[[int], str]) -> Any:
    yaml = YAML(typ="safe", pure=True)
    try:
        node = yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        tree.problems.append(f"{place(mark.line + 1 if mark else 1)}: not valid YAML: {said}")
        return None
    except RecursionError:
        tree.problems.append(f"{place(1)}: nested too deeply")
        return None
    except (YAMLError, ValueError) as error:  # a character that YAML does not allow, a date that there is not
        tree.problems.append(f"{place(1)}: not valid YAML: {' '.join(str(error).split())}")
        return None
    return None if node is None else _build(node, tree, keys, place, yaml)


def _build(node: Node, tree: Tree, keys: Keys, place: Callable[[int], str], yaml: YAML) -> Any:
    where = place(node.start_mark.line + 1)
    tree.places.setdefault(keys, where)
    kind = str(node.tag).removeprefix(TAGS)
    tree.count += 1
    if len(keys) > 20 or tree.count > MOST:  # an alias inside its own anchor, or aliases of aliases, would never end
        said = f"{where}: nested too deeply" if len(keys) > 20 else f"{tree.source}: more than {MOST:,} values"
        if said not in tree.problems:
            tree.problems.append(said)
        return None
    if isinstance(node, SequenceNode) and kind == "seq":
        parts = enumerate(node.value)
        return [_build(each, tree, (*keys, i), place, yaml) for i, each in parts if tree.count <= MOST]
    if isinstance(node, MappingNode) and kind == "map":
        return _mapping(node, tree, keys, place, yaml)
    if isinstance(node, ScalarNode) and kind in ("int", "float", "bool", "null"):
        try:
            return yaml.constructor.construct_object(node)
        except (ValueError, ArithmeticError) as error:
            tree.problems.append(f"{where}: {show(node.value)} is not a value of YAML's kind {kind}: {error}")
            return None
    if isinstance(node, ScalarNode) and kind in ("str", "timestamp"):
        return _text(node.value, tree, where)
    tree.problems.append(f"{where}: {kind} is not a value a recipe may have: write it without a tag")
    return None


def _text(value: str, tree: Tree, where: str) -> str:
    """A text as it is; half of a character, which an escape can make, is none."""
    try:
        value.encode()
    except UnicodeEncodeError:
        tree.problems.append(f"{where}: {value!r} is not a text: it has half of a character")
        return value.encode(errors="replace").decode()
    return value


def _mapping(node: MappingNode, tree: Tree, keys: Keys, place: Callable[[int], str], yaml: YAML) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        where = place(key.start_mark.line + 1)
        if not isinstance(key, ScalarNode):
            tree.problems.append(f"{where}: a key must be a text")
            continue
        name = normal(_text(key.value, tree, where))
        if tree.count > MOST:
            break
        if name in found:
            first = tree.place((*keys, name))
            tree.problems.append(f"{where}: `{key.value}` is here a second time, the first is at {first}")
            continue
        tree.places[(*keys, name)] = where
        found[name] = _build(value, tree, (*keys, name), place, yaml)
    return found
