"""Methods side by side on one model and the same text: a file for each finished row, docs/leaderboard.md of them all.

    python -m benchmarks.leaderboard MODEL [--name NAME] [--patterns 50% 2:4] [--methods alps wanda]
        [--calibration SOURCE] [--text NAME=SOURCE ...] [--samples 24] [--length 256] [--windows 24]
        [--zeroshot FOLDER] [--items 100]

MODEL: a folder or hub name; NAME: what the table calls it. A SOURCE is an installed source of text, or a local file,
or NAME=FILE, to call the file by a name. FOLDER: where the files of zeroshot.yaml are; tasks are asked through lm-eval.
Rows, in leaderboard.yaml, that are finished are not run again, so an interrupted table goes on. What was measured
alike stands in one table: the same model, calibration and windows. `--write` only writes the page.
"""

import argparse
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

import sparsekit
from benchmarks.show import show
from sparsekit.results import figures_of
from sparsekit.system import hardware, human_size, versions, write_json

HERE = Path(__file__).parent
ROWS = HERE / "results" / "leaderboard"
PAGE = HERE.parent / "docs" / "leaderboard.md"
README = HERE.parent / "README.md"
BEGIN, END = (
    "<!-- leaderboard -->\n",
    "<!-- end of leaderboard -->\n",
)  # what stands between them in README.md is written
BASELINE = "sparsegpt"
AROUND = ("prepare", "load", "save", "verify", "evaluate", "measure")  # parts of a run that are not the method's

Row = dict[str, Any]


class Method(NamedTuple):
    """What a row runs: its class of cost, its stages (none of the dense model), and how sparsities are spread."""

    kind: str
    stages: list[Any]
    allocation: Any = "uniform"


def methods() -> dict[str, Method]:
    """A row's name -> what it runs."""
    classes = YAML(typ="safe", pure=True).load(HERE / "leaderboard.yaml")
    found = {"dense": Method("", [])}
    for kind, rows in classes.items():
        for name, told in (rows or {}).items():
            found[name] = Method(kind, **told) if isinstance(told, dict) else Method(kind, told)
    return found


def run(given: argparse.Namespace, method: str, pattern: str) -> Row:
    """Run one row and measure it."""
    kind, stages, allocation = methods()[method]
    texts = [_source(text) | {"name": _name(text), "windows": given.windows} for text in given.text]
    measure = {"perplexity": texts, "length": given.window} | zero_shot(given)
    row = {"model": given.name, "method": method, "class": kind, "pattern": pattern if stages else "", "stages": stages}
    row |= {} if allocation == "uniform" else {"allocation": allocation}
    row |= {"calibration": {"text": _name(given.calibration), "samples": given.samples, "length": given.length}}
    if not stages:
        figures = sparsekit.evaluate(*sparsekit.load(given.model), **measure)
        row |= {"seconds": 0.0, "memory": 0}
    else:
        calibration = _source(given.calibration) | {"samples": given.samples, "length": given.length}
        with tempfile.TemporaryDirectory() as folder:
            result = sparsekit.fit(
                {
                    "model": given.model,
                    "pattern": pattern,
                    "allocation": allocation,
                    "calibration": calibration,
                    "stages": stages,
                    "evaluate": measure | {"dense": False, "samples": False},
                    "output": f"{folder}/run",
                },
                quiet=True,
            )
            assert result.verified, f"{method} {pattern} is not proved"
            figures = figures_of(result.report["evaluation"]["pruned"])
            cost = [stage for stage in result.report["stages"] if not stage["name"].startswith(AROUND)]
        row |= {
            "seconds": sum(stage["seconds"] for stage in cost),
            "memory": max(stage["peak_memory_bytes"] for stage in cost),
        }
    told = {
        name: {"value": figure.value, "stderr": figure.stderr, **figure.settings} for name, figure in figures.items()
    }
    row["figures"] = {text["name"]: told[text["name"]] for text in texts}
    tasks = {name.removesuffix(" acc"): figure for name, figure in told.items() if name.endswith(" acc")}
    row |= {"tasks": tasks, "items": given.items} if tasks else {}
    return row | {"hardware": hardware(), "versions": versions()}


def zero_shot(given: argparse.Namespace) -> dict[str, Any]:
    """What `evaluate` has for the tasks, if a folder of them is given."""
    if not given.zeroshot:
        return {}
    asked = YAML(typ="safe", pure=True).load(HERE / "zeroshot.yaml")
    return {"tasks": [task | {"path": str(given.zeroshot / task["path"])} for task in asked], "limit": given.items}


def _source(text: str) -> dict[str, Any]:
    """What a recipe has for `NAME=FILE`, or for a source."""
    return {"source": text.partition("=")[2] or text}


def _name(text: str) -> str:
    name, equals, _ = text.partition("=")
    return name if equals else Path(text).name


def file_of(row: Mapping[str, Any]) -> Path:
    """Where a row is kept: by what it is of, and by how it was measured."""
    like = hashlib.sha256(json.dumps(_alike(row), sort_keys=True).encode()).hexdigest()[:8]
    name = "-".join(part for part in (row["method"], row["pattern"]) if part)
    return ROWS / f"{row['model']}-{like}" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def _alike(row: Mapping[str, Any]) -> dict[str, Any]:
    """What rows of one table have in common."""
    measured = {
        name: [figure.get(key) for key in ("length", "windows", "digest")] for name, figure in row["figures"].items()
    }
    return {"model": row["model"], "calibration": row["calibration"], "measured": measured}


def rows() -> list[Row]:
    """All that are finished."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(ROWS.glob("*/*.json"))]


def tables(found: Sequence[Row]) -> Iterator[tuple[str, str, list[str], list[list[str]]]]:
    """Title, explanation, columns and lines, a table for each model and way of measuring."""
    groups: dict[str, list[Row]] = {}
    for row in found:
        groups.setdefault(json.dumps(_alike(row), sort_keys=True), []).append(row)
    order = list(methods())
    for group in groups.values():
        dense = next((row for row in group if row["method"] == "dense"), None)
        group = sorted(group, key=lambda row: (row["pattern"], order.index(row["method"])))
        texts = list(group[0]["figures"])
        calibration = group[0]["calibration"]
        lines = []
        for row in group:
            base = next((r for r in group if r["method"] == BASELINE and r["pattern"] == row["pattern"]), None)
            line = [row["pattern"] or "-", row["method"], row["class"]]
            for text in texts:
                figure = row["figures"][text]
                over = f" ({figure['value'] / base['figures'][text]['value']:.2f})" if base else ""
                error = "" if figure["stderr"] is None else f" ± {figure['stderr']:.1f}"
                line.append(f"{figure['value']:.1f}{error}{over}")
            lines.append([*line, human_size(row["memory"]) if row["memory"] else ""])
        columns = ["pattern", "method", "class", *texts, "peak memory"]
        windows, machine = next(iter(group[0]["figures"].values())), group[-1]["hardware"]
        said = (
            f"Calibrated on {calibration['samples']} x {calibration['length']} tokens of {calibration['text']}; "
            f"perplexity ± one standard error on {windows['windows']} windows of {windows['length']} tokens, in "
            f"brackets over {BASELINE}'s. On {machine['accelerator'] or 'a CPU'}, {machine['threads']} threads."
        )
        yield group[0]["model"], said if dense else f"{said} The dense model was not measured.", columns, lines


def task_tables(found: Sequence[Row]) -> Iterator[tuple[str, str, list[str], list[list[str]]]]:
    """The same of the rows of which tasks were asked, a table for each model."""
    order = list(methods())
    for model in dict.fromkeys(row["model"] for row in found if row.get("tasks")):
        mine = [row for row in found if row["model"] == model and row.get("tasks")]
        mine.sort(key=lambda row: (row["pattern"], order.index(row["method"])))
        names = list(mine[0]["tasks"])
        lines = []
        for row in mine:
            asked = [row["tasks"][name] for name in names]
            mean = sum(task["value"] for task in asked) / len(asked)
            error = sum(task["stderr"] ** 2 for task in asked) ** 0.5 / len(asked)
            each = [f"{100 * task['value']:.0f}" for task in asked]
            lines.append(
                [row["pattern"] or "-", row["method"], row["class"], *each, f"{100 * mean:.1f} ± {100 * error:.1f}"]
            )
        said = (
            f"Zero-shot through lm-eval, the first {mine[0]['items']} items of each validation split: % of right "
            "answers (the likeliest one), and the mean ± one standard error."
        )
        yield f"{model}, zero-shot", said, ["pattern", "method", "class", *names, "mean"], lines


def write_page(found: Sequence[Row]) -> None:
    """docs/leaderboard.md."""
    text = [
        "# Leaderboard",
        "Written by `python -m benchmarks.leaderboard`; every row is a file in benchmarks/results/leaderboard, with "
        "its stages, seconds and versions. Compare rows of one class: others cost more, or train. What a method costs "
        "in time is measured side by side elsewhere (`python -m benchmarks.layerwise`, benchmarks/results).",
    ]
    for model, said, columns, lines in (*tables(found), *task_tables(found)):
        head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        text += [f"## {model}", said, "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])]
    PAGE.write_text("\n\n".join(text) + "\n", encoding="utf-8")


def summary(found: Sequence[Row]) -> str:
    """The first model's table with a column for each pattern: the figures of all texts, and the class of cost."""
    if not found:
        return ""
    first = [row for row in found if _alike(row) == _alike(found[0])]
    order = list(methods())
    patterns = sorted({row["pattern"] for row in first if row["pattern"]}, key=lambda p: (":" in p, p))
    names = sorted({row["method"] for row in first if row["stages"]}, key=order.index)
    texts = list(first[0]["figures"])

    def cell(method: str, pattern: str) -> str:
        row = next((row for row in first if (row["method"], row["pattern"]) == (method, pattern)), None)
        return "" if row is None else " / ".join(f"{row['figures'][text]['value']:.1f}" for text in texts)

    dense = cell("dense", "")
    lines = [f"| | class | {' | '.join(patterns)} |", "|---|---|" + "---|" * len(patterns)]
    lines += [f"| `{n}` | {methods()[n].kind} | {' | '.join(cell(n, p) for p in patterns)} |" for n in names]
    calibration, windows = first[0]["calibration"], first[0]["figures"][texts[0]]
    said = (
        f"{first[0]['model']}: perplexity on {' / '.join(texts)}, {windows['windows']} windows of {windows['length']} "
        f"tokens of each (dense {dense}), calibrated on {calibration['samples']} x {calibration['length']} tokens of "
        f"{calibration['text']}."
    )
    return f"{said}\n\n" + "\n".join(lines) + "\n"


def write_readme(found: Sequence[Row]) -> None:
    """The block of README.md, where it has one."""
    text = README.read_text(encoding="utf-8")
    if BEGIN in text and END in text:
        head, _, rest = text.partition(BEGIN)
        README.write_text(f"{head}{BEGIN}\n{summary(found)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not finished, one row after another, and write the page after each."""
    parser = argparse.ArgumentParser("python -m benchmarks.leaderboard")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--name")
    parser.add_argument("--patterns", nargs="+", default=["50%", "60%", "70%", "2:4"])
    parser.add_argument("--methods", nargs="+", default=list(methods()), choices=list(methods()))
    parser.add_argument("--calibration", default="c4")
    parser.add_argument("--text", nargs="+", default=["wikitext2", "python-docs"])
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--zeroshot", type=Path)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(argv)
    if given.model and not given.write:
        given.name = given.name or Path(given.model).name
        for method in given.methods:
            for pattern in given.patterns if method != "dense" else [""]:
                if any(_is(row, given, method, pattern) for row in rows()):
                    continue
                row = run(given, method, pattern)
                file = file_of(row)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, row)
                write_page(rows())
                write_readme(rows())
                print(file.name, {n: f["value"] for n, f in row["figures"].items()}, flush=True)
    write_page(rows())
    write_readme(rows())
    for model, said, columns, lines in (*tables(rows()), *task_tables(rows())):
        show(columns, lines, title=f"{model}. {said}")


def _is(row: Row, given: argparse.Namespace, method: str, pattern: str) -> bool:
    """Whether a finished row is what was asked for."""
    names = {_name(text) for text in given.text}
    same = (row["model"], row["method"], row["pattern"]) == (given.name, method, pattern)
    calibration = {"text": _name(given.calibration), "samples": given.samples, "length": given.length}
    windows = {figure["windows"] for figure in row["figures"].values()}
    asked = not given.zeroshot or row.get("items") == given.items
    same = same and asked and row["calibration"] == calibration
    return same and names == set(row["figures"]) and windows == {given.windows}


if __name__ == "__main__":
    main()
