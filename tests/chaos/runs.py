"""Runs of every kind of stage that are killed, or whose disk is full: they go on to the same bits, or say why not."""

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.chaos.forks import LONG, READ_ONLY, REMOUNT, Disk, at, bits, die, forked, small_files, watch
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
        self.disk = Disk(self.folder / "disk")
        self.run = self.folder / "disk" / "run"
        text = RECIPE.format(tiny=TINY, pattern=pattern, stages=stages, output=self.run)
        (self.folder / "r.yaml").write_text(text)
        self.fit = ["fit", "--recipe", str(self.folder / "r.yaml"), "--resume"]
        whole = forked(self.fit, self.folder, seconds=LONG, before=self._count)
        if whole.status:
            raise RuntimeError(f"{name}: {whole.said[-1500:]}")
        self.operations = (self.folder / "marks").stat().st_size
        self.bits = bits(self.run)
        self.evaluation = self._evaluation()
        sizes = [file.stat().st_size for file in self.run.rglob("*") if file.is_file()]
        self.largest, self.size = max(sizes), sum(sizes)

    def _count(self) -> None:
        """Write one byte for every operation that `at` would count."""
        handle = os.open(self.folder / "marks", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        watch(self.run, lambda: os.write(handle, b"x"))

    def _evaluation(self) -> object:
        return json.loads((self.run / "report.json").read_text())["evaluation"]

    def clean(self) -> None:
        """Begin again."""
        shutil.rmtree(self.run, ignore_errors=True)

    def goes_on(self) -> str:
        """Resume, and what is wrong then; empty: nothing."""
        ended = forked(self.fit, self.folder, seconds=LONG)
        if ended.status or ended.traceback:
            return f"resume ended with {ended.status}: {ended.said[-800:]}"
        if bits(self.run) != self.bits or self._evaluation() != self.evaluation:
            return "other bits"
        proof = forked(["verify", str(self.run), "--against", str(TINY)], self.folder)
        return f"verify ended with {proof.status}: {proof.said[-800:]}" if proof.status else ""


def kills(count: int, number: int, kinds: list[Kind]) -> tuple[Counter, list[str]]:
    """Disturb runs at random operations on files: killed, some again while they resume, interrupted, asked to end, or
    begun once more beside the first."""
    draw, seen, wrong = random.Random(number), Counter(), []
    for turn in range(count):
        kind = kinds[turn % len(kinds)]
        kind.clean()
        when = draw.randint(1, max(1, kind.operations))
        how = draw.choices(["killed", "killed twice", "SIGINT", "SIGTERM", "two"], [60, 20, 8, 8, 4])[0]
        problem, beside = "", kind.folder / "beside"
        beside.unlink(missing_ok=True)
        if how == "two":

            def second(kind: Kind = kind, beside: Path = beside) -> None:
                other = forked(kind.fit, kind.folder)
                beside.write_text(f"{other.status} {other.said}")

            ended = forked(kind.fit, kind.folder, seconds=LONG, before=at(when, kind.run, second))
            said = beside.read_text() if beside.exists() else "2 "  # it may have ended before
            if ended.status or not said.startswith("2 ") or "Traceback" in said:
                problem = f"beside another: {ended.status} {said[-800:]}"
        else:
            sent = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}.get(how, signal.SIGKILL)
            ended = forked(kind.fit, kind.folder, seconds=LONG, before=at(when, kind.run, partial(die, sent)))
            if ended.traceback or ended.hung:
                problem = f"{ended.status} {ended.said[-800:]}"
        if how == "killed twice":
            again = draw.randint(1, max(1, kind.operations))
            forked(kind.fit, kind.folder, seconds=LONG, before=at(again, kind.run, die))
        seen[how if ended.status else f"{how}, too late" if how != "two" else how] += 1
        if problem := problem or kind.goes_on():
            wrong.append(f"{kind.name}, {how} at operation {when} of {kind.operations}: {problem}")
            seen["wrong"] += 1
    return seen, wrong


def disks(count: int, number: int, kinds: list[Kind]) -> tuple[Counter, list[str]]:
    """Give runs a disk that is too small, or turns read-only; no room for temporary files; no room for large files.
    Then make room. Where nothing may be mounted, only the last is tried."""
    draw, seen, wrong = random.Random(number), Counter(), []
    for turn in range(count):
        kind = kinds[turn % len(kinds)]
        kind.clean()
        how = draw.choices(["full disk", "read-only", "full temporary folder", "small files"], [60, 15, 10, 15])[0]
        when = draw.randint(1, max(1, kind.operations))
        aside = Disk(kind.folder / "temporary")
        limit = int(10 ** draw.uniform(4.3, 1 + len(str(kind.largest))))  # what is printed must fit
        size = draw.randint(1, int(2.2 * kind.size))  # shards, checkpoints and the last step's are there at once
        try:
            before = small_files(limit)
            if how == "full disk":
                kind.disk.mount(size)
                before = _nothing
            elif how == "read-only":
                kind.disk.mount(1 << 30)
                before = at(when, kind.run, partial(_try, kind.disk.mount, 1 << 30, REMOUNT | READ_ONLY))
            elif how == "full temporary folder":
                aside.mount(1)
                before = partial(os.environ.update, TMPDIR=str(aside.folder))
        except OSError:
            how = "small files"
        ended = forked(kind.fit, kind.folder, seconds=LONG, before=before)
        problem = f"no sentence: {ended.said[-800:]}" if ended.traceback or ended.status not in (0, 1, 2) else ""
        if how in ("full disk", "read-only"):
            kind.disk.mount(1 << 30, REMOUNT)
        problem = problem or kind.goes_on()
        for disk in (kind.disk, aside):
            disk.unmount()
        seen[how if ended.status else f"{how}, fitted"] += 1
        if problem:
            wrong.append(f"{kind.name}, {how} ({size} of {kind.size} bytes, files up to {limit}, {when}): {problem}")
            seen["wrong"] += 1
    return seen, wrong


def _nothing() -> None:
    pass


def _try(do: Callable[..., object], *given: object) -> None:
    with suppress(OSError):
        do(*given)
