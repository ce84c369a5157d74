"""`sparsekit methods`: what is installed, and what one of it does."""

from typing import TYPE_CHECKING

from sparsekit import registry

if TYPE_CHECKING:
    from entrypoints import EntryPoint
    from rich.console import Console


def show_methods(name: str | None = None, *, long: bool = False) -> int:
    """Print everything installed, or one method in full; read from source text, so that nothing is imported.

    Raises:
        ValueError: nothing of this name is installed.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    found = [(group, entry) for group in registry.GROUPS for entry in registry.entries(group)]
    if name is not None:
        chosen = [pair for pair in found if registry.normal(pair[1].name) == registry.normal(name)]
        if not chosen:
            valid = [entry.name for _, entry in found]
            raise registry.UnknownName(f"unknown method `{name}`, {registry.suggest(name, valid)}")
        for group, entry in chosen:
            _show_method(console, group, entry)
        return 0
    width = max((len(entry.name) for _, entry in found), default=0)
    for group in registry.GROUPS:
        console.print(f"{group}", style="bold")
        for entry in registry.entries(group):
            read = registry.describe(entry)
            line = f"  {entry.name:<{width}}  {read.summary}"
            if not long:
                console.print(line, markup=False, soft_wrap=False, no_wrap=True, overflow="ellipsis")
                continue
            console.print(line, markup=False)
            known = ", ".join(option.name for option in read.options)
            chain = CHAIN[read.start] if group == "solvers" else ""
            notes = [chain, f"options: {known}" if known else "", registry.package(entry), read.source]
            console.print(f"  {'':<{width}}  {' | '.join(filter(None, notes))}", style="dim", markup=False)
        if not registry.entries(group):
            console.print("  none installed")
    if not long:
        console.print(
            "\n`sparsekit methods NAME` explains one; --long lists options, packages and sources", style="dim"
        )
    return 0


CHAIN = {"none": "begins a chain", "optional": "begins or continues a chain", "required": "continues a chain"}


def _show_method(console: "Console", group: str, entry: "EntryPoint") -> None:
    read = registry.describe(entry)
    chain = f", {CHAIN[read.start]}" if group == "solvers" else ""
    console.print(f"{entry.name}", style="bold", end="")
    console.print(
        f"  ({'criterion' if group == 'criteria' else group[:-1]}{chain}; {registry.package(entry)})\n\n{read.doc}\n",
        markup=False,
    )
    console.print("options:" if read.options else "options: none", style="bold")
    for option in read.options:
        kind = f": {option.type}" if option.type else ""
        default = "  (required)" if option.default is None else f" = {option.default}"
        console.print(f"  {option.name}{kind}{default}", markup=False)
    console.print(f"\n{read.file}:{read.line}", style="dim", markup=False)
