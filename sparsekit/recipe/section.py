"""What all sections of a recipe have in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of a recipe with fixed keys; types are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
