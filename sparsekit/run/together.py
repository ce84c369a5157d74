"""How Lightning starts several processes for one recipe."""

from datetime import timedelta

import torch
from lightning.pytorch.strategies import DDPStrategy

PATIENCE = timedelta(days=30)  # one process may solve, or evaluate, for long while the others wait for it


class Together(DDPStrategy):
    """Processes that walk together: Lightning's launcher and process group, without gradients to average."""

    def __init__(self) -> None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
        super().__init__(timeout=PATIENCE, process_group_backend=backend)

    def configure_ddp(self) -> None:
        """Wrap nothing: a walk has no parameters of its own, which DDP would refuse."""
