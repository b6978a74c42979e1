"""The exceptions of all three packages.

::

    ToolkitError
    ├── InputError              the call was wrong: nothing was done          (exit status 2)
    │   ├── DataError           rows that cannot be read, rendered or supervised
    │   ├── AdapterError        a base or adapter that cannot be attributed
    │   └── MismatchError       a run directory opened with something it was not made from
    └── WorkError               the call was right, the work failed           (exit status 1)
        ├── NumericalError      NaN, divergence, a matrix that cannot be solved
        ├── StoreError          a file that is truncated, damaged or too large for the disk
        ├── ShortOfMemory       not even one row fits
        └── ProcessError        another process of the same call ended

Every message says what was given, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class ToolkitError(Exception):
    """Base of every error this toolkit raises on purpose."""

    exit_status = 1


class InputError(ToolkitError):
    """The call was wrong, so nothing was done and nothing was written."""

    exit_status = 2


@dataclass(frozen=True)
class BadRow:
    """One unusable row: its 1-based number in the file, its id if it has one, and the reason.

    Where rows are of several files, the number is `FILE:NUMBER`.
    """

    number: int | str
    id: str | None
    reason: str

    def __str__(self) -> str:
        """`row 7 (id 'a17'): reason`."""
        name = f" (id {self.id!r})" if self.id is not None else ""
        return f"row {self.number}{name}: {self.reason}"


class UnusableRow(Exception):
    """The reason why one row cannot be used.

    Raised and caught inside `rows` and `tokens`, where the reasons of all rows are gathered into
    one `DataError`. No caller of the toolkit sees it.
    """


class DataError(InputError):
    """Rows that cannot be used, all of them at once in `.rows`."""

    def __init__(self, message: str, rows: Sequence[BadRow] = ()) -> None:
        self.rows = tuple(rows)
        shown = [f"  {row}" for row in self.rows[:50]]
        if len(self.rows) > 50:
            shown.append(f"  ... and {len(self.rows) - 50} more")
        super().__init__("\n".join([message, *shown]))


class AdapterError(InputError):
    """A base or adapter whose influence cannot be computed, with what is possible instead."""


class MismatchError(InputError):
    """A run directory, or a file in it, that was made from something else. Names what differs."""


class WorkError(ToolkitError):
    """The call was right but the work could not be completed."""


class NumericalError(WorkError):
    """NaN or infinite values, a divergent iteration, or a matrix that cannot be factorised."""


class StoreError(WorkError):
    """A stored file that is truncated or damaged, or a disk that is too small."""


class ShortOfMemory(WorkError, MemoryError):
    """Memory in which not even one row fits."""


class ProcessError(WorkError):
    """Another process of the same call ended, so that this one cannot go on."""


def refuse(message: str, reasons: Sequence[str]) -> None:
    """Raise an `AdapterError` that lists the reasons, unless there are none."""
    if reasons:
        shown = [f"  - {reason}" for reason in reasons[:10]]
        if len(reasons) > 10:
            shown.append(f"  - ... and {len(reasons) - 10} more")
        raise AdapterError("\n".join([f"{message}:", *shown]))


#: What torch says of memory that is too small in errors of no class of their own.
SHORT = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


@contextmanager
def libraries_named(message: str, advice: str) -> Iterator[None]:
    """Make an `AdapterError` of whatever transformers, PEFT or bitsandbytes raise in the block.

    Its first line is `message` with the first line of what was raised, its second line `advice`;
    the whole is its cause. This toolkit's own errors, and memory that is too small, pass through.
    """
    try:
        yield
    except (ToolkitError, MemoryError):
        raise
    except Exception as error:
        if memory_is_short(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = lines[0] if lines else "no reason given"
        if len(first) > 400:
            first = f"{first[:400]} ..."
        raise AdapterError(f"{message}: {type(error).__name__}: {first}\n{advice}") from error


def memory_is_short(error: BaseException) -> bool:
    """Whether an error says that the memory of this machine or of its accelerator is too small."""
    return (
        isinstance(error, MemoryError)
        or "OutOfMemory" in type(error).__name__
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in SHORT))
    )
