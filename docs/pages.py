"""The pages of docs/methods: each begins with the method's own words, and ends with what was written by hand.

    python docs/pages.py          writes them again
    python docs/pages.py --check  says which are not what the methods say now, and ends with 1

What stands below the line `<!-- by hand -->` of a page is kept. Methods of plugins have pages too where they are
installed here.
"""

import re
import sys
from pathlib import Path

from sparsekit import registry

FOLDER = Path(__file__).parent / "methods"
LINE = "<!-- by hand -->\n"
FIRST = "<!-- from the method's docstring, by docs/pages.py: change it there -->\n"
GROUPS = {"solvers": "solver", "stages": "stage", "criteria": "criterion", "allocators": "allocation"}
CHAIN = {"none": "begins a chain", "optional": "begins or continues a chain", "required": "continues a chain"}
LABELS = ("Source", "Cost", "Memory", "Raises")


def pages() -> dict[Path, str]:
    """What every page should be, by its file."""
    found = {}
    rows = []
    for group, kind in GROUPS.items():
        for entry in registry.entries(group):
            package = registry.package(entry).partition(" ")[0]
            if package.startswith("sparsekit"):
                file = FOLDER / f"{entry.name}.md"
                found[file] = f"{FIRST}{_page(group, kind, entry, package)}\n{LINE}{_by_hand(file)}"
                rows.append((entry.name, kind, registry.describe(entry).summary))
    index = FOLDER / "README.md"
    table = "\n".join(f"| [`{name}`]({name}.md) | {kind} | {_cell(said)} |" for name, kind, said in rows)
    head = f"{FIRST}# Methods\n\n| | | |\n|---|---|---|\n{table}\n"
    return {index: f"{head}\n{LINE}{_by_hand(index)}"} | found


def _by_hand(file: Path) -> str:
    return file.read_text(encoding="utf-8").partition(LINE)[2] if file.is_file() else ""


def _page(group: str, kind: str, entry: registry.entrypoints.EntryPoint, package: str) -> str:
    read = registry.describe(entry)
    about = [kind] + ([CHAIN[read.start]] if group == "solvers" else [])
    about += [f"package {package}"] if package != "sparsekit-lightning" else []
    names = {registry.normal(option.name) for option in read.options}
    text = "\n".join(_markdown(paragraph, names) for paragraph in read.doc.split("\n\n"))
    rows = [
        (each.name, each.type, "required" if each.default is None else f"`{each.default}`") for each in read.options
    ]
    table = "\n".join(f"| `{name}` | {_cell(kind)} | {_cell(default)} |" for name, kind, default in rows)
    options = f"\n| option | type | default |\n|---|---|---|\n{table}\n" if table else ""
    return f"# `{entry.name}`\n\n{', '.join(about)}\n\n{text}{options}"


def _markdown(paragraph: str, names: set[str]) -> str:
    """A paragraph of a docstring: what explains options as a list, sources and costs with their words in bold."""
    found: list[str] = []
    listed = False
    for line in paragraph.split("\n"):
        key, colon, rest = line.partition(": ")
        keys = [registry.normal(each.strip()) for each in re.sub(r" \([^)]*\)", "", key).split(",")]
        if colon and line[0] != " " and all(each in names for each in keys):
            found += [""] * (bool(found) and not listed)
            found.append(f"- {', '.join(f'`{each}`' for each in keys)}: {rest}")
            listed = True
        elif colon and key in LABELS:
            found += [""] * bool(found) + [f"**{key}.** {rest}"]
            listed = False
        else:
            found.append(f"  {line.strip()}" if listed and line.startswith(" ") else line)
            listed = listed and line.startswith(" ")
    return "\n".join(found) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write the pages, or compare them."""
    old = [file for file, text in pages().items() if not file.is_file() or file.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        print("\n".join(f"{file.name} is not what the method says now: python docs/pages.py" for file in old))
        return int(bool(old))
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
