"""The sections of a run's page, each a function of the report that gives HTML, or nothing where it has no data."""

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from typing import Any

from sparsekit.contracts import Figure
from sparsekit.results.figures import PERPLEXITY, TASK, figures_of, remark, shown
from sparsekit.results.page.charts import Bar, bars, fill, lines
from sparsekit.results.page.heat import heat
from sparsekit.results.words import aim
from sparsekit.system import human_size

Report = Mapping[str, Any]
TITLES = {TASK: "Tasks", "": "Other figures"}  # of charts


def title(report: Report) -> str:
    """What was done to which model, in a few words."""
    name = report.get("model", {}).get("name", "a model")
    return f"{name}, {aim(dict(report))}" if {"recipe", "sparsity"} <= report.keys() else name


def stages_of(report: Report) -> str:
    """The recipe's stages: "wanda > fista"."""
    stages = report.get("recipe", {}).get("stages") or []
    return " > ".join(stage if isinstance(stage, str) else next(iter(stage)) for stage in stages)


def headline(report: Report) -> str:
    """The few figures that matter most."""
    dense, pruned = _evaluation(report)
    cards = []
    chosen = [name for name, each in pruned.items() if each.kind == PERPLEXITY][:2]
    chosen += [name for name, each in pruned.items() if each.kind == TASK and name.split()[-1] in ("acc_norm", "acc")][
        :1
    ]
    chosen += [name for name, each in pruned.items() if not each.kind][: 2 - len(chosen)]
    for name in chosen:
        value, before = pruned[name], dense.get(name)
        if value.kind == PERPLEXITY and before is not None:
            beside = f"{value.value / before.value:.2f} x dense, {before.value:.2f}"
        else:
            beside = f"dense {shown(replace(before, stderr=None))}" if before else "dense not measured"
        what = f"perplexity {name}" if value.kind == PERPLEXITY else name
        cards.append((what, shown(replace(value, stderr=None)), beside))
    sparsity = report.get("sparsity", {})
    if sparsity.get("per_linear"):
        beside = f"{sparsity.get('zeros', 0):,} of {sparsity.get('parameters', 0):,}"
        cards.append(("zeros in the linears", f"{sparsity['total']:.2%}", beside))
    if parameters := report.get("structure", {}).get("parameters"):
        less = 1 - parameters["pruned"] / parameters["dense"]
        cards.append(("parameters removed", f"{less:.1%}", f"{parameters['pruned']:,} of {parameters['dense']:,} left"))
    faster = report.get("speed", {}).get("faster", {})
    for key, title in (("decode", "decoding"), ("images", "seeing images")):
        if times := faster.get(key):
            batch = min(times, key=int)
            cards.append((title, f"{times[batch]:.2f} x", f"the dense model's speed, batch {batch}"))
    if stages := report.get("stages"):
        seconds = sum(stage["seconds"] for stage in stages)
        peak = human_size(max(stage["peak_memory_bytes"] for stage in stages))
        cards.append(("whole run", duration(seconds), f"peak memory {peak}"))
    inside = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)}<small>{escape(beside)}</small></dd></div>"
        for what, value, beside in cards
    )
    return f'<dl class="headline">{inside}</dl>' if cards else ""


def quality(report: Report) -> str:
    """All figures, dense and pruned, with one standard error where it is known."""
    dense, pruned = _evaluation(report)
    groups: dict[tuple[str, str], dict[str, tuple[str, list[Bar]]]] = {}
    for name, figure in pruned.items():
        sides = [(who, of[name]) for who, of in (("dense", dense), ("pruned", pruned)) if name in of]
        both = [Bar(who, each.value, each.stderr, shown(each)) for who, each in sides]
        groups.setdefault((figure.kind, figure.better), {})[name] = (remark(figure), both)
    charts = [
        bars(f"{TITLES.get(kind, kind.capitalize())} ({better} is better)", group, top=1.0 if _shares(group) else None)
        for (kind, better), group in groups.items()
    ]
    sure = any(bar.stderr for group in groups.values() for _, found in group.values() for bar in found)
    note = '<p class="soft small">The lines across the bars, and ±, are one standard error.</p>' if sure else ""
    return f'{note}<div class="wide">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>' if charts else ""


def _shares(group: Mapping[str, tuple[str, list[Bar]]]) -> bool:
    return all(0 <= bar.value <= 1 for _, found in group.values() for bar in found)


def speed(report: Report) -> str:
    """What `sparsekit bench` measured, in transformers and in other clients."""
    found = [report["speed"]] if report.get("speed") else []
    return "".join(map(_measured, [*found, *(report.get("speeds") or {}).values()]))


def _measured(found: Mapping[str, Any]) -> str:
    from sparsekit.results.benchmark import SPREAD, bench_rows

    head = ["", *(["pruned", "dense", "relation"] if len(found["models"]) == 2 else ["pruned"])]
    cores = found.get("hardware", {}).get("threads")
    settings = found["settings"]
    remark = f"in {settings['backend']} " if settings.get("backend", "transformers") != "transformers" else ""
    remark += f"({settings['precision']}) " if settings.get("precision") else ""
    remark += f"on {settings['device']}" + (f", {cores} threads" if cores else "")
    remark += f". {SPREAD}" if len(head) == 4 else "."
    return f'<p class="soft small">Measured {escape(remark)}</p>{table_of(head, bench_rows(found))}'


def linears(report: Report) -> str:
    """Sparsity and error of every linear."""
    per_linear = report.get("sparsity", {}).get("per_linear") or {}
    sparsity = {name: values["sparsity"] for name, values in per_linear.items()}
    maps = [
        heat("Sparsity, % of weights that are zero", "sparsity", sparsity, top=1.0) if any(sparsity.values()) else "",
        heat("Error of the output, % of its energy", "error", report.get("error") or {}),
    ]
    return f'<div class="wide">{"".join(maps)}</div>' if any(maps) else ""


def training(report: Report, metrics: str | None) -> str:
    """Curves: of recovery stages, of LAMP's blocks, and whatever else the run logged as it went."""
    charts = []
    for stage, notes in (report.get("notes") or {}).items():
        points = [(*point, None)[:3] for point in notes.get("curve") or []]  # the validation loss may be left out
        series = {
            "training": [(step, loss) for step, loss, _ in points if loss is not None],
            "validation": [(step, loss) for step, _, loss in points if loss is not None],
        }
        charts.append(lines(f"{stage}: loss", series, x="step"))
    lamp = [notes["lamp"] for notes in (report.get("blocks") or {}).values() if "lamp" in notes]
    left = {
        f"trained {when} pruning": [
            (index, 100 * notes[when]["after"] / notes[when]["before"])
            for index, notes in enumerate(lamp)
            if notes.get(when, {}).get("before")
        ]
        for when in ("before", "after")
    }
    charts.append(lines("lamp: held-out error that training leaves of a block, %", left, x="block"))
    charts += [lines(f"logged: {name}", {name: points}, x="step") for name, points in logged(metrics or "").items()]
    charts = [chart for chart in charts if chart]
    return f'<div class="wide">{"".join(charts)}</div>' if charts else ""


def logged(metrics: str) -> dict[str, list[tuple[float, float]]]:
    """{column: [(step, value), ...]} of Lightning's metrics.csv, but for what never changes and the sparsity."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in csv.DictReader(io.StringIO(metrics)):
        for column, value in row.items():
            if value and row.get("step") and column not in ("step", "epoch", "sparsity"):
                found.setdefault(column, []).append((float(row["step"]), float(value)))
    return {column: points for column, points in found.items() if len({value for _, value in points}) > 1}


def _on_device(stage: dict[str, Any]) -> str:
    peak = stage.get("peak_device_bytes")
    return f", {human_size(peak)} on the device" if peak else ""


def cost(report: Report) -> str:
    """Seconds and peak memory of each stage."""
    stages = report.get("stages") or []
    if not stages:
        return ""
    longest = max(stage["seconds"] for stage in stages) or 1
    most = max(stage["peak_memory_bytes"] for stage in stages) or 1
    body = ""
    for stage in stages:
        time, memory = fill(stage["seconds"] / longest, ""), fill(stage["peak_memory_bytes"] / most, "third")
        peak = human_size(stage["peak_memory_bytes"]) + _on_device(stage)
        body += (
            f'<tr><th scope="row">{escape(stage["name"])}</th>'
            f'<td>{duration(stage["seconds"])}<span class="track">{time}</span></td>'
            f'<td>{peak}<span class="track">{memory}</span></td></tr>'
        )
    head = '<thead><tr><td></td><th scope="col">time</th><th scope="col">peak memory</th></tr></thead>'
    return f'<table class="stages"><colgroup><col><col><col></colgroup>{head}<tbody>{body}</tbody></table>'


def samples(report: Report) -> str:
    """What the dense and the pruned model say after the same prompts, or cut out of the same pictures."""
    parts, drawn = [], False
    for sample in report.get("samples") or []:
        shown = ""
        for who in ("asked", "dense", "pruned"):
            if (made := sample.get(who)) is not None:
                drawn = drawn or made.startswith(PICTURE)
                shown += f'<div><div class="who">{who}</div>{said_by(made, who)}</div>'
        layout = "shown" if "asked" in sample else "wide"
        prompt = escape(sample.get("prompt", ""))
        parts.append(f'<div class="sample"><p class="prompt">{prompt}</p><div class="{layout}">{shown}</div></div>')
    pictures = "A colour is an object, and a white point or box asks for it."
    said = pictures if drawn else "Greedy: the likeliest next token each time."
    return f'<p class="soft small">{said}</p>' + "".join(parts) if parts else ""


PICTURE = "data:image/png;base64,"


def said_by(made: str, who: str) -> str:
    """What a model said, or a picture of what it cut out."""
    if made.startswith(PICTURE):
        return f'<img src="{escape(made)}" alt="masks, {who}">'
    return f'<p class="said">{escape(made.lstrip(" ").strip(chr(10)))}</p>'


def remarks(report: Report) -> str:
    """Failures, warnings with how often they came, and what was left as it is."""
    verified = report.get("verified")
    failures = verified if isinstance(verified, list) else []
    items = [f'<li class="bad">not as asked: {escape(failure)}</li>' for failure in failures]
    count: dict[str, list[str]] = {}
    for name, sentences in (report.get("warnings") or {}).items():
        for sentence in sentences:
            count.setdefault(sentence, []).append(name)
    for sentence, names in count.items():
        where = f"{len(names)} linears, the first is {names[0]}" if len(names) > 1 else names[0]
        items.append(f'<li>{escape(sentence)} <span class="soft">({escape(where)})</span></li>')
    items += [
        f"<li>left as it is: {escape(n)} ({escape(why)})</li>" for n, why in (report.get("skipped") or {}).items()
    ]
    for name, written in (report.get("exports") or {}).items():
        if why := written.get("why_not"):
            items.append(f"<li>not {escape(name)}: {escape(why)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def recipe(report: Report) -> str:
    """The resolved recipe, and what it ran with."""
    if not report.get("recipe"):
        return ""
    from sparsekit.recipe import to_yaml

    ran = [f"{name} {version}" for name, version in (report.get("versions") or {}).items()]
    hardware = report.get("hardware") or {}
    if hardware:
        where = hardware.get("accelerator") or f"{hardware.get('cores')} cores, {hardware.get('threads')} threads"
        ran.append(f"on {hardware.get('system')} {hardware.get('machine')}, {where}")
    return f'<pre>{escape(to_yaml(report["recipe"]).strip())}</pre><p class="soft small">{escape(", ".join(ran))}</p>'


def duration(seconds: float) -> str:
    """Seconds for people: '0.8 s', '12 s', '4 min 5 s', '40 min', '2 h 3 min'."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _evaluation(report: Report) -> tuple[dict[str, Figure], dict[str, Figure]]:
    evaluation = report.get("evaluation") or {}
    return figures_of(evaluation.get("dense")), figures_of(evaluation.get("pruned"))


def table_of(head: list[str], rows: list[tuple[str, ...]]) -> str:
    """A table of texts; the first of each row is its name."""
    first = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(what)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for what, *cells in rows
    )
    return (
        f'<div class="scroll"><table class="plain"><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'
    )
