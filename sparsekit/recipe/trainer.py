"""The section `trainer` of a recipe: what of Lightning's Trainer may be set, and why the rest may not."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from sparsekit.recipe import values
from sparsekit.recipe.section import Section

REFUSED = {
    **dict.fromkeys(
        ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "fast_dev_run", "overfit_batches"),
        "would end a walk before its last block, or begin it again: a stage has its own `steps` or `epochs`",
    ),
    **dict.fromkeys(
        ("limit_train_batches", "limit_val_batches", "reload_dataloaders_every_n_epochs", "use_distributed_sampler"),
        "would leave blocks out, whose stream is the data of a walk: leave it out",
    ),
    **dict.fromkeys(
        ("enable_checkpointing", "default_root_dir"), "is not needed: committed blocks are what a run goes on from"
    ),
    "accumulate_grad_batches": "is an option of the stages that train, `accumulate`: give it there",
}


def _dotted(path: str) -> str:
    if not all(part.isidentifier() for part in path.split(".")) or "." not in path:
        raise ValueError(f'is "{path}", must be package.module.Class')
    return path


def _strategy(name: str) -> str:
    if name not in ("auto", "ddp", "fsdp"):
        raise ValueError(
            f'is "{name}", and can be auto or ddp, which are the same: every process has the whole model, walks share '
            "out blocks, and stages that train average their gradients; or fsdp: each process has a share of what lora "
            "and finetune train"
        )
    return name


class ClassPath(Section):
    """A class of an installed package and its arguments, as LightningCLI writes them."""

    class_path: Annotated[str, AfterValidator(_dotted)] = Field(description="package.module.Class")
    init_args: dict[str, Any] = Field(default_factory=dict, description="its arguments")


class TrainerOptions(Section):
    """What is handed to lightning.Trainer."""

    accelerator: str = Field(default="auto", description="cpu, cuda, mps, ... or auto")
    devices: Annotated[Any, AfterValidator(values.devices)] = Field(
        default=1, description='how many, a list of numbers, or "auto"'
    )
    num_nodes: int = Field(default=1, gt=0, description="machines, each started by torchrun on a shared folder")
    strategy: Annotated[str, AfterValidator(_strategy)] = Field(
        default="auto",
        description="auto or ddp, the same: with several devices, the whole model in every process; or fsdp",
    )
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] | None = Field(
        default=None, description="of stages that train the model; null: bf16-mixed where the accelerator has it"
    )
    gradient_clip_val: float | None = Field(
        default=None, gt=0, description="largest norm of a gradient in stages that train the model; null: the stage's"
    )
    callbacks: list[ClassPath] = Field(default_factory=list, description="of Lightning, for stages that a Trainer runs")
    logger: list[ClassPath] = Field(default_factory=list, description="of Lightning, beside those of `loggers`")

    @property
    def several(self) -> bool:
        """Whether there are several processes, as far as is said."""
        devices = self.devices
        return self.num_nodes > 1 or (len(devices) > 1 if isinstance(devices, list) else devices not in (1, "auto"))

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, value: Any) -> Any:
        for key in value if isinstance(value, dict) else ():
            if key in REFUSED:
                raise ValueError(f"`trainer.{key}` {REFUSED[key]}")
        return value
