"""Run the tutorials and keep what they print, as the site shows it: python docs/executed.py [NAME ...]

A minute or two each on two cores, with the model that they name.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "tutorials"
TEMPORARY = re.compile(r"/\S*/tmp\w{8}/")  # where a tutorial wrote its runs


def executed(file: Path) -> None:
    """Run a notebook and write it again, with its outputs but for notices and for where this machine keeps files."""
    book = nbformat.read(file, as_version=4)
    NotebookClient(book, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    book.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.metadata = {}
            cell.outputs = [plain(output) for output in cell.outputs if output.get("name") != "stderr"]
    file.write_text(TEMPORARY.sub("", nbformat.writes(book)) + "\n", encoding="utf-8")


def plain(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An output as text: rich's tables come as HTML beside it."""
    output.get("data", {}).pop("text/html", None)
    return output


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        executed(FOLDER / f"{name}.ipynb")
        print(name)
