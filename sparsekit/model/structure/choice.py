"""Which units stay: those with the best scores, so that the budget of parameters is kept."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from sparsekit.contracts import share
from sparsekit.model.structure.units import Part, Units

SHAPES = ("free", "uniform", "serving")
SERVED = 256  # channels that are kept or go together where a model is for programs that serve it
BUDGETS = ("separate", "joint")


def check_shape(shape: str, budgets: str) -> None:
    """Raise ValueError for a shape or budgets that are unknown, or do not go together."""
    if shape not in SHAPES or budgets not in BUDGETS:
        raise ValueError(
            f"shape is {shape!r} and budgets {budgets!r}; they can be {', '.join(SHAPES)} and {', '.join(BUDGETS)}"
        )
    if (shape, budgets) == ("uniform", "joint"):
        raise ValueError("shape uniform gives each kind of units its own budget; budgets cannot be joint with it")


def choose(
    units: Units, scores: Tensor, remove: float, *, shape: str = "free", budgets: str = "separate", least: int = 1
) -> Tensor:
    """The mask (units,) that keeps the highest scores (units,) and removes the share `remove` of all parameters.

    Never less than `remove` goes, and more by less than one unit: the smallest that could still go, or with separate
    budgets one of the last kind (uniform: one in each block). Of equal scores the unit that comes first stays.

    shape: free, the best of the whole model; uniform, the same number in each block (the same share where blocks
        differ), the best of each; serving, free, but heads of a block stay or go together, and channels by 256, the
        worst first: widths that programs which serve models have code for (the exporter `deci`)
    budgets: separate, of heads (or whole attentions) the nearest number to their share goes that leaves channels (or
        MLPs) something to do, and of these as few as bring the total to `remove`; joint, the lowest scores of both
        kinds go, which must be comparable; a unit that would go beyond `remove` is passed over for smaller ones
    least: units that every part keeps, of those with several

    Raises:
        ValueError: a share outside (0, 1), more than these units hold, an unknown shape or budgets.
    """
    share(remove)
    check_shape(shape, budgets)
    if shape == "uniform" and units.kinds != ["layers"] and all(part.count == 1 for part in units.parts):
        raise ValueError(
            f"shape uniform removes as many {' and '.join(units.kinds)} in every block, and each has one: give shape: "
            "free"
        )
    if shape != "uniform" and units.kinds == ["experts"]:
        raise ValueError(
            "a config has one number of experts for all blocks, so as many go from each: give shape: uniform, not free"
        )
    if shape == "serving":
        coarse, members = _coarse(units, scores)
        values = torch.stack([scores[each].double().mean() for each in members])
        stay = choose(coarse, values, remove, shape="free", budgets=budgets)
        kept = torch.ones(len(units), dtype=torch.bool)
        for each, stays in zip(members, stay.tolist(), strict=True):
            mine = units.part == units.part[each[0]]
            kept[each] = stays and bool(kept[mine].all())  # what is worse goes with what is better
        return kept
    goal = math.ceil(remove * units.total - 1e-6)
    kept = torch.ones(len(units), dtype=torch.bool)
    safe = _best_of_each(units, scores, least)
    if budgets == "joint":
        order = _worst_first(units, scores, ~safe)
        return _dropped(kept, order[_filled(units.parameters[order], goal, units)])
    for position, kind in enumerate(units.kinds):
        mine = units.of(kind)
        done = int(units.parameters[~kept].sum())
        last = kind == units.kinds[-1]
        later = sum(int(units.parameters[units.of(other) & ~safe].sum()) for other in units.kinds[position + 1 :])
        if shape == "uniform" and kind != "layers":
            parts = [part for part in units.parts if part.kind == kind]
            steps = _alike(parts, least)
            held = [sum(n * part.parameters for n, part in zip(step, parts, strict=True)) for step in steps]
            if last:
                number = next((n for n, size in enumerate(held) if size >= goal - done), None)
                if number is None:
                    raise _too_much(units, done + held[-1])
            else:
                number = min(round(remove * (len(steps) - 1)), len(steps) - 1)
                while number and held[number] > goal - done:
                    number -= 1
                while number < len(steps) - 1 and held[number] + later < goal - done:
                    number += 1
            for part, count in zip(parts, steps[number], strict=True):
                order = _worst_first(units, scores, units.part == units.parts.index(part))
                kept = _dropped(kept, order[:count])
            continue
        order = _worst_first(units, scores, mine & ~safe)
        sizes = units.parameters[order]
        if last:
            number = _enough(sizes, goal - done, units, done)
        else:
            number = _between(round(remove * int(mine.sum())), sizes.tolist(), goal - done, later)
        kept = _dropped(kept, order[:number])
    return kept


def _coarse(units: Units, scores: Tensor) -> tuple[Units, list[Tensor]]:
    """Units that are made of several, and the numbers of those, the best first: all heads of a block, its channels by
    256, and what is left over."""
    parts: list[Part] = []
    members: list[Tensor] = []
    for number, part in enumerate(units.parts):
        size = {"heads": part.count, "channels": SERVED}.get(part.kind, 1)
        pieces = _worst_first(units, scores, units.part == number).flip(0).split(size)
        whole = [piece for piece in pieces if len(piece) == size]
        for alike in (whole, list(pieces[len(whole) :])):
            if alike:
                each = len(alike[0])
                parts.append(replace(part, count=len(alike), parameters=each * part.parameters, fewest=0))
        members += pieces
    return Units(tuple(parts), units.total), members


def _alike(parts: list[Part], least: int) -> list[list[int]]:
    """How many units go from each part, step by step: the same share, so the same number where parts have as many."""
    most = [part.count - max(least, part.least) if part.count > 1 else 0 for part in parts]
    largest = max(part.count for part in parts)
    return [
        [min(top, -(-number * part.count // largest)) for part, top in zip(parts, most, strict=True)]
        for number in range(largest + 1)
    ]


def _best_of_each(units: Units, scores: Tensor, least: int) -> Tensor:
    """Whether a unit is among the `least` best of its part (units,); parts of one unit have none that is safe.

    Of whole layers the best one of all is safe: a model without any is none.
    """
    safe = torch.zeros(len(units), dtype=torch.bool)
    if units.kinds == ["layers"]:
        safe[_worst_first(units, scores, ~safe)[-1]] = True
    for number, part in enumerate(units.parts):
        if part.count > 1 and (stay := max(least, part.least)):
            order = _worst_first(units, scores, units.part == number)
            safe[order[-stay:]] = True
    return safe


def _worst_first(units: Units, scores: Tensor, among: Tensor) -> Tensor:
    order = torch.argsort(-scores.double(), stable=True).flip(0)
    return order[among[order]]


def _enough(parameters: Tensor, goal: int, units: Units, done: int = 0) -> int:
    """How many of these, in this order, hold `goal` parameters."""
    if goal <= 0:
        return 0
    total = parameters.cumsum(0)
    if not len(total) or total[-1] < goal:
        raise _too_much(units, done + (int(total[-1]) if len(total) else 0))
    return int((total < goal).sum()) + 1


def _between(number: int, sizes: list[int], goal: int, later: int) -> int:
    """The number of units nearest to `number` that leaves to later kinds something to do, and no more than they hold.

    sizes: parameters of the units in the order in which they go; goal: parameters that must go in all
    """
    number = min(number, len(sizes))
    while number and sum(sizes[:number]) > goal:
        number -= 1
    while number < len(sizes) and sum(sizes[:number]) + later < goal:
        number += 1
    return number


def _filled(parameters: Tensor, goal: int, units: Units) -> Tensor:
    """Which of these go (count,), in this order, so that the goal is passed by less than the smallest that is left."""
    if int(parameters.sum()) < goal:
        raise _too_much(units, int(parameters.sum()))
    gone, left = torch.zeros(len(parameters), dtype=torch.bool), goal
    for index, size in enumerate(parameters.tolist()):
        if size <= left:
            gone[index], left = True, left - size
        if not left:
            return gone
    least = parameters.masked_fill(gone | (parameters < left), int(parameters.max()) + 1)
    last = int(least.argmin())  # the first of the smallest that is enough
    over = int(parameters[last]) - left
    for index in gone.nonzero().flatten().flip(0).tolist():  # what it makes needless stays, the best first
        if parameters[index] <= over:
            gone[index], over = False, over - int(parameters[index])
    gone[last] = True
    return gone


def _too_much(units: Units, most: int) -> ValueError:
    return ValueError(
        f"{' and '.join(units.kinds)} can give up {most / units.total:.1%} of the blocks' parameters at most; "
        "remove less, or other units"
    )


def _dropped(kept: Tensor, which: Tensor) -> Tensor:
    kept = kept.clone()
    kept[which] = False
    return kept
