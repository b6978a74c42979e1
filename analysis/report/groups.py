"""The edited rows of a record, each with its verdict: the removed ones and the changed ones."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from analysis.report.verdicts import LEVEL, finite, forgetting, learning, with_evidence
from unlearn.record.declared import nothing
from unlearn.record.edit_record import EditRecord, MeasurementRecord, RowRecord


@dataclass(frozen=True, kw_only=True)
class Row(RowRecord):
    """One edited row as the record has it, null where not measured, with its verdict."""

    @property
    def goal(self) -> float | None:
        """The loss that `after` is held against.

        The target; for new content without one, the loss that the old content had before.
        """
        if self.action == "remove" or finite(self.target) is not None:
            return self.target
        return self.old_before

    @property
    def verdict(self) -> str:
        """The word for this row, by the rules of `analysis.report.verdicts`."""
        rule = forgetting if self.action == "remove" else learning
        return rule(self.before, self.after, self.goal)

    @property
    def order(self) -> tuple[int, float]:
        """Sort key: least forgotten, or least taken up, first."""
        before, after, goal = finite(self.before), finite(self.after), finite(self.goal)
        way = math.inf
        if after is not None and goal is not None:
            if self.action == "remove":
                way = after / goal if goal else math.inf
            elif before is not None and before > goal:
                way = (before - after) / (before - goal)
        return LEVEL.get(self.verdict, 3), way


@dataclass(frozen=True)
class Group:
    """The removed rows of an edit, or those with new content, and what is known of all of them."""

    kind: Literal["remove", "change"]
    rows: tuple[Row, ...]
    measured: tuple[MeasurementRecord, ...] = ()

    def mean(self, name: str, *with_: str) -> float | None:
        """Mean of one value over the rows where it, and those `with_` it, are known."""
        numbers = [[finite(getattr(row, key)) for key in (name, *with_)] for row in self.rows]
        values = [first for first, *rest in numbers if first is not None and None not in rest]
        return float(np.mean(values)) if values else None

    def finite_values(self, name: str) -> np.ndarray:
        """The finite values of one field, in the rows' order."""
        values = (finite(getattr(row, name)) for row in self.rows)
        return np.array([value for value in values if value is not None])

    def count(self, verdict: str) -> int:
        """How many rows have this verdict."""
        return sum(row.verdict == verdict for row in self.rows)

    @property
    def verdict(self) -> str:
        """The word for all of them, by their loss and by what the edit did not aim at."""
        return with_evidence(self.by_loss, ((each.name, each.verdict) for each in self.measured))

    @property
    def by_loss(self) -> str:
        """The word for all of them by their loss, by the rules of `analysis.report.verdicts`."""
        rule = forgetting if self.kind == "remove" else learning
        after, goal = self.mean("after", "goal"), self.mean("goal", "after")
        word = rule(self.mean("before", "after", "goal"), after, goal)
        passed = word in ("forgotten", "taken up")
        return f"{word} on average" if passed and self.count(word) < len(self.rows) else word

    @property
    def recited(self) -> int:
        """Of how many removed rows more than half of the text can still be extracted."""
        if self.kind != "remove":
            return 0
        return int(np.sum(self.finite_values("extraction_after") > 0.5))


def groups(record: EditRecord) -> tuple[Group, ...]:
    """The rows that were asked for, removed ones first, with what was measured of each."""
    measured = {row.id: row for row in record.rows}
    rows = []
    for request in record.requests:
        row = measured[request.id] if request.id in measured else nothing(RowRecord)
        rows.append(Row(**vars(replace(row, id=request.id, action=request.action))))
    removed = tuple(row for row in rows if row.action == "remove")
    changed = tuple(row for row in rows if row.action != "remove")
    found = measurements(record)
    both = (Group("remove", removed, found), Group("change", changed, found))
    return tuple(group for group in both if group.rows)


def measurements(record: EditRecord) -> tuple[MeasurementRecord, ...]:
    """What the edit did not aim at, as far as it was measured."""
    return () if record.evidence is None else record.evidence.measurements or ()
