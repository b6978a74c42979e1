"""What a request for scores asks: one measurement of each query, or of whole sets of queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence.at_point import AtPoint, memory_chunks
from influence.errors import InputError
from influence.features import StoredFeatures
from influence.measurements import Contrast, Measurement, SumLoss
from influence.rows import Examples
from influence.tokens import TokenizedExamples

#: Makes gradients `[Q, P]`, or features `[Q, K]`, of a measurement of queries.
Made = Callable[[TokenizedExamples, Measurement], Tensor]

#: How queries are taken together: the mean or the sum of all, or the mean of each group.
AGGREGATES = ("mean", "sum", "group")


@dataclass(frozen=True)
class Asked:
    """The queries of one request as tokens, what is measured of them, and what they are contrasted
    with.

    `ids` [Q] name what is asked, `members` [Q] the positions of the queries that each is made of;
    `summed` adds their measurements up, else it is their mean.
    """

    tokens: TokenizedExamples
    measurement: Measurement | Contrast
    ids: Sequence[str]
    members: Sequence[np.ndarray]
    summed: bool = False
    against: TokenizedExamples | None = None

    @classmethod
    def of(
        cls,
        queries: Examples,
        tokens: TokenizedExamples,
        measurement: Measurement | Contrast,
        aggregate: str | None = None,
        against: TokenizedExamples | None = None,
    ) -> Asked:
        """One measurement of each query, or with `aggregate` of all or of each group.

        Raises `InputError` for queries without a group where groups are asked for.
        """
        everyone = np.arange(len(queries))
        if aggregate is None:
            ids, members = queries.ids, [everyone[k : k + 1] for k in everyone]
        elif aggregate in ("mean", "sum"):
            ids, members = [aggregate], [everyone]
        elif aggregate == "group":
            groups = [row.group for row in queries]
            if nameless := [row.id for row in queries if row.group is None]:
                raise InputError(
                    f"queries were to be taken together by their group, and {len(nameless)} of "
                    f"{len(queries)} have none ({', '.join(nameless[:3])}): give them a group, or "
                    "aggregate mean"
                )
            ids = list(dict.fromkeys(str(group) for group in groups))
            members = [np.flatnonzero([str(each) == id for each in groups]) for id in ids]
        else:
            raise InputError(
                f"aggregate {aggregate!r} was given; expected {', '.join(AGGREGATES)} or none"
            )
        return cls(tokens, measurement, ids, members, aggregate == "sum", against)

    @classmethod
    def each(cls, tokens: TokenizedExamples, measurement: Measurement) -> Asked:
        """One measurement of each row of `tokens`."""
        every = np.arange(len(tokens))
        return cls(tokens, measurement, tokens.ids, [every[k : k + 1] for k in every])

    def __len__(self) -> int:
        return len(self.ids)

    def gradients(self, point: AtPoint, rows: np.ndarray) -> Tensor:
        """Gradients at a point of what `rows` [K] of the request ask, `[K, P]`."""
        return self._gathered(point.query_gradients, point, rows)

    def features(self, stored: StoredFeatures, rows: np.ndarray) -> Tensor:
        """The same in the coordinates that a point's rows are kept in."""
        return self._gathered(stored.of_measurement, stored.point, rows)

    def _gathered(self, made: Made, point: AtPoint, rows: np.ndarray) -> Tensor:
        """What is asked, of gradients as they are `made`."""
        if all(len(self.members[row]) == 1 for row in rows):
            return self._of_each(made, np.concatenate([self.members[row] for row in rows]))
        found = []
        for row in rows:
            members = self.members[row]
            parts = [members[part] for part in memory_chunks(point.run, len(members))]
            total = torch.stack([self._of_each(made, part).sum(0) for part in parts]).sum(0)
            found.append(total if self.summed else total / len(members))
        return torch.stack(found)

    def _of_each(self, made: Made, queries: np.ndarray) -> Tensor:
        """Gradients of the measurement of single queries, `[K, P]`."""
        tokens = self.tokens.select(queries)
        if isinstance(self.measurement, Contrast):
            assert self.against is not None
            found = made(tokens, SumLoss())
            return found - made(self.against.select(queries), SumLoss())
        return made(tokens, self.measurement)
