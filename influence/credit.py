"""Credit that training rows share, and how large it is.

EK-FAC's inverse sees no row as such: of three rows that teach one fact each gets the whole credit.
Here the rows' own curvature counts too. At each point of the path, with `M = (C + lambda I)^-1`,
`f_i = sqrt(w_i) grad l_i`, the rows' similarities `K = F M F^T` [n, n] and a query's
`u = F M grad m(q)` [n],

    P = (I + s K)^-1
    score[q, i] = t sqrt(w_i) (P u)_i / P_ii             row i alone is removed
    effect[q, R] = t sqrt(w_R)^T P_RR^-1 (P u)_R         the rows R are removed together
    self_influence[i] = t (K P)_ii / (T_i P_ii)

which is Woodbury's `(C + lambda I + s F^T F)^-1`, without the removed rows' own part. The time t
and the strength s are told from the losses along the path (`influence.path_time`); s = 0 and t = 1
is the additive form. Over points, predictions are averaged by each point's share of the time.

The effect of a set is *not* the sum of its rows' scores: rows that teach the same stand in for each
other, so that two of them together do more than both alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import starmap
from operator import iadd
from typing import Any

import numpy as np

from influence import distributed
from influence.at_point import memory_chunks
from influence.calibration import calibrate_once
from influence.curvature.base import Invertible
from influence.damping import Damping
from influence.errors import InputError
from influence.kernel import RowInverse, WholeKernel, missing_bytes, row_kernel
from influence.matrix_file import directory_for
from influence.path_time import PathTime, path_record, path_time
from influence.progress import say
from influence.run import Run
from influence.setting import ADDITIVE, CREDITS, SHARED, Setting


@dataclass(frozen=True, eq=False)
class Credit:
    """How raw scores `w_i grad m(q)^T M grad l_i` at each point become shared ones.

    `weights` [n] are the rows' w and `kernels` K at each point, or P where that is there; `factor`
    multiplies everything (a calibration by retraining, else 1).
    """

    path: PathTime
    weights: np.ndarray = field(repr=False)
    kernels: list[WholeKernel | RowInverse] = field(repr=False)
    factor: float = 1.0

    @cached_property
    def inverses(self) -> list[RowInverse]:
        """P at each point. A K in memory gives way to its P when that is first asked for."""
        every = [self.kernels.pop(0) for _ in self.path.shares]
        return [
            each.inverse(self.path.strength) if isinstance(each, WholeKernel) else each
            for each in every
        ]

    @property
    def factors(self) -> np.ndarray:
        """What each point's part is multiplied by, `[points]`: its share of the time."""
        return self.factor * self.path.time * self.path.shares

    def record(self) -> dict[str, Any]:
        """What a score file says of it."""
        return {
            "factors": self.factors,
            "path_time": self.path.time,
            "strength": self.path.strength,
        }

    @property
    def _roots(self) -> np.ndarray:
        return np.sqrt(self.weights)

    def pulls(self, raw: np.ndarray, point: int) -> np.ndarray:
        """`P u` [K, n] at a point, of raw scores `raw` [K, n]."""
        roots = self._roots
        unweighted = np.divide(raw, roots, out=np.zeros(raw.shape), where=roots > 0)
        return self.inverses[point].apply(unweighted, overwrite=True)

    def singles(self, parts: np.ndarray) -> np.ndarray:
        """Scores `[K, n]` of raw ones `[points, K, n]`."""

        def single(point: int, factors: np.ndarray) -> np.ndarray:
            pulls = self.pulls(parts[point], point)
            pulls *= factors * self._roots
            return pulls

        return reduce(iadd, starmap(single, enumerate(self.row_factors)))

    @property
    def row_factors(self) -> list[np.ndarray]:
        """What `sqrt(w_i) (P u)_i` at each point is multiplied by, `[n]` each."""
        return [
            factor / inverse.diagonal
            for factor, inverse in zip(self.factors, self.inverses, strict=True)
        ]

    def taken(self, raw: np.ndarray, point: int) -> np.ndarray:
        """`c` [K, n] by which the shared inverse's answer is `M (grad m(q) - sum_i c_i grad l_i)`,
        of raw scores `[K, n]` at a point.
        """
        return self.path.strength * self._roots * self.pulls(raw, point)

    def together(self, parts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Effects `[K]` of removing `rows` [k] together, of raw scores `[points, K, n]`."""
        roots, found = self._roots[rows], np.zeros(parts.shape[1])
        for point, (factor, inverse) in enumerate(zip(self.factors, self.inverses, strict=True)):
            weights = np.linalg.solve(inverse.block(rows), roots)
            found += factor * self.pulls(parts[point], point)[:, rows] @ weights
        return found

    def on_themselves(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Rises of the removed rows' own mean losses `[k]` where `rows` [k] go together, nats.

        `counts` [k] are their supervised tokens.
        """
        roots, found = self._roots[rows], np.zeros(len(rows))
        for factor, inverse in zip(self.factors, self.inverses, strict=True):
            # K P = (I - P) / s, of which the removed rows' part is taken out again
            found += factor * (np.linalg.solve(inverse.block(rows), roots) - roots)
        scale = self.path.strength * counts * roots
        return np.divide(found, scale, out=np.zeros(len(rows)), where=roots > 0)

    def self_influence(self, counts: np.ndarray) -> np.ndarray:
        """Predicted rise of each row's own mean loss `[n]` if it alone is removed, nats a token.

        `counts` [n] are the rows' supervised tokens.
        """
        found = np.zeros(len(counts))
        for factor, inverse in zip(self.factors, self.inverses, strict=True):
            found += factor * (1 / inverse.diagonal - 1)
        return found / (self.path.strength * counts)


def credited(
    run: Run,
    curvature: str | None = None,
    damping: str | Damping | None = None,
    at: str | None = None,
    *,
    credit: str | None = None,
) -> tuple[Setting, Credit | None]:
    """The setting of a request, with the credit that its rows share.

    None for additive credit, which is used where it is asked for, and, said, where credit cannot be
    shared. Raises `InputError` where `shared` was asked for and cannot be.
    """
    if credit not in (None, *CREDITS):
        raise InputError(f"credit {credit!r} was given; expected {' or '.join(CREDITS)}")
    if credit != ADDITIVE:
        setting = Setting.of(run, curvature, damping, at, credit=SHARED)
        found = shared_credit(setting)
        if isinstance(found, Credit):
            return setting, found
        if credit == SHARED:
            raise InputError(f"shared credit was asked for, and {found}: give --credit additive")
        if not setting.operators[0].curvature.undamped:  # nobody expects it of plain products
            say(f"note: credit is additive: {found}")
    calibrate_once(run)
    return Setting.of(run, curvature, damping, at), None


def shared_credit(setting: Setting) -> Credit | str:
    """The credit that rows share in a setting, or why it cannot be shared."""
    if (reason := distributed.at_first(lambda: refusal(setting))) is not None:
        return reason
    run = setting.run
    if (known := run.kept.get(("credit", setting.name, setting.kappa))) is not None:
        return known
    run.kept.clear()  # one setting's at a time: these are large
    record = path_record(run).of([point.number or 0 for point in setting.points])
    every: list[Any] = [row_kernel(point, operator) for point, operator in setting.each()]
    slopes = [kernel.slope(run.weights) for kernel in every]
    path = path_time(record, slopes, [point.place.scale for point in setting.points])
    if path is None:
        return (
            f"the loss on the rows is {record.adapter:.3g} under the adapter and {record.base:.3g} "
            "nats a token under the base, which does not tell how far training went"
        )
    for number, kernel in enumerate(every):
        if not isinstance(kernel, WholeKernel):  # by all processes, where they still go together
            every[number] = kernel.inverse(path.strength)
    found = Credit(path, run.weights, every, setting.kappa)
    run.kept["credit", setting.name, setting.kappa] = found
    return found


def refusal(setting: Setting) -> str | None:
    """Why the credit of a setting cannot be shared, or None."""
    run, operator = setting.run, setting.operators[0]
    if operator.curvature.undamped:
        return f"{operator.curvature.name} stands for plain products of gradients"
    if not all(isinstance(each.curvature, Invertible) for each in setting.operators):
        return f"{operator.curvature.name} has no closed inverse"
    stored = run.gradients_stored or all(point.features(each) for point, each in setting.each())
    if not stored and len(memory_chunks(run, len(run.tokens))) > 1:
        return (
            "the rows are not stored (--store), nor in few bytes for this damping, and are too many "
            "to compute again"
        )
    needed = sum(missing_bytes(point, operator) for point, operator in setting.each())
    if needed and directory_for(run.directory, needed) is None:
        return (
            f"the similarities of {len(run.tokens)} rows at {len(setting.points)} points need "
            f"{needed / 1e9:.1f} GB of disk, which are free neither in {run.directory} nor for "
            "temporary files"
        )
    return None
