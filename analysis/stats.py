"""Rank correlation and bootstrap intervals: the statistics every study of this package shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from influence.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A bootstrap interval and what is needed to draw it again.

    Attributes
    ----------
    low, high : float
        Its ends, in the unit of the statistic; both NaN where no resample gave a number.
    level : float
        The coverage aimed at, between 0 and 1.
    resamples : int
        How many resamples were drawn.
    seed : int
        The seed of the generator that drew them.
    undefined : int
        How many of the resamples gave NaN; the ends are quantiles of the others.
    """

    low: float
    high: float
    level: float
    resamples: int
    seed: int
    undefined: int = 0


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], ArrayLike],
    n: int,
    *,
    together: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Give the percentile bootstrap interval of a statistic of n exchangeable units.

    A resample is n indices drawn with replacement from `0 ... n - 1`; the ends are the `(1 - level)
    / 2` and `(1 + level) / 2` quantiles of the statistic over the resamples (Efron and Tibshirani
    1993, chapter 13). The same n, resamples and seed draw the same indices, so intervals of several
    statistics are made on the same resamples. With few units the interval is somewhat too short.

    Parameters
    ----------
    statistic : callable
        Takes the indices, an integer array [n], and returns one number. NaN says that the statistic
        is undefined on that resample; it is counted and left out.
    n : int
        Number of units that were sampled independently.
    together : int
        How many resamples the statistic takes at once, where it can: its indices are then [k, n]
        with k at most this, and it returns k numbers. The same resamples are drawn.
    resamples : int
        Number of resamples.
    level : float
        Coverage aimed at, between 0 and 1.
    seed : int
        Seed of the generator.

    Raises
    ------
    InputError
        If n or resamples is below 1, or level does not lie strictly between 0 and 1.
    """
    if n < 1 or resamples < 1:
        raise InputError(
            f"A bootstrap was asked for with n = {n} units and {resamples} resamples; expected at "
            "least one of each: give it data and a positive number of resamples."
        )
    if not 0 < level < 1:
        raise InputError(
            f"A bootstrap was asked for at level {level}; expected a number strictly between 0 and "
            "1: write 95 % as 0.95."
        )
    rng = np.random.default_rng(seed)
    if together:
        counts = [min(together, resamples - k) for k in range(0, resamples, together)]
        values = np.concatenate([statistic(rng.integers(n, size=(k, n))) for k in counts])
        values = values.astype(np.float64)
    else:
        values = np.array(
            [statistic(rng.integers(n, size=n)) for _ in range(resamples)], dtype=np.float64
        )
    defined = values[~np.isnan(values)]
    low = high = float("nan")
    if defined.size:
        low, high = (float(end) for end in np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]))
    return Interval(low, high, level, resamples, seed, undefined=resamples - defined.size)


def spearman(x: ArrayLike, y: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """Spearman rank correlation along one axis, for all other axes at once.

    `rho = sum_s a_s b_s / sqrt(sum_s a_s^2 * sum_s b_s^2)` where a and b are the ranks of x and y
    along the axis, ties sharing their average rank, less the mean rank (m + 1) / 2.

    Parameters
    ----------
    x, y : array_like [..., m, ...]
        Equally long along `axis`; the other axes broadcast (after `axis` has been moved to the
        end).
    axis : int
        The axis that is ranked.

    Returns
    -------
    array [...]
        The correlations; NaN where a side is constant or holds a NaN. For 1-d input a 0-d array.

    Raises
    ------
    InputError
        If the lengths along the axis differ.
    """
    x = np.moveaxis(np.asarray(x), axis, -1)
    y = np.moveaxis(np.asarray(y), axis, -1)
    m = x.shape[-1]
    if y.shape[-1] != m:
        raise InputError(
            f"spearman was given {m} and {y.shape[-1]} values along axis {axis}; expected pairs: "
            "pass two arrays that are equally long along that axis."
        )
    # Ranks and their mean are multiples of one half, so the sums are exact: a constant side gives
    # exactly 0.
    a = rankdata(x, axis=-1) - (m + 1) / 2
    b = rankdata(y, axis=-1) - (m + 1) / 2
    product = np.asarray((a * b).sum(axis=-1))
    scale = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.divide(product, scale, out=np.full(product.shape, np.nan), where=scale > 0)
