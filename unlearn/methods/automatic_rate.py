"""The automatic learning rate of NGDiff: GeN (Bu et al. 2024, arXiv 2410.22086).

Along a move u the retained rows' loss is read at several multiples s of it, a parabola
`a + b s + c s^2` is fitted, and its minimum, `s* = -b / 2c`, is the rate to take, as a multiple of
the present one. With the three points -1, 0, 1 that is
`s* = (L(-1) - L(1)) / 2 (L(1) - 2 L(0) + L(-1))`.

All constants are choices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from unlearn.methods.batches import TermBatches, TermGradient

#: Multiples of a move at which the loss is read; 0 is where the model is.
POINTS = (-1.0, -0.5, 0.5, 1.0)
#: Share of the losses' variance that the parabola must explain.
FIT = 0.95
#: Losses that differ by less, relative to the largest, are equal up to rounding (float32).
FLAT = 1e-6
#: A rate changes by at most this factor at a time.
LARGEST = 2.0
#: Weight of the new rate in the logarithmic average with the old one.
SMOOTHING = 0.5
#: Steps from one reading of the losses to the next.
EVERY = 10


def parabola_minimum(points: np.ndarray, losses: np.ndarray) -> float | None:
    """Where the least-squares parabola through `(points, losses)`, both `[m]`, has its minimum.

    None where there is none ahead: the losses differ by no more than rounding, or are not all
    finite; the loss does not fall along the move (b >= 0); the parabola is not convex (c <= 0), or
    explains less than `FIT` of the variance. At least three points are needed.
    """
    if not np.isfinite(losses).all() or np.ptp(losses) <= FLAT * np.abs(losses).max():
        return None
    design = np.vander(points, 3)
    coefficients = np.linalg.lstsq(design, losses, rcond=None)[0]
    c, b, _ = coefficients
    variance = float(((losses - losses.mean()) ** 2).sum())
    if b >= 0 or c <= 0:
        return None
    if float(((losses - design @ coefficients) ** 2).sum()) > (1 - FIT) * variance:
        return None
    return float(-b / (2 * c))


def next_rate(rate: float, points: np.ndarray, losses: np.ndarray) -> float:
    """The rate after the losses `[m]` were read at `points`, multiples of the present move.

    It goes towards the parabola's minimum, by at most `LARGEST`, smoothed, and stays where there is
    none.
    """
    minimum = parabola_minimum(points, losses)
    if minimum is None:
        return rate
    return float(rate * np.clip(minimum, 1 / LARGEST, LARGEST) ** SMOOTHING)


def rate_along(
    retain: TermBatches, gradient: TermGradient, theta: Tensor, move: Tensor, rate: float
) -> float:
    """The rate after reading the step's retained rows along its `move` [P] from `theta` [P].

    Leaves the model at the last point.
    """
    losses = []
    for point in POINTS:
        retain.model.restore(theta + point * move)
        losses.append(retain.mean_loss(gradient.rows))
    points, losses = np.array([*POINTS, 0.0]), np.array([*losses, gradient.loss])
    return next_rate(rate, points, losses)
