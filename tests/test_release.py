"""What is released: a wheel and an archive of the source, built and opened in an environment of its own."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAID = """
from importlib.metadata import entry_points, requires
from importlib.util import find_spec
from pathlib import Path
found = Path(find_spec("sparsekit").origin).parent
assert "site-packages" in str(found), found
assert (found / "model" / "__init__.pyi").is_file() and (found / "py.typed").is_file()
for name in ("solvers", "stages", "criteria", "allocators", "sources", "metrics"):
    assert entry_points(group=f"sparsekit.{name}"), name
assert any(line.startswith("torch") for line in requires("sparsekit-lightning"))
"""


@pytest.mark.long
def test_a_wheel_and_a_source_archive(tmp_path: Path) -> None:
    """Both are built without a network; the wheel is installed where nothing else is, and has all it needs of us."""
    clone = tmp_path / "clone"
    try:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    built = "import setuptools.build_meta as b; print(b.build_sdist('dist')); print(b.build_wheel('dist'))"
    subprocess.run([sys.executable, "-c", built], cwd=clone, check=True, capture_output=True)
    [wheel], [archive] = (list((clone / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    assert archive.stat().st_size > 100_000
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "plugins/"))]
    venv.create(tmp_path / "bare", with_pip=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    subprocess.run([python, "-c", SAID], check=True, cwd=tmp_path)
