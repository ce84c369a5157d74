"""What mkdocs asks while it builds the site: the first page is the README, links out of docs/ become plain text."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text as the site has it."""
    here = Path(page.file.abs_src_path).parent
    if page.file.src_uri == "index.md":
        markdown = (ROOT / "README.md").read_text(encoding="utf-8")
        here = ROOT

    def rewritten(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        there = (here / target).resolve()
        docs = ROOT / "docs"
        if there.is_relative_to(docs) and there != docs:
            name = there.relative_to(docs)
            name = name / "README.md" if there.is_dir() else name
            up = "../" * (len(Path(page.file.src_uri).parts) - 1)
            return f"[{text}]({up}{name.as_posix()}{anchor})"
        if there == ROOT / "README.md":
            return f"[{text}](index.md{anchor})"
        return text if "`" in text else f"`{text}`"

    parts = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)
