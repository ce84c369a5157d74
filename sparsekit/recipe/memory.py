"""The section `memory` of a recipe."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from sparsekit.recipe import values
from sparsekit.recipe.section import Section


class Memory(Section):
    """Budgets."""

    budget: Annotated[int | None, BeforeValidator(values.in_bytes, json_schema_input_type=int | str | None)] = Field(
        default=None,
        gt=0,
        description='of the whole process, in bytes or as "8GB", without what is mapped from disk: activations and '
        "statistics get what the walks leave of it",
    )
    activations: Annotated[int, BeforeValidator(values.in_bytes, json_schema_input_type=int | str)] = Field(
        default=4 * 10**9,
        gt=0,
        description='of calibration activations in CPU memory, and on an accelerator, in bytes or "4GB"; the rest is '
        "on disk",
    )
    statistics: Annotated[int, BeforeValidator(values.in_bytes, json_schema_input_type=int | str)] = Field(
        default=4 * 10**9,
        gt=0,
        description="of a block's Gram matrices at a time; where experts have more, they come in several turns",
    )
