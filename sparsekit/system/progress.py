"""How far long work is, with the time left: a bar on a terminal's standard error, and nothing elsewhere."""

import sys
import threading
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
_SHOWN: list[bool] = [False]  # the last one: whether long work shows a bar now


@contextmanager
def bars(on: bool | None = None) -> Iterator[None]:
    """While this lasts, `track` shows bars, or not. on: None: where standard error is a terminal"""
    _SHOWN.append(sys.stderr.isatty() if on is None else on)
    try:
        yield
    finally:
        _SHOWN.pop()


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar that says how many of them are done and how long the rest will take.

    what: what is done to them, as in `measuring`. total: how many they are, where they do not know it themselves.
    Work inside of work shows no bar of its own, nor does what another thread does.
    """
    if not _SHOWN[-1] or threading.current_thread() is not threading.main_thread():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    total = len(items) if total is None and isinstance(items, Sized) else total
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown, bars(False):
        task = shown.add_task(what, total=total)
        for item in items:
            yield item
            shown.advance(task)
