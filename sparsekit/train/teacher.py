"""The dense model as a teacher: it runs along on every batch, or its largest logits are read from a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from sparsekit.model import Said
from sparsekit.system import commit, committed, write_tensors
from sparsekit.train.records import IGNORED
from sparsekit.train.rows import Rows


class Running:
    """The dense model on the same batch, without gradients. load: makes it; called at the first batch."""

    def __init__(self, load: Callable[[], nn.Module]):
        self.load = load
        self.model: nn.Module | None = None

    @torch.no_grad()
    def look(self, ids: Tensor, positions: Tensor | None = None, hidden: bool = False) -> Said:
        """What it makes of tokens and positions (sequences, length)."""
        if self.model is None:
            self.model = self.load().to(ids.device).eval()
        return Said(self.model, ids, positions, hidden=hidden)

    def forget(self) -> None:
        """Give its memory back."""
        self.model = None


class Cached(Callback):
    """The `top` largest log-probabilities of the dense model for every token of the training rows, in one file.

    Written before the first step, in one pass of the dense model, which is not needed any more then; a resumed run
    finds it. float16 and int32: 6 bytes for each of them.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        rows: Rows,
        file: Path,
        *,
        top: int,
        batch: int,
        temperature: float,
        console: Console,
    ):
        self.running, self.rows, self.file = Running(load), rows, file
        self.top, self.batch, self.temperature, self.console = top, batch, temperature, console

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        """Write the file, unless it is there; of several processes the first does."""
        if trainer.is_global_zero and not committed(self.file):
            self._write(trainer, module)
        trainer.strategy.barrier()

    def _write(self, trainer: Trainer, module: Any) -> None:
        self.console.print(
            f"what the dense model says of {self.rows.ids.numel()} tokens is kept in {self.file}", markup=False
        )
        logs, indices = [], []
        with trainer.precision_plugin.val_step_context():
            for start in range(0, len(self.rows), self.batch):
                part = self.rows[start : start + self.batch].to(module.device)
                said = self.running.look(part.ids, part.positions)
                pieces = [self._best(said, places) for places in said.places(last=True)]
                logs.append(torch.cat([log for log, _ in pieces], 1))
                indices.append(torch.cat([index for _, index in pieces], 1))
        self.running.forget()
        tensors = {"logs": torch.cat(logs), "indices": torch.cat(indices)}
        commit(self.file, lambda aside: write_tensors(aside, tensors))

    @torch.no_grad()
    def _best(self, said: Said, places: Tensor) -> tuple[Tensor, Tensor]:
        logits = said.logits(places).float() / self.temperature
        best = log_softmax(logits, -1).topk(min(self.top, logits.shape[-1]))
        return best.values.to("cpu", torch.float16), best.indices.to("cpu", torch.int32)

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and vocabulary indices of some rows, each (rows, length, top), on their device."""
        with safe_open(self.file, framework="pt") as handle:
            slices = [handle.get_slice(key) for key in ("logs", "indices")]
            logs, indices = (torch.cat([part[row : row + 1] for row in rows.tolist()]) for part in slices)
        return logs.to(rows.device).float(), indices.to(rows.device).long()


def divergence(logits: Tensor, dense: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """temperature^2 KL(dense || model) of the distributions softened by `temperature`, a sum over what is predicted.

    logits, dense: (sequences, places, vocabulary); targets: (sequences, places), of which those that count say which
    places do. Hinton, Vinyals & Dean 2015, arXiv:1503.02531. One sequence at a
    time, so that only one sequence's dense distributions are held beside the logits.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for own, other, said in zip(logits, dense, targets, strict=True):
        keep = said != IGNORED
        log_q = log_softmax(own[keep].float() / temperature, -1)
        log_p = log_softmax(other[keep].float() / temperature, -1)
        total = total + kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total * temperature**2


def divergence_of_top(logits: Tensor, logs: Tensor, indices: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The same from the dense model's largest log-probabilities at that temperature; all others count as one outcome.

    logs, indices: (sequences, places, top). It is at most the whole divergence, by what is lost inside the rest.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for own, log_p, index, said in zip(logits, logs, indices, targets, strict=True):
        keep = said != IGNORED
        log_q = log_softmax(own[keep].float() / temperature, -1).gather(-1, index[keep])
        log_q, log_p = (torch.cat((log, _rest(log)), -1) for log in (log_q, log_p[keep]))
        total = total + kl_div(log_q, log_p, reduction="sum", log_target=True)
    return total * temperature**2


def _rest(logs: Tensor) -> Tensor:
    """The logarithm of what is left of 1, (..., 1); bounded, as float32 may leave nothing."""
    return (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(1e-6).log()


def distance(hidden: tuple[Tensor, ...], dense: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Squared differences of hidden states over each dense token's energy: the mean over layers, a sum over tokens.

    hidden, dense: of each layer (sequences, length, width); labels: (sequences, length), of which those that count say
    which tokens do: the ones that predict them, as in the text's loss, so neither padding nor prompts

    Raises:
        ValueError: there are not as many, or not of that width.
    """
    if [h.shape for h in hidden] != [h.shape for h in dense]:
        raise ValueError(
            f"the dense model has {len(dense)} layers of width {dense[0].shape[-1]}, the pruned one {len(hidden)} of "
            f"{hidden[0].shape[-1]}: their hidden states cannot be compared, use `distill` alone"
        )
    keep = labels[:, 1:] != IGNORED
    parts = []
    for own, other in zip(hidden, dense, strict=True):
        own, other = own[:, :-1][keep].float(), other[:, :-1][keep].float()
        parts.append(((own - other).square().sum(-1) / other.square().sum(-1).clamp_min(1e-12)).sum())
    return torch.stack(parts).mean()
