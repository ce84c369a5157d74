"""Runs of every kind of stage that are killed, or whose disk is full: they go on to the same bits, or say why not."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

from tests.chaos.forks import LONG, bits, die_at, forked, small_disk, watch
from tests.chaos.recipes import TINY

KINDS = {
    "solver": "[sparsegpt]",
    "chain": "[wanda, {fista: {rounds: 1, iterations: 3}}]",
    "walk": "[{lamp: {epochs: 1}}]",
    "feed-forward": "[{sparsellm: {epochs: 1}}]",
    "recovery": "[magnitude, {lora: {steps: 3, length: 32, batch: 2, checks: 3, source: python-docs}}]",
    "all parameters": "[magnitude, {finetune: {steps: 3, length: 32, batch: 2, checks: 3, source: python-docs}}]",
    "cut": "[{wanda-sp: {remove: 20%, shape: uniform}}]",
    "learned cut": "[{policy_gradient: {remove: 20%, steps: 4, masks: 2, batch: 2, length: 32}}]",
    "quantize": "[sparsegpt, {quantize: {bits: 4}}]",
}
RECIPE = """\
model: {tiny}
pattern: {pattern}
calibration: {{source: python-docs, samples: 16, length: 32}}
stages: {stages}
evaluate: {{perplexity: [{{source: python-docs, windows: 2}}], length: 32, samples: false, dense: false}}
output: {output}
"""


class Kind:
    """A recipe of one kind of stage, and what it comes to undisturbed."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder / name.replace(" ", "-")
        self.folder.mkdir(parents=True)
        stages = KINDS[name]
        pattern = "null" if "cut" in name else '"2:4"'
        text = RECIPE.format(tiny=TINY, pattern=pattern, stages=stages, output=self.folder / "run")
        (self.folder / "r.yaml").write_text(text)
        self.fit = ["fit", "--recipe", str(self.folder / "r.yaml"), "--resume"]
        whole = forked(self.fit, self.folder, seconds=LONG, before=self._count)
        if whole.status:
            raise RuntimeError(f"{name}: {whole.said[-1500:]}")
        self.operations = (self.folder / "marks").stat().st_size
        self.bits = bits(self.folder / "run")
        self.evaluation = self._evaluation()
        self.largest = max(file.stat().st_size for file in (self.folder / "run").rglob("*") if file.is_file())

    def _count(self) -> None:
        """Write one byte for every operation that `die_at` would count."""
        handle = os.open(self.folder / "marks", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        watch(self.folder / "run", lambda: os.write(handle, b"x"))

    def _evaluation(self) -> object:
        return json.loads((self.folder / "run" / "report.json").read_text())["evaluation"]

    def clean(self) -> None:
        """Begin again."""
        shutil.rmtree(self.folder / "run", ignore_errors=True)

    def goes_on(self) -> str:
        """Resume, and what is wrong then; empty: nothing."""
        ended = forked(self.fit, self.folder, seconds=LONG)
        if ended.status or ended.traceback:
            return f"resume ended with {ended.status}: {ended.said[-800:]}"
        if bits(self.folder / "run") != self.bits or self._evaluation() != self.evaluation:
            return "other bits"
        proof = forked(["verify", str(self.folder / "run"), "--against", str(TINY)], self.folder)
        return f"verify ended with {proof.status}: {proof.said[-800:]}" if proof.status else ""


def kills(count: int, number: int, kinds: list[Kind]) -> tuple[Counter, list[str]]:
    """Kill runs at random operations on files, sometimes again while they resume."""
    draw, seen, wrong = random.Random(number), Counter(), []
    for turn in range(count):
        kind = kinds[turn % len(kinds)]
        kind.clean()
        at = draw.randint(1, max(1, kind.operations))
        ended = forked(kind.fit, kind.folder, seconds=LONG, before=die_at(at, kind.folder / "run"))
        if draw.random() < 0.25:
            again = draw.randint(1, max(1, kind.operations))
            forked(kind.fit, kind.folder, seconds=LONG, before=die_at(again, kind.folder / "run"))
        said = kind.goes_on()
        seen["killed" if ended.status == -9 else f"ended with {ended.status}"] += 1
        if said:
            wrong.append(f"{kind.name}, killed at operation {at} of {kind.operations}: {said}")
            seen["wrong"] += 1
    return seen, wrong


def disks(count: int, number: int, kinds: list[Kind]) -> tuple[Counter, list[str]]:
    """Let no file grow beyond a random size; then make room."""
    draw, seen, wrong = random.Random(number), Counter(), []
    for turn in range(count):
        kind = kinds[turn % len(kinds)]
        kind.clean()
        limit = int(10 ** draw.uniform(4.3, 1 + len(str(kind.largest))))  # what is printed must fit
        ended = forked(kind.fit, kind.folder, seconds=LONG, before=small_disk(limit))
        problem = f"no sentence: {ended.said[-800:]}" if ended.traceback or ended.status not in (0, 1, 2) else ""
        problem = problem or kind.goes_on()
        seen["full" if ended.status else "fitted"] += 1
        if problem:
            wrong.append(f"{kind.name}, no file above {limit} bytes: {problem}")
            seen["wrong"] += 1
    return seen, wrong
