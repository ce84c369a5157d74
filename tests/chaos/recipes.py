"""Recipes from the schema and beside it: every one is accepted or answered in a sentence, and none hangs."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as some

from sparsekit import registry
from tests.chaos.forks import forked

TINY = Path(__file__).parents[1] / "models" / "tiny-llama"
STAGES: list[Any] = ["magnitude", "wanda", "sparsegpt", "fista", "alps", "lamp", "sparsellm", "finetune"]
STAGES += [{"lora": {"tokens": 4096}}, {"wanda-sp": {"remove": "20%"}}, {"quantize": {"bits": 4}}]
SECTIONS = ["calibration", "evaluate", "memory", "trainer", "allocation", "loggers", "export", "keep", "seed", "bos"]
OPTIONS = ["damping", "rank", "steps", "remove", "iterations", "bits", "epochs", "units", "bracket", "targets"]
GROUPS = ("solvers", "stages", "criteria", "allocators", "sources", "metrics", "exporters")
NUMBERS = some.one_of(
    some.integers(-3, 40), some.sampled_from([10**9, 10**19, -(10**9), 2**63]), some.floats(), some.floats(0, 1)
)
WORDS = some.one_of(
    some.text(max_size=12),
    some.sampled_from(
        ["2:4", "50%", "4:8", "0%", "100%", "1:1", "auto", "null", "../x", "/", "{{q}}", "[/x]", "!!x", "~"]
    ),
)
VALUES = some.recursive(
    some.one_of(some.none(), some.booleans(), NUMBERS, WORDS),
    lambda inner: some.one_of(
        some.lists(inner, max_size=3), some.dictionaries(some.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def base(draw: random.Random) -> dict[str, Any]:
    """A recipe that may be right."""
    stages = draw.sample(STAGES, draw.randint(1, 3))
    return {
        "model": str(TINY),
        "pattern": draw.choice(["50%", "2:4", None]),
        "calibration": {"source": "python-docs", "samples": 4, "length": 32},
        "stages": stages,
        "evaluate": {"perplexity": [{"source": "python-docs", "windows": 2}], "length": 32},
        "output": "run",
    }


def places(value: Any, where: tuple = ()) -> list[tuple]:
    """The paths of everything inside."""
    found = [where] if where else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, each in items for place in places(each, (*where, key))]


def put(value: Any, where: tuple, new: Any) -> Any:
    """A copy with another value at a place."""
    if not where:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[where[0]] = put(copied[where[0]], where[1:], new)
    return copied


@some.composite
def texts(draw: Any) -> str:
    """The text of a recipe that was changed in a few places."""
    recipe = base(random.Random(draw(some.integers(0, 10**6))))
    known = [name for group in GROUPS for name in registry.names(group)]
    for _ in range(draw(some.integers(0, 4))):
        kind = draw(some.integers(0, 4))
        where = draw(some.sampled_from(places(recipe)))
        if kind == 0:
            recipe = put(recipe, where, draw(VALUES))
        elif kind == 1:
            recipe = {**recipe, draw(some.one_of(some.sampled_from(SECTIONS), WORDS)): draw(VALUES)}
        elif kind == 2:
            recipe = put(recipe, where, draw(some.sampled_from(known)))
        elif kind == 3:
            stage = {draw(some.sampled_from(known)): {draw(some.sampled_from(OPTIONS)): draw(VALUES)}}
            stages = recipe.get("stages")
            recipe["stages"] = [*(stages if isinstance(stages, list) else []), stage]
        else:
            recipe.pop(draw(some.sampled_from(sorted(map(str, recipe)))), None)
            recipe = recipe or {"model": str(TINY)}
    text = json.dumps(recipe)
    for _ in range(draw(some.integers(0, 2)) if draw(some.booleans()) else 0):
        at = draw(some.integers(0, len(text)))
        text = text[:at] + draw(some.text(max_size=4)) + text[at + draw(some.integers(0, 3)) :]
    return text


def campaign(count: int, number: int, folder: Path) -> tuple[Counter, list[str]]:
    """Try so many recipes with --dry-run; what came of them, and what was wrong."""
    seen: Counter = Counter()
    wrong: list[str] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(texts())
    def each(text: str) -> None:
        (folder / "r.yaml").write_text(text, encoding="utf-8", errors="replace")
        ended = forked(["fit", "--recipe", "r.yaml", "--dry-run"], folder)
        said = "accepted" if ended.status == 0 else "refused" if ended.status == 2 else "wrong"
        if ended.traceback or ended.hung or said == "wrong" or (folder / "run").exists():
            said = "hung" if ended.hung else "traceback" if ended.traceback else "wrong"
            wrong.append(f"{said} {ended.status}: {text!r}\n{ended.said[-600:]}")
        seen[said] += 1

    each()
    return seen, wrong
