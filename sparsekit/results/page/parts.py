"""The sections of a run's page, each a function of the report that gives HTML, or nothing where it has no data."""

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsekit.contracts import Figure
from sparsekit.results.figures import PERPLEXITY, TASK, figures_of, remark, shown
from sparsekit.results.page.charts import Bar, bars, lines
from sparsekit.results.page.heat import heat
from sparsekit.results.page.templating import PICTURE, joined, section
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


def under(report: Report) -> str:
    """What stands below the title: the stages, and whether the result was proved."""
    stages = stages_of(report)
    if "verified" not in report:
        return stages
    proved = report["verified"] is True
    said = "proved from disk" if proved else "NOT as asked, see the remarks"
    said += f", manifest {report['manifest'][:12]}" if "manifest" in report else ""
    return joined(stages, section("proof", proved=proved, said=said))


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
    return section("headline", cards=cards) if cards else ""


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
    note = "The lines across the bars, and ±, are one standard error." if sure else ""
    return section("wide", charts=charts, note=note) if charts else ""


def _shares(group: Mapping[str, tuple[str, list[Bar]]]) -> bool:
    return all(0 <= bar.value <= 1 for _, found in group.values() for bar in found)


def speed(report: Report) -> str:
    """What `sparsekit bench` measured, in transformers and in other clients."""
    found = [report["speed"]] if report.get("speed") else []
    return joined(*map(_measured, [*found, *(report.get("speeds") or {}).values()]))


def _measured(found: Mapping[str, Any]) -> str:
    from sparsekit.results.benchmark import SPREAD, bench_rows

    head = ["", *(["pruned", "dense", "relation"] if len(found["models"]) == 2 else ["pruned"])]
    cores = found.get("hardware", {}).get("threads")
    settings = found["settings"]
    remark = f"in {settings['backend']} " if settings.get("backend", "transformers") != "transformers" else ""
    remark += f"({settings['precision']}) " if settings.get("precision") else ""
    remark += f"on {settings['device']}" + (f", {cores} threads" if cores else "")
    remark += f". {SPREAD}" if len(head) == 4 else "."
    said = section("note", said=f"Measured {remark}")
    return joined(said, section("table", head=head, rows=bench_rows(found)))


def linears(report: Report) -> str:
    """Sparsity and error of every linear."""
    per_linear = report.get("sparsity", {}).get("per_linear") or {}
    sparsity = {name: values["sparsity"] for name, values in per_linear.items()}
    maps = [
        heat("Sparsity, % of weights that are zero", "sparsity", sparsity, top=1.0) if any(sparsity.values()) else "",
        heat("Error of the output, % of its energy", "error", report.get("error") or {}),
    ]
    return section("wide", charts=maps) if any(maps) else ""


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
    return section("wide", charts=charts) if any(charts) else ""


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
    rows = [
        {
            "name": stage["name"],
            "took": duration(stage["seconds"]),
            "time": stage["seconds"] / longest,
            "peak": human_size(stage["peak_memory_bytes"]) + _on_device(stage),
            "memory": stage["peak_memory_bytes"] / most,
        }
        for stage in stages
    ]
    return section("cost", stages=rows)


def samples(report: Report) -> str:
    """What the dense and the pruned model say after the same prompts, or cut out of the same pictures."""
    prompts = []
    for sample in report.get("samples") or []:
        answers = [(who, sample[who]) for who in ("asked", "dense", "pruned") if sample.get(who) is not None]
        prompts.append((sample.get("prompt", ""), "shown" if "asked" in sample else "wide", answers))
    drawn = any(made.startswith(PICTURE) for _, _, answers in prompts for _, made in answers)
    pictures = "A colour is an object, and a white point or box asks for it."
    note = pictures if drawn else "Greedy: the likeliest next token each time."
    return section("samples", note=note, prompts=prompts) if prompts else ""


def remarks(report: Report) -> str:
    """Failures, warnings with how often they came, and what was left as it is."""
    verified = report.get("verified")
    failures = verified if isinstance(verified, list) else []
    count: dict[str, list[str]] = {}
    for name, sentences in (report.get("warnings") or {}).items():
        for sentence in sentences:
            count.setdefault(sentence, []).append(name)
    warnings = [
        (sentence, f"{len(names)} linears, the first is {names[0]}" if len(names) > 1 else names[0])
        for sentence, names in count.items()
    ]
    others = [f"left as it is: {name} ({why})" for name, why in (report.get("skipped") or {}).items()]
    for name, written in (report.get("exports") or {}).items():
        if why := written.get("why_not"):
            others.append(f"not {name}: {why}")
    if not (failures or warnings or others):
        return ""
    return section("remarks", failures=failures, warnings=warnings, others=others)


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
    return section("code", text=to_yaml(report["recipe"]).strip(), ran=", ".join(ran))


def code(text: str) -> str:
    """Lines to copy."""
    return section("code", text=text)


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
