"""The keys of a recipe, their types, defaults and short forms; and what is said where one of them is wrong."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import ErrorDetails

from sparsekit import registry
from sparsekit.contracts import show
from sparsekit.data import FORMATS
from sparsekit.recipe import values
from sparsekit.recipe.memory import Memory
from sparsekit.recipe.section import Section
from sparsekit.recipe.trainer import ClassPath, TrainerOptions
from sparsekit.recipe.yaml_tree import Keys, Tree, dotted

BRANCHES = ("a name", "a mapping")  # pydantic's way into the two forms of a task, which no key of a recipe is called


@dataclass(frozen=True)
class Stage:
    """A named method with its options: an element of `stages`, or `allocation`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    line: int | None = field(default=None, compare=False)  # in the recipe's file; None if set from outside


def expand(keys: Keys, value: Any, inner: str | int = "") -> Any:
    """A short form written in full: `model: x` -> `model: {path: x}`, a bare method -> `{method: {}}`.

    inner: the key that an override goes on to; ValueError if it is another method than the one that is there.
    """
    match keys:
        case ("allocation",) | ("stages", _):
            full = {registry.normal(value): {}} if isinstance(value, str) else value
            if isinstance(full, dict) and full and inner not in full:
                key = dotted(keys)
                raise ValueError(
                    f"`{key}` is `{next(iter(full))}`, not `{inner}`; to replace it give {key}={inner} first"
                )
            return full
        case ("model",) if isinstance(value, str):
            return {"path": value}
        case ("evaluate", "perplexity", _) if isinstance(value, str):
            return {"source": value}
        case ("evaluate", "accuracy", _) if isinstance(value, str):
            return {"path": value}
    return value


def _source_alone(value: Any) -> Any:
    return expand(("evaluate", "perplexity", 0), value)


def _path_alone(value: Any) -> Any:
    return expand(("evaluate", "accuracy", 0), value)


def _local_file(value: Any) -> Any:
    """`source: notes.txt` written in full, `source: text, path: notes.txt`; and whether there is such a file."""
    name = value.get("source") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return value
    suffix = Path(name).suffix.lower()
    if suffix in FORMATS and registry.normal(name) not in map(registry.normal, registry.names("sources")):
        value = {**value, "source": FORMATS[suffix], "path": name}
    if value["source"] in FORMATS.values() and isinstance(value.get("path"), str):
        values.a_file(value["path"])
    return value


def method(*groups: str) -> Callable[[Any], Stage]:
    """A validator: a bare name, or one name over its options, of a method in one of these groups."""

    def parse(value: Any) -> Stage:
        if isinstance(value, Stage):
            return value
        given = {value: {}} if isinstance(value, str) else value
        if not isinstance(given, dict) or len(given) != 1:
            raise ValueError(
                f"is {show(value)}, must be a name, or one name with its options: `name: {{option: value}}`"
            )
        [(name, options)] = given.items()
        if not isinstance(options, dict | None):
            raise ValueError(f"`{name}` has {show(options)}, must have a mapping of options, such as {{option: value}}")
        return Stage(_find(name, groups), options or {})

    return parse


def _find(name: str, groups: Sequence[str]) -> str:
    """The published spelling of an installed name."""
    offering = [g for g in groups if registry.normal(name) in map(registry.normal, registry.names(g))]
    if len(offering) > 1:
        offers = " and ".join(f"a {g[:-1]} of {registry.package(registry.find(g, name))}" for g in offering)
        raise ValueError(f"`{name}` is {offers}: uninstall one of them")
    if not offering and len(groups) > 1:
        valid = [each for group in groups for each in registry.names(group)]
        raise registry.UnknownName(f"unknown method `{name}`, {registry.suggest(name, valid)}")
    return registry.find((offering or groups)[0], name).name


def _source(name: str) -> str:
    return _find(name, ["sources"])


class Model(Section):
    """What to prune."""

    path: str = Field(min_length=1, description="hub name or folder")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the checkpoint's own"
    )
    gguf_file: str | None = Field(default=None, description="file name inside path, for a GGUF checkpoint")
    trust_remote_code: bool = Field(default=False, description="run the Python code that comes with the checkpoint")


class Text(Section):
    """A source of text; keys beyond the fixed ones are options of the source."""

    model_config = ConfigDict(extra="allow")
    source: Annotated[str, AfterValidator(_source)] = Field(description="an installed source of text or a local file")

    @model_validator(mode="before")
    @classmethod
    def _full(cls, value: Any) -> Any:
        return _local_file(value)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the source."""
        return dict(self.model_extra or {})


class Calibration(Text):
    """The text whose activations the methods see; further keys are options of the source."""

    source: Annotated[str, AfterValidator(_source)] = Field(
        default="c4", description="an installed source of text or a local file"
    )
    samples: int = Field(default=128, gt=0, description="how many sequences")
    length: int = Field(default=2048, gt=1, description="tokens of each")
    seed: int = Field(default=0, ge=0, description="of the choice of sequences")
    batch: int | None = Field(default=None, gt=0, description="sequences at a time; null: chosen by the run")


class TextSet(Text):
    """A text to measure perplexity on; further keys are options of the source."""

    name: str | None = Field(default=None, min_length=1, description="in the results; null: of the source or file")
    length: int | None = Field(default=None, gt=1, description="tokens of a window; null: as evaluate.length")
    windows: int | None = Field(default=None, gt=0, description="only the first so many windows; null: all")

    @property
    def called(self) -> str:
        """Its name in the results."""
        return self.name or Path(str(self.options.get("path") or self.source)).name


class Task(Section):
    """A multiple-choice task over a local JSON-lines file; prompt, choices and label are Jinja templates."""

    name: str = Field(min_length=1)
    path: Annotated[str, AfterValidator(values.a_file)]
    prompt: str
    choices: Annotated[Any, AfterValidator(values.texts)] = Field(description="a template, or a list of texts")
    label: Annotated[Any, AfterValidator(values.label)] = Field(description="a template, or a number from 0")
    limit: int | None = Field(default=None, gt=0, description="documents; null: as evaluate.limit")


class ImageSet(Section):
    """Labelled images to measure accuracy on."""

    path: str = Field(
        min_length=1, description="a folder with a folder for each class, a Parquet file, or a hub data set"
    )
    name: str | None = Field(default=None, min_length=1, description="in the results; null: of the folder")
    part: str | None = Field(default=None, description="of the data set; null: test, validation, or the only one")
    image: str = Field(default="image", description="the column of images")
    label: str = Field(default="label", description="the column of labels")
    limit: int | None = Field(default=None, gt=0, description="images; null: as evaluate.limit")

    @property
    def called(self) -> str:
        """Its name in the results."""
        return self.name or Path(self.path).name


def _called_once(sets: list[Any]) -> list[Any]:
    names = [each.called for each in sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        what = "perplexity sets" if isinstance(sets[0], TextSet) else "sets of images"
        raise ValueError(f"several {what} are called `{twice[0]}`: give each another `name`")
    return sets


AnyTask = Annotated[
    Annotated[Annotated[str, AfterValidator(values.task_name)], Tag(BRANCHES[0])] | Annotated[Task, Tag(BRANCHES[1])],
    Discriminator(lambda value: BRANCHES[isinstance(value, dict | Task)]),
]


class Evaluate(Section):
    """What the result is measured by."""

    perplexity: Annotated[
        list[Annotated[TextSet, BeforeValidator(_source_alone, json_schema_input_type=str | TextSet)]],
        AfterValidator(_called_once),
    ] = Field(default_factory=list, description="sources or local files")
    tasks: list[AnyTask] = Field(default_factory=list, description="tasks of lm-eval by name or YAML file, or your own")
    accuracy: Annotated[
        list[Annotated[ImageSet, BeforeValidator(_path_alone, json_schema_input_type=str | ImageSet)]],
        AfterValidator(_called_once),
    ] = Field(default_factory=list, description="labelled images, for vision models")
    metrics: list[Annotated[Stage, BeforeValidator(method("metrics"))]] = Field(
        default_factory=list, description="other metrics, by name or as {name: {option: value}}"
    )
    length: int = Field(default=2048, gt=1, description="tokens of a perplexity window")
    limit: int | None = Field(default=None, gt=0, description="documents of each task, or images; null: all")
    batch: int = Field(default=1, gt=0, description="sequences at a time")
    dense: bool = Field(default=True, description="measure the model before pruning too")
    samples: bool = Field(default=True, description="have the models go on with a few prompts, to be read side by side")


SECTIONS: dict[tuple[str | int, ...], type[Section]] = {
    ("model",): Model,
    ("memory",): Memory,
    ("trainer",): TrainerOptions,
    ("trainer", "callbacks"): ClassPath,
    ("trainer", "logger"): ClassPath,
    ("evaluate",): Evaluate,
    ("evaluate", "tasks"): Task,
    ("evaluate", "accuracy"): ImageSet,
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
        BeforeValidator(values.patterns, json_schema_input_type=str | float | dict[str, str | float]),
    ] = Field(
        default=None,
        description='"50%" removed, or "2:4": keep 2 of 4; or what each target gets, the first that means a linear: '
        '{attention: "50%", mlp: "2:4"}; stages that remove structures need none',
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
