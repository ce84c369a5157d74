"""Is learning the mask worth its forward passes? Structural methods on one model, over seeds, and what should hold.

    python -m benchmarks.structures tests/models/tiny-llama --calibration python-docs --test python-docs \\
      [--seeds 0 1 2] [--policy group=16 sharpness=4.0 masks=2] [--output runs/structures]

Runs the tables `matrix` and `ablations` of tables/policy_gradient.yaml: a seed draws calibration text, the same for all
methods, and masks. What is finished in --output is not run again. Exit status: 1 if a row failed or one of CLAIMS does
not hold, 2 for a mistake in what was given.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.show import show
from benchmarks.tables.__main__ import Table, cells, run_seeds
from benchmarks.tables.rows import table

PAPER = "policy_gradient"
CLAIMS = {  # table -> which row should have the lower perplexity than which others
    "matrix": [
        ("Policy gradient", ["Wanda-sp", "FLAP", "LLM-Pruner"]),
        ("Policy gradient, random start", ["Random masks"]),
    ],
    "ablations": [
        ("Policy gradient", ["Per layer"]),
        ("Moving average", ["No baseline"]),
    ],
}


def claims(number: str, done: Table) -> list[tuple[str, bool]]:
    """Sentences on what should hold in a table, and whether it does, for each share; none where a row is missing.

    Compared are means over seeds of the first figure.
    """
    name = next((name for found in done.runs for each in found for name in each), "")
    means = {}
    for row, *own in zip(done.rows, *done.runs, strict=True):
        if values := [each[name] for each in own if name in each]:
            means[row.method, row.swept] = mean(values)
    said = []
    for better, others in CLAIMS[number]:
        for other in others:
            for share in dict.fromkeys(share for _, share in means):
                if (better, share) in means and (other, share) in means:
                    ours, theirs = means[better, share], means[other, share]
                    sentence = f"{better} against {other} at {share}: {ours:.2f}, {theirs:.2f}"
                    said.append((sentence, ours < theirs))
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """Run both tables, print them, then what should hold."""
    parser = argparse.ArgumentParser("benchmarks.structures", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="hub name, folder or bundled model")
    parser.add_argument("--calibration", default="c4", metavar="SOURCE", help="a source's name or a file, default c4")
    parser.add_argument("--test", default="wikitext2", metavar="SOURCE", help="the same, default wikitext2")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--ablation-seeds", nargs="*", type=int, help="none: no ablations; default: the first seed")
    parser.add_argument("--policy", nargs="+", default=[], metavar="OPTION=VALUE", help="of policy gradient")
    parser.add_argument("--rows", nargs="+", default=[], metavar="TEXT", help="of `matrix`, only rows with such a text")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for every row")
    parser.add_argument("--output", type=Path, default=Path("runs/structures"), help="default runs/structures")
    parser.add_argument("--markdown", action="store_true")
    given = parser.parse_args(argv)
    texts = [f"calibration.source={given.calibration}", f"evaluate.perplexity=[{{source: {given.test}}}]"]
    policy = [f"stages.0.policy_gradient.{option}" for option in given.policy]
    others = given.seeds[:1] if given.ablation_seeds is None else given.ablation_seeds
    wrong = 0
    for number, seeds, wanted in (("matrix", given.seeds, given.rows), ("ablations", others, [])):
        if not seeds:
            continue
        try:
            done = run_seeds(PAPER, number, given.model, [*texts, *given.set, *policy], wanted, seeds, given.output)
        except ValueError as error:
            print(f"benchmarks.structures: {error}", file=sys.stderr)
            return 2
        described = table(PAPER, number)
        columns, lines = cells(done, described)
        show(columns, lines, title=f"{described['title']}; {given.model}, seeds {seeds}", markdown=given.markdown)
        for sentence, holds in claims(number, done):
            print(f"{'holds' if holds else 'MISSED'}: {sentence}")
            wrong += not holds
        for sentence in done.failed:
            print(f"failed: {sentence}", file=sys.stderr)
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
