"""The exceptions of all three packages.

::

    ToolkitError
    ├── InputError              the call was wrong: nothing was done          (exit status 2)
    │   ├── DataError           rows that cannot be read, rendered or supervised
    │   ├── AdapterError        a base or adapter that cannot be attributed
    │   └── MismatchError       a run directory opened with something it was not made from
    └── WorkError               the call was right, the work failed           (exit status 1)
        ├── NumericalError      NaN, divergence, a matrix that cannot be solved
        └── StoreError          a file that is truncated, damaged or too large for the disk

Every message says what was given, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
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
