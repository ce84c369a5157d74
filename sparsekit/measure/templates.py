"""Jinja templates of tasks: rendered in Jinja's sandbox, and refused where rendering them could take for ever."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST = 10_000  # characters of a template
LARGEST = 1_000_000  # of a number or a repetition that a template makes
PLAIN = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge")  # kinds of YAML that are data
LOADED = ("include", "task")  # keys of a task's YAML that name other files or tasks


def sandbox() -> Any:
    """An environment as lm-eval has it, in which a template reaches nothing but its record."""
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval.utils import regex_replace

    class Sandbox(ImmutableSandboxedEnvironment):
        """With limits on what `*` and `**` may make."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Refuse what would fill the memory."""
            if operator == "**" and (abs(left) > LARGEST or abs(right) > 64):
                raise OverflowError("a power in a template is too large")
            if operator == "*":
                sizes = [len(each) if isinstance(each, str | list | tuple) else abs(each) for each in (left, right)]
                if not all(isinstance(each, int | float) for each in (left, right)) and sizes[0] * sizes[1] > LARGEST:
                    raise OverflowError("a repetition in a template is too long")
            return super().call_binop(context, operator, left, right)

    made = Sandbox(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    made.filters["regex_replace"] = regex_replace
    made.globals.pop("range", None)
    made.globals.pop("lipsum", None)
    return made


@contextmanager
def sandboxed() -> Iterator[None]:
    """While this lasts, lm-eval renders its templates in the sandbox."""
    from lm_eval import utils

    before, utils.env = utils.env, sandbox()
    try:
        yield
    finally:
        utils.env = before


def check_template(text: Any) -> None:
    """Raise ValueError for a template that is none, or has loops inside loops, macros or calls of itself."""
    from jinja2 import Environment, TemplateSyntaxError, nodes

    if not isinstance(text, str) or len(text) > LONGEST:
        raise ValueError(f"must be a template of at most {LONGEST:,} characters")
    try:
        tree = Environment().parse(text)
    except (TemplateSyntaxError, RecursionError) as error:
        raise ValueError(f"is no template ({error})") from error
    forbidden = (nodes.Macro, nodes.CallBlock, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    if any(True for _ in tree.find_all(forbidden)):
        raise ValueError("may look at its record only: leave out macros, calls and other templates")
    for loop in tree.find_all(nodes.For):
        if loop.recursive or any(inner is not loop for inner in loop.find_all(nodes.For)):
            raise ValueError("has a loop inside a loop, which could take for ever: leave one out")


def check_task_file(file: Path, seen: frozenset[Path] = frozenset()) -> None:
    """Raise ValueError for a task's YAML that is not there, is too large, or would run code: tags such as !function.

    What it includes is looked at too.
    """
    import yaml

    if not file.is_file():
        raise ValueError(f"there is no task file `{file}`")
    if file.stat().st_size > LARGEST:
        raise ValueError(f"the task file `{file}` has more than {LARGEST:,} bytes")
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"the task file `{file}` is not valid YAML: {str(error).splitlines()[0]}") from error
    for each in _nodes(node):
        if str(each.tag).removeprefix("tag:yaml.org,2002:") not in PLAIN:
            raise ValueError(
                f"the task file `{file}` has the tag {each.tag}, which would run code, and a recipe is data: write "
                "templates in its place"
            )
    for key, value in _pairs(node):
        if key == "hf_evaluate" or (key == "trust_remote_code" and value != "false"):
            raise ValueError(f"the task file `{file}` has `{key}`, which would run code of other people: leave it out")
        if (key in LOADED and value.endswith((".yaml", ".yml"))) or key == "include":
            inner = file.parent / value
            if inner.resolve() not in seen:
                check_task_file(inner, seen | {file.resolve()})


def _nodes(node: Any) -> Iterator[Any]:
    stack, seen = [node], set()
    while stack:
        each = stack.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each.value, list):
            stack += [part for item in each.value for part in (item if isinstance(item, tuple) else (item,))]


def _pairs(node: Any) -> Iterator[tuple[str, str]]:
    """All keys with a single value, wherever they stand."""
    for each in _nodes(node):
        for item in each.value if isinstance(each.value, list) else ():
            if isinstance(item, tuple) and isinstance(item[1].value, str):
                yield str(item[0].value), item[1].value
