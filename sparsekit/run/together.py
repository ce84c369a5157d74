"""How several processes are started for one recipe, and who each of them is."""

from datetime import timedelta
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.pytorch.strategies import DDPStrategy

from sparsekit.recipe import TrainerOptions
from sparsekit.system import Team

PATIENCE = timedelta(days=30)  # one process may solve, or evaluate, for long while the others wait for it


class Together(DDPStrategy):
    """Processes that walk together: Lightning's launcher and process group, without gradients to average."""

    def __init__(self) -> None:
        super().__init__(timeout=PATIENCE, process_group_backend=_backend())

    def configure_ddp(self) -> None:
        """Wrap nothing: a walk has no parameters of its own, which DDP would refuse."""


def start(trainer: TrainerOptions) -> tuple[Team, torch.device]:
    """Start the other processes of a recipe, if there are to be some; who this one is, and where it computes.

    They run the same command from the top and meet this one here. Trainers that are made afterwards join the group.
    """
    devices, num_nodes = trainer.devices, trainer.num_nodes
    several = num_nodes > 1 or (len(devices) > 1 if isinstance(devices, list) else devices not in (1, "auto"))
    strategy: Any = FabricDDP(timeout=PATIENCE, process_group_backend=_backend()) if several else "auto"
    fabric = Fabric(accelerator=trainer.accelerator, devices=devices, num_nodes=num_nodes, strategy=strategy)
    fabric.launch()
    return Team(fabric.global_rank, fabric.world_size), fabric.device


def _backend() -> str | None:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
