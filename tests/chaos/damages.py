"""Random damages of a finished run: `verify` sees every one of them, in a sentence."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos.forks import forked
from tests.chaos.recipes import TINY
from tests.chaos.runs import Kind

JUNK: list[Any] = [None, 0, -1, 10**9, 1e308, "", "x", [], {}, True, [[[]]], {"a": {"b": []}}, "../../x", "\0"]


def damage(run: Path, draw: random.Random) -> str:
    """Change one thing in a run's folder; what it was. Never what a run leaves that says nothing of its result."""
    free = ("metrics.csv", "run.json", "hparams.yaml")
    files = [
        file for file in run.rglob("*") if file.is_file() and file.name not in free and "metrics" not in file.parts
    ]
    file = draw.choice(sorted(files))
    what = draw.choice(["flip", "truncate", "remove", "append", "json", "swap", "add", "directory"])
    content = file.read_bytes()
    if what == "json" and file.suffix != ".json":
        what = "flip"
    match what:
        case "flip" if content:
            at = draw.randrange(len(content))
            changed = bytearray(content)
            changed[at] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
        case "truncate" if content:
            file.write_bytes(content[: draw.randrange(len(content))])
        case "remove":
            file.unlink()
        case "json":
            whole = json.loads(content)
            key = draw.choice(sorted(whole)) if isinstance(whole, dict) and whole else None
            new = draw.choice(JUNK)
            if key is None or whole[key] == new:
                whole = {"planted": new}
            else:
                whole[key] = new
            file.write_text(json.dumps(whole))
        case "swap":
            other = draw.choice(sorted(files))
            if other.read_bytes() == content:
                file.write_bytes(content + b" ")
            else:
                file.write_bytes(other.read_bytes())
        case "add":
            (
                file.parent / draw.choice(["a.bin", "model-00001-of-00002.safetensors", "x.py", "adapter_config.json"])
            ).write_bytes(content)
            if file.parent == run:  # a stray beside model/ is nobody's claim
                file.write_bytes(content[1:])
        case "directory":
            file.unlink()
            file.mkdir()
        case _:
            file.write_bytes(content + b"\0")
    return f"{what} {file.relative_to(run)}"


def campaign(count: int, number: int, kinds: list[Kind]) -> tuple[Counter, list[str]]:
    """Damage runs, each copy once."""
    draw, seen, wrong = random.Random(number), Counter(), []
    for turn in range(count):
        kind = kinds[turn % len(kinds)]
        copy = kind.folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(kind.folder / "whole", copy)
        what = damage(copy, draw)
        against = ["--against", str(TINY)] if draw.random() < 0.5 else []
        ended = forked(["verify", str(copy), *against], kind.folder)
        told = ended.status in (1, 2) and not ended.traceback and bool(ended.said.strip())
        seen[what.split()[0]] += 1
        if not told:
            wrong.append(f"{kind.name}, {what}: {ended.status} {ended.said[-500:]}")
            seen["wrong"] += 1
        for command in (["report", str(copy)], ["compare", str(copy), str(copy.parent / "whole")]):
            other = forked(command, kind.folder)
            if other.traceback or other.hung or other.status not in (0, 1, 2):
                wrong.append(f"{command[0]} after {what}: {other.status} {other.said[-500:]}")
                seen["wrong"] += 1
    return seen, wrong
