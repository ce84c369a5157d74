"""report.html: its HTML, its figures and drawings; how a real browser shows it: test_page_shown.py."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sparsekit import cli
from sparsekit.results.page import write_page
from sparsekit.results.page.charts import Bar, bars, columns, lines, scatter, thin, ticks
from sparsekit.results.page.compared import comparison
from sparsekit.results.page.heat import by_block, heat, percent
from sparsekit.results.page.html import page
from sparsekit.results.page.kept import lost, structure
from sparsekit.results.page.parts import duration, logged

NASTY = '<script>alert("&")</script>'
LINEARS = [
    f"model.layers.{block}.{linear}"
    for block in range(3)
    for linear in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
]


def example() -> dict[str, Any]:
    """A report with everything a page can show."""
    measured = {
        "perplexity": {"wikitext2": 30.0},
        "perplexity_stderr": {"wikitext2": 1.0},
        "context": {"wikitext2": {"length": 512, "windows": 6}},
        "tasks": {"arc_easy": {"acc": 0.5, "acc_stderr": 0.01, "n": 2376}},
    }
    stages = [("load", 1.0, 10**9), ("wanda", 3700.0, 2 * 10**9)]
    timed = {"dtype": "float32", "parameters": 100, "nonzero": 50, "file_bytes": 400, "memory_bytes": 10**8}
    timed |= {"prefill_seconds": {"1": 0.2}, "decode_seconds": {"1": 0.02}}
    return {
        "model": {"name": "some/model", "class": "LlamaForCausalLM", "dtype": "auto"},
        "recipe": {"model": {"path": "some/model"}, "pattern": "50%", "stages": [{"wanda": {}}], "output": "runs/x"},
        "versions": {"python": "3.11", "torch": "2.6"},
        "hardware": {"system": "Linux", "machine": "x86_64", "cores": 2, "threads": 1, "accelerator": None},
        "stages": [{"name": n, "seconds": s, "peak_memory_bytes": b} for n, s, b in stages],
        "sparsity": {
            "total": 0.5,
            "zeros": 600,
            "parameters": 1200,
            "per_linear": {name: {"sparsity": 0.5, "pattern": "50%"} for name in LINEARS},
        },
        "structure": {
            "parameters": {"dense": 1000, "pruned": 800},
            "total": 0.25,
            "removed": [0.25],
            "source_layers": 4,
            "layers": [0, 2],
            "blocks": [
                {"heads": [1, 3], "channels": [5, 8], "parameters": [50, 100]},
                {"heads": [2, 3], "parameters": [75, 100]},
            ],
        },
        "error": {name: 10.0 ** -(number % 4 + 1) for number, name in enumerate(LINEARS)},
        "notes": {
            "lora": {"curve": [[0, None, 3.0], [1, 2.5, None], [2, 2.0, 2.2]]},
            "policy-gradient": {"curve": [[0, 4.0], [1, 3.5]]},
        },
        "blocks": {"model.layers.0": {"lamp": {"after": {"before": 0.4, "after": 0.1}}}},
        "warnings": {name: ["damping was raised"] for name in LINEARS[:2]},
        "skipped": {"model.layers.0.experts": "fused"},
        "evaluation": {"dense": measured, "pruned": measured | {"perplexity": {"wikitext2": 45.0}}},
        "samples": [{"prompt": "Once", "dense": " upon a time", "pruned": "\n    there"}],
        "speed": {
            "settings": {"batches": [1], "prompt": 128, "new": 32, "repeat": 5, "device": "cpu"},
            "hardware": {"threads": 2},
            "models": [timed, timed],
            "faster": {"prefill": {"1": 1.25}, "decode": {"1": 1.5}},
            "spread": {"prefill": {"1": [1.2, 1.3]}, "decode": {"1": [1.4, 1.6]}},
        },
        "exports": {"packed": {"why_not": "no such layout"}},
        "verified": ["layer 3 is not 2:4"],
    }


METRICS = "error,sparsity,step\n0.1,0.5,0\n0.3,0.5,1\n"


class Balance(HTMLParser):
    """Checks that every element is closed in its turn, and collects the text and the attributes."""

    VOID = ("meta", "link", "col", "wbr", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_sound_and_says_what_the_report_says() -> None:
    html = page(example(), METRICS)
    read = Balance(html)
    text = " ".join(" ".join(read.text).split())
    for said in (
        "20.0% of its parameters removed",
        "NOT as asked",
        "not as asked: layer 3 is not 2:4",
        "1.50 x dense, 30.00",
        "6 x 512 tokens",
        "45.00 ± 1.00",
        "0.500 ± 0.010",
        "2,376 documents",
        "20.0%",
        "800 of 1,000 left",
        "1.25 x as fast",
        "1 h 2 min",
        "2.0 GB",
        "damping was raised (2 linears, the first is model.layers.0.self_attn.q_proj)",
        "left as it is: model.layers.0.experts (fused)",
        "not packed: no such layout",
        "upon a time",
        'from_pretrained("runs/x/model")',
        'pattern: "50%"',
        "on Linux x86_64, 2 cores, 1 threads",
    ):
        assert said in text, said
    ids = {attributes["id"] for _, attributes in read.tags if "id" in attributes}
    links = [attributes["href"] for tag, attributes in read.tags if tag == "a"]
    assert len(links) == 10 and {str(link)[1:] for link in links} <= ids
    drawings = [attributes for tag, attributes in read.tags if tag == "svg"]
    assert len(drawings) == 7 and all(each["role"] == "img" and each["aria-label"] for each in drawings)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = page(example(), METRICS)
    assert not re.search(r"https?:|@import|url\(|<script|<iframe|<img", html)
    for tag, attributes in Balance(html).tags:
        for key in ("href", "src"):
            assert str(attributes.get(key, "#")).startswith(("#", "data:,")), (tag, attributes)


def test_what_the_report_holds_cannot_become_html() -> None:
    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [poison(inner) for inner in value]
        return NASTY + value if isinstance(value, str) else value

    report = example()
    kept = ("evaluation", "notes", "blocks")
    poisoned = {key: poison(value) for key, value in report.items() if key not in kept}
    poisoned["structure"] = report["structure"]
    poisoned["warnings"] = {NASTY: [NASTY]}
    poisoned["error"] = {f"model.layers.0.{NASTY}": 0.1}
    for measured in (report["evaluation"]["dense"], report["evaluation"]["pruned"]):
        for inner in measured.values():
            inner[NASTY] = next(iter(inner.values()))
    poisoned |= {"evaluation": report["evaluation"], "notes": {NASTY: {"curve": [[0, 1.0, 2.0]]}}}
    html = page(poisoned, f"step,{NASTY}\n0,1\n1,2\n", NASTY)
    Balance(html)
    assert "<script" not in html and html.count("&lt;script&gt;") > 20


@pytest.mark.parametrize("absent", [*example(), None])
def test_a_report_may_lack_anything(absent: str | None) -> None:
    report = example()
    if absent is None:
        report = {}
    else:
        del report[absent]
    Balance(page(report))


def test_a_failed_proof_and_a_proved_one_are_told_apart() -> None:
    report = example()
    assert "NOT as asked" in page(report) and "proved from disk" not in page(report)
    report["verified"] = True
    assert "NOT as asked" not in page(report) and "proved from disk" in page(report)


def test_bars_are_as_long_as_their_figures_say() -> None:
    html = bars("t", {"a": ("", [Bar("dense", 20, None, "20"), Bar("pruned", 80, 10, "80")])})
    top = 80 + 10
    widths = [float(width) for width in re.findall(r'class="fill \w+" style="width:([\d.]+)%"', html)]
    assert widths == pytest.approx([100 * 20 / top, 100 * 80 / top], abs=0.01)
    [(left, width)] = re.findall(r'class="range" style="left:([\d.]+)%;width:([\d.]+)%"', html)
    assert float(left) == pytest.approx(100 * (80 - 10) / top, abs=0.01)
    assert float(width) == pytest.approx(100 * 2 * 10 / top, abs=0.01)


def test_curves_go_through_their_points() -> None:
    html = lines("t", {"one": [(0, 0.0), (5, 5.0), (10, 10.0)], "two": [(0, math.nan), (10, 2.5)]}, x="step")
    [one, two] = re.findall(r'class="s\d" [^>]*points="([^"]+)"', html)
    assert one == "0.0,200.0 300.0,100.0 600.0,0.0"
    assert two == "0.0,150.0 600.0,150.0"  # a single point is drawn as a level line
    assert "step 5: one 5" in html and "step 10: one 10, two 2.5" in html
    logarithmic = lines("t", {"one": [(0, 1.0), (1, 10.0), (2, 100.0)]}, x="step")
    assert re.findall(r'class="s0" [^>]*points="([^"]+)"', logarithmic) == ["0.0,200.0 300.0,100.0 600.0,0.0"]
    assert lines("t", {"one": [], "two": [(0, math.inf)]}, x="step") == ""


def test_long_curves_are_drawn_as_means() -> None:
    points = [(float(step), float(step % 7)) for step in range(4000)]
    drawn = thin(points, 400)
    assert len(drawn) == 400
    assert drawn[0] == (4.5, sum(step % 7 for step in range(10)) / 10)
    assert thin(points[:300], 400) == points[:300] and thin([]) == []


def test_ticks_are_few_round_and_enclose() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        low = draw.uniform(-1, 1) * 10 ** draw.uniform(-6, 6)
        high = low + 10 ** draw.uniform(-6, 6) if draw.random() < 0.9 else low
        if high - low < 1e-9 * abs(low) and high != low:
            continue  # beyond what a double can tell apart
        found = ticks(low, high)
        step = found[1] - found[0]
        slack = 1e-6 * step
        assert 2 <= len(found) <= 7 and found[0] <= low + slack and high - slack <= found[-1]
        assert round(step / 10 ** math.floor(math.log10(step * 1.0001)), 3) in (1, 2, 5)


def heights(html: str, name: str) -> list[float]:
    return [float(height) for height in re.findall(rf'class="{name}"[^>]* height="([\d.]+)"', html)]


def test_columns_are_as_high_as_what_is_kept() -> None:
    html = columns("t", [0.25, None, 1.0, 0.0], ["1 of 4", "not known", "4 of 4", "0 of 4"], mean=0.5, said="half")
    assert heights(html, "kept") == [50, 200, 0] and heights(html, "removed") == [150, 0, 200]
    assert [float(y) for y in re.findall(r'class="kept"[^>]* y="([\d.]+)"', html)] == [150, 0, 200]
    assert re.findall(r'class="mean"[^>]* y1="([\d.]+)" y2="([\d.]+)"', html) == [("100.0", "100.0")]
    assert re.findall(r"<title>([^<]+)</title>", html) == ["layer 0: 1 of 4", "layer 2: 4 of 4", "layer 3: 0 of 4"]
    assert re.findall(r'left:([\d.]+)%">(\d+)<', html) == [(f"{12.5 + 25 * n:.2f}", str(n)) for n in range(4)]
    marks = re.findall(r'%">(\d+)<', columns("t", [1.0] * 80, [""] * 80, mean=1, said="").split('"x at"')[1])
    assert marks == [str(10 * n) for n in range(8)]


def test_every_layer_of_the_source_has_a_column_even_if_it_is_gone() -> None:
    report = example()
    html = structure(report)
    parameters, heads, channels = html.split("<figure>")[1:]
    assert heights(parameters, "kept") == [100, 0, 150, 0]  # layers 1 and 3 are gone, the last one too
    assert heights(heads, "kept") == pytest.approx([200 / 3, 0, 400 / 3, 0], abs=0.1)
    assert heights(channels, "kept") == [125, 0, 0]  # of layer 2 it is not known
    assert "layer 3: 0 of 3" in heads and "layer 2: 2 of 3" in heads
    assert "125 of 400 (31.2\N{NO-BREAK SPACE}%). Gone in layers 1, 3." in parameters
    assert "Most lost in layer 0: 66.7\N{NO-BREAK SPACE}%. Least lost in layer 2: 33.3\N{NO-BREAK SPACE}%." in heads


def test_what_nothing_was_taken_of_has_no_chart() -> None:
    report = example()
    for block in report["structure"]["blocks"]:
        block |= {"heads": [3, 3], "channels": [8, 8]}
    assert structure(report).count("<figure>") == 1  # of the parameters: two layers are gone
    for block in report["structure"]["blocks"]:
        del block["parameters"]  # as earlier versions wrote it
    del report["structure"]["source_layers"]
    html = structure(report)
    assert "Layers, % kept" in html and heights(html, "kept") == [200, 0, 200]
    assert structure({}) == ""


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ([0.5, 0.25, 0.25, 1.0], "Most lost in layers 1, 2: 75.0 %. Least lost in layer 3: 0 %."),
        ([0.7, 0.702, None], "All lost 30.0 %."),
        ([0.0, 0.5, 0.5], "Gone in layer 0. The others lost 50.0 %."),
        ([0.0, 1.0, 1.0], "Gone in layer 0. The others lost nothing."),
        ([0.5] * 7 + [0.8], "Most lost in 7 layers: 50.0 %. Least lost in layer 7: 20.0 %."),
    ],
)
def test_which_layers_lost_most(shares: list[float | None], said: str) -> None:
    assert lost(shares).replace("\N{NO-BREAK SPACE}", " ") == said


def test_linears_are_laid_out_by_block() -> None:
    assert by_block({"h.0.attn.a": 1, "h.0.mlp.a": 2, "h.0.mlp.b": 3, "h.1.mlp.b": 4, "head": 5}) == {
        "h.0": {"attn.a": 1, "mlp.a": 2, "b": 3},
        "h.1": {"b": 4},
        "": {"head": 5},
    }


def test_depth_of_colour() -> None:
    values = {"l.0.a": 0.001, "l.0.b": 0.01, "l.1.a": 0.1, "l.1.b": 0.0}
    depths = re.findall(r"--v:([\d.]+)", heat("t", "error", {k: v for k, v in values.items() if v}))
    assert [float(depth) for depth in depths] == [0, 50, 100]
    depths = re.findall(r"--v:([\d.]+)", heat("t", "sparsity", values, top=0.2))
    assert [float(depth) for depth in depths] == pytest.approx([0.5, 5, 50, 0], abs=0.6)
    assert re.findall(r"--v:([\d.]+)", heat("t", "error", {"l.0.a": 0.0, "l.0.b": 0.1})) == ["0", "100"]
    assert heat("t", "error", {}) == heat("t", "error", {"l.0.a": math.nan}) == ""
    body = heat("t", "error", {"l.0.a": 0.5, "l.1.b": 0.5}).partition("<tbody>")[2]
    assert body.count('<td class="none"></td>') == 2


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0"), (1, "100"), (0.9996, "100"), (0.4963, "49.6"), (0.0213, "2.1"), (0.00084, "0.08"), (0.00996, "1.0")],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_what_was_logged() -> None:
    csv = "epoch,error,loss,sparsity,step\n0,0.1,,0.5,0\n0,0.3,,0.5,1\n0,,7.0,,2\n0,,7.0,,3\n"
    assert logged(csv) == {"error": [(0, 0.1), (1, 0.3)]}  # what never changes is no curve
    assert logged("") == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.82, "0.8 s"),
        (12.3, "12 s"),
        (59.7, "1 min 0 s"),
        (245, "4 min 5 s"),
        (2400, "40 min"),
        (3590, "1 h 0 min"),
        (7380, "2 h 3 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert cli.main(["report", str(run)]) == 2
    assert "has no report.json; only a finished run has a report" in capsys.readouterr().err
    (run / "run.json").write_text("{}")
    assert cli.main(["report", str(run)]) == 2
    assert "is not finished: continue it with --resume" in capsys.readouterr().err
    (run / "report.json").write_text(json.dumps(example()))
    (run / "metrics.csv").write_text(METRICS)
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    html = (run / "report.html").read_text(encoding="utf-8")
    assert html == page(example(), METRICS, str(run)) and "logged: error" in html
    assert {path.name for path in run.iterdir()} == {"run.json", "report.json", "metrics.csv", "report.html"}


def board(runs: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `leaderboard` gives of a few runs, and their reports."""
    rows = [
        {
            "run": f"runs/{NASTY if index == 1 else index}",
            "model": "some/model",
            "asked": "50%",
            "stages": "wanda",
            "verified": True,
            "values": {"wiki": 20.0 + 5 * index, "size": 10**8 * (9 - index), "seconds": 60.0},
            "stderr": {"wiki": 1.0},
        }
        for index in range(runs)
    ]
    told = {"by": "wiki", "lower": True, "columns": ["wiki", "size", "seconds"], "dense": [], "runs": rows, "notes": []}
    told |= {"context": {"wiki": {"windows": 6, "length": 512}}, "distances": []}
    return told, {row["run"]: example() for row in rows}


def test_runs_side_by_side() -> None:
    """The page is sound, has each run in the table, in the chart, in the maps and in the samples, and runs no code."""
    html = comparison(*board())
    Balance(html)
    assert "<script" not in html.lower() and "runs/0" not in html.partition("</header>")[0].partition("<h1>")[2][:40]
    assert html.count('class="dot') == 3 and html.count("error of the output, %") >= 3
    assert "wiki and size of model/" in html and "seconds of pruning" not in html  # all took equally long
    assert len(re.findall(r'<div class="who">', html)) >= 4


def test_the_line_joins_what_nothing_betters() -> None:
    """Fewer of both is better: (1, 9), (3, 4) and (9, 1) stay, (4, 5) and (9, 2) are bettered."""
    points = {"a": (1.0, 9.0), "b": (3.0, 4.0), "c": (9.0, 1.0), "d": (4.0, 5.0), "e": (9.0, 2.0)}
    html = scatter("t", points, x="x", y="y", less=(True, True))
    assert html.count('"dot"') == 3 and html.count('"dot soft"') == 2
    [path] = re.findall(r'<polyline [^>]*points="([^"]*)"', html)
    assert len(path.split()) == 3
    more = scatter("t", points, x="x", y="y", less=(False, False))  # more of both: (1, 9) (4, 5) (9, 2)
    assert [name for name in "abcde" if re.search(rf'class="dot" [^>]*title="{name}:', more)] == ["a", "d", "e"]


def test_write_tells_where_the_page_is(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert write_page(tmp_path) == tmp_path / "report.html"
