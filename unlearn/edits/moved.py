"""The curvature after an edit, from the run's own factors.

    C' = C - sum_{gone} w_i C_i + sum_{come} w_i C_i

Which rows make the difference between the fit and the rows after the edit is said here; how a
curvature changes with them, each curvature says itself (`Curvature.updated`). lambda stays the
fit's: it is the same for the edit and for a refit that checks it. Work is that of the changed rows:
one forward and backward of each at sampled labels, less where the run keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from influence.at_point import AtPoint
from influence.batches import plan_batches
from influence.cost import Cost
from influence.curvature import Damped
from influence.curvature.base import ALWAYS
from influence.gradients import max_rows, stream_gradients, tape
from influence.sampled_gradients import sampled_gradients
from influence.tokens import TokenizedExamples
from unlearn.record.change import Change


@dataclass(frozen=True, eq=False)
class RowsOut:
    """Training rows that are gone after an edit, at `positions` [k] of the training set
    (`ChangedRows`).
    """

    point: AtPoint
    positions: np.ndarray
    cost: Cost

    @property
    def tokens(self) -> TokenizedExamples:
        """The rows' tokens."""
        return self.point.run.tokens.select(self.positions)

    @property
    def weights(self) -> np.ndarray:
        """Their weights in the objective, `[k]`."""
        return self.point.run.weights[self.positions]

    def sampled(self, draws: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """`(rows, features)`: read where the run keeps them, else computed."""
        if self.point.run.specification.reads_rows == ALWAYS:
            # as many to a row as the fit drew
            for place, features in enumerate(self.point.kept_rows_of(self.positions)):
                yield np.full(len(features), place), features
        else:
            yield from sampled_rows(self.point, self.tokens, draws, self.cost)

    def ran(self, rows: int) -> None:
        """Count rows that a product runs."""
        self.cost.gradients += rows


@dataclass(frozen=True, eq=False)
class RowsIn:
    """New contents that are training rows after an edit (`ChangedRows`)."""

    point: AtPoint
    tokens: TokenizedExamples
    weights: np.ndarray
    cost: Cost

    @property
    def positions(self) -> np.ndarray:
        """None of the training set."""
        return np.zeros(0, dtype=int)

    def sampled(self, draws: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """`(rows, features)`, computed."""
        return sampled_rows(self.point, self.tokens, draws, self.cost)

    def ran(self, rows: int) -> None:
        """Count rows that a product runs."""
        self.cost.gradients += rows


def moved(point: AtPoint, change: Change, cost: Cost) -> tuple[RowsOut, RowsIn]:
    """The rows that make the difference between a fit and the rows after an edit, all earlier
    edits included.
    """
    version = change.version
    changed = set(version.changed) | {request.before.id for request in change.requests}
    after, tokens, weights = change.after, change.tokens_after, change.weights_after
    new = [place for place, id in enumerate(after.ids) if id in changed]
    position = {version.rows.ids[i]: version.positions[i] for i in range(len(version.rows))}
    stay = np.array([position[id] for id in after.ids if id not in changed], dtype=int)
    gone = np.setdiff1d(np.arange(len(version.run.train)), stay)
    come = RowsIn(point, tokens.select(new), weights[new], cost)
    return RowsOut(point, gone, cost), come


def after(point: AtPoint, operator: Damped, change: Change, cost: Cost) -> Damped:
    """The damped curvature of a run's point after a change, its lambda kept."""
    gone, come = moved(point, change, cost)
    return replace(operator, curvature=operator.curvature.updated(gone, come))


def sampled_rows(
    point: AtPoint, tokens: TokenizedExamples, draws: int, cost: Cost
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield `(rows [b], features [b, P])` of gradients at labels drawn as `fit` draws them, draw
    after draw.

    With no draws (the empirical Fisher) at the data's own labels.
    """
    if len(tokens) == 0:
        return
    run, model = point.run, point.model
    budget, seed = run.token_budget, run.manifest.seed
    cost.gradients += len(tokens) * max(1, draws)
    if draws == 0:
        with model.at(point.place.theta):
            for rows, gradients, _ in stream_gradients(model, tokens, token_budget=budget):
                yield rows, point.geometry.features(gradients)
        return
    with model.at(point.place.theta), tape(model) as recorder:
        for rows in plan_batches(tokens, budget, max_rows=max_rows(model.space)):
            for some, gradients in sampled_gradients(recorder, tokens, rows, seed, draws):
                yield some, point.geometry.features(gradients)
