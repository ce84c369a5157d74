"""How several processes are started for one recipe, and who each of them is."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy as FabricDDP
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor

from sparsekit.recipe import TrainerOptions
from sparsekit.system import Team
from sparsekit.train import local

PATIENCE = timedelta(days=30)  # one process may solve, or evaluate, for long while the others wait for it


class Together(DDPStrategy):
    """Processes that walk together: Lightning's launcher and process group, without gradients to average."""

    def __init__(self) -> None:
        super().__init__(timeout=PATIENCE, process_group_backend=_backend())

    def configure_ddp(self) -> None:
        """Wrap nothing: a walk has no parameters of its own, which DDP would refuse."""


class Sharded(ModelParallelStrategy):
    """Processes that each hold a share of what is trained (torch's FSDP), and write checkpoints of their shares."""

    def __init__(self, processes: int) -> None:
        super().__init__(processes, 1, timeout=PATIENCE, process_group_backend=_backend())

    @property
    def lightning_restore_optimizer(self) -> bool:
        """By `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: the module says what it trains."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: the module has read it."""

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """This process's share of the moments, in plain tensors."""
        state: dict[str, Any] = optimizer.state_dict()
        state["state"] = {
            index: {name: local(value) if isinstance(value, Tensor) else value for name, value in each.items()}
            for index, each in state["state"].items()
        }
        return state

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """The moments of this process's share."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            for group, known in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({key: value for key, value in known.items() if key != "params"})
                for parameter, index in zip(group["params"], known["params"], strict=True):
                    optimizer.state[parameter] = {
                        name: value if not value.dim() else _like(parameter, value)
                        for name, value in state["state"].get(index, {}).items()
                    }

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """In every process, to a file of its own."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The same."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)


def _like(parameter: Tensor, mine: Tensor) -> Tensor:
    """A tensor that is divided as a parameter is, of this process's share."""
    shared = torch.zeros_like(parameter)
    local(shared).copy_(mine)
    return shared


def start(trainer: TrainerOptions) -> tuple[Team, torch.device]:
    """Start the other processes of a recipe, if there are to be some; who this one is, and where it computes.

    They run the same command from the top and meet this one here. Trainers that are made afterwards join the group.
    """
    strategy: Any = FabricDDP(timeout=PATIENCE, process_group_backend=_backend()) if trainer.several else "auto"
    fabric = Fabric(
        accelerator=trainer.accelerator, devices=trainer.devices, num_nodes=trainer.num_nodes, strategy=strategy
    )
    fabric.launch()
    return Team(fabric.global_rank, fabric.world_size), fabric.device


def _backend() -> str | None:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
