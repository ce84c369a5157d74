"""Pages: what a method says of itself stands there as it says it now, and every link leads somewhere."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparsekit import registry

ROOT = Path(__file__).parents[1]
OTHERS = {".venv", ".clients", "node_modules"}
TEXTS = sorted(path for path in ROOT.rglob("*.md") if not OTHERS & set(path.relative_to(ROOT).parts))
PLUGINS = sorted(path.name for path in (ROOT / "plugins").iterdir() if path.name.startswith("sparsekit-"))


def _pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pages()


def test_every_page_has_the_methods_own_words():
    offered = {
        registry.package(entry).partition(" ")[0] for group in registry.GROUPS for entry in registry.entries(group)
    }
    if missing := set(PLUGINS) - offered:
        pytest.skip(f"{min(missing)} is not installed, so its methods cannot be asked")
    for file, text in _pages().items():
        assert file.is_file() and file.read_text(encoding="utf-8") == text, f"{file.name}: run python docs/pages.py"
        assert len(text.partition("<!-- by hand -->")[2].split()) > 5, f"{file.name} has nothing but the docstring"


def test_no_page_is_left_of_a_method_that_is_gone():
    known = {file.name for file in _pages()}
    for file in (ROOT / "docs" / "methods").glob("*.md"):
        package = re.search(r"^[a-z]+.*, package (\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert file.name in known or (package and package[1] in PLUGINS), file.name


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_leads_somewhere(file):
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        there = (file.parent / name).resolve() if name else file
        assert there.exists(), f"{target} is not there"
        if anchor and there.suffix == ".md":
            assert anchor in _anchors(there.read_text(encoding="utf-8")), f"{target}: no such heading"


def _anchors(text):
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.long
def test_the_site_builds_with_every_link(tmp_path):
    """`make docs`, where mkdocs is installed: a link that leads nowhere is an error."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs")
    pytest.importorskip("mkdocs_jupyter")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr

    assert "Prune a model of transformers" in (tmp_path / "api.html").read_text()
