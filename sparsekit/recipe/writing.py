"""A recipe with every default filled in, and as YAML again."""

import io
import re
from collections.abc import Iterable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from sparsekit import registry
from sparsekit.recipe.effects import group_of
from sparsekit.recipe.measuring import TextSet
from sparsekit.recipe.methods import Stage
from sparsekit.recipe.schema import Recipe
from sparsekit.recipe.texts import Calibration
from sparsekit.recipe.yaml_tree import Keys


def named_methods(recipe: Recipe) -> Iterable[tuple[Keys, str, str, Stage, dict[str, Any]]]:
    """Everything named in a recipe: keys of its options, words for it, entry-point group, itself, keys beside them."""
    beside = recipe.calibration.model_dump(include=set(Calibration.model_fields))
    data = Stage(recipe.calibration.source, recipe.calibration.options)
    yield ("calibration",), f"source `{data.name}`", "sources", data, beside
    rule = recipe.allocation
    yield ("allocation", registry.normal(rule.name)), f"allocation `{rule.name}`", "allocators", rule, {}
    for i, stage in enumerate(recipe.stages):
        yield ("stages", i, registry.normal(stage.name)), f"stage {i + 1}, `{stage.name}`", group_of(stage), stage, {}
    for i, text in enumerate(recipe.evaluate.perplexity):
        data = Stage(text.source, text.options)
        beside = text.model_dump(include=set(TextSet.model_fields))
        yield ("evaluate", "perplexity", i), f"source `{data.name}`", "sources", data, beside
    for i, each in enumerate(recipe.evaluate.metrics):
        yield ("evaluate", "metrics", i, registry.normal(each.name)), f"metric `{each.name}`", "metrics", each, {}
    for i, each in enumerate(recipe.export or ()):
        yield ("export", i, registry.normal(each.name)), f"exporter `{each.name}`", "exporters", each, {}


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every default filled in, those of the methods' options too; plain types, replayable.

    Imports the named methods, as `check_options` does.
    """
    plain = recipe.model_dump(by_alias=True)
    filled = [stage.options | _defaults(group, stage, beside) for _, _, group, stage, beside in named_methods(recipe)]
    plain["calibration"] |= filled[0]
    plain["allocation"] = {recipe.allocation.name: filled[1]}
    count = len(recipe.stages)
    plain["stages"] = [{s.name: o} for s, o in zip(recipe.stages, filled[2 : 2 + count], strict=True)]
    rest = iter(filled[2 + count :])
    plain["evaluate"]["perplexity"] = [text | next(rest) for text in plain["evaluate"]["perplexity"]]
    plain["evaluate"]["metrics"] = [{each.name: next(rest)} for each in recipe.evaluate.metrics]
    if recipe.export is not None:
        plain["export"] = [{each.name: next(rest)} for each in recipe.export]
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
