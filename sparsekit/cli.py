"""The command line. Heavy libraries are imported by the command that needs them, and by no other."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from sparsekit.arguments import command_line

MISTAKE, FAILED, INTERRUPTED = 2, 1, 130  # exit status: the user's, the result's or the machine's, Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 only when everything asked for is true.

    2: a mistake in what was given (one message, no traceback). 1: the result is not as asked, or the machine failed,
    such as a full disk. 130: Ctrl-C. A defect of sparsekit itself stays a traceback.
    """
    from sparsekit.system import bars, other_sparsekit

    parser = command_line()
    given = parser.parse_args(argv)
    if said := other_sparsekit():
        print(f"sparsekit: {said}", file=sys.stderr)
    if given.command is None:
        parser.print_help(sys.stderr)
        return MISTAKE
    if given.verbose:
        import logging

        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    try:
        with _silence() if given.quiet else bars():
            return COMMANDS[given.command](given)
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        print(f"sparsekit: {error}", file=sys.stderr)
        return MISTAKE
    except OSError as error:
        print(f"sparsekit: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        advice = ": finished blocks are kept, run again with --resume to go on" if given.command == "fit" else ""
        print(f"sparsekit: stopped{advice}", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _silence() -> Iterator[None]:
    """While this lasts, what is printed is not seen; mistakes and failures still are."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def fit(given: argparse.Namespace) -> int:
    """`sparsekit fit`: the recipe is checked in full before a model is looked at."""
    from sparsekit.recipe import RecipeError, check_options, load_recipes

    recipes = load_recipes(given.recipe, given.set)
    print(f"{given.recipe}: looking at its methods and its model", flush=True)  # their libraries take seconds
    if problems := list(dict.fromkeys(each for recipe in recipes.values() for each in check_options(recipe))):
        raise RecipeError(problems)
    key = None
    if given.sign:
        from pathlib import Path

        from sparsekit.results import private_key, sign

        key = private_key(Path(given.sign))  # so that a wrong one is said now
    from sparsekit.run import run_each

    status = run_each(recipes, resume=given.resume, dry_run=given.dry_run)
    for recipe in recipes.values() if key is not None and status == 0 and not given.dry_run else ():
        sign(Path(str(recipe.output)), key)
    return status


def evaluate(given: argparse.Namespace) -> int:
    """`sparsekit eval`: perplexities and tasks of any checkpoint, beside another one where asked."""
    if not (given.perplexity or given.task or given.accuracy or given.features or given.iou or given.metric):
        raise ValueError(
            "nothing to measure: give --perplexity (a source or a file), --task, --accuracy, --features, --iou or "
            "--metric"
        )
    from pathlib import Path

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from sparsekit.measure import check_evaluation
    from sparsekit.recipe import option_of
    from sparsekit.results import figures_of, label, shown, source_of
    from sparsekit.run import evaluate_path
    from sparsekit.system import write_json

    texts = [{"source": each, "windows": given.windows} for each in given.perplexity]
    settings = {"perplexity": texts, "tasks": given.task, "accuracy": given.accuracy, "length": given.length}
    settings |= {"features": given.features, "iou": given.iou}
    settings |= {"metrics": [option_of(f"metric={each}")[1] for each in given.metric]}
    settings |= {"batch": given.batch, "limit": given.limit}
    check_evaluation(settings)
    dense = given.against or source_of(given.path)
    if given.features and dense is None:
        raise ValueError("--features compares with the dense model, and it is not known: name it by --against")
    models = {given.path: given.path} | ({dense if isinstance(dense, str) else dense["path"]: dense} if dense else {})
    paths = list(models)
    found = {}
    for path, model in reversed(models.items()):  # the dense one, where there is one, decides how windows begin
        found[path] = evaluate_path(model, settings, dense, device=given.device)
        settings["bos"] = found[path]["bos"]["used"]
    figures = {path: figures_of(measured) for path, measured in found.items()}
    table = Table("", *map(escape, paths))
    for name, first in figures[given.path].items():
        table.add_row(escape(label(name, first)), *(shown(figures[path][name]) for path in paths))
    Console().print(table)
    if given.json:
        write_json(Path(given.json), {"settings": settings, "models": found})
    if dense is None:
        print("--against DENSE measures the model it was made from beside it: a perplexity alone says little")
    return 0


def verify(given: argparse.Namespace) -> int:
    """`sparsekit verify`: prove from disk that a run, or anybody's checkpoint, is what it should be."""
    from pathlib import Path

    from sparsekit.model import locate
    from sparsekit.results import run_of, signature_failures, verify_run
    from sparsekit.results import verify as check
    from sparsekit.system import session, write_json

    source = locate(given.against) if given.against else None
    run = run_of(Path(given.path).expanduser())
    with session():
        if run is not None:
            found = verify_run(run, given.pattern, source)
        else:
            found = check(locate(given.path), pattern=given.pattern, against=source)
    if given.key:
        found.failures += signature_failures(run or Path(given.path), Path(given.key))
    if given.json:
        told = {"verified": not found.failures and not found.unproved, "failures": found.failures}
        told |= {"unproved": found.unproved, "zeros": found.total, "linears": found.per_linear}
        write_json(Path(given.json), told)
    for failure in found.failures:
        print(f"FAILED  {failure}")
    for sentence in found.unproved:
        print(f"NOT PROVED  {sentence}")
    asked = f", {given.pattern}" if given.pattern else ""
    print(f"{given.path}: {len(found.per_linear)} linears, {found.total:.2%} zeros{asked}: {_verdict(found)}")
    return FAILED if found.failures else 0


def _verdict(found: Any) -> str:
    if found.failures:
        return f"{len(found.failures)} failures"
    return "what could be compared holds" if found.unproved else "verified"


def compare(given: argparse.Namespace) -> int:
    """`sparsekit compare`: finished runs in one table, or the reason why they do not compare."""
    from pathlib import Path

    from rich.console import Console

    from sparsekit.results import board_markdown, leaderboard, show_board
    from sparsekit.results.page import write_comparison
    from sparsekit.system import write_json

    board = leaderboard(given.runs, by=given.by)
    if given.json:
        write_json(Path(given.json), board)
    if given.html:
        write_comparison(board, Path(given.html))
    if given.markdown:
        print(board_markdown(board))
    else:
        show_board(board, Console())
    return 0


def search(given: argparse.Namespace) -> int:
    """`sparsekit search`: the best methods within a budget of time, and a recipe of them."""
    from sparsekit.run import search

    ranked = search(
        given.model,
        given.pattern,
        text={"source": given.text, "windows": given.windows},
        calibration={"source": given.calibration, "samples": given.samples, "length": given.length},
        length=given.length,
        budget=given.budget,
        output=given.output,
        say=lambda line: print(line, flush=True),
    )
    print(f"\nbest: {ranked[0].name}. It was chosen on {given.text}: report its figures on another text.")
    print(f"\n  sparsekit fit --recipe {given.output}/recipe.yaml\n  open {given.output}/search.html")
    return 0


def bench(given: argparse.Namespace) -> int:
    """`sparsekit bench`: size, memory and speed of a model, beside the one it was made from."""
    from pathlib import Path

    from rich.console import Console

    from sparsekit.results import bench, bench_table, models_of, read_report
    from sparsekit.results.page import add_to_report, require_finished
    from sparsekit.system import write_json

    if given.save:
        require_finished(Path(given.path))
    texts = [{"source": each, "windows": given.windows} for each in given.perplexity]
    console = Console(highlight=False, markup=False)
    result = bench(
        models_of(given.path, given.against),
        **{key: getattr(given, key) for key in ("prompt", "new", "repeat", "backend", "precision")},
        batches=given.batch or ([1] if given.backend == "llama.cpp" else [1, 8]),
        evaluation={"perplexity": texts, "length": given.length} if texts else None,
        say=lambda line: console.print(line, style="dim"),
    )
    console.print(bench_table(result))
    if given.json:
        write_json(Path(given.json), result)
    if given.save:
        entries = {"speed": result}
        if given.backend != "transformers":
            speeds = read_report(Path(given.path)).get("speeds") or {}
            entries = {"speeds": speeds | {f"{given.backend} {given.precision}": result}}
        console.print(f"kept in {add_to_report(Path(given.path), entries)}", markup=False)
    return 0


def init(given: argparse.Namespace) -> int:
    """`sparsekit init`: a first recipe from five answers."""
    from pathlib import Path

    from sparsekit.recipe import asked, write_first

    if Path(given.file).exists():
        raise ValueError(f"there is a {given.file} already; give another name, as in sparsekit init mine.yaml")
    try:
        answers = asked(vars(given), input)
    except EOFError:
        raise ValueError(
            "there is nobody to answer: give --model, --goal, --time, --text and --output, or some of them"
        ) from None
    write_first(Path(given.file), answers)
    print(f"{given.file} is written. Next:\n\n  sparsekit fit --recipe {given.file} --dry-run")
    print(f"  sparsekit fit --recipe {given.file}\n  sparsekit bench {answers['output']}")
    return 0


def export(given: argparse.Namespace) -> int:
    """`sparsekit export`: another form of a finished run's model, proved before it is kept."""
    from pathlib import Path

    from rich.console import Console

    from sparsekit.recipe import option_of
    from sparsekit.run import export_run, said_of

    console = Console(highlight=False, markup=False, soft_wrap=True)
    written, failures = export_run(given.run, given.to, dict(map(option_of, given.set)))
    for failure in failures:
        console.print(f"not as asked: {failure}")
    console.print(said_of(given.to, written, Path(given.run) / f"model-{given.to}"))
    return FAILED if failures else MISTAKE if "why_not" in written else 0


def unpack(given: argparse.Namespace) -> int:
    """`sparsekit unpack`: what `export --to bitmask` wrote, as a checkpoint again."""
    from sparsekit.results import unpack_bitmask

    unpack_bitmask(given.folder, given.target)
    print(given.target)
    return 0


def report(given: argparse.Namespace) -> int:
    """`sparsekit report`: write the page of a finished run again."""
    from pathlib import Path

    from sparsekit.results.page import write_page

    print(write_page(Path(given.run)))
    return 0


def methods(given: argparse.Namespace) -> int:
    """`sparsekit methods`: everything installed, or one of it in full."""
    from sparsekit.listing import show_methods

    return show_methods(given.name, long=given.long)


def doctor(given: argparse.Namespace) -> int:
    """`sparsekit doctor`: what this machine can do."""
    import json

    from sparsekit.run import examine, report_of

    found = examine()
    print(json.dumps(found, indent=2) if given.json else report_of(found))
    return 0


def schema(given: argparse.Namespace) -> int:
    """`sparsekit schema`: JSON Schema of recipes, with the installed names."""
    import json

    from sparsekit.recipe import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def completion(given: argparse.Namespace) -> int:
    """`sparsekit completion`: what completes commands and their arguments in a shell."""
    try:
        import shtab
    except ImportError:
        raise ValueError("completion is written by shtab, which is not installed: pip install shtab") from None
    print(shtab.complete(command_line(), given.shell))
    return 0


COMMANDS = {
    "init": init,
    "fit": fit,
    "eval": evaluate,
    "verify": verify,
    "search": search,
    "compare": compare,
    "bench": bench,
    "export": export,
    "unpack": unpack,
    "report": report,
    "methods": methods,
    "doctor": doctor,
    "schema": schema,
    "completion": completion,
}
