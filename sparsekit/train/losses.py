"""What recovery minimises: the loss of the text, and of what the dense model says of the same text."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekit.train.records import IGNORED
from sparsekit.train.rows import Rows, forward
from sparsekit.train.teacher import Cached, Running, distance, divergence, divergence_of_top


def text_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The summed cross-entropy of the labels that count, in float32, and how many they are.

    logits: (sequences, length, vocabulary); labels: (sequences, length), each predicted from the tokens before it
    """
    targets = labels[:, 1:].flatten()
    total = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
    return total, int((targets != IGNORED).sum())


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
        out = forward(model, ids, positions, output_hidden_states=self.hidden > 0)
        text, count = text_loss(out.logits, labels)
        said = float(text.detach())
        if self.teacher is None:
            return text, said, count
        loss = (1 - self.distill) * text
        if isinstance(self.teacher, Cached):
            kl = divergence_of_top(out.logits, *self.teacher.read(rows), labels, self.temperature)
            return loss + self.distill * kl, said, count
        dense = self.teacher.look(ids, positions, self.hidden > 0)
        if self.distill:
            loss = loss + self.distill * divergence(out.logits, dense.logits, labels, self.temperature)
        if self.hidden:
            loss = loss + self.hidden * distance(out.hidden_states[1:], dense.hidden_states[1:], labels)
        return loss, said, count

    def validation(self, model: nn.Module, rows: Rows) -> tuple[Tensor, int]:
        """The cross-entropy of rows, a sum, and how many tokens it is over: what the best state is chosen by."""
        return text_loss(forward(model, rows.ids, rows.positions).logits, rows.labels)

    def forget(self) -> None:
        """Give the dense model's memory back."""
        if isinstance(self.teacher, Running):
            self.teacher.forget()
