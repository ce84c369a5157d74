"""What the command line takes. Nothing heavy is imported."""

import argparse
import re
from typing import Any

from sparsekit import __version__


def command_line() -> argparse.ArgumentParser:
    """Every command with its arguments; the command is `command` of what is parsed."""
    parser = argparse.ArgumentParser("sparsekit", description="Make large transformers sparse.")
    parser.add_argument("--version", action="version", version=f"sparsekit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    add = commands.add_parser("init", help="write a first recipe from five answers")
    add.add_argument("file", nargs="?", default="recipe.yaml", metavar="FILE", help="of the recipe (recipe.yaml)")
    for name, said in (
        ("model", "a hub name or a folder"),
        ("goal", "faster, 2:4, 50%% or int4"),
        ("time", "minutes, hours, or 'a day'"),
        ("text", "to calibrate on: a source, or a file"),
        ("output", "folder of the run"),
    ):
        add.add_argument(f"--{name}", metavar=name.upper(), help=said)

    add = commands.add_parser("fit", help="prune a model as a recipe says, prove and measure the result")
    add.add_argument("--recipe", required=True, metavar="FILE", help="the recipe, a YAML file")
    add.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as in calibration.samples=8"
    )
    add.add_argument("--resume", action="store_true", help="go on after a crash, from the last finished block")
    add.add_argument(
        "--dry-run", action="store_true", help="check everything and say what it would take; prune nothing"
    )

    add.add_argument("--sign", metavar="KEY", help="sign the manifest with this ed25519 key (a PEM file)")

    add = commands.add_parser("eval", help="measure any checkpoint")
    add.add_argument("path", metavar="PATH", help="folder of a model or of a run, or a hub name")
    _add_texts(add)
    add.add_argument("--task", nargs="+", action="extend", default=[], metavar="TASK", help="a task of lm-eval")
    add.add_argument(
        "--metric",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="a metric, or '{name: {option: value}}'",
    )
    add.add_argument(
        "--accuracy",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="labelled images, for vision models",
    )
    add.add_argument(
        "--features", nargs="+", action="extend", default=[], metavar="FOLDER", help="images: cosine to --against"
    )
    add.add_argument(
        "--iou", nargs="+", action="extend", default=[], metavar="SET", help="images with masks, for models such as SAM"
    )
    add.add_argument("--against", metavar="PATH", help="measure this model too; for a run's result, its source is")
    add.add_argument(
        "--device", metavar="DEVICE", help="such as cpu or cuda (default: the accelerator, if there is one)"
    )
    add.add_argument(
        "--batch", type=_positive, default=1, metavar="N", help="sequences, or images, at a time (default 1)"
    )
    add.add_argument("--limit", type=_positive, metavar="N", help="documents of each task, or images (default: all)")
    add.add_argument("--json", metavar="FILE", help="write the figures here too")

    add = commands.add_parser("verify", help="prove from disk that a checkpoint is sparse and sound")
    add.add_argument("path", metavar="PATH", help="folder of a model or of a run, or a hub name")
    add.add_argument("--pattern", metavar="PATTERN", help='such as "2:4" or "50%%"')
    add.add_argument("--against", metavar="SOURCE", help="the model it was made from: all else must be unchanged")
    add.add_argument("--key", metavar="PUBLIC", help="the run must be signed by the owner of this key (a PEM file)")
    add.add_argument("--json", metavar="FILE", help="write what was found here too")

    add = commands.add_parser("search", help="find the methods that are best on a model within some minutes")
    add.add_argument("--model", required=True, metavar="MODEL", help="a folder or a hub name")
    add.add_argument("--pattern", required=True, metavar="PATTERN", help='such as "2:4" or "50%%"')
    add.add_argument("--budget", required=True, type=_seconds, metavar="TIME", help="such as 20min, 2h or 90s")
    add.add_argument("--calibration", required=True, metavar="SOURCE", help="a source or a file")
    add.add_argument(
        "--text", required=True, metavar="SOURCE", help="decides between methods: none that figures are reported on"
    )
    add.add_argument("--samples", type=_positive, default=64, metavar="N", help="in the last round (default 64)")
    add.add_argument("--length", type=_positive, default=512, metavar="N", help="tokens of each (default 512)")
    add.add_argument("--windows", type=_positive, default=16, metavar="N", help="of the text (default 16)")
    add.add_argument("--output", required=True, metavar="FOLDER", help="of the recipe, the page and the last runs")

    add = commands.add_parser("compare", help="finished runs in one table, best first")
    add.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run, measured like the others")
    add.add_argument("--by", metavar="COLUMN", help="sort by this column (default: the first perplexity)")
    add.add_argument("--json", metavar="FILE", help="write the figures here too")
    add.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    add.add_argument("--html", metavar="FILE", help="write a page: figures, quality against price, maps, samples")

    add = commands.add_parser("bench", help="parameters, size, memory and speed of a model, beside its source")
    add.add_argument("path", metavar="PATH", help="folder of a model or of a run, or a hub name")
    add.add_argument("--against", metavar="PATH", help="measure this model in turn; for a run's result, its source is")
    add.add_argument(
        "--batch", nargs="+", type=_positive, metavar="N", help="batch sizes (default 1 8; in llama.cpp 1)"
    )
    add.add_argument(
        "--backend",
        default="transformers",
        metavar="NAME",
        help="transformers (default), compiled, semi-structured (CUDA), llama.cpp, onnxruntime, openvino",
    )
    add.add_argument(
        "--precision", default="source", metavar="TYPE", help="in llama.cpp: source (default), f16, q8_0 ..."
    )
    add.add_argument("--prompt", type=_positive, default=128, metavar="N", help="tokens of the prompt (default 128)")
    add.add_argument("--new", type=_positive, default=32, metavar="N", help="tokens generated (default 32)")
    add.add_argument("--repeat", type=_positive, default=5, metavar="N", help="turns of each model (default 5)")
    _add_texts(add)
    add.add_argument("--json", metavar="FILE", help="write the figures here too")
    add.add_argument("--save", action="store_true", help="keep the figures in the run's report.json and report.html")

    add = commands.add_parser("export", help="write another form of a finished run's model, and prove it")
    add.add_argument("run", metavar="RUN", help="folder of a finished run")
    add.add_argument("--to", required=True, metavar="NAME", help="an installed exporter: gguf, bitmask, packed ...")
    add.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="OPTION=VALUE", help="of it, as in precision=q8_0"
    )

    add = commands.add_parser("unpack", help="make a checkpoint again of what `export --to bitmask` wrote")
    add.add_argument("folder", metavar="FOLDER", help="model-bitmask/ of a run")
    add.add_argument("target", metavar="TARGET", help="a folder that does not exist")

    add = commands.add_parser("report", help="write report.html of a finished run again")
    add.add_argument("run", metavar="RUN", help="folder of a finished run")

    add = commands.add_parser("methods", help="list what is installed, or explain one of it")
    add.add_argument("name", nargs="?", metavar="NAME", help="a solver, allocator, stage or source")

    add.add_argument("--long", action="store_true", help="options, packages and sources of all")

    add = commands.add_parser("doctor", help="say what this machine can do, and what would let it do more")
    add.add_argument("--json", action="store_true", help="print it as JSON")

    commands.add_parser("schema", help="print the JSON Schema of recipes, for your editor")

    add = commands.add_parser("completion", help="print what completes these commands in your shell (needs shtab)")
    add.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="bash, zsh or tcsh")
    for each in (parser, *commands.choices.values()):  # before the command, or behind it
        kept: dict[str, Any] = {} if each is parser else {"default": argparse.SUPPRESS}
        each.add_argument("--quiet", action="store_true", help="say nothing but mistakes and failures", **kept)
        each.add_argument("--verbose", action="store_true", help="show what the libraries below say, too", **kept)
    return parser


def _add_texts(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--perplexity", nargs="+", action="extend", default=[], metavar="SOURCE", help="a source or a file"
    )
    add.add_argument("--length", type=_positive, default=2048, metavar="N", help="tokens of a window (default 2048)")
    add.add_argument("--windows", type=_positive, metavar="N", help="only the first N windows of each text")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h)", text.strip())
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give one such as 20min, 2h or 90s")
    return float(found[1]) * {"s": 1, "min": 60, "m": 60, "h": 3600}[found[2]]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
