"""HoldZeros: a pruned model's zeros through anybody's training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsekit.maths import NM
from sparsekit.train import HoldZeros

TINY = Path(__file__).parent / "models" / "tiny-llama"
TOKENS = torch.randint(0, 512, (6, 16), generator=torch.Generator().manual_seed(0))


class Noisy(torch.optim.SGD):
    """An optimizer that moves every weight, whatever its gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter) * 1e-3)
        return loss


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.5),
    "noisy": lambda p: Noisy(p, lr=0.1),
}


class Mine(LightningModule):
    """What a user would write, with the model deep inside."""

    def __init__(self, optimizer: str, manual: bool = False):
        super().__init__()
        self.inner = torch.nn.ModuleDict({"lm": AutoModelForCausalLM.from_pretrained(TINY)})
        self.optimizer, self.automatic_optimization = optimizer, not manual

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        loss = self.inner["lm"](input_ids=batch, labels=batch).loss
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        return None


def pruned(module: Mine) -> dict[str, Tensor]:
    """Prune the MLPs to 2:4 by magnitude; the masks by the names that the model itself has."""
    masks = {}
    with torch.no_grad():
        for name, linear in module.inner["lm"].named_modules():
            if isinstance(linear, torch.nn.Linear) and ".mlp." in name:
                masks[name] = NM(2, 4).keep(linear.weight.abs())
                linear.weight.masked_fill_(~masks[name], 0)
    return masks


def fit(module: Mine, hold: HoldZeros, **options: Any) -> None:
    settings: dict[str, Any] = {"gradient_clip_val": 0.5} if module.automatic_optimization else {}
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[hold],
        **(settings | options),
    )
    trainer.fit(module, torch.utils.data.DataLoader(TOKENS, batch_size=2))  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [True, False], ids=["masks", "own zeros"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_are_held_bit_for_bit(optimizer: str, precision: str, given: bool) -> None:
    module = Mine(optimizer)
    masks = pruned(module)
    before = {name: p.detach().clone() for name, p in module.inner["lm"].named_parameters()}
    fit(module, HoldZeros(masks if given else None), precision=precision)
    moved = 0
    for name, parameter in module.inner["lm"].named_parameters():
        kept = masks.get(name.removesuffix(".weight"))
        if kept is not None:
            zeros = parameter.detach()[~kept]
            assert not zeros.count_nonzero() and not torch.signbit(zeros).any(), name
        moved += not torch.equal(parameter.detach().to(before[name].dtype), before[name])
    assert moved > 20  # it did train


def test_manual_optimization_too() -> None:
    module = Mine("noisy", manual=True)
    masks = pruned(module)
    fit(module, HoldZeros(masks))
    for name, kept in masks.items():
        assert not module.inner["lm"].get_submodule(name).weight.detach()[~kept].count_nonzero()


def test_without_it_the_zeros_are_lost() -> None:
    """The oracle of the tests above: training does fill zeros."""
    module = Mine("adamw")
    masks = pruned(module)
    fit(module, HoldZeros({next(iter(masks)): masks[next(iter(masks))]}))
    filled = [name for name, kept in masks.items() if module.inner["lm"].get_submodule(name).weight[~kept].any()]
    assert filled == list(masks)[1:]


def test_clipping_sees_the_gradients_of_kept_weights_alone() -> None:
    module = Mine("sgd")
    masks = pruned(module)
    norms = []

    class Look(HoldZeros):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            for name, kept in masks.items():
                norms.append(float(module.inner["lm"].get_submodule(name).weight.grad[~kept].abs().max()))

    fit(module, Look(masks))
    assert norms and max(norms) == 0


def test_nothing_is_left_behind() -> None:
    module = Mine("sgd")
    pruned(module)
    hold = HoldZeros()
    fit(module, hold)
    assert not hold._handles and not any(p._post_accumulate_grad_hooks for p in module.parameters())


def test_mistakes() -> None:
    module = Mine("sgd")
    with pytest.raises(ValueError, match="no linear has zeros to hold"):
        fit(module, HoldZeros())
    masks = pruned(module)
    name, kept = next(iter(masks.items()))
    with pytest.raises(ValueError, match="fits no linear"):
        fit(module, HoldZeros({"model.layers.99.mlp.up_proj": kept}))
    with pytest.raises(ValueError, match=r"fits \d+ linears"):
        fit(module, HoldZeros({"up_proj": kept}))
    with pytest.raises(ValueError, match="is not zero outside its mask"):
        fit(module, HoldZeros({name: torch.zeros_like(kept)}))
    with pytest.raises(ValueError, match=r"the mask of .* is \(2, 2\)"):
        fit(module, HoldZeros({name: kept[:2, :2]}))
