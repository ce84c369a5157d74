"""JSON Schema of recipes, for editors."""

from typing import Any

from sparsekit import registry
from sparsekit.data import FORMATS
from sparsekit.recipe.chains import TARGETS
from sparsekit.recipe.schema import Recipe


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe with the installed names, for an editor that completes and checks while one types."""
    whole = Recipe.model_json_schema()
    whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    whole["properties"]["stages"]["items"] = _method_schema("solvers", "stages", "criteria")
    whole["$defs"]["Evaluate"]["properties"]["metrics"]["items"] = _method_schema("metrics")
    whole["properties"]["export"] = {
        "anyOf": [{"type": "array", "items": _method_schema("exporters")}, {"type": "null"}]
    }
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
            if group == "solvers":
                known[TARGETS] = {"description": "only these linears, of a solver that goes on with another's answer"}
            found[entry.name] = {"type": ["object", "null"], "properties": known, "additionalProperties": False}
    full = {
        "type": "object",
        "properties": found,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"anyOf": [{"enum": sorted(found)}, full]}
