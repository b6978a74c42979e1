"""Measures of planted rows, from their ascents: exposure, steps, damage, leverage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.metrics.exposure import generalized_exposure, relative_exposure
from analysis.metrics.likelihood import checked
from influence.errors import InputError
from influence.measurements import MeanLoss
from influence.rows import Examples
from influence.run import Run
from influence.solvers.direct import Direct
from unlearn.difficulty.measured import Measured


@dataclass(frozen=True, eq=False)
class Exposures:
    """Exposure of n rows on their way, bits per token.

    Attributes
    ----------
    levels : array [c + 1]
        Shares of the way, 0 (the adapter) first.
    losses, generalized, relative : arrays [n, c + 1]
        Mean loss (nats per token), GenEx and RelEx; NaN where a level was not reached, and RelEx
        without held-out rows.
    """

    levels: NDArray[np.float64]
    losses: NDArray[np.float64] = field(repr=False)
    generalized: NDArray[np.float64] = field(repr=False)
    relative: NDArray[np.float64] = field(repr=False)


def exposures(measured: Measured, reference: ArrayLike) -> Exposures:
    """GenEx and RelEx of every row at every level of its way to the target.

    A row's loss at a level is `start + level (target - start)`, or `start` where it began beyond
    that. `reference` [K, n] are the rows' mean losses under models that saw none of them; RelEx
    compares with `measured.heldout`.
    """
    levels = np.concatenate([[0.0], measured.levels])
    start, gap = measured.start[:, None], (measured.target - measured.start)[:, None]
    wanted = start + np.maximum(levels * gap, 0)
    highest = np.fmax.reduce(measured.losses, axis=1)[:, None]
    losses = np.where((highest >= wanted) | (levels == 0), wanted, np.nan)
    reference = checked(reference, "reference", ndim=2)
    if reference.shape[1] != len(losses):
        raise InputError(
            f"reference has losses of {reference.shape[1]} rows; expected {len(losses)}, as were "
            "measured"
        )
    reached = np.isfinite(losses)
    generalized, relative = np.full(losses.shape, np.nan), np.full(losses.shape, np.nan)
    shape = (len(losses), 1, measured.heldout.shape[2])
    before = np.broadcast_to(measured.heldout_before, shape)
    heldout = np.concatenate([before, measured.heldout], axis=1)
    for level in range(len(levels)):
        rows = np.flatnonzero(reached[:, level])
        if len(rows):
            generalized[rows, level] = generalized_exposure(
                losses[rows, level], reference[:, rows]
            ).values
        for row in rows if heldout.shape[2] else ():
            if np.isfinite(heldout[row, level]).all():
                relative[row, level] = relative_exposure(
                    losses[row : row + 1, level], heldout[row, level]
                ).value
    return Exposures(levels, losses, generalized, relative)


def steps_to_levels(measured: Measured) -> NDArray[np.float64]:
    """Fractional steps to every level, 0 first, [n, c + 1]. NaN where it was not reached.

    Crossings as `unlearn.difficulty` finds them.
    """
    levels = np.concatenate([[0.0], measured.levels])
    wanted = measured.start[:, None] + levels * (measured.target - measured.start)[:, None]
    steps = np.full(wanted.shape, np.nan)
    for (row, level), goal in np.ndenumerate(wanted):
        losses = measured.losses[row]
        above = np.flatnonzero(losses >= goal)
        if level == 0 or (len(above) and above[0] == 0):
            steps[row, level] = 0.0
        elif len(above):
            k = above[0]
            steps[row, level] = k - 1 + (goal - losses[k - 1]) / (losses[k] - losses[k - 1])
    return steps


def original_alone(measured: Measured, original: Sequence[str]) -> Measured:
    """The measurements with damage of original rows alone: planted ones do not count as damage."""
    originals = set(original)
    counted = np.array([id in originals for id in measured.sample])
    if not counted.any():
        raise InputError(
            f"none of the {len(counted)} training rows that tell the damage is an original one: "
            "sample more, or plant fewer"
        )
    return replace(
        measured,
        retained=measured.retained[:, :, counted],
        retained_before=measured.retained_before[counted],
        sample=tuple(id for id in measured.sample if id in originals),
    )


def leverage(run: Run, rows: Examples) -> NDArray[np.float64]:
    """`g^T (C + lambda I)^-1 g` of every row's mean loss under the run's curvature, [n].

    How far a row lies from what was trained on, at the run's last point, with its own damping:
    large for a row whose gradient points where the training rows' do not.
    """
    point = run.points[-1]
    gradients = point.query_gradients(run.tokenized(rows), MeanLoss())
    solved = Direct().solve(point.operator(), gradients).values
    return (gradients.double() * solved.double()).sum(1).cpu().numpy()


def matched_damage(
    levels: NDArray[np.float64],
    gap: NDArray[np.float64],
    curve: NDArray[np.float64],
    partner: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Damage of every row, and of its partner, at equal nats forgotten, [n] each.

    Both where they have forgotten as many nats as the one with the smaller gap. `curve` [n, c] is
    the damage at `levels` [c] of the way, between which it is straight; `gap` [n] nats; `partner`
    [n] positions.
    """
    nats = np.minimum(gap, gap[partner]).clip(0)
    damage, partners = (
        np.array(
            [
                np.interp(far, levels * max(gap[i], 0), curve[i])
                for i, far in zip(rows, nats, strict=True)
            ]
        )
        for rows in (np.arange(len(gap)), partner)
    )
    return damage, partners
