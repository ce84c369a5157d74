"""The texts that a recipe names: a source with its options, or a local file."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from sparsekit import registry
from sparsekit.data import FORMATS
from sparsekit.recipe import values
from sparsekit.recipe.methods import source_name
from sparsekit.recipe.section import Section


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


class Text(Section):
    """A source of text; keys beyond the fixed ones are options of the source."""

    model_config = ConfigDict(extra="allow")
    source: Annotated[str, AfterValidator(source_name)] = Field(
        description="an installed source of text or a local file"
    )

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

    source: Annotated[str, AfterValidator(source_name)] = Field(
        default="c4", description="an installed source of text or a local file"
    )
    samples: int = Field(default=128, gt=0, description="how many sequences")
    length: int = Field(default=2048, gt=1, description="tokens of each")
    seed: int = Field(default=0, ge=0, description="of the choice of sequences")
    batch: int | None = Field(default=None, gt=0, description="sequences at a time; null: chosen by the run")
