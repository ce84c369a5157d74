"""What `import sparsekit` gives beside `prune`: the command line's `fit` and `eval`, from Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsekit.contracts import Figure
from sparsekit.measure import evaluate as measured
from sparsekit.recipe import Recipe, load_recipe, load_recipes
from sparsekit.results import figures_of
from sparsekit.run.fitting import run_recipe
from sparsekit.run.patterns import run_each
from sparsekit.run.pruned import Result
from sparsekit.system import session


def fit(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    settings: Sequence[str] = (),
    resume: bool = False,
    quiet: bool = False,
) -> Result:
    """Run a recipe as `sparsekit fit --recipe FILE --set SETTING ...` does.

    recipe: its file, or what such a file would hold
    settings: "dotted.key=value", as after --set
    resume: go on with a run that was interrupted, or give back one that is finished
    quiet: say nothing on the way

    Returns:
        the finished run; `result.verified` tells whether everything asked for is proved

    Raises:
        ValueError: the recipe (RecipeError), the model, the text or the output folder cannot be used.
        OSError: the disk is full or a folder cannot be written; committed blocks are kept.
    """
    checked = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, settings)
    run_recipe(checked, resume=resume, console=Console(quiet=True) if quiet else None)
    return Result(str(checked.output))


def fit_each(
    recipe: Mapping[str, Any] | str | Path,
    *,
    settings: Sequence[str] = (),
    resume: bool = False,
    quiet: bool = False,
) -> dict[str, Result]:
    """Run a recipe whose `pattern` is a list: a run for each entry, into folders of its own in `output`.

    The texts are read and the dense model is measured once. Arguments and errors are those of `fit`.

    Returns:
        the finished runs by their patterns, {"50%": ..., "2:4": ...}; patterns.html beside them compares them
    """
    recipes = load_recipes(recipe, settings)
    run_each(recipes, resume=resume, console=Console(quiet=True) if quiet else None)
    return {name: Result(str(each.output)) for name, each in recipes.items()}


def evaluate(model: Any, tokenizer: Any, *, dense: Any = None, **settings: Any) -> dict[str, Figure]:
    """Measure a model in memory, as the section `evaluate` of a recipe says.

        evaluate(model, tokenizer, perplexity=["wikitext2"], tasks=["arc_easy"], length=2048)

    tokenizer: of a vision model its image processor
    dense: the dense model, for `features=`, which are compared with its

    Returns:
        figures by name: a text's, "TASK METRIC", and those of metrics; each has value, stderr, count and more

    Raises:
        ValueError: settings, texts and model do not fit each other.
    """
    with session():
        return figures_of(measured(model, tokenizer, settings, dense=None if dense is None else lambda: dense))
