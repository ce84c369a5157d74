"""Entry points: real distributions are written to a folder that is put on sys.path, no look-up is faked."""

import inspect
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from sparsekit import registry


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """install("pkg", "1.0", {"solvers": {"name": "module:function"}}, module="source text")."""

    def put(package: str, version: str, groups: dict[str, dict[str, str]], **modules: str) -> None:
        folder = tmp_path / package
        info = folder / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = []
        for group, entries in groups.items():
            lines += [f"[sparsekit.{group}]", *(f"{name} = {target}" for name, target in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for name, text in modules.items():
            (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        for name in modules:
            monkeypatch.delitem(sys.modules, name, raising=False)

    return put


def test_builtins_come_through_the_door() -> None:
    assert {"magnitude", "wanda", "sparsegpt", "refit"} <= set(registry.names("solvers"))
    assert registry.names("sparsekit.solvers") == registry.names("solvers") == sorted(registry.names("solvers"))
    assert registry.package(registry.find("solvers", "wanda")).startswith("sparsekit-lightning ")
    assert registry.load("allocators", "uniform")({"a": 1}, 0.5) == {"a": 0.5}


@pytest.mark.parametrize("name", ["python-docs", "python_docs"])
def test_hyphen_and_underscore_are_one_letter(name: str) -> None:
    assert registry.find("sources", name).name == "python-docs"


def test_unknown_name_has_the_nearest_and_all() -> None:
    with pytest.raises(registry.UnknownName, match=r"unknown solver `spasegpt`, did you mean `sparsegpt`\?.*wanda"):
        registry.find("solvers", "spasegpt")
    with pytest.raises(registry.UnknownName) as error:
        registry.load("solvers", "zzz")
    assert "did you mean" not in str(error.value)
    with pytest.raises(ValueError, match="unknown group `solver`, did you mean `solvers`"):
        registry.names("solver")


def test_a_strangers_plugin(install: Any) -> None:
    install("ria_pkg", "2.1", {"solvers": {"ria-x": "ria_mod:ria"}}, ria_mod="def ria(weight, stats, pattern): ...")
    assert "ria-x" in registry.names("solvers")
    assert registry.load("solvers", "ria_x").__name__ == "ria"
    assert registry.package(registry.find("solvers", "ria-x")) == "ria-pkg 2.1"


def test_a_name_offered_twice_is_an_error_only_when_used(install: Any) -> None:
    install("one", "1.0", {"solvers": {"two-way": "one_mod:f"}})
    install("two", "2.0", {"solvers": {"two_way": "two_mod:f"}})
    assert [registry.normal(name) for name in registry.names("solvers")].count("two_way") == 1
    assert registry.find("solvers", "wanda")
    with pytest.raises(ValueError, match=r"`two-way` is offered by .*(one 1\.0.*two 2\.0|two 2\.0.*one 1\.0)"):
        registry.find("solvers", "two-way")


def test_a_distribution_seen_twice_is_one(install: Any) -> None:
    install("again", "1.0", {"solvers": {"again": "again_mod:f"}})
    install("again_egg", "1.0", {"solvers": {"again": "again_mod:f"}})  # the same target under another name
    assert registry.find("solvers", "again").module_name == "again_mod"


@pytest.mark.parametrize(
    ("text", "cause"),
    [("import no_such_module_here", ImportError), ("1 / 0", ZeroDivisionError), ("other = 1", AttributeError)],
)
def test_a_plugin_that_cannot_be_imported(install: Any, text: str, cause: type[Exception]) -> None:
    install("broken", "0.3", {"solvers": {"broken": "broken_mod:f"}}, broken_mod=text)
    with pytest.raises(ValueError, match=r"`broken` of broken 0\.3 cannot be imported") as error:
        registry.load("solvers", "broken")
    assert isinstance(error.value.__cause__, cause)


def test_an_entry_point_must_be_a_function(install: Any) -> None:
    install("number", "1.0", {"solvers": {"number": "number_mod:f"}}, number_mod="f = 3")
    with pytest.raises(ValueError, match="is a int; an entry point must name a function"):
        registry.load("solvers", "number")


def method(
    weight: Any,
    pattern: Any,
    init: Any = None,
    *,
    a: int,
    b: float = 0.1,
    c: bool = False,
    d: int | None = None,
    e: "str | None" = None,
    f: Literal["row", "matrix"] | int = "row",
    g=2.0,
    h: Any = None,
    i: list[int] = [],  # noqa: B006
) -> None:
    """Options of all kinds."""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, None),
        ({"b": 1}, None),
        ({"b": 1e-4}, None),
        ({"b": "1e-4"}, 'option `b` is "1e-4", must be a number'),
        ({"b": True}, "option `b` is true, must be a number"),
        ({"b": None}, "option `b` is null, must be a number"),
        ({"c": 1}, "option `c` is 1, must be true or false"),
        ({"d": None}, None),
        ({"d": 2.0}, "option `d` is 2.0, must be a whole number or null"),
        ({"e": "x"}, None),
        ({"e": None}, None),
        ({"e": 3}, "option `e` is 3, must be a text or null"),
        ({"f": "matrix"}, None),
        ({"f": 64}, None),
        ({"f": "rows"}, 'option `f` is "rows", must be a whole number or "row" or "matrix"'),
        ({"g": 1}, None),
        ({"g": "x"}, 'option `g` is "x", must be a number'),
        ({"h": [object]}, None),
        ({"i": [1]}, None),
        ({"i": 1}, "option `i` is 1, must be a list"),
        ({"bb": 1}, "unknown option `bb`, did you mean `b`? (valid: a, b, c, d, e, f, g, h, i)"),
        ({"init": 1}, "unknown option `init`, valid: a, b, c, d, e, f, g, h, i"),
    ],
)
def test_options_are_checked(given: dict[str, Any], said: str | None) -> None:
    expected = [] if said is None else [f"stage 2: {said}"]
    assert registry.check_options(method, {"a": 1} | given, "stage 2") == expected


def test_all_problems_of_options_at_once() -> None:
    problems = registry.check_options(method, {"b": "x", "zz": 1}, "here")
    assert len(problems) == 3
    assert "here: option `a` is required" in problems


@pytest.mark.parametrize("group", registry.GROUPS)
def test_descriptions_agree_with_the_functions(group: str) -> None:
    """The oracle of what is read from source text is inspect on the imported function."""
    for name in registry.names(group):
        read, function = registry.describe(registry.find(group, name)), registry.load(group, name)
        known = registry.options(function)
        doc = inspect.getdoc(function) or ""
        assert read.doc == doc or (group == "criteria" and read.doc.startswith(f"{doc}\n\nAs a stage")), name
        assert read.summary, name
        assert [option.name for option in read.options] == list(known), name
        assert [option.default is None for option in read.options] == [p.default is p.empty for p in known.values()]
        assert read.start == registry.start(function), name
        assert Path(read.file).samefile(inspect.getsourcefile(inspect.unwrap(function)) or "")


def test_description_follows_a_reexport_and_imports_nothing(install: Any, tmp_path: Path) -> None:
    install("deep", "1.0", {"solvers": {"deep": "deep_pkg:public"}})
    package = tmp_path / "deep" / "deep_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import private as public\nraise RuntimeError('imported')")
    (package / "inner.py").write_text(
        'def private(w, s, p, init, *, k: int = 3):\n    """One. Two.\n\n    Source: A."""'
    )
    read = registry.describe(registry.find("solvers", "deep"))
    assert (read.summary, read.source, read.start, read.line) == ("One.", "A", "required", 1)
    assert read.options == (registry.Option("k", "int", "3"),)
    assert "deep_pkg" not in sys.modules


def test_description_of_what_is_not_there(install: Any) -> None:
    install("gone", "1.0", {"solvers": {"gone": "gone_mod:f", "empty": "empty_mod:f"}}, empty_mod="x = 1")
    assert "not there" in registry.describe(registry.find("solvers", "gone")).doc
    assert "no function f" in registry.describe(registry.find("solvers", "empty")).doc
