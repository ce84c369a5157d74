"""The keys of a recipe, their types, defaults and short forms; and what is said where one of them is wrong."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr
from pydantic_core import ErrorDetails

from sparsekit import registry
from sparsekit.contracts import show
from sparsekit.recipe import values
from sparsekit.recipe.measuring import BRANCHES, Evaluate, FeatureSet, ImageSet, MaskSet, Task
from sparsekit.recipe.memory import Memory
from sparsekit.recipe.methods import Stage, expand, method
from sparsekit.recipe.section import Section
from sparsekit.recipe.texts import Calibration
from sparsekit.recipe.trainer import ClassPath, TrainerOptions
from sparsekit.recipe.yaml_tree import Tree, dotted

Asked = str | float | dict[str, str | float]  # a pattern as it may be written


class Model(Section):
    """What to prune."""

    path: str = Field(min_length=1, description="hub name or folder")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the checkpoint's own"
    )
    gguf_file: str | None = Field(default=None, description="file name inside path, for a GGUF checkpoint")
    trust_remote_code: bool = Field(default=False, description="run the Python code that comes with the checkpoint")


SECTIONS: dict[tuple[str | int, ...], type[Section]] = {
    ("model",): Model,
    ("memory",): Memory,
    ("trainer",): TrainerOptions,
    ("trainer", "callbacks"): ClassPath,
    ("trainer", "logger"): ClassPath,
    ("evaluate",): Evaluate,
    ("evaluate", "tasks"): Task,
    ("evaluate", "accuracy"): ImageSet,
    ("evaluate", "features"): FeatureSet,
    ("evaluate", "iou"): MaskSet,
}
TYPES = {"string_type": "a text", "int_type": "a whole number", "bool_type": "true or false", "list_type": "a list"}
TYPES |= {"model_type": "a mapping", "too_short": "at least one", "string_too_short": "a text of at least one letter"}


def names_of(section: type[Section]) -> list[str]:
    """The keys of a section as they are written."""
    return [field.alias or name for name, field in section.model_fields.items()]


def _empty(value: Any) -> Any:
    return {} if value is None else value  # a section of which every line is commented out


class Recipe(Section):
    """A whole recipe, with all defaults; made by `load_recipe`."""

    model: Annotated[
        Model,
        BeforeValidator(lambda value: expand(("model",), value), json_schema_input_type=str | Model),
    ]
    pattern: Annotated[
        str | dict[str, str] | None,
        BeforeValidator(values.patterns, json_schema_input_type=Asked | list[Asked]),
    ] = Field(
        default=None,
        description='"50%" removed, or "2:4": keep 2 of 4; or what each target gets, the first that means a linear: '
        '{attention: "50%", mlp: "2:4"}; a list of such: a run for each, into folders of its own; stages that remove '
        "structures need none",
    )
    prune: Literal["text", "vision", "encoder", "decoder", "all"] | None = Field(
        default=None,
        description="the part of a model of several that is pruned; null: what predicts text, both of an encoder and a "
        "decoder; see docs/models.md",
    )
    targets: Annotated[list[str], AfterValidator(values.some)] | None = Field(
        default=None,
        description="the linears that are pruned, the others stay: parts of names such as q_proj or mlp.down_proj, "
        "ranges such as `blocks 4-11`, or attention, mlp, experts, router; null: all but routers and gates",
    )
    ignore: list[str] = Field(default_factory=list, description="linears that stay as they are, named like targets")
    from_: Annotated[str | None, AfterValidator(lambda name: name if name is None else values.a_run(name))] = Field(
        default=None, alias="from", description="folder of a finished run, whose result the stages go on with"
    )
    calibration: Annotated[Calibration, BeforeValidator(_empty)] = Calibration()
    bos: Literal["auto", "window", "published"] = Field(
        default="auto", description="whether the first token stands before every window of text"
    )
    masks: Literal["source", "none"] = Field(
        default="source", description="whether recovery keeps the zeros of a source that is sparse already"
    )
    error_correction: Literal["prefix", "sequential", "none", "block", "model"] = "prefix"
    allocation: Annotated[Stage, BeforeValidator(method("allocators"))] = Stage("uniform")
    stages: list[Annotated[Stage, BeforeValidator(method("solvers", "stages", "criteria"))]] = Field(
        min_length=1, description="methods, in order"
    )
    memory: Annotated[Memory, BeforeValidator(_empty)] = Memory()
    loggers: list[Literal["csv", "tensorboard", "wandb"]] = Field(
        default=["csv"], description="where the curves of a run go; csv: metrics.csv"
    )
    trainer: Annotated[TrainerOptions, BeforeValidator(_empty)] = TrainerOptions()
    evaluate: Annotated[Evaluate, BeforeValidator(_empty)] = Evaluate()
    export: list[Annotated[Stage, BeforeValidator(method("exporters"))]] | None = Field(
        default=None, description="other forms to write; null: packed, where the last stage quantized"
    )
    output: str | None = Field(
        default=None, min_length=1, description="folder of the run; default runs/<name of the recipe>"
    )
    seed: int = Field(default=0, ge=0, description="of everything random but the calibration's choice")
    keep: bool = Field(default=False, description="keep blocks/ after a finished run")
    _tree: Tree = PrivateAttr(default_factory=lambda: Tree("recipe"))


def sentence(error: ErrorDetails, tree: Tree) -> str:
    """One of pydantic's findings as a sentence of ours, with its place."""
    keys, given, what = tuple(k for k in error["loc"] if k not in BRANCHES), error["input"], error["type"]
    key = f"`{dotted(keys)}`"
    if what == "extra_forbidden":
        section = SECTIONS.get(tuple(key for key in keys[:-1] if isinstance(key, str)), Recipe)
        said = f"unknown key {key}, {registry.suggest(str(keys[-1]), names_of(section))}"
    elif what == "missing":
        said = f"missing key {key}"
    elif what == "value_error":
        said = str(error["ctx"]["error"])
        said = f"{key} {said}" if said.startswith("is ") else said
    elif what == "literal_error":
        valid = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        said = f"{key} is {show(given)}, {registry.suggest(str(given), valid)}"
    elif what in TYPES:
        quotes = " (put it in quotes)" if what == "string_type" and not isinstance(given, list | dict | None) else ""
        said = f"{key} is {show(given)}, must be {TYPES[what]}{quotes}"
    else:
        said = f"{key} is {show(given)}, {error['msg'].replace('Input should', 'must')}"
    return f"{tree.place(keys)}: {said}"
