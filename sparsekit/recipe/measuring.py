"""What a recipe has measured: texts, tasks, labelled images, images with masks."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from sparsekit.recipe import values
from sparsekit.recipe.methods import Stage, expand, method
from sparsekit.recipe.section import Section
from sparsekit.recipe.texts import Text

BRANCHES = ("a name", "a mapping")  # pydantic's way into the two forms of a task, which no key of a recipe is called


def _source_alone(value: Any) -> Any:
    return expand(("evaluate", "perplexity", 0), value)


def _path_alone(value: Any) -> Any:
    return expand(("evaluate", "accuracy", 0), value)


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


class FeatureSet(ImageSet):
    """Images on which a model's features are compared with the dense model's."""

    neighbours: int | None = Field(
        default=None, gt=0, description="measure accuracy by so many nearest images too (DINO: 20); null: cosines alone"
    )
    side: int | None = Field(
        default=None,
        gt=0,
        description="of towers that take patches of images of any size: pixels of the square's sides; null: 448",
    )


class MaskSet(Section):
    """Images with the masks of what is on them, to measure intersection over union on."""

    path: str = Field(
        min_length=1,
        description="a folder, annotations of COCO, a Parquet file, or a hub data set; see docs/recipes.md",
    )
    images: str | None = Field(default=None, description="the folder of the pictures that COCO's annotations speak of")
    name: str | None = Field(default=None, min_length=1, description="in the results; null: of the folder or file")
    part: str | None = Field(default=None, description="of the data set; null: test, validation, or the only one")
    image: str = Field(default="image", description="the column of images")
    masks: str = Field(default="masks", description="the column of masks")
    prompt: Literal["point", "centroid", "box"] = Field(
        default="point", description="what asks for an object; point: the one farthest from its edge"
    )
    answer: Literal["single", "likeliest", "best"] = Field(
        default="single", description="one mask, or of three the one that the model thinks best of, or the nearest"
    )
    objects: int | None = Field(default=None, gt=0, description="masks of an image; null: all")
    limit: int | None = Field(default=None, gt=0, description="images; null: as evaluate.limit")

    @property
    def called(self) -> str:
        """Its name in the results."""
        return self.name or Path(self.path).stem


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
    iou: Annotated[
        list[Annotated[MaskSet, BeforeValidator(_path_alone, json_schema_input_type=str | MaskSet)]],
        AfterValidator(_called_once),
    ] = Field(default_factory=list, description="images with masks, for models that cut objects out (SAM)")
    features: Annotated[
        list[Annotated[FeatureSet, BeforeValidator(_path_alone, json_schema_input_type=str | FeatureSet)]],
        AfterValidator(_called_once),
    ] = Field(default_factory=list, description="images, for vision models: cosine of features to the dense model's")
    metrics: list[Annotated[Stage, BeforeValidator(method("metrics"))]] = Field(
        default_factory=list, description="other metrics, by name or as {name: {option: value}}"
    )
    length: int = Field(default=2048, gt=1, description="tokens of a perplexity window")
    limit: int | None = Field(default=None, gt=0, description="documents of each task, or images; null: all")
    batch: int = Field(default=1, gt=0, description="sequences at a time")
    dense: bool = Field(default=True, description="measure the model before pruning too")
    samples: bool = Field(
        default=True, description="have the models answer a few prompts, to be read or seen side by side"
    )
