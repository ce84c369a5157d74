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
HOME = ROOT / "sparsekit"
FILES = sorted(HOME.rglob("*.py"))
FLOORS = [  # of rooms, the lowest first: imports point down
    "maths system registry contracts",
    "solvers allocators data",
    "model",
    "walk recipe measure",
    "results train",
    "run",
    "stages criteria",
    "testing",
    "cli arguments listing __main__ __init__",
]
METHODS = {"solvers", "allocators", "stages", "criteria"}  # one paper a file: entry points name the files themselves
HEAVY = {"lightning", "transformers", "datasets", "lm_eval", "torchmetrics", "peft"}
WITHOUT_TORCH = ["__init__", "registry", "cli", "listing", "__main__", "data.corpora", "data.naming", "data.sampling"]
WITHOUT_TORCH += ["recipe.load", "recipe.schema", "recipe.values", "recipe.yaml_tree"]


def module(path: Path) -> str:
    """sparsekit/solvers/wanda.py -> solvers.wanda; a room's own file has the name of the room."""
    parts = path.relative_to(HOME).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def door(stub: Path) -> dict[str, str]:
    """What a room gives through its door: name -> the module that it comes from."""
    room = ".".join(stub.relative_to(HOME).parts[:-1])
    found = {}
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 1 and all(alias.asname == alias.name for alias in node.names), (stub, node.lineno)
            found |= {alias.name: f"{room}.{node.module}".strip(".") for alias in node.names}
    return found


DOORS = {".".join(stub.relative_to(HOME).parts[:-1]): door(stub) for stub in HOME.rglob("__init__.pyi")}


def room(name: str) -> str:
    return name.split(".")[0]


def floor(name: str) -> int:
    found = [number for number, names in enumerate(FLOORS) if room(name) in names.split()]
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


def resolved(target: str) -> str:
    """The module of ours behind "model.Block" or "model.blocks.Block": doors are looked through."""
    place, _, name = target.rpartition(".")
    if name in DOORS.get(place, {}):
        found = DOORS[place][name]
        return found if found in MODULES and found not in DOORS else resolved(f"{found}.{name}")
    parts = target.split(".")
    known = [".".join(parts[:i]) for i in range(len(parts), 0, -1) if ".".join(parts[:i]) in MODULES]
    return known[0] if known else "__init__"


def ours(name: str, everywhere: bool = True) -> set[str]:
    """Modules of sparsekit that a module of it imports."""
    targets = (target.partition(".") for target in imports(MODULES[name], everywhere))
    return {resolved(rest) for first, _, rest in targets if first == "sparsekit"} - {name}


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
    assert "recipe.load" in ours("cli")
    assert "recipe.load" not in ours("cli", everywhere=False)
    assert "torch" in foreign("solvers.wanda")
    assert resolved("model.Block") == "model.blocks" and resolved("load") == "model.storage"


def test_the_house_is_small() -> None:
    """Rooms that a newcomer can walk through: few of them, and next to nothing outside of them."""
    assert len([path for path in HOME.iterdir() if path.is_dir() and path.name != "__pycache__"]) <= 16
    assert len(list(HOME.glob("*.py"))) <= 7
    assert len(FLOORS) <= 9


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_floor(name: str) -> None:
    assert floor(name) < len(FLOORS), "give its room one in FLOORS"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    above = {other for other in ours(name) if floor(other) > floor(name) and other != "__init__"}
    assert not above


def test_no_cycles() -> None:
    """Neither between rooms nor between modules."""
    TopologicalSorter({name: ours(name) for name in MODULES}).prepare()
    rooms: dict[str, set[str]] = {}
    for name in MODULES:
        others = {room(other) for other in ours(name)} - {room(name), "__init__"}
        rooms.setdefault(room(name), set()).update(others if name != "__init__" else ())
    TopologicalSorter(rooms).prepare()


def users() -> list[Path]:
    """Everybody who may enter rooms: the package, plugins and benchmarks. Tests look behind doors."""
    others = [path for folder in ("plugins", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return FILES + [path for path in others if "tests" not in path.parts]


@pytest.mark.parametrize("path", users(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_reaches_past_a_door(path: Path) -> None:
    """What is outside a room asks its door (`from sparsekit.model import Block`) and no file behind it."""
    own = room(module(path)) if HOME in path.parents else ""
    for target in imports(ast.parse(path.read_text(encoding="utf-8")), everywhere=True):
        first, _, rest = target.partition(".")
        place, _, name = rest.rpartition(".")
        if (
            first != "sparsekit"
            or not place
            or room(rest) in {own, *METHODS}
            or place in ("registry", "testing", "cli", "arguments", "listing")
        ):
            continue
        assert place in DOORS and name in DOORS[place], f"{target}: a name that the door of {room(rest)} does not give"


@pytest.mark.parametrize("place", DOORS)
def test_a_door_gives_what_is_there(place: str) -> None:
    """And no name that a file of the room has too: which of the two one got would depend on who came first."""
    for name, home in DOORS[place].items():
        assert f"{place}.{name}" not in MODULES, f"{name} is a file of {place}"
        assert home in MODULES and (home in DOORS or name in names_of(home)), f"{home} has no {name}"


def names_of(name: str) -> set[str]:
    """What a module defines at its top level."""
    found = set()
    for node in MODULES[name].body:
        found |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


LIGHT = ("maths", "system", "registry", "solvers", "allocators", "data", "model", "recipe", "measure")


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in LIGHT])
def test_the_lower_floors_import_nothing_heavy(name: str) -> None:
    assert not foreign(name) & HEAVY


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_checks_a_recipe_does_without_torch(name: str) -> None:
    assert not foreign(name) & (HEAVY | {"torch"})


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ("solvers", "allocators")])
def test_methods_know_no_models_files_or_frameworks(name: str) -> None:
    assert all(room(other) in ("maths", "solvers", "allocators") for other in ours(name))
    assert not foreign(name) & {"pathlib", "os", "entrypoints", "safetensors"}


def test_files_are_of_medium_size() -> None:
    lines = {str(path.relative_to(HOME)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert statistics.median(lines.values()) <= 130
    assert max(lines.values()) <= 350, lines


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
