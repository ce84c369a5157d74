"""llama.cpp, by the package xllamacpp: what it makes of a GGUF file, beside what the model itself gives.

It runs in a process of its own, since it prints what it likes and may end the process that it is in.
"""

import json
import math
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def compare(finished: Finished, file: Path, *, exact: bool, context: int = 512) -> tuple[dict[str, Any], list[str]]:
    """What was compared, for proof.json, and what is not the same, as sentences.

    exact: the file holds the model's own weights, so that log-probabilities must agree; else they are only told
    context: tokens that the model may be given
    """
    try:
        client = f"{PACKAGE} {version(PACKAGE)}"
    except PackageNotFoundError:
        return {"client": None, "said": f"not run in llama.cpp: {PACKAGE} is not installed"}, []
    from sparsekit.model import load

    model, tokenizer = load(finished.folder, trust_remote_code=False)
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    begun = [ids[: context - NEW - 1] for ids in texts]
    scores = [_goes_on(model, ids) for ids in begun]
    try:
        task = {
            "texts": list(TEXTS),
            "prompts": [_prompts(*pair) for pair in zip(begun, scores, strict=True)],
            "top": TOP,
        }
        answers = _ask(file, task)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"client": client, "ran": False}, [f"llama.cpp does not run it: {error}"]
    wrong, apart, compared = [], 0.0, 0
    for text, ids, score, answer in zip(TEXTS, texts, scores, answers, strict=True):
        if answer["tokens"] != ids:
            wrong.append(f"llama.cpp splits {text[:20]!r} into other tokens than the model's tokenizer")
        for here, top in zip(score, answer["steps"], strict=True):
            if not top:  # half a letter: llama.cpp keeps it back until the other half is there
                continue
            compared += 1
            apart = max(apart, *(_apart(float(here[each["id"]]), each["logprob"]) for each in top))
            if exact and float(here.max() - here[top[0]["id"]]) > TIE:
                wrong.append(f"llama.cpp goes on from {text[:20]!r} with another token than the model")
                break
    if not compared:
        wrong.append("llama.cpp gave no log-probabilities, so nothing was compared")
    limit = SAME if next(model.parameters()).dtype == torch.float32 else ROUNDED
    if exact and apart > limit:
        wrong.append(f"log-probabilities in llama.cpp are up to {apart:.3f} from the model's, beyond {limit}")
    return {
        "client": client,
        "ran": True,
        "texts": len(TEXTS),
        "tokens": compared,
        "log-probabilities within": round(apart, 5),
    }, wrong


def _apart(mine: float, theirs: float | None) -> float:
    """The distance of two log-probabilities; infinite where one is no number."""
    gap = math.inf if theirs is None else abs(mine - theirs)
    return math.inf if math.isnan(gap) else gap


@torch.no_grad()
def _goes_on(model: Any, ids: list[int]) -> Tensor:
    """Log-probabilities (NEW, vocabulary) of each next token, after the likeliest ones before it."""
    tokens = torch.tensor([ids])
    for _ in range(NEW):
        scores = model(input_ids=tokens, use_cache=False).logits[0].float()
        tokens = torch.cat([tokens, scores[-1:].argmax(-1, keepdim=True)], 1)
    return scores[len(ids) - 1 :].log_softmax(-1)


def _prompts(ids: list[int], scores: Tensor) -> list[list[int]]:
    """What is given for each step: the text, and what the model itself has chosen so far."""
    chosen = scores.argmax(-1).tolist()
    return [ids + chosen[:count] for count in range(len(chosen))]


def _ask(file: Path, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Have a process run the file. ValueError with its last words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "task.json", Path(folder) / "answer.json"
        given.write_text(json.dumps(task), encoding="utf-8")
        command = [sys.executable, "-m", "sparsekit.results.exporters.llamacpp", str(file), str(given), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=1800)
        if done.returncode or not answer.is_file():
            said = (done.stderr + done.stdout).strip().splitlines()
            last = [line for line in said if line.strip() and " I " not in line][-1:]
            raise ValueError(f"it ended with {done.returncode}{': ' + last[0] if last else ''}")
        found: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _serve(file: str, task: dict[str, Any]) -> list[dict[str, Any]]:
    """In the process of its own: tokens of the texts, and the likeliest next ones after each prompt."""
    from urllib.request import Request, urlopen

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = 512
    params.n_parallel = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    found = []
    for text, prompts in zip(task["texts"], task["prompts"], strict=True):
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as reply:  # the server of this process, on this machine
            tokens = json.load(reply)["tokens"]
        settings = {"n_predict": 1, "temperature": 0.0, "n_probs": task["top"], "cache_prompt": False}
        steps = []
        for ids in prompts:
            given = server.handle_completions({"prompt": ids, **settings})
            given = json.loads(given) if isinstance(given, str) else given
            if "choices" not in given:
                raise ValueError(f"it answers {given}")
            told = (given["choices"][0].get("logprobs") or {}).get("content") or [{"top_logprobs": []}]
            steps.append([{key: each[key] for key in ("id", "logprob")} for each in told[0]["top_logprobs"]])
        found.append({"tokens": tokens, "steps": steps})
    return found


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(
        json.dumps(_serve(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))), encoding="utf-8"
    )
