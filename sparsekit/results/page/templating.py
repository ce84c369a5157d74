"""HTML comes from the templates beside this file (Jinja2): whatever a report holds is escaped by them."""

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

PICTURE = "data:image/png;base64,"  # how a sample that is a picture begins


@cache
def _templates() -> "Environment":
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("sparsekit.results.page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["share"] = lambda part: f"{min(max(part, 0), 1):.2%}"
    made.globals["picture"] = PICTURE
    return made


def chart(name: str, **values: Any) -> str:
    """A macro of charts.html, as HTML that other templates do not escape again."""
    return _filled("charts.html", name, values)


def section(name: str, **values: Any) -> str:
    """A macro of sections.html, as HTML that other templates do not escape again."""
    return _filled("sections.html", name, values)


def _filled(file: str, name: str, values: dict[str, Any]) -> str:
    """A macro of a template file, filled."""
    made: str = getattr(_templates().get_template(file).module, name)(**values)
    return made


def document(title: str, under: str, headline: str, sections: dict[str, str]) -> str:
    """A page of sections; those without HTML are left out. under, headline: below the title"""
    shown = {name: (f"s{number}", html) for number, (name, html) in enumerate(sections.items()) if html}
    return (
        _templates().get_template("document.html").render(title=title, under=under, headline=headline, sections=shown)
    )


def joined(*parts: str) -> str:
    """Pieces of HTML, and texts that are not HTML yet, one after the other."""
    from markupsafe import Markup

    return Markup("").join(parts)
