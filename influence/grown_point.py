"""The fit of one point of a run that is grown from another (`influence.growing`).

Rows that stay are copied. The pass is over those that come and, where they are part of a sum, those
that go: each in sums of their own, so that weights stay positive. At its end

    sums = factor x sums before + sums of those that came - sums of those that went

is what a pass over all rows would have left. Killed and resumed it goes on as every pass does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.at_point import AtPoint
from influence.curvature import Accumulator, Specification
from influence.curvature.base import Arrays, SampledRows
from influence.fitted_point import LOSSES, PointFit
from influence.geometry import Geometry
from influence.gradients import Tape
from influence.growing import Growth
from influence.optimizer_state import OptimizerState
from influence.path_time import losses_of_pass
from influence.row_storage import Storage
from influence.store import RowFiles, copy_rows, open_rows
from influence.tokens import TokenizedExamples

#: Weights that differ by less, relative, are the same but for rounding.
ALIKE = 1e-12


class Kept(Accumulator):
    """A curvature that stays as it is: no sums."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    def finish(self, rows: SampledRows) -> dict[str, Tensor]:
        """What the run before kept."""
        return dict(self.arrays)


class GrownFit(PointFit):
    """The fit of one point: the pass over the rows that come and go.

    Its rows are the run's, and after them those that go.
    """

    def __init__(
        self,
        growth: Growth,
        point: AtPoint,
        curvature: Specification,
        storage: Storage,
        state: OptimizerState | None,
    ) -> None:
        self.growth = growth
        self.before = growth.before.points[point.number or 0]
        self.arrays = growth.arrays(point.number or 0)
        #: sums of the rows that go; None where nothing is summed
        self.gone: Accumulator | None = None
        super().__init__(point, curvature, storage, state)

    def rows(self) -> tuple[TokenizedExamples, np.ndarray]:
        """The run's rows and those that go, with the weights that they have in the sums before."""
        if self.growth.keeps_curvature:
            self.draws = 0
        run, before, removed = self.run, self.growth.before, self.growth.removed
        tokens = TokenizedExamples.joined([run.tokens, before.tokens.select(removed)])
        return tokens, np.concatenate([run.weights, self.growth.factor * before.weights[removed]])

    def stores_rows(self, storage: Storage) -> bool:
        """Whether rows at sampled labels are kept, as they were."""
        return self.growth.rows_stored and self.keep_rows and not self.growth.keeps_curvature

    def coordinates(self, state: OptimizerState | None) -> Geometry:
        """The geometry of the run before."""
        return self.before.geometry

    def begin(self) -> Accumulator:
        """Empty sums of the rows that come, and of those that go."""
        if self.growth.keeps_curvature:
            return Kept(self.arrays)
        rows = self.growth.rows_stored
        come = self.curvature.grow(self.point, self.arrays, rows=rows)
        if len(self.growth.removed) and (come.per_leaf or come.per_row):
            self.gone = self.curvature.grow(self.point, self.arrays, rows=rows)
        return come

    def planned(self, limited: bool) -> tuple[list[np.ndarray], int]:
        """Batches of the rows that come, and of those that go where they are part of a sum."""
        n = len(self.run.tokens)
        batches = self.plan(self.growth.added, limited)
        if self.gone is not None:
            batches += self.plan(np.arange(n, len(self.tokens)), limited)
        return batches, len(batches) if self.draws else 0

    def lay_out(self) -> bool:
        """Create the row files, and copy the rows that stay into them.

        The marks of what is done are copied last, so that a killed copy is made again.
        """
        created = super().lay_out()
        kept, places = self.growth.kept, self.growth.places
        stored = self.store_gradients and not created
        if stored and open_rows(self.point.file("gradients"), "done")[kept].all():
            return created
        files = [("rows", "rows", max(1, self.draws))] * self.store_rows
        files += [("gradients", "gradients", 1), ("gradients", "done", 1)] * self.store_gradients
        for file, name, each in files:
            copy_rows(self.before.file(file), self.point.file(file), name, places, kept, each)
        return created

    def run_batch(
        self,
        recorder: Tape,
        rows: np.ndarray,
        files: RowFiles | None = None,
        draws: int | None = None,
    ) -> None:
        """One batch into the sums of its side, and the files if it comes."""
        if rows[0] < len(self.run.tokens):
            super().run_batch(recorder, rows, files, draws)
            return
        come, gone = self.accumulator, self.gone
        assert gone is not None
        self.accumulator = gone
        try:
            super().run_batch(recorder, rows, None, draws)
        finally:
            self.accumulator = come

    def relative_weights(self, rows: np.ndarray) -> Tensor | None:
        """`w_i` relative to the largest of the run's rows, `[b]`, or None where all are equal."""
        relative = self.weights / self.run.weights.max()
        if np.abs(relative - 1).max() < ALIKE:
            return None
        return torch.from_numpy(relative[rows]).to(self.model.device)

    def sums(self) -> dict[str, Tensor]:
        """The sums of both sides, and the losses."""
        sums = {LOSSES: self.losses}
        sums |= {f"come/{name}": tensor for name, tensor in self.accumulator.sums().items()}
        if self.gone is not None:
            sums |= {f"gone/{name}": tensor for name, tensor in self.gone.sums().items()}
        return sums

    def summed(self) -> Accumulator:
        """The accumulator with the sums of all rows, those that stay from the run before."""
        distributed.add_up(self.sums())
        come = self.accumulator
        if self.gone is not None:
            taken = self.gone.sums()
            for name, tensor in come.sums().items():
                tensor -= taken[name]
            self.gone = None
        come.restore(self.arrays, self.growth.factor)
        return come

    def known_losses(self) -> Tensor | None:
        """The losses `l_i` [n] of all rows: those of the rows that stay as they were."""
        losses, before = super().known_losses(), losses_of_pass(self.before)
        if losses is None or before is None:
            return None
        losses = losses[: len(self.run.tokens)].clone()
        losses[self.growth.kept] = torch.from_numpy(before[self.growth.places])
        return losses
