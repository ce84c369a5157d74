"""Tables of the benchmarks: for a terminal, or as Markdown for a results file."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 250  # where there is no terminal whose width would matter


def show(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", markdown: bool = False) -> None:
    """Print a table; every column but the first is aligned to the right."""
    if markdown:
        head = [f"{title}\n"] if title else []
        lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
        print("\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)]))
        return
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console = console if console.is_terminal else Console(width=FILE_WIDTH)
    if title:
        console.print(title, markup=False, highlight=False)
    console.print(table)
