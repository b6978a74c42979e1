"""Progress on standard error: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from influence.messages import one_line, printable

T = TypeVar("T")

#: Seconds between plain lines when standard error is not a terminal.
INTERVAL = 10.0
#: Share of the first pass's work after which the time that the whole is going to take is told.
TOLD_AFTER = 0.1
#: Parts that a bar is drawn in.
BAR = 100_000
#: Columns of a terminal below which there is no room for a bar.
NARROW = 64


def track(
    items: Iterable[T],
    label: str,
    *,
    total: int | None = None,
    done: int = 0,
    counts: Sequence[int] | None = None,
    sizes: Sequence[float] | None = None,
    passes: float = 0.0,
) -> Iterator[T]:
    """Yield `items` and show how far along they are.

    Parameters
    ----------
    items
        What is left to do.
    label
        What is counted, as in `training rows`.
    total, done
        All items, and those that were done before, by a run that is resumed. `total` counts both.
    counts
        How many of what `label` names each item stands for, such as the rows of each batch. All
        items, those that are done first. None: one each.
    sizes
        The work of each item in any unit, such as its tokens, in the same order: the time that is
        left is told by it. None: as `counts`.
    passes
        Passes like this one that come after it. Once a tenth of this pass is done, the time left
        for all of them is said, where that is more than `INTERVAL` seconds. 0: nothing is said.
    """
    if counts is not None:
        total = len(counts)
    elif total is None:
        total = (len(items) if isinstance(items, Sized) else 0) + done
    counted = [1] * total if counts is None else counts
    way = Way.of(counted, counted if sizes is None else sizes, done)
    if sys.stderr.isatty() and speaks():
        yield from _bar(items, label, way, passes)
        return
    start, due, told = time.monotonic(), NowAndThen(), passes == 0
    for item in items:
        yield item
        way.step()
        if not told:
            told = _tell_all(way, start, passes)
        if due():
            seconds = way.seconds_left(time.monotonic() - start)
            say(f"{label}: {way.shown}, about {seconds:.0f} s left")


@dataclass
class Way:
    """How far along items are: what is counted, and the work, after each item of `[0 ... total]`.

    `first` items were done before and `at` are done now.
    """

    counted: Sequence[int]
    work: Sequence[float]
    first: int
    at: int

    @classmethod
    def of(cls, counts: Sequence[int], sizes: Sequence[float], done: int) -> Way:
        """Of what each item counts and works."""
        return cls(
            list(accumulate(counts, initial=0)), list(accumulate(sizes, initial=0.0)), done, done
        )

    def step(self) -> None:
        """One item is done; one more than were announced counts as the last."""
        self.at = min(self.at + 1, len(self.work) - 1)

    @property
    def shown(self) -> str:
        """What is done of what there is, as in `30/195`."""
        return f"{self.counted[self.at]}/{self.counted[-1]}"

    @property
    def share(self) -> float:
        """Share of all work that is done, 0 to 1."""
        return self.work[self.at] / self.work[-1] if self.work[-1] else 1.0

    def seconds_left(self, elapsed: float, passes: float = 0.0) -> float:
        """Seconds that the rest and `passes` more take, after `elapsed` seconds since `first`."""
        here = self.work[self.at] - self.work[self.first]
        left = self.work[-1] * (1 + passes) - self.work[self.at]
        return elapsed / here * left if here else 0.0


def _tell_all(way: Way, start: float, passes: float) -> bool:
    """Say what is left in all, once enough of this one is done. Whether that is over."""
    if way.share < TOLD_AFTER:
        return False
    if way.share < 1 and (seconds := way.seconds_left(time.monotonic() - start, passes)) > INTERVAL:
        say(f"in all about {duration(seconds)} left")
    return True


def duration(seconds: float) -> str:
    """A time for people: `45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 9.95 else f"{seconds:.1f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


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


def _bar(items: Iterable[T], label: str, way: Way, passes: float) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    narrow = console.width < NARROW
    if narrow:  # the count and the time are never cut, what is counted may be
        label = one_line(label, max(console.width - 2 * len(str(way.counted[-1])) - 12, 4))
    columns = (
        TextColumn("{task.description}"),
        *([] if narrow else [BarColumn()]),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    start, told = time.monotonic(), passes == 0
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=BAR, completed=int(BAR * way.share), shown=way.shown)
        for item in items:
            yield item
            way.step()
            progress.update(task, completed=int(BAR * way.share), shown=way.shown)
            if not told:
                told = _tell_all(way, start, passes)
