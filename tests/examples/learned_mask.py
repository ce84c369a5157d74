"""Learn the n:m mask of all linears at once by gradient descent on scores: an example of a sparsekit stage."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from sparsekit.contracts import Context, Count, Effect, Fit, Positive, declares


@declares(Effect(prunes=True, start="dense", gradients=True))
def learned_mask(context: Context, *, steps: Count = 20, batch: Count = 2, learning_rate: Positive = 0.1) -> Fit:
    """Train a score for every weight; the best of each group stay, and gradients pass straight through the choice.

    steps, batch: of training, sequences in a step. learning_rate: of AdamW

    Source: an example, no paper. The weights stay what they are: it gives masks alone, and the run applies them.
    """
    return Fit(Learner(context, steps, batch, learning_rate), DataLoader(range(steps)))  # type: ignore[arg-type]


class Learner(LightningModule):
    """Scores of all weights of the blocks' linears, and the loss of the model that they mask."""

    def __init__(self, context: Context, steps: int, batch: int, learning_rate: float):
        super().__init__()
        self.context, self.batch, self.rate = (context,), batch, learning_rate  # in a tuple: no submodule
        self.linears = {name: linear for block in context.blocks for name, linear in block.linears.items()}
        size = {name: linear.weight.abs() / linear.weight.abs().mean() for name, linear in self.linears.items()}
        self.scores = nn.ParameterList([nn.Parameter(score.clone()) for score in size.values()])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.scores.parameters(), lr=self.rate, weight_decay=0.0)

    def kept(self) -> dict[str, Tensor]:
        """A linear's name -> the weights (out, in) that stay."""
        patterns = self.context[0].patterns
        return {name: patterns[name].keep(s.detach()) for name, s in zip(self.linears, self.scores, strict=True)}

    def training_step(self, step: Tensor, index: int) -> Tensor:
        context, masked = self.context[0], {}
        for (name, mask), score in zip(self.kept().items(), self.scores, strict=True):
            soft = mask.to(score) + score - score.detach()  # the mask, with the gradient of the score
            masked[f"{name}.weight"] = self.linears[name].weight * soft
        tokens = context.tokens.roll(-index * self.batch, 0)[: self.batch]
        logits = functional_call(context.model, masked, (tokens,), {"use_cache": False}).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def on_train_end(self) -> None:
        for block in self.context[0].blocks:
            block.masks = {name: mask for name, mask in self.kept().items() if name in block.linears}
