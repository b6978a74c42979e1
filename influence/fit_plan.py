"""What a fit is going to do, counted before it starts: passes over the rows, bytes on disk.

A *pass* is a forward with its backwards over all training rows. What is stored decides how many
there are: a fit whose rows' gradients are not stored computes them again for EK-FAC's second look,
and twice for the rows' similarities; rows in few bytes are made in a pass of their own. A curvature
of some of the rows runs these in batches of their own, before all rows are stored.

n rows, P LoRA parameters.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from influence.adapter import AdaptedModel, ParamSpace
from influence.at_point import PART_BYTES
from influence.batches import plan_batches
from influence.curvature.base import NEVER, ONCE, Specification
from influence.errors import InputError
from influence.features import bytes_of_row
from influence.gradients import max_rows
from influence.kernel import WHOLE_ROWS, bytes_of_files, landmarks_for
from influence.manifest import ROW_BYTES, STORE_BEFORE
from influence.memory import block_bytes
from influence.path_time import LOSS_ROWS, ROWS_OF_ALL
from influence.row_storage import Storage, keeps_for_good, keeps_sampled
from influence.tokens import TokenizedExamples

#: How the rows' gradients are kept: whole, in few bytes, or not at all; or the first that fits.
AUTO, FULL, FEATURES, NONE = STORE = ("auto", "full", "features", "none")
#: Bytes of a file's own around its arrays, as HDF5 writes it.
FILE_BYTES = 6144
#: Shares of a forward, and of a backward, in a forward with one backward.
FORWARD, BACKWARD = 1 / 3, 2 / 3


def store_bytes(
    kind: str, n: int, P: int, leaves: int, *, itemsize: int = 4, row_bytes: int = ROW_BYTES
) -> int:
    """Bytes that the rows take at one point of the path, the most of them that they may.

    Parameters
    ----------
    kind
        `full`: n x P numbers of `itemsize` bytes. `features`: codes of at most `row_bytes` a row,
        and what lies beside them (`influence.features`). `none`: 0.
    n, P, leaves
        Rows, LoRA parameters, and LoRA matrices.
    """
    if kind == FULL:
        return n * P * itemsize
    if kind == FEATURES:
        return n * bytes_of_row(P, leaves, row_bytes)
    if kind == NONE:
        return 0
    raise InputError(f"store {kind!r} was given; expected {FULL}, {FEATURES} or {NONE}")


def chosen_store(
    rule: str,
    n: int,
    space: ParamSpace,
    points: int,
    budget: float,
    *,
    itemsize: int = 4,
    row_bytes: int = ROW_BYTES,
    whitens: bool = True,
) -> str:
    """The kind of store that a rule means: the only place where `auto` is decided.

    `auto` is the first of `full` and `features` whose bytes of all points are within the `budget`,
    and `none` where neither is. `features` need a curvature that `whitens`.
    """
    if rule != AUTO:
        return STORE_BEFORE.get(rule, rule)
    for kind in (FULL, FEATURES):
        size = store_bytes(
            kind, n, space.size, len(space.leaves), itemsize=itemsize, row_bytes=row_bytes
        )
        if size * points <= budget and (whitens or kind == FULL):
            return kind
    return NONE


@dataclass(frozen=True)
class FitPlan:
    """What a fit reads, runs and writes.

    Attributes
    ----------
    rows, tokens, parameters, leaves, points : int
        Training rows, their tokens without padding, LoRA parameters and matrices, points.
    draws : int
        Label draws a row.
    itemsize : int
        Bytes of a gradient's number.
    store : str
        `full`, `features` or `none`.
    sampled : bool
        Whether gradients at sampled labels are on disk, for a pass or for good (`keeps_rows`).
    keeps_rows : bool
        Whether the curvature keeps them for good.
    looks_again : bool
        Whether gradients at sampled labels are needed a second time.
    shares_credit : bool
        Whether the rows' similarities are made.
    closed : bool
        Whether the curvature has an inverse of its own.
    whitens : bool
        Whether rows can be kept in few bytes.
    sample : int
        Rows that the curvature is formed of.
    row_bytes : int
        Bytes of a row's codes as features.
    at_adapter : bool
        Whether the adapter itself is one of the points.
    landmarks : int
        Rows that stand for all in the rows' similarities; 0: none need to.
    """

    rows: int
    tokens: int
    parameters: int
    leaves: int
    points: int
    draws: int
    itemsize: int
    store: str
    sampled: bool
    keeps_rows: bool
    looks_again: bool
    shares_credit: bool
    closed: bool
    whitens: bool
    sample: int
    row_bytes: int = ROW_BYTES
    at_adapter: bool = False
    landmarks: int = 0

    @classmethod
    def of(
        cls,
        model: AdaptedModel,
        tokens: TokenizedExamples,
        curvature: Specification,
        *,
        points: int,
        store: str,
        disk_budget: float,
        row_bytes: int = ROW_BYTES,
        seed: int = 0,
        growable: bool = False,
        at_adapter: bool = False,
    ) -> FitPlan:
        """The plan of a fit with these options, which are those of `influence.fit`."""
        space, itemsize = model.space, model.dtype.itemsize
        n, draws = len(tokens), curvature.draws
        point_bytes = store_bytes(FULL, n, space.size, len(space.leaves), itemsize=itemsize)
        kind = chosen_store(
            store,
            n,
            space,
            points,
            disk_budget,
            itemsize=itemsize,
            row_bytes=row_bytes,
            whitens=curvature.whitens,
        )
        if curvature.reads_rows != NEVER and draws == 0:
            kind = FULL  # the gradients at the data's labels are the rows that the curvature keeps
        left = disk_budget - point_bytes * (points - 1) if kind == FULL else disk_budget
        rule = STORE_BEFORE.get(store, store)
        storage = Storage(kind == FULL, rule, left, growable)
        sampled = keeps_sampled(curvature, storage, point_bytes)
        sample = len(curvature.sample(n, seed))
        at_once = max(1, block_bytes(PART_BYTES) // (space.size * itemsize))
        closed = not curvature.undamped and not curvature.matrix_free
        total = int(tokens.lengths.sum())
        return cls(
            rows=n,
            tokens=total,
            parameters=space.size,
            leaves=len(space.leaves),
            points=points,
            at_adapter=at_adapter,
            draws=draws,
            itemsize=itemsize,
            store=kind,
            sampled=sampled and sample == n,
            keeps_rows=sampled and sample == n and keeps_for_good(curvature, storage),
            looks_again=curvature.reads_rows == ONCE,
            shares_credit=closed and (kind != NONE or n <= at_once),
            closed=closed,
            whitens=curvature.whitens,
            sample=sample,
            row_bytes=row_bytes,
            landmarks=landmarks_for(
                model, rows=n, tokens=total, points=points, disk_budget=disk_budget
            ),
        )

    def batches(
        self, model: AdaptedModel, tokens: TokenizedExamples, token_budget: int
    ) -> list[np.ndarray]:
        """The batches in which labels are drawn, of the rows `tokens` that they are drawn of, or in
        which gradients are stored where none are: limited in rows too where gradients are formed.
        """
        limited = self.store == FULL or self.sampled or not self.closed
        most = max_rows(model.space) if limited else None
        return plan_batches(tokens, token_budget, max_rows=most)

    # ---- passes

    @property
    def stored(self) -> bool:
        """Whether the rows are on disk, whole or in few bytes."""
        return self.store != NONE

    @property
    def sample_share(self) -> float:
        """Share of the rows that the curvature is formed of."""
        return self.sample / self.rows

    @property
    def apart(self) -> bool:
        """Whether rows of the curvature run in batches of their own."""
        return self.sample < self.rows

    @property
    def runs_first(self) -> bool:
        """Whether there is a first pass: label draws, or gradients to store."""
        return self.draws > 0 or self.store == FULL

    @property
    def runs_again(self) -> bool:
        """Whether gradients at sampled labels are computed again for a second look."""
        on_disk = self.sampled or (self.draws == 0 and self.store == FULL)
        return self.looks_again and not on_disk

    @property
    def credit_passes(self) -> float:
        """Passes with one backward for the rows' similarities at one point."""
        if not self.shares_credit or self.stored:
            return 0
        # the rows themselves, and their products with all rows or with the landmarks
        return 2 + self.landmarks / self.rows

    @property
    def passes(self) -> float:
        """All passes of the fit, forward and backward, at all points."""
        if self.apart:
            first = self.sample_share * (self.draws > 0) + (self.store == FULL)
        else:
            first = float(self.runs_first)
        again = self.sample_share * self.runs_again
        # features are written in a pass of their own, once the factors are there
        return self.points * (first + again + (self.store == FEATURES) + self.credit_passes)

    @property
    def first_work(self) -> float:
        """Work of a first pass, in passes with one backward."""
        drawn, stored = self.draws > 0, self.store == FULL
        if self.apart:
            each = self.sample_share * drawn * (FORWARD + BACKWARD * self.draws)
            return each + stored * (FORWARD + BACKWARD)
        return FORWARD + BACKWARD * (self.draws + stored)

    @property
    def again_work(self) -> float:
        """Work of a second look's pass, in passes with one backward."""
        return self.sample_share * (FORWARD + BACKWARD * self.draws)

    @property
    def work(self) -> float:
        """All work of the fit at the model, in passes with one backward."""
        each = self.first_work * self.runs_first + self.again_work * self.runs_again
        each += self.credit_passes + (self.store == FEATURES)
        losses = FORWARD * self.loss_rows / self.rows * self.loss_places
        return self.points * each + (losses if self.shares_credit else 0.0)

    @property
    def leaves_losses(self) -> bool:
        """Whether the passes run all rows, and so leave the losses of all at the points."""
        return self.store == FULL or (self.draws > 0 and not self.apart)

    @property
    def loss_rows(self) -> int:
        """Rows that are run at each place whose loss is not known (`influence.path_time`)."""
        return min(self.rows, LOSS_ROWS if self.leaves_losses else ROWS_OF_ALL)

    @property
    def loss_places(self) -> int:
        """Places whose loss is not known: the base, the adapter but where it is a point, and the
        points where no pass left losses.
        """
        return 2 - self.at_adapter + (0 if self.leaves_losses else self.points)

    @property
    def to_come(self) -> float:
        """Work after the first point's first pass, in passes like that one."""
        return self.work / self.first_work - 1 if self.runs_first else 0.0

    # ---- bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the rows' gradients at all points."""
        one = store_bytes(
            self.store,
            self.rows,
            self.parameters,
            self.leaves,
            itemsize=self._stored_itemsize,
            row_bytes=self.row_bytes,
        )
        return self.points * one

    @property
    def sampled_bytes(self) -> int:
        """Bytes of the gradients at sampled labels at one point."""
        if not self.sampled:
            return 0
        return self.rows * self.draws * self.parameters * self._stored_itemsize

    @property
    def kernel_bytes(self) -> int:
        """Bytes of the rows' similarities at all points, and of their inverses where these are kept."""
        if not self.shares_credit:
            return 0
        if self.rows <= WHOLE_ROWS:
            return self.points * self.rows**2 * self._stored_itemsize
        return self.points * bytes_of_files(self.rows, self.landmarks, self._stored_itemsize)

    @property
    def kept_bytes(self) -> int:
        """Bytes of rows and similarities that the run keeps: all of its files but the factors."""
        rows = self.points * self.sampled_bytes if self.keeps_rows else 0
        return self.gradient_bytes + self.kernel_bytes + rows

    @property
    def passing_bytes(self) -> int:
        """Bytes of gradients at sampled labels that are deleted again, point by point."""
        return 0 if self.keeps_rows else self.sampled_bytes

    @property
    def _stored_itemsize(self) -> int:
        """Bytes of a number in a file: float32, or float64 where gradients are."""
        return max(4, self.itemsize)

    def __str__(self) -> str:
        """The plan in one line."""
        passes = f"{self.passes:.3g} pass" + ("es" if self.passes != 1 else "")
        where = f" at {self.points} points" if self.points > 1 else ""
        passing = f", {size(self.passing_bytes)} more meanwhile" if self.passing_bytes else ""
        return (
            f"{passes}{where} over {self.rows:,} rows ({self.tokens:,} tokens), "
            f"{size(self.kept_bytes)} of disk for what is kept of the rows{passing}"
        )


def size(count: float) -> str:
    """A number of bytes for people: `3.2 MB`, `41 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            number = count / factor
            return f"{number:.1f} {unit}" if number < 9.95 else f"{number:,.0f} {unit}"
    return f"{count / 1e3:.0f} kB"


def string_bytes(values: Collection[str]) -> int:
    """Bytes that a file takes for strings: the text, and 24 bytes each for where it lies."""
    if not values:
        return 0
    return int(np.sum([len(value.encode()) + 24 for value in values]))
