"""One run for each of several patterns, of one reading of the texts and one measurement of the dense model."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from sparsekit.recipe import Recipe
from sparsekit.results import REPORT, leaderboard, show_board
from sparsekit.results.page import write_comparison
from sparsekit.run.fitting import run_recipe
from sparsekit.run.measuring import measures
from sparsekit.run.shared import STATISTICS, Shared
from sparsekit.system import write_json

PAGE, BOARD, COMMON = "patterns.html", "patterns.json", "shared"


def run_each(
    recipes: Mapping[str, Recipe], *, resume: bool = False, dry_run: bool = False, console: Console | None = None
) -> int:
    """Run recipes that differ in their pattern, one after another, and write a page that compares them.

    Texts are read and the dense model is measured once. Each pattern has its own walk, and why is said at the start;
    without error correction, where linears see dense inputs, the first walk's statistics serve all.

    recipes: as `load_recipes` gives them; one alone, called "", is just run

    Returns:
        0, or the first status that is another: a run that is not proved does not keep the others from being run.

    Raises:
        ValueError, OSError: see `run_recipe`; what was finished before is kept, and `resume` goes on.
    """
    console = console or Console()
    first = next(iter(recipes.values()))
    if list(recipes) == [""]:
        return run_recipe(first, resume=resume, dry_run=dry_run, console=console)
    if first.trainer.devices not in (1, "auto", [0]) or first.trainer.num_nodes > 1:
        raise ValueError(
            f"several patterns run in one process, and trainer.devices is {first.trainer.devices}: leave it out, or "
            "give one pattern at a time"
        )
    home = Path(str(first.output)).parent
    shared, statuses = Shared(home / COMMON), []
    told = "each has a walk of its own, since what enters a block depends on how those before it were pruned"
    if first.error_correction == "none":
        told = "solvers that come first take one capture, as linears are given what the dense model gives them"
    console.print(
        f"{len(recipes)} patterns, {', '.join(recipes)}: the texts are read and the dense model is measured once; "
        f"{told}",
        markup=False,
        highlight=False,
    )
    for name, recipe in recipes.items():
        console.print(f"\n{name} -> {recipe.output}", style="bold", markup=False, highlight=False)
        again = resume and Path(str(recipe.output)).exists()
        statuses.append(run_recipe(recipe, resume=again, dry_run=dry_run, console=console, shared=shared))
    if dry_run or not all((Path(str(recipe.output)) / REPORT).is_file() for recipe in recipes.values()):
        return next((status for status in statuses if status), 0)
    shutil.rmtree(home / COMMON / STATISTICS, ignore_errors=True)
    if not measures(first):
        console.print("nothing was measured, as the recipe has no `evaluate`: there is no page that compares the runs")
    else:
        board = leaderboard([str(recipe.output) for recipe in recipes.values()])
        write_json(home / BOARD, board)
        write_comparison(board, home / PAGE)
        if not console.quiet:
            show_board(board, console)
        console.print(f"open {home / PAGE}", markup=False, highlight=False)
    return next((status for status in statuses if status), 0)
