"""What recovery minimises: the loss of the text, and of what the dense model says of the same text."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekit.model import Said
from sparsekit.train.head import summed
from sparsekit.train.records import IGNORED
from sparsekit.train.rows import Rows
from sparsekit.train.teacher import Cached, Running, distance, divergence, divergence_of_top


def text_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed cross-entropy of the targets that count, in float32.

    logits: (sequences, places, vocabulary); targets: (sequences, places), the token that follows each place
    """
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


class Objective:
    """The loss of a batch: (1 - distill) text + distill KL to the dense model + hidden distance of hidden states.

    Each is a sum over the tokens that are predicted, so that batches count by how many they have.
    teacher: the dense model, None for the text alone
    """

    def __init__(
        self,
        teacher: Running | Cached | None = None,
        *,
        distill: float = 0.0,
        hidden: float = 0.0,
        temperature: float = 1.0,
    ):
        self.teacher, self.distill, self.hidden, self.temperature = teacher, distill, hidden, temperature

    def __call__(
        self, model: nn.Module, ids: Tensor, labels: Tensor, rows: Tensor, positions: Tensor | None = None
    ) -> tuple[Tensor, float, int]:
        """The loss to be minimised of tokens and labels (sequences, length), the cross-entropy in it, and their number.

        rows: (sequences,), the numbers of the training rows that they are; positions: as in `Rows`

        Returns:
            two sums over the tokens that are predicted, and how many these are
        """
        own = Said(model, ids, positions, hidden=self.hidden > 0)
        dense = self.teacher.look(ids, positions, self.hidden > 0) if isinstance(self.teacher, Running) else None
        known = self.teacher.read(rows) if isinstance(self.teacher, Cached) else None
        seen = ids.new_zeros((), dtype=torch.float32)

        def loss(logits: Tensor, places: Tensor) -> Tensor:
            targets = labels[:, places + 1]
            text = text_loss(logits, targets)
            seen.add_(text.detach())
            if self.teacher is None:
                return text
            text = (1 - self.distill) * text
            if known is not None:
                logs, indices = (part[:, places] for part in known)
                return text + self.distill * divergence_of_top(logits, logs, indices, targets, self.temperature)
            if dense is not None and self.distill:
                with torch.no_grad():
                    other = dense.logits(places)
                return text + self.distill * divergence(logits, other, targets, self.temperature)
            return text

        total = summed(own, loss)
        if self.hidden and dense is not None:
            total = total + self.hidden * distance(own.hidden_states[1:], dense.hidden_states[1:], labels)
        return total, float(seen), int((labels[:, 1:] != IGNORED).sum())

    def validation(self, model: nn.Module, rows: Rows) -> tuple[Tensor, int]:
        """The cross-entropy of rows, a sum, and how many tokens it is over: what the best state is chosen by."""
        total = summed(
            Said(model, rows.ids, rows.positions),
            lambda logits, places: text_loss(logits, rows.labels[:, places + 1]),
        )
        return total, int((rows.labels[:, 1:] != IGNORED).sum())

    def forget(self) -> None:
        """Give the dense model's memory back."""
        if isinstance(self.teacher, Running):
            self.teacher.forget()
