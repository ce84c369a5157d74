"""Recovery as Lightning sees it: a model of which some parameters are trained, and a small checkpoint."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from sparsekit.system import Team
from sparsekit.train.features import FeatureObjective
from sparsekit.train.losses import Objective
from sparsekit.train.rows import Rows
from sparsekit.train.schedule import cosine
from sparsekit.train.sharded import Sharding, local
from sparsekit.train.step import mean_gradients


class Recovery(LightningModule):
    """Trains the parameters `leaves` of a model by AdamW, with a linear warm-up and a cosine to zero.

    leaves: name in the model -> parameter; nothing else is in its checkpoints
    steps: of the optimizer; warmup: share of them. weight_decay: of parameters with two dimensions
    switch: called with True before a training step and with False before validation, where layers differ between them
    seed: with the batch's number added, of what is random in a step (dropout), so that a resumed run repeats it
    sharding: divides the blocks among the processes; None: every process has the whole model

    The model stays in eval mode. `trainer_options` is what it asks of the Trainer.
    """

    strict_loading = False

    def __init__(
        self,
        model: nn.Module,
        leaves: dict[str, nn.Parameter],
        objective: Objective | FeatureObjective,
        *,
        steps: int,
        learning_rate: float,
        warmup: float = 0.1,
        weight_decay: float = 0.0,
        switch: Callable[[bool], Any] = lambda _: None,
        seed: int = 0,
        team: Team = Team(),  # noqa: B008 (frozen)
        sharding: Sharding | None = None,
    ):
        super().__init__()
        self.sharding = sharding
        self.model, self.leaves, self.objective, self.switch = model.eval(), leaves, objective, switch
        self.steps, self.learning_rate, self.warmup, self.weight_decay = steps, learning_rate, warmup, weight_decay
        self.seed, self.team = seed, team
        self.text, self.predicted = 0.0, 0  # cross-entropy and number of the tokens since it was last asked for
        self.weight = 0  # tokens predicted since the last step of the optimizer
        self.trainer_options: dict[str, Any] = {}

    def configure_model(self) -> None:
        """Divide the blocks, before anything is made of their parameters."""
        if self.sharding is not None:
            self.sharding.divide(self.device_mesh["data_parallel"])  # type: ignore[index]

    def configure_optimizers(self) -> Any:
        """AdamW, and its rate step by step."""
        wide = [leaf for leaf in self.leaves.values() if leaf.ndim > 1]
        flat = [leaf for leaf in self.leaves.values() if leaf.ndim <= 1]
        groups = [{"params": wide, "weight_decay": self.weight_decay}, {"params": flat, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.learning_rate)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(self.steps, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def training_step(self, batch: tuple[Tensor, ...], index: int) -> Tensor:
        """The summed loss of a batch, as `Batches` gives it."""
        self.switch(True)
        torch.manual_seed(self.seed + index * self.team.size + self.team.rank)
        loss, text, count = self.objective(self.model, *batch)
        self.text, self.predicted, self.weight = self.text + text, self.predicted + count, self.weight + count
        return loss * self.trainer.accumulate_grad_batches  # by which Lightning divides, as if batches were alike

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradient of the mean over all tokens of a step, over batches and processes."""
        if self.sharding is None:
            mean_gradients(self.leaves.values(), self.weight, self.team)
        else:
            self.sharding.mean_gradients(self.weight)
        self.weight = 0

    @torch.no_grad()
    def validate(self, rows: Rows, batch: int) -> float:
        """The mean loss of `rows`, as the objective has it; with several processes each looks at its share."""
        self.switch(False)
        sums = torch.zeros(2, dtype=torch.float64)
        mine = rows[self.team.rank :: self.team.size]
        with self.trainer.precision_plugin.val_step_context():
            for start in range(0, self._longest(len(rows), len(mine)), batch):  # a process may have no rows
                part = mine[start : start + batch]
                total, count = self.objective.validation(self.model, (part if len(part) else rows[:1]).to(self.device))
                if len(part):
                    sums += torch.tensor([float(total), count], dtype=torch.float64)
        self.team.sum([sums])
        return float(sums[0] / sums[1].clamp_min(1))

    def _longest(self, rows: int, mine: int) -> int:
        """The rows of the process that has most: with shares of the blocks, all must run as often."""
        return mine if self.sharding is None else -(-rows // self.team.size)

    def mean_loss(self) -> float:
        """The mean text loss since it was last asked for, over all processes."""
        sums = torch.tensor([self.text, self.predicted], dtype=torch.float64)
        self.team.sum([sums])
        self.text, self.predicted = 0.0, 0
        return float(sums[0] / sums[1].clamp_min(1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Only what is trained; with shares of the blocks, this process's."""
        checkpoint["state_dict"] = {f"model.{name}": local(leaf.detach()) for name, leaf in self.leaves.items()}

    @torch.no_grad()
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Shares are read here; a whole model's parameters Lightning reads."""
        if self.sharding is not None:
            for name, leaf in self.leaves.items():
                local(leaf).copy_(checkpoint["state_dict"][f"model.{name}"])
