"""What the model would lose without a set of its training rows, which is no sum of scores.

    effect[q] = sum_p t_p sqrt(w_R)^T P_RR^-1 (P u)_R            (`influence.credit`)

where the rows R go together: rows that teach the same stand in for each other, so that two of them
together do more than both alone. The same for the removed rows' own mean losses.

A prediction is first-order in the adapter's outputs and may leave what can be. It is held between 0
and `MOST` times what the base itself loses, and said to be where it would lie beyond.

Its interval is that of the size: predicted over measured changes of the same kind on the models
that it was measured on (benchmarks/README.md, "Credit that is shared"), not a statement on this one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from influence.credit import credited
from influence.damping import Damping
from influence.errors import InputError
from influence.measurements import MeanLoss
from influence.path import scaled
from influence.rows import Examples
from influence.run import Run
from influence.scores import raw_parts
from influence.setting import SHARED
from influence.shared_rows import shared_losses
from influence.tokens import TokenizedExamples

#: A loss is held at this many times the base's, at most: adapters were seen at 1.2 times its loss on
#: rows that they never saw (tofu-tiny, held-out rows).
MOST = 1.5
#: Measured over predicted changes, nine in ten of them, of removed rows and of queries whose kin
#: were removed, on tofu-tiny, its mild regime and the demo (the formula was chosen on the first two).
SIZE = (0.5, 5.0)


@dataclass(frozen=True)
class Prediction:
    """One row's mean loss before, and predicted without the removed rows, nats a token.

    `low` and `high` are the ends of its interval; `beyond` is True where the prediction would lie
    beyond what can be, and is held there.
    """

    id: str
    before: float
    predicted: float
    low: float
    high: float
    beyond: bool

    @property
    def change(self) -> float:
        """Predicted minus before."""
        return self.predicted - self.before


@dataclass(frozen=True)
class Effect:
    """Predicted losses of the queries and of the removed rows themselves, if these go together."""

    queries: tuple[Prediction, ...]
    removed: tuple[Prediction, ...]
    attributes: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The lists of predictions, as JSON objects."""
        return {
            name: [vars(each) for each in getattr(self, name)] for name in ("queries", "removed")
        }


def without(
    run: Run,
    ids: Sequence[str] = (),
    queries: Examples | None = None,
    *,
    group: str | None = None,
    curvature: str | None = None,
    damping: str | Damping | None = None,
    at: str | None = None,
    explain: str = "last",
) -> Effect:
    """Predicted losses without some training rows, without training again.

    Parameters
    ----------
    run
        A finished run.
    ids, group
        The rows: training ids, all rows of a group, or both.
    queries
        Rows whose losses are predicted beside those of the removed ones.
    curvature, damping, at, explain
        As for `influence.scores.score`.

    Raises
    ------
    InputError
        For unknown or no rows, for all of them, or where credit cannot be shared.
    """
    rows = chosen_rows(run.train, ids, group)
    setting, credit = credited(run, curvature, damping, at, credit=SHARED)
    assert credit is not None
    of_queries: tuple[Prediction, ...] = ()
    if queries is not None and len(queries):
        key = (setting.name, queries.digest, explain)
        tokens = run.query_tokens(queries, explain)
        if ("parts", key) not in run.kept:
            run.kept["parts", key] = raw_parts(setting, tokens, MeanLoss())
        changes = credit.together(run.kept["parts", key], rows)
        of_queries = predictions(queries.ids, changes, *_losses(run, tokens, key))
    removed = run.tokens.select(rows)
    own = credit.on_themselves(rows, removed.counts)
    losses = _losses(run, removed, ("removed", rows.tobytes()))
    attributes = {**setting.provenance("direct"), **credit.record()}
    return Effect(of_queries, predictions(removed.ids, own, *losses), attributes)


def _losses(run: Run, tokens: TokenizedExamples, key: Hashable) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses of some rows under the adapter and under the base, `[k]` each."""
    if ("losses", key) not in run.kept:
        budget = run.token_budget
        before = shared_losses(run.model, tokens, token_budget=budget)
        with run.model.at(scaled(run.model, 0.0)):
            base = shared_losses(run.model, tokens, token_budget=budget)
        run.kept["losses", key] = before, base
    return run.kept["losses", key]


def chosen_rows(train: Examples, ids: Sequence[str], group: str | None) -> np.ndarray:
    """Positions of the rows that are named by id or group, in the training set's order.

    Raises `InputError` for names that are not there, for no row, and for every row.
    """
    wanted = set(ids)
    unknown = [id for id in ids if id not in train]
    if unknown:
        shown = ", ".join(unknown[:5])
        raise InputError(
            f"ids were given of which {len(unknown)} are no training row's ({shown}): give ids of "
            "the rows that the run was fitted on"
        )
    in_group = [group is not None and row.group == group for row in train]
    if group is not None and not any(in_group):
        raise InputError(f"group {group!r} was given, and no training row has it: give another")
    rows = np.flatnonzero([id in wanted or of for id, of in zip(train.ids, in_group, strict=True)])
    if not 0 < len(rows) < len(train):
        what = "no rows were" if len(rows) == 0 else "every training row was"
        raise InputError(f"{what} named: give ids or a group of some of the training rows")
    return rows


def predictions(
    ids: Sequence[str], changes: np.ndarray, before: np.ndarray, base: np.ndarray
) -> tuple[Prediction, ...]:
    """Losses after `changes`, held where they can be: arrays `[k]` of nats a token."""
    most = np.maximum(MOST * base, before)
    ends = [np.clip(before + factor * changes, 0, most) for factor in (1.0, *SIZE)]
    beyond = (before + changes < 0) | (before + changes > most)
    low, high = np.minimum(ends[1], ends[2]), np.maximum(ends[1], ends[2])
    columns = (before, ends[0], low, high)
    return tuple(
        Prediction(id, *numbers, beyond=bool(held))
        for id, held, *numbers in zip(
            ids, beyond, *(each.tolist() for each in columns), strict=True
        )
    )
