"""`sparsekit search`: which methods are best on a model within some minutes, by short probes; the worst are dropped."""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.maths import NM, parse
from sparsekit.recipe import load_recipe, resolved, to_yaml
from sparsekit.results import leaderboard
from sparsekit.results.page import write_comparison
from sparsekit.run.door import fit
from sparsekit.system import write_json

RUNGS = (0.25, 0.5, 1.0)  # shares of the calibration samples that the probes of a round have
KEPT = 3  # of so many probes one goes on
PROBES, RECIPE, PAGE, FOUND = "probes", "recipe.yaml", "search.html", "search.json"


@dataclass
class Probe:
    """A method that was tried. keys: of its recipe; loss: log-perplexity on the held-out text; None: not run"""

    name: str
    keys: dict[str, Any]
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    folder: str = ""
    why: str = ""  # it is out

    @property
    def loss(self) -> float:
        """In the last round that it was in."""
        return self.losses[-1] if self.losses else math.inf


def candidates(pattern: str) -> dict[str, dict[str, Any]]:
    """The recipes that are tried for a pattern, cheapest first: name -> the keys that differ."""
    lamp_of_alps = {"lamp": {"epochs": 4, "solver": "alps"}}
    found: dict[str, dict[str, Any]] = {
        "wanda": {"stages": ["wanda"]},
        "sparsegpt": {"stages": ["sparsegpt"]},
        "wanda, refit": {"stages": ["wanda", "refit"]},
        "alps": {"stages": ["alps"]},
        "alps, ridge by input": {"stages": [{"alps": {"ridge": "column"}}]},
        "sparsegpt, refit": {"stages": ["sparsegpt", "refit"]},
    }
    if not isinstance(parse(pattern), NM):
        found |= {
            "sparsegpt, sensitivity": {"stages": ["sparsegpt"], "allocation": "sensitivity"},
            "alps, sensitivity": {"stages": ["alps"], "allocation": "sensitivity"},
            "lamp, sensitivity": {"stages": [{"lamp": {"epochs": 4}}], "allocation": "sensitivity"},
            "lamp of alps, sensitivity": {"stages": [lamp_of_alps], "allocation": "sensitivity"},
        }
    return found | {"lamp": {"stages": [{"lamp": {"epochs": 4}}]}, "lamp of alps": {"stages": [lamp_of_alps]}}


def search(
    model: str | Mapping[str, Any],
    pattern: str,
    *,
    text: Mapping[str, Any],
    calibration: Mapping[str, Any],
    budget: float,
    output: str | Path,
    length: int = 512,
    tried: Mapping[str, Mapping[str, Any]] | None = None,
    say: Callable[[str], Any] = print,
) -> list[Probe]:
    """Try methods on few samples, go on with the best third on more, and so on; all probes, best first.

    text: an entry of `evaluate.perplexity`, with `windows`: what decides, so it must be none that figures are reported
        on. calibration: as in a recipe; the last round has all its samples
    budget: seconds; a probe that would not end in time, by what it took before, is left out and said to be
    output: a folder that does not exist: recipe.yaml of the best, search.html, search.json, and the last round's runs
    tried: name -> keys of a recipe; None: `candidates`

    Successive halving: Jamieson and Talwalkar 2016, arXiv 1502.07943.

    Raises:
        ValueError: recipe, model or text cannot be used, or the folder exists.
    """
    folder, began = Path(output), time.monotonic()
    if folder.exists():
        raise ValueError(f"{folder} exists; give a folder that does not")
    probes = [Probe(name, dict(keys)) for name, keys in (tried or candidates(pattern)).items()]
    samples = int(calibration.get("samples", 128))
    base = {"model": model, "pattern": pattern}
    base["evaluate"] = {"perplexity": [dict(text)], "length": length, "dense": False, "samples": False}

    def recipe_of(probe: Probe, count: int, place: Path) -> dict[str, Any]:
        return {**base, **probe.keys, "calibration": {**calibration, "samples": count}, "output": str(place)}

    for probe in probes:  # all mistakes now
        load_recipe(recipe_of(probe, samples, folder / PROBES))
    left, seen = probes, 0
    for number, share in enumerate(RUNGS):
        count = max(1, round(share * samples))
        say(f"round {number + 1}: {len(left)} methods, {count} samples")
        for probe in left:
            expected = probe.seconds * count / seen if seen else 0.0
            spent = time.monotonic() - began
            if spent + expected > budget and any(each.losses for each in probes):
                probe.why = f"no time in round {number + 1}: it would have taken {expected:.0f} s more"
                say(f"  {probe.name}: {probe.why}")
                continue
            place = folder / PROBES / f"{number + 1} {probe.name.replace(',', ' +')}"
            started = time.monotonic()
            try:
                result = fit(recipe_of(probe, count, place), quiet=True)
            except ValueError as error:  # this method cannot be had of this model
                probe.why = str(error)
                say(f"  {probe.name}: {probe.why}")
                continue
            if not result.verified:
                raise ValueError(f"{probe.name} is not as asked: {result.verify()[0]}")
            [value] = result.report["evaluation"]["pruned"]["perplexity"].values()
            probe.seconds, probe.folder = time.monotonic() - started, str(place)
            probe.losses.append(math.log(value) if math.isfinite(value) else math.inf)
            say(f"  {probe.name}: perplexity {value:.2f}, {probe.seconds:.0f} s")
        done = sorted((each for each in left if len(each.losses) > number), key=lambda each: each.loss)
        if not done:
            break
        go_on = done[: max(1, math.ceil(len(done) / KEPT))] if number + 1 < len(RUNGS) else done
        for probe in done[len(go_on) :]:
            probe.why = probe.why or f"not among the best {len(go_on)} of round {number + 1}"
        for probe in done:
            if probe not in go_on or len(go_on) == 1:
                _forget(Path(probe.folder))
        left, seen = go_on, count
        if len(left) == 1 and number + 1 < len(RUNGS):
            break
    ranked = sorted(probes, key=lambda each: (-len(each.losses), each.loss))
    if not ranked[0].losses:
        raise ValueError(f"no method could be tried: {ranked[0].why}")
    _write(ranked, folder, recipe_of(ranked[0], samples, folder / "run"), calibration)
    return ranked


def _forget(run: Path) -> None:
    """Let a probe's weights go; what was measured stays."""
    shutil.rmtree(run / "model", ignore_errors=True)
    (run / "masks.safetensors").unlink(missing_ok=True)


def _write(ranked: Sequence[Probe], folder: Path, recipe: dict[str, Any], calibration: Mapping[str, Any]) -> None:
    recipe = recipe | {"calibration": dict(calibration), "evaluate": recipe["evaluate"] | {"dense": True}}
    (folder / RECIPE).write_text(to_yaml(resolved(load_recipe(recipe))), encoding="utf-8")
    told = [
        {
            "name": each.name,
            "rounds": [math.exp(loss) for loss in each.losses],
            "seconds": each.seconds,
            "out": each.why,
        }
        for each in ranked
    ]
    write_json(folder / FOUND, {"methods": told, "best": ranked[0].name})
    rounds = len(ranked[0].losses)
    runs = [each.folder for each in ranked if len(each.losses) == rounds]
    first = [str(path.parent) for path in sorted((folder / PROBES).glob("1 */report.json"))]
    write_comparison(leaderboard(runs if len(runs) > 1 else first), folder / PAGE)
