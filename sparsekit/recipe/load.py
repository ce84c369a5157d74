"""A recipe: the YAML file that says what to do, checked in full before anything heavy is imported.

Two steps. `load_recipe` checks structure, types and names without importing torch or any method. `check_options` then
imports the named methods alone and checks their options. Both report every problem at once, each with its line.
"""

import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from sparsekit import registry
from sparsekit.data import FORMATS
from sparsekit.recipe import yaml_tree as yamltree
from sparsekit.recipe.schema import Calibration, Recipe, Stage, TextSet, expand, method, sentence
from sparsekit.recipe.yaml_tree import Keys


class RecipeError(ValueError):
    """Everything that is wrong with a recipe: `problems`, one sentence each with its place, in the file's order."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = sorted(problems, key=_order)
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems in the recipe\n  "
        super().__init__(head + "\n  ".join(self.problems))


def _order(problem: str) -> tuple[bool, int]:
    line = re.match(r"[^\n]*?:(\d+): ", problem)
    return problem.startswith("--set "), int(line[1]) if line else 0


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; overrides are "dotted.key=value". Relative paths in it are from the current directory.

    Raises RecipeError with all problems of structure, types and names. Imports neither torch nor any method.
    """
    tree = yamltree.read(path)
    if tree.value is None:
        raise RecipeError(tree.problems)
    for setting in overrides:
        yamltree.override(tree, setting, expand)
    if not isinstance(tree.value, dict):
        raise RecipeError([*tree.problems, f"{tree.place(())}: a recipe is a mapping with {', '.join(_required())}"])
    _model_of_run(tree.value)
    try:
        recipe = Recipe.model_validate(tree.value)
    except ValidationError as error:
        raise RecipeError(tree.problems + [sentence(each, tree) for each in error.errors()]) from None
    if tree.problems:
        raise RecipeError(tree.problems)
    solvers_ = [stage.name for stage in recipe.stages if kind(stage) == "solver"]
    if recipe.pattern is None and solvers_:
        raise RecipeError([_without_pattern(tree, solvers_[0])])
    stages = [replace(s, line=_line(tree.place(("stages", i)))) for i, s in enumerate(recipe.stages)]
    allocation = replace(recipe.allocation, line=_line(tree.place(("allocation",))))
    output = recipe.output or f"runs/{Path(path).stem}"
    recipe = recipe.model_copy(update={"stages": stages, "allocation": allocation, "output": output})
    recipe._tree = tree
    return recipe


def _model_of_run(value: dict[str, Any]) -> None:
    """`from` says the model too, the one that its run began with, and the pattern, unless they are given."""
    report = Path(str(value.get("from"))) / "report.json"
    if isinstance(value.get("from"), str) and report.is_file():
        earlier = json.loads(report.read_text(encoding="utf-8"))["recipe"]
        for key in ("model", "pattern"):
            value.setdefault(key, earlier[key])


def _without_pattern(tree: yamltree.Tree, name: str) -> str:
    return f'{tree.place(())}: missing key `pattern`, which `{name}` prunes to: give one such as "50%" or "2:4"'


def kind(stage: Stage) -> Literal["solver", "stage"]:
    """Whether a stage is a layer-wise solver or a stage with a loop of its own."""
    return "solver" if registry.normal(stage.name) in map(registry.normal, registry.names("solvers")) else "stage"


def check_options(recipe: Recipe) -> list[str]:
    """The second step: problems of the options of the named methods, and of the order of stages.

    Imports the modules of the methods that the recipe names (and with them, as a rule, torch); one that cannot be
    imported is a problem too.
    """
    problems: list[str] = []
    for keys, where, group, stage, fields in _methods(recipe):
        try:
            function = registry.load(group, stage.name)
        except ValueError as error:
            problems.append(f"{recipe._tree.place(keys)}: {where}: {error}")
            continue
        given = stage.options | {k: v for k, v in fields.items() if k in registry.options(function)}
        for name, problem in registry.option_problems(function, given, also=fields).items():
            problems.append(f"{recipe._tree.place((*keys, name))}: {where}: {problem}")
        if group == "stages" and not registry.option_problems(function, given):
            problems += [
                f"{recipe._tree.place(keys)}: {where}: {problem}" for problem in _out_of_range(function, given)
            ]
    needy = [s.name for s in recipe.stages if kind(s) == "stage" and "solver" in _options_of(s)]
    if recipe.pattern is None and needy:
        problems.append(_without_pattern(recipe._tree, needy[0]))
    places = [f"{recipe._tree.place(('stages', i))}: stage {i + 1}, `{s.name}`" for i, s in enumerate(recipe.stages)]
    for place, stage in zip(places, recipe.stages, strict=True):
        if kind(stage) == "stage" and "solver" in stage.options:
            problems += _solver_problems(stage.options["solver"], place)
    pruned = recipe.from_ is not None and (Path(recipe.from_) / "masks.safetensors").is_file()
    return problems + _order_problems(recipe.stages, places, f"from: {recipe.from_}" if pruned else "")


def _out_of_range(function: Callable[..., Any], given: dict[str, Any]) -> list[str]:
    """What a stage's own `check`, if it has one, says of all its options; and whether `remove` is a share."""
    from sparsekit.model.structure import share

    options = {name: p.default for name, p in registry.options(function).items()}
    options |= {registry.normal(name): value for name, value in given.items()}
    try:
        if "remove" in options:
            share(options["remove"])
        getattr(function, "check", lambda _: None)(options)
    except ValueError as error:
        return [str(error)]
    return []


def named_solvers(given: Any) -> list[Stage]:
    """What a stage's option `solver` names: a name, {name: options}, or a list of these. ValueError if it cannot be."""
    find = method("solvers")
    return [find(each) for each in (given if isinstance(given, list | tuple) and given else [given])]


def _solver_problems(given: Any, place: str) -> list[str]:
    try:
        stages = named_solvers(given)
        functions = [registry.load("solvers", stage.name) for stage in stages]
    except ValueError as error:
        return [f"{place}, option `solver`: {error}"]
    problems = [
        f"{place}, solver `{stage.name}`: {problem}"
        for stage, function in zip(stages, functions, strict=True)
        for problem in registry.option_problems(function, stage.options).values()
    ]
    return problems + _order_problems(stages, [f"{place}, solver `{stage.name}`" for stage in stages])


def _order_problems(stages: Sequence[Stage], places: Sequence[str], earlier: str = "") -> list[str]:
    """earlier: what pruned weights before the first stage."""
    problems = []
    for stage, place in zip(stages, places, strict=True):
        if kind(stage) == "stage":
            if earlier and walking(stage):
                problems.append(f"{place}, prunes the dense model, so `{earlier}` before it would be lost: remove it")
            if earlier and structural(stage):
                problems.append(f"{place}, removes structures, which must come before `{earlier}`: move it there")
            if not structural(stage):
                earlier = stage.name  # solvers after it start from what it leaves
            continue
        try:
            start = registry.start(registry.load("solvers", stage.name))
        except ValueError:
            continue  # that it cannot be imported is reported already
        if earlier and start == "none":
            problems.append(
                f"{place}, cannot start from the answer of `{earlier}`, which would be thrown away: remove `{earlier}` "
                "or put a solver after it that continues a chain (`sparsekit methods` shows which do)"
            )
        if not earlier and start == "required":
            problems.append(f"{place}, only improves the answer of an earlier stage: put one, such as wanda, before it")
        earlier = stage.name
    return problems


def walking(stage: Stage) -> bool:
    """Whether a stage prunes the dense model block by block, with solvers of its own: it has an option `solver`."""
    return kind(stage) == "stage" and "solver" in _options_of(stage)


def structural(stage: Stage) -> bool:
    """Whether a stage removes structures: it has an option `remove`."""
    return kind(stage) == "stage" and "remove" in _options_of(stage)


def _options_of(stage: Stage) -> Iterable[str]:
    try:
        return registry.options(registry.load("stages", stage.name))
    except ValueError:
        return ()  # that it cannot be imported is reported already


def _methods(recipe: Recipe) -> Iterable[tuple[Keys, str, str, Stage, dict[str, Any]]]:
    """Everything named in a recipe: keys of its options, words for it, entry-point group, itself, keys beside them."""
    beside = recipe.calibration.model_dump(include=set(Calibration.model_fields))
    data = Stage(recipe.calibration.source, recipe.calibration.options)
    yield ("calibration",), f"source `{data.name}`", "sources", data, beside
    rule = recipe.allocation
    yield ("allocation", registry.normal(rule.name)), f"allocation `{rule.name}`", "allocators", rule, {}
    for i, stage in enumerate(recipe.stages):
        yield ("stages", i, registry.normal(stage.name)), f"stage {i + 1}, `{stage.name}`", f"{kind(stage)}s", stage, {}
    for i, text in enumerate(recipe.evaluate.perplexity):
        data = Stage(text.source, text.options)
        beside = text.model_dump(include=set(TextSet.model_fields))
        yield ("evaluate", "perplexity", i), f"source `{data.name}`", "sources", data, beside


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, those of the methods' options too; plain types, replayable.

    Imports the named methods, as `check_options` does.
    """
    plain = recipe.model_dump(by_alias=True)
    filled = [stage.options | _defaults(group, stage, beside) for _, _, group, stage, beside in _methods(recipe)]
    plain["calibration"] |= filled[0]
    plain["allocation"] = {recipe.allocation.name: filled[1]}
    count = len(recipe.stages)
    plain["stages"] = [{s.name: o} for s, o in zip(recipe.stages, filled[2 : 2 + count], strict=True)]
    plain["evaluate"]["perplexity"] = [
        text | more for text, more in zip(plain["evaluate"]["perplexity"], filled[2 + count :], strict=True)
    ]
    return plain


def _defaults(group: str, stage: Stage, beside: dict[str, Any]) -> dict[str, Any]:
    """Defaults of the options that are not given; one that YAML has no word for is left to the function."""
    known = registry.options(registry.load(group, stage.name))
    defaults = {name: p.default for name, p in known.items() if name not in stage.options and name not in beside}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in defaults.items()
        if value is None or isinstance(value, bool | int | float | str | list | tuple | dict)
    }


def to_yaml(recipe: dict[str, Any]) -> str:
    """A recipe as YAML. A text like 2:4 is quoted, since readers of YAML 1.1 take it for a number."""

    def quoted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: quoted(each) for key, each in value.items()}
        if isinstance(value, list):
            return [quoted(each) for each in value]
        return DoubleQuotedScalarString(value) if isinstance(value, str) and re.match(r"\d", value) else value

    yaml, stream = YAML(), io.StringIO()
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.dump(quoted(recipe), stream)
    return stream.getvalue()


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe with the installed names, for an editor that completes and checks while one types."""
    whole = Recipe.model_json_schema()
    whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    whole["properties"]["stages"]["items"] = _method_schema("solvers", "stages")
    whole["properties"]["allocation"] = _method_schema("allocators") | {"default": "uniform"}
    files = "|".join(suffix[1:] for suffix in FORMATS)
    source = {"anyOf": [{"enum": registry.names("sources")}, {"type": "string", "pattern": rf"\.({files})$"}]}
    for section in ("Calibration", "TextSet"):
        whole["$defs"][section]["properties"]["source"] |= source
    whole["$defs"]["Evaluate"]["properties"]["perplexity"]["items"]["anyOf"][0] = source
    del whole["$defs"]["Stage"]
    return whole


def _method_schema(*groups: str) -> dict[str, Any]:
    found = {}
    for group in groups:
        for entry in registry.entries(group):
            known = {o.name: {"description": f"default {o.default}"} for o in registry.describe(entry).options}
            found[entry.name] = {"type": ["object", "null"], "properties": known, "additionalProperties": False}
    full = {
        "type": "object",
        "properties": found,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"anyOf": [{"enum": sorted(found)}, full]}


def _required() -> list[str]:
    return [name for name, field in Recipe.model_fields.items() if field.is_required()]


def _line(place: str) -> int | None:
    file, _, line = place.rpartition(":")
    return int(line) if file and not place.startswith("--set ") and line.isdecimal() else None
