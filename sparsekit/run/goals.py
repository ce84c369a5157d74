"""How much a structural stage removes where the recipe says what is to be reached: a speed, a size."""

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekit.contracts import goal
from sparsekit.model import Block, adopt, filled, save_model
from sparsekit.model.structure import Cuts, Removal, Shape, choose, find_units
from sparsekit.results import BACKENDS, bench, check_backend
from sparsekit.system import commit, committed, human_size

FILE = "goal.json"
NOMINAL = 0.3  # a share that stands for one that is to be measured, where a recipe is checked
CLOSE = 0.03  # how far a measured speed may be from what was asked
TRIES, TURNS = 6, 7
LOWEST, HIGHEST = 0.02, 0.9  # shares that are looked at


def counted(asked: dict[str, Any], model: nn.Module, blocks: Sequence[Block], dtype: torch.dtype) -> float:
    """The share of the blocks' parameters that must go for a size; of a speed, which must be measured, a nominal one.

    asked: as `contracts.goal` gives it; dtype: of the weights

    Raises:
        ValueError: the blocks do not hold so much, the model is small enough as it is, or a backend is not there.
    """
    if "speedup" in asked:
        check_backend(asked["backend"], [], [asked["batch"]], "cpu", on=asked["on"])  # before anything heavy starts
        return NOMINAL
    total = sum(parameter.numel() for parameter in model.parameters())
    inside = sum(parameter.numel() for block in blocks for parameter in block.module.parameters())
    if "memory" in asked:
        left, said = asked["memory"] // dtype.itemsize, f"weights of {human_size(asked['memory'])}"
    else:
        left, said = asked["parameters"], f"{asked['parameters']:,} parameters"
    if left >= total:
        raise ValueError(f"remove asks for {said}, and the model has {total:,} parameters: there is nothing to remove")
    if left <= total - HIGHEST * inside:
        raise ValueError(
            f"remove asks for {said}, and of the {total:,} parameters {total - inside:,} are outside the blocks: ask "
            f"for more than {int(total - HIGHEST * inside):,}"
        )
    return (total - left) / inside


def measured(
    asked: dict[str, Any],
    speed: Callable[[float], float],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[float, list[tuple[float, float]]]:
    """The share with which a model is as many times as fast as was asked, and what was tried: (share, speed).

    speed: how many times as fast a model is without a share of its blocks' parameters

    Regula falsi on 1 / speed, which is nearly linear in the share.

    Raises:
        ValueError: even without HIGHEST of them it is not so fast.
    """
    wanted = float(asked["speedup"])
    below: tuple[float, float] = (0.0, 1.0)  # (share, speed)
    above: tuple[float, float] | None = None
    tried: list[tuple[float, float]] = []
    share = min(HIGHEST, max(LOWEST, 1.2 * (1 - 1 / wanted)))
    for _ in range(TRIES):
        found = speed(share)
        tried.append((share, found))
        say(f"without {share:.1%} of the blocks' parameters {found:.2f} times as fast, {wanted:g} are asked")
        if abs(found / wanted - 1) <= CLOSE:
            break
        if found < wanted:
            if share >= HIGHEST:
                raise ValueError(
                    f"remove asks for {wanted:g} times the speed, and without {HIGHEST:.0%} of its blocks' parameters "
                    f"the model is {found:.2f} times as fast: what is outside the blocks takes the time"
                )
            below = (share, found)
        else:
            above = (share, found)
        if above is None:
            further = (1 - 1 / wanted) / (1 - 1 / found) if found > 1 else 1.5  # as if 1 / speed were linear
            share = min(HIGHEST, share * min(2.0, max(1.05, further)))
        else:
            one, other, aim = 1 / below[1], 1 / above[1], 1 / wanted
            part = (one - aim) / (one - other) if one > other else 0.5
            share = below[0] + (above[0] - below[0]) * min(0.9, max(0.1, part))
    best = min(tried, key=lambda pair: abs(pair[1] / wanted - 1))
    if abs(best[1] / wanted - 1) > CLOSE:
        say(f"nearer than {best[1]:.2f} times was not measured; is something else running on this machine?")
    return best[0], tried


def decided(
    given: Any,
    kinds: Sequence[str],
    shape: str,
    model: nn.Module,
    blocks: list[Block],
    tokenizer: Any,
    source: Path | None,
    cuts: Cuts,
    folder: Path,
    device: str,
    say: Callable[[str], None],
) -> float:
    """The share that a stage's `remove` comes to; what was measured is kept in `folder`, so that a resume takes it too.

    source: the checkpoint that speeds are relative to; cuts: what was cut out of the model before

    Raises:
        ValueError: the goal cannot be reached, or a speed is asked for and there is no checkpoint to measure beside.
    """
    asked = goal(given)
    assert asked is not None
    if committed(folder / FILE):
        return float(json.loads((folder / FILE).read_text(encoding="utf-8"))["remove"])
    tried: list[tuple[float, float]] = []
    if "speedup" not in asked:
        share = counted(asked, model, blocks, next(model.parameters()).dtype)
    elif source is None:
        raise ValueError("remove asks for a speed, which is measured beside the model's folder, and it has none")
    else:
        before = source

        def speed(share: float) -> float:
            with tempfile.TemporaryDirectory() as aside:
                _save_cut(model, blocks, kinds, shape, share, tokenizer, cuts, Path(aside) / "cut")
                options = {key: asked[key] for key in ("backend", "prompt", "new")}
                where = device if BACKENDS[asked["backend"]].torch else "cpu"
                found = bench(
                    [f"{aside}/cut", str(before)], batches=[asked["batch"]], repeat=TURNS, device=where, **options
                )
            return float(found["faster"][asked["on"]][str(asked["batch"])])

        share, tried = measured(asked, speed, say)
    said = json.dumps({"asked": asked, "remove": share, "tried": tried})
    commit(folder / FILE, lambda aside: aside.write_text(said, encoding="utf-8"))
    return share


def told(folder: Path) -> dict[str, Any]:
    """What a stage aimed at, what was tried, and what that came to, for the report; nothing where it named a share."""
    return {"goal": json.loads((folder / FILE).read_text(encoding="utf-8"))} if committed(folder / FILE) else {}


def _save_cut(
    model: nn.Module,
    blocks: list[Block],
    kinds: Sequence[str],
    shape: str,
    share: float,
    tokenizer: Any,
    cuts: Cuts,
    folder: Path,
) -> None:
    """A copy of the model without a share of its blocks' parameters, whichever: the time does not depend on which."""
    with filled(blocks):
        other = copy.deepcopy(model)
    own = adopt(other, blocks)
    units = find_units(other, own, kinds)
    scores = torch.rand(len(units), generator=torch.Generator().manual_seed(0)).double()
    removal = Removal(units.kinds, choose(units, scores, share, shape=shape))
    found = removal.apply(other, own)
    save_model(other, tokenizer, folder, Shape.of(other, [*cuts, (found, removal)]))
