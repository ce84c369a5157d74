"""A first recipe from five answers: `sparsekit init`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsekit import registry


@dataclass(frozen=True)
class Question:
    """What is asked, the answers that are allowed (none: any), and the one that is taken for nothing."""

    text: str
    default: str
    choices: tuple[str, ...] = ()


QUESTIONS = {
    "model": Question("Which model? A hub name or a folder", "HuggingFaceTB/SmolLM2-135M"),
    "goal": Question("What for? faster, 2:4, 50% or int4", "faster", ("faster", "2:4", "50%", "int4")),
    "time": Question("How long may it take? minutes, hours or a day", "minutes", ("minutes", "hours", "a day")),
    "text": Question("Which text is it calibrated on? A source such as c4 or python-docs, or a file", "c4"),
    "output": Question("Where does the result go?", "runs/first"),
}
GOALS = {
    "faster": "Heads and channels are removed, so that any runtime is faster and the model smaller.",
    "2:4": "Of every four weights two stay: sparse tensor cores use that (NVIDIA, from Ampere on); a CPU does not.",
    "50%": "Half of the weights go, wherever they are: for research, and for runtimes with sparse kernels.",
    "int4": "2:4 and four bits a weight: smaller on disk, in transformers and vLLM.",
}
HALF = """pattern: "50%"
# each layer as sparse as its share in the loss allows; the total is the same
allocation: sensitivity
"""
LORA = """  # what is left is trained on the same text; pruned weights stay zero
  - lora: {tokens: 1000000}
"""
STAGES = {
    ("faster", "minutes"): """  - wanda-sp:
      remove: "20%"        # or {speedup: 1.5, on: decode}, measured on this machine; or {memory: 6GB}
      shape: uniform       # as many from each layer: plain transformers loads it
      compensate: true     # what stays makes up for what goes, by least squares
""",
    ("faster", "hours"): """  - policy_gradient:
      remove: "20%"        # or {speedup: 1.5, on: decode}, measured on this machine; or {memory: 6GB}
      shape: uniform       # as many from each layer: plain transformers loads it
"""
    + LORA,
    ("2:4", "minutes"): "  - sparsegpt              # one pass over the model\n",
    ("2:4", "hours"): "  - alps                   # better than sparsegpt, three to five times its time\n" + LORA,
    ("2:4", "a day"): "  - lamp                   # every block is trained to make up for those before it\n" + LORA,
    ("int4", "minutes"): "  - sparsegpt: {quantize: {bits: 4, group: 64}}   # the group must divide every width\n",
    ("int4", "hours"): "  - alps\n  - quantize: {bits: 4, group: 64}   # the group must divide every width\n",
    ("int4", "a day"): "  - lamp: {quantize: {bits: 4, group: 64}}   # the group must divide every width\n",
}
STAGES[("faster", "a day")] = STAGES[("faster", "hours")].replace("1000000", "10000000")
STAGES |= {("50%", time): text for (goal, time), text in list(STAGES.items()) if goal == "2:4"}


def asked(given: Mapping[str, str | None], answer: Callable[[str], str]) -> dict[str, str]:
    """Answers to all questions: those that are given, and for the others what `answer(question)` says.

    Raises:
        ValueError: an answer that is given is none of the allowed.
    """
    found = {}
    for name, question in QUESTIONS.items():
        value = given.get(name)
        while value is None:
            said = answer(f"{question.text} [{question.default}]: ").strip() or question.default
            if not question.choices or said in question.choices:
                value = said
        if question.choices and value not in question.choices:
            raise ValueError(f"--{name} is {value}: {registry.suggest(value, list(question.choices))}")
        found[name] = value
    return found


def first_recipe(answers: Mapping[str, str]) -> str:
    """A recipe with comments, as YAML, from the answers to QUESTIONS."""
    goal, time = answers["goal"], answers["time"]
    samples, length = (32, 512) if time == "minutes" else (128, 2048)
    pattern = {"faster": "", "2:4": 'pattern: "2:4"\n', "50%": HALF, "int4": 'pattern: "2:4"\n'}[goal]
    text = f"{{source: {answers['text']}, samples: {samples}, length: {length}}}"
    measured = answers["text"] if answers["text"] in registry.names("sources") else "wikitext2"
    export = "\n# a GGUF file for llama.cpp, Ollama, LM Studio: pip install gguf xllamacpp, and take the # away\n"
    export += "# export: [{gguf: {precision: q8_0}}]\n"
    return (
        f"# {GOALS[goal]}\n"
        "# Check it, and see what it would take, without doing anything: sparsekit fit --recipe FILE --dry-run\n\n"
        f"model: {answers['model']}\n{pattern}\n"
        f"# text like what the model is for; more of it is better, and takes longer\ncalibration: {text}\n\n"
        f"stages:\n{STAGES[goal, time]}\n"
        f"evaluate:\n  perplexity: [{measured}]   # of the model before and after\n  length: {length}\n"
        f"{export}\noutput: {answers['output']}\n"
    )


def write_first(file: Path, answers: Mapping[str, str]) -> None:
    """Write the recipe. ValueError where there is something already."""
    if file.exists():
        raise ValueError(f"there is a {file} already; give another name, as in sparsekit init mine.yaml")
    file.write_text(first_recipe(answers), encoding="utf-8")
