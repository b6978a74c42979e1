"""Progress on standard error: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from influence.messages import printable

T = TypeVar("T")

#: Seconds between plain lines when standard error is not a terminal.
INTERVAL = 10.0


def track(
    items: Iterable[T], label: str, *, total: int | None = None, done: int = 0
) -> Iterator[T]:
    """Yield `items` and show how far along they are.

    `done` items were done before, by a run that is resumed. `total` counts them too.
    """
    if total is None:
        total = (len(items) if isinstance(items, Sized) else 0) + done
    if sys.stderr.isatty() and speaks():
        yield from _bar(items, label, total, done)
        return
    start, due = time.monotonic(), NowAndThen()
    count = done
    for item in items:
        yield item
        count += 1
        if due():
            seconds = (time.monotonic() - start) / (count - done) * (total - count)
            say(f"{label}: {count}/{total}, about {seconds:.0f} s left")


def speaks() -> bool:
    """Whether this process tells what is going on: of several at one piece of work the first."""
    several = sys.modules.get("torch.distributed")  # not loaded: one process
    if several is None or not (several.is_available() and several.is_initialized()):
        return True
    return several.get_rank() == 0


def say(message: str) -> None:
    """One plain line on standard error. Names in it may be those of files of others.

    Of several processes the first one says it.
    """
    if speaks():
        print(printable(message), file=sys.stderr, flush=True)


class NowAndThen:
    """A clock that is due every `INTERVAL` seconds, for work that must not run in silence."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> bool:
        """Whether the interval is over. If it is, the next one begins."""
        if time.monotonic() - self._last <= INTERVAL:
            return False
        self._last = time.monotonic()
        return True


def _bar(items: Iterable[T], label: str, total: int, done: int) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)
