"""Every text family through every kind of stage: `python -m tests.matrix [--families ...] [--recipes ...]`.

Results are added to a file of JSON lines, and what is there already is not run again. `--table` prints docs/models.md.
`--shard 0/2` takes every second family, for two processes side by side. A cell is "works" (proved from disk, opened by
plain transformers, generates with its cache), "own" (opened by sparsekit.load alone, as the run says), "refused" in
advance with a sentence, or "WRONG" with what came of it.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch

from tests.matrix import families, save, towers

BASE = {
    "calibration": {"source": "python-docs", "samples": 8, "length": 32},
    "evaluate": {"samples": False},
    "loggers": [],
    "bos": "published",
}
SHORT = {"steps": 2, "length": 32, "batch": 1, "validation": 0.1}
RECIPES: dict[str, dict[str, Any]] = {
    "sparsegpt": {"pattern": "2:4", "stages": ["sparsegpt"]},
    "lamp": {"pattern": "2:4", "stages": [{"lamp": {"epochs": 1}}]},
    "sparsellm": {"pattern": "50%", "stages": [{"sparsellm": {"epochs": 1}}]},
    "wanda-sp": {"stages": [{"wanda-sp": {"remove": "10%"}}]},
    "channels": {"stages": [{"wanda-sp": {"remove": "5%", "units": "channels"}}]},
    "mamba": {"stages": [{"wanda-sp": {"remove": "5%", "units": "mamba"}}]},
    "layers": {"stages": [{"block-influence": {"remove": "20%"}}]},
    "lora": {"pattern": "2:4", "stages": ["magnitude", {"lora": {"rank": 2, **SHORT}}]},
    "reap": {"stages": [{"reap": {"remove": "5%"}}]},
}


def cell(name: str, source: Path, recipe: str, home: Path) -> dict[str, Any]:
    """What comes of one recipe."""
    from sparsekit.cli import main

    output = home / "run"
    shutil.rmtree(output, ignore_errors=True)
    file = home / "recipe.yaml"
    settings = {"model": str(source), "output": str(output), **BASE, **RECIPES[recipe]}
    if name.partition("/")[0] in towers.SEEN:
        path = str(towers.pictures(home / "pictures"))
        settings["calibration"] = {"source": "images", "path": path, "samples": 4}
        settings |= {"prune": "vision"} if name.startswith("towers/") else {}
        settings["calibration"] |= {"side": 32}
    if name.partition("/")[0] in towers.HEARD and towers.is_heard(source):
        settings["calibration"] = {"source": "sounds", "path": str(towers.recordings(home / "sounds")), "samples": 4}
        settings["calibration"] |= {"seconds": 1}
    file.write_text(json.dumps(settings))
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["fit", "--recipe", str(file)])
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "cell": "WRONG",
            "why": f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[:300],
        }
    said = err.getvalue().strip().splitlines() or out.getvalue().strip().splitlines()
    if status == 2 and not (output / "model").exists():
        late = "block 1/" in out.getvalue()
        last = next((line for line in reversed(said) if line.startswith("sparsekit: ")), said[-1])
        return {"cell": "LATE" if late else "refused", "why": last.removeprefix("sparsekit: ")[:300]}
    if status != 0:
        return {"cell": "WRONG", "why": " ".join(said[-2:])[:300]}
    try:
        if "/" in name:
            return tower_checked(settings.get("prune"), output / "model")
        return checked(source, output / "model", recipe)
    except Exception as error:
        return {"cell": "WRONG", "why": f"reloaded: {type(error).__name__}: {error}"[:300]}


def cache_apart(model: Any) -> float:
    """How far logits of generating with the cache are from those of a pass over the whole text, relative to these."""
    ids = torch.arange(5, 21)[None]
    told = {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        said = model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, min_new_tokens=2, **told)
        logits = model(input_ids=said.sequences[:, :-1]).logits[0, -1]
    apart = float((said.logits[-1][0] - logits).abs().max() / logits.abs().max())
    return apart if apart == apart else float("inf")


def checked(source: Path, folder: Path, recipe: str) -> dict[str, Any]:
    """Whether the result is what it should be for whoever opens it."""
    from transformers import AutoModelForCausalLM

    import sparsekit
    from sparsekit.model import decides, find_blocks, split_experts

    own = False
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder)
    except Exception:
        own, (model, _) = True, sparsekit.load(folder)
    model.eval()
    if cache_apart(model) > 1e-3 > cache_apart(sparsekit.load(source)[0]):  # CPM-Ant's own is .04
        return {"cell": "WRONG", "why": "the reloaded model's cache and its whole pass differ"}
    found: dict[str, Any] = {"cell": "own" if own else "works"}
    if "pattern" in RECIPES[recipe]:
        split_experts(model)
        zeros = total = 0
        for block in find_blocks(model):
            linears = {linear.module.weight for name, linear in block.linears.items() if not decides(name)}
            others = {
                p for p in block.module.parameters() if p.dim() == 3 and p.shape[1] > 1
            }  # in no form that is known
            for parameter in linears | others:
                zeros, total = zeros + int((parameter == 0).sum()), total + parameter.numel()
        found["share"] = round(2 * zeros / max(1, total), 3)
    return found


def tower_checked(tower: str | None, folder: Path) -> dict[str, Any]:
    """The same of a model that is opened by the class that its config names; nothing is generated."""
    import sparsekit
    from sparsekit.model import auto_class, choose_tower, decides, find_blocks, split_experts

    try:
        model = auto_class(folder).from_pretrained(folder).eval()
    except Exception:  # no config of transformers can say what it is
        model = sparsekit.load(folder)[0]
    split_experts(model)
    choose_tower(model, tower)
    zeros = total = 0
    for block in find_blocks(model):
        for name, linear in block.linears.items():
            if not decides(name) and "position_bias" not in name:
                zeros, total = zeros + int((linear.weight == 0).sum()), total + linear.weight.numel()
    return {"cell": "works", "share": round(2 * zeros / max(1, total), 3)}


def tower_table(known: dict[tuple[str, str], dict[str, Any]]) -> str:
    """Of each kind of model: what works, wholly or in part, and what is refused, with the sentence."""
    lines = []
    for task in towers.TASKS:
        mine = {name.partition("/")[2]: entry for (name, _), entry in known.items() if name.startswith(f"{task}/")}
        whole = [name for name, entry in mine.items() if entry.get("share", 0) >= 0.97]
        part = [f"{name} ({entry['share']:.0%})" for name, entry in mine.items() if entry.get("share", 1) < 0.97]
        lines += [f"**{task}**: {len(whole) + len(part)} of {len(mine)}.", "", f"- works: {', '.join(whole)}"]
        lines += [f"- works in part: {', '.join(part)}"] if part else []
        others = {name: entry for name, entry in mine.items() if "share" not in entry}
        lines += [f"- {entry['cell']}: {name}: {entry['why']}" for name, entry in others.items()] + [""]
    return "\n".join(lines)


def main() -> int:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--families", nargs="*")
    parser.add_argument("--towers", action="store_true", help="models that see images or are no decoders, by sparsegpt")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--results", type=Path, default=Path("matrix.jsonl"))
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for file in [given.results] if given.results.is_file() else []:
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            known[entry["family"], entry["recipe"]] = entry
    if given.table:
        print(tower_table(known) if given.towers else table(known))
        return 0
    mine, of = map(int, given.shard.split("/"))
    torch.set_num_threads(1)
    if given.towers:
        given.recipes = ["sparsegpt"]
        given.families = given.families or [f"{task}/{name}" for task in towers.TASKS for name in towers.names(task)]
    for name in (given.families or families.names())[mine::of]:
        wanted = [recipe for recipe in given.recipes if (name, recipe) not in known]
        with tempfile.TemporaryDirectory() as folder:
            home, source = Path(folder), Path(folder) / "source"
            try:
                if wanted:
                    save(name, source)
            except BaseException as error:  # of packages that are not installed too
                print(f"{name}: no tiny model: {error}"[:200], file=sys.stderr, flush=True)
                continue
            for recipe in wanted:
                entry = {"family": name, "recipe": recipe, **cell(name, source, recipe, home)}
                with given.results.open("a") as handle:
                    handle.write(json.dumps(entry) + "\n")
                print(entry, flush=True)
    return 0


NONE = re.compile("has no Mamba|has no experts that sparsekit knows")  # a family without such units


def table(known: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The results as a table, and below it the sentences of what is refused."""
    rows = sorted({family for family, _ in known})
    lines = ["| family | " + " | ".join(RECIPES) + " |", "|---|" + "---|" * len(RECIPES)]
    reasons: dict[str, list[str]] = {}
    for family in rows:
        cells = []
        for recipe in RECIPES:
            entry = known.get((family, recipe), {"cell": ""})
            said = entry["cell"] + (f" {entry['share']:.0%}" if "share" in entry else "")
            if NONE.search(entry.get("why", "")):
                said = "none"
            elif "why" in entry:
                why = re.sub(r"\w+(ForCausalLM|LMHeadModel)", "...", entry["why"].replace(family, "..."))
                reasons.setdefault(why, []).append(f"{family}/{recipe}")
            cells.append(said)
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {', '.join(who)}: {why}" for why, who in sorted(reasons.items()))]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
