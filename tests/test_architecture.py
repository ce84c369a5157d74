"""The shape of the code: floors, cycles, sizes, docstrings, and things that may not be written."""

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "sparsekit").rglob("*.py"))
FLOORS = [
    "__init__ pattern statistics grid store plugins data images evaluate report yamltree values schedule",
    "solvers allocate structure blocks checkpoint commits dense stream team reconstruct feedforward testing quiet",
    "walk progress parallel remove loggers policy recover",
    "stages sections recipe plan preview folder work pipeline run verify export result "
    "compare distance leaderboard bench timing samples page",
    "cli __main__",
]
HEAVY = {"lightning", "transformers", "datasets", "lm_eval", "torchmetrics", "peft"}
WITHOUT_TORCH = {"__init__", "plugins", "data", "yamltree", "values", "sections", "recipe", "cli", "__main__"}


def module(path: Path) -> str:
    """sparsekit/solvers/wanda.py -> solvers.wanda."""
    parts = path.relative_to(ROOT / "sparsekit").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def floor(name: str) -> int:
    found = [number for number, names in enumerate(FLOORS) if name.split(".")[0] in names.split()]
    return found[0] if found else len(FLOORS)


def imports(tree: ast.AST, everywhere: bool) -> Iterator[str]:
    """Dotted names that are imported, at module level or everywhere; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, everywhere)


def ours(name: str, everywhere: bool = True) -> set[str]:
    """Modules of sparsekit that a module of it imports."""
    found = set()
    for target in imports(MODULES[name], everywhere):
        first, _, rest = target.partition(".")
        if first == "sparsekit":
            parts = rest.split(".") if rest else ["__init__"]
            known = [".".join(parts[:i]) for i in range(len(parts), 0, -1) if ".".join(parts[:i]) in MODULES]
            found.add(known[0] if known else "__init__")
    return found - {name}


def foreign(name: str) -> set[str]:
    """Top-level packages that importing a module imports, through other modules of ours too."""
    seen, stack, found = set(), [name], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        found |= {target.split(".")[0] for target in imports(MODULES[current], everywhere=False)}
        parents = [".".join(current.split(".")[:i]) for i in range(1, current.count(".") + 1)]
        stack += [*ours(current, everywhere=False), *parents, "__init__"]
    return found - {"sparsekit"}


def test_the_reader_of_imports_sees_something() -> None:
    assert "plugins" in ours("cli")
    assert "plugins" not in ours("cli", everywhere=False)
    assert "torch" in foreign("solvers.wanda")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_floor(name: str) -> None:
    assert floor(name) < len(FLOORS), "give it one in FLOORS"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    above = {other for other in ours(name) if floor(other) > floor(name)}
    assert not above


def test_no_cycles() -> None:
    TopologicalSorter({name: ours(name) for name in MODULES}).prepare()


@pytest.mark.parametrize("name", [name for name in MODULES if floor(name) < 2])
def test_the_lower_floors_import_nothing_heavy(name: str) -> None:
    assert not foreign(name) & HEAVY


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_what_checks_a_recipe_does_without_torch(name: str) -> None:
    assert not foreign(name) & (HEAVY | {"torch"})


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(("solvers", "allocate"))])
def test_methods_know_no_models_files_or_frameworks(name: str) -> None:
    allowed = ("grid", "pattern", "statistics", "solvers", "allocate")
    assert all(module.split(".")[0] in allowed for module in ours(name))
    assert not foreign(name) & {"pathlib", "os", "entrypoints", "safetensors"}


def test_files_are_of_medium_size() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert statistics.median(lines.values()) <= 200
    assert sum(count > 300 for count in lines.values()) <= len(lines) / 6, lines
    assert max(lines.values()) <= 450, lines


@pytest.mark.parametrize("name", MODULES)
def test_public_things_have_docstrings(name: str) -> None:
    tree = MODULES[name]
    bodies = [("", tree)] + [(f"{node.name}.", node) for node in tree.body if isinstance(node, ast.ClassDef)]
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [
        (prefix + node.name, node)
        for prefix, body in bodies
        for node in body.body
        if isinstance(node, definitions) and not node.name.startswith("_") and not prefix.startswith("_")
    ]
    assert ast.get_docstring(tree) or not tree.body
    assert [label for label, node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_swallowed_or_pickled(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            assert not (ast.unparse(node.type).endswith("Exception") and isinstance(node.body[0], ast.Pass)), (
                node.lineno
            )
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save"):
            raise AssertionError(f"{ast.unparse(node.func)} in line {node.lineno} reads or writes pickles")
    assert not {target.split(".")[0] for target in imports(MODULES[name], True)} & {
        "pickle",
        "joblib",
        "dill",
        "shelve",
    }


def written() -> list[Path]:
    """Every file that is tracked or could be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    return [path for path in (ROOT / name for name in done.stdout.splitlines()) if path.is_file()]


def test_no_machine_is_written_into_the_files() -> None:
    """Neither the paths of somebody's machine nor its accelerator; this file is spared by how it is written."""
    forbidden = re.compile(r"""(?<![\w.~}*-])/(?:work|root|home/[a-z]+)/|cuda:[0]|head_dim\s*=\s*[0-9]{2,}\s*[*/]""")
    found = []
    for path in written():
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in forbidden.finditer(text)]
    assert found == []
