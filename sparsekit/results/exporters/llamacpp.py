"""llama.cpp, by the package xllamacpp: what it makes of a GGUF file, beside what the model itself gives.

It runs in a process of its own, since it prints what it likes and may end the process that it is in.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparsekit.contracts import Finished

PACKAGE = "xllamacpp"
TEXTS = (
    "The assignment statement is used to bind a name to a value, and",
    "def add(first, second):\n    return first + second\n\n\nprint(",
    "In 1969 the first people walked on the moon; they came back with 21.5 kg of",
)
NEW = 12  # tokens that it goes on with
TOP = 5  # log-probabilities that are compared, of the likeliest next tokens
SAME, ROUNDED = 0.02, 0.2  # how far they may be apart: llama.cpp keeps its cache and some products in half precision
TIE = 0.05  # tokens as likely as that may change places


def compare(finished: Finished, file: Path, *, exact: bool) -> tuple[dict[str, Any], list[str]]:
    """What was compared, for proof.json, and what is not the same, as sentences.

    exact: the file holds the model's own weights, so that log-probabilities must agree; else they are only told
    """
    try:
        client = f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:
        return {"client": None, "said": f"not run in llama.cpp: {PACKAGE} is not installed"}, []
    from sparsekit.model import load

    model, tokenizer = load(finished.folder, trust_remote_code=False)
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    try:
        answers = _ask(file, {"texts": list(TEXTS), "prompts": texts, "new": NEW, "top": TOP})
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"client": client, "ran": False}, [f"llama.cpp does not run it: {error}"]
    wrong, apart = [], 0.0
    for text, ids, answer in zip(TEXTS, texts, answers, strict=True):
        if answer["tokens"] != ids:
            wrong.append(f"llama.cpp splits {text[:20]!r} into other tokens than the model's tokenizer")
        gap, same = _gap(model, ids, answer["steps"])
        apart = max(apart, gap)
        if exact and not same:
            wrong.append(f"llama.cpp goes on from {text[:20]!r} with other tokens than the model")
    limit = SAME if next(model.parameters()).dtype == torch.float32 else ROUNDED
    if exact and apart > limit:
        wrong.append(f"log-probabilities in llama.cpp are up to {apart:.3f} from the model's, beyond {limit}")
    told = {
        "client": client,
        "ran": True,
        "texts": len(TEXTS),
        "tokens": NEW,
        "log-probabilities within": round(apart, 5),
    }
    return told, wrong


@torch.no_grad()
def _gap(model: Any, ids: list[int], steps: list[dict[str, Any]]) -> tuple[float, bool]:
    """How far log-probabilities are apart along what llama.cpp chose, and whether the model would choose the same."""
    chosen = [step["id"] for step in steps]
    tokens = torch.tensor([ids + chosen])
    scores = model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
    apart, same = 0.0, True
    for place, step in enumerate(steps):
        here = scores[len(ids) - 1 + place]
        for other in step["top"]:
            apart = max(apart, abs(float(here[other["id"]]) - other["logprob"]))
        same = same and float(here.max() - here[step["id"]]) <= TIE
    return apart, same


def _ask(file: Path, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Have a process run the file. ValueError with its last words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "task.json", Path(folder) / "answer.json"
        given.write_text(json.dumps(task), encoding="utf-8")
        command = [sys.executable, "-m", "sparsekit.results.exporters.llamacpp", str(file), str(given), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=1800)
        if done.returncode or not answer.is_file():
            last = [line for line in (done.stderr + done.stdout).strip().splitlines() if line.strip()][-1:]
            raise ValueError(f"it ended with {done.returncode}{': ' + last[0] if last else ''}")
        found: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _serve(file: str, task: dict[str, Any]) -> list[dict[str, Any]]:
    """In the process of its own: tokens of the texts, and what follows the prompts."""
    from urllib.request import Request, urlopen

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    found = []
    for text, prompt in zip(task["texts"], task["prompts"], strict=True):
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as reply:  # the server of this process, on this machine
            tokens = json.load(reply)["tokens"]
        settings = {"temperature": 0.0, "n_probs": task["top"], "cache_prompt": False, "ignore_eos": False}
        given = server.handle_completions({"prompt": prompt, "n_predict": task["new"], **settings})
        given = json.loads(given) if isinstance(given, str) else given
        steps = [
            {"id": step["id"], "top": [{key: each[key] for key in ("id", "logprob")} for each in step["top_logprobs"]]}
            for step in given["choices"][0]["logprobs"]["content"]
        ]
        found.append({"tokens": tokens, "steps": steps})
    return found


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(
        json.dumps(_serve(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))), encoding="utf-8"
    )
