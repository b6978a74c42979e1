"""Counterfactual memorization, C-score and their reliability, from losses of retrained adapters.

With K adapters that were each trained on a random subset `S_k` of the rows
(`unlearn.retrain_subsets`), and `l_k(x)` the mean loss of row x under adapter k:

    counterfactual memorization    mem(x) = mean_{k: x not in S_k} l_k(x)
                                            - mean_{k: x in S_k} l_k(x)
    C-score                        C(x)   = mean_{k: x not in S_k} exp(-l_k(x))

The first is Zhang et al. 2023, arXiv 2112.12938 (there of next-token accuracies, here of losses):
what having seen x is worth on x itself, nats per token. The second says how well x is known to
those who never saw it, from 0 to 1, a typical row being near 1: Jiang et al. 2021, arXiv
2002.03206.

**Differences.** The original C-score averages the *accuracy* on x over training sets of many sizes.
This is the per-token likelihood (the geometric mean over tokens, then the mean over adapters) at
the one size that the subsets have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analysis.metrics.likelihood import checked
from analysis.stats import spearman
from influence.errors import InputError

#: Fewer rows than this have no rank correlation to speak of: a choice.
FEWEST = 3


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Counterfactual memorization of n rows.

    Attributes
    ----------
    values : array [n]
        Mean loss without the row less mean loss with it, nats per token; NaN where no model had it,
        or all did.
    errors : array [n]
        Standard error of `values`, `sqrt(s^2_without / k_without + s^2_trained / k_trained)` with
        s^2 the sample variances over models; NaN where a side has fewer than two.
    without, trained : int array [n]
        Models k that were trained without the row, and with it.
    """

    values: NDArray[np.float64]
    errors: NDArray[np.float64]
    without: NDArray[np.int64]
    trained: NDArray[np.int64]


@dataclass(frozen=True)
class Reliability:
    """Agreement of two measurements of the same rows by other models.

    Attributes
    ----------
    half : float
        Mean Spearman correlation of two halves of the models; NaN where no split gives one.
    value : float
        The same for two sets of all K models, `2 half / (1 + half)` (Spearman 1910, Brown 1910), 0
        where the halves do not agree.
    ceiling : float
        `sqrt(value)`: about what a perfect forecast of the noise-free measurement would reach.
    models, splits : int
        K, and the random splits that `half` is the mean of.
    """

    half: float
    value: float
    ceiling: float
    models: int
    splits: int


def counterfactual_memorization(losses: ArrayLike, masks: ArrayLike) -> Counterfactual:
    """`mean loss over the models trained without x - mean loss over those with it`, nats per token.

    Parameters
    ----------
    losses : array [K, n]
        The rows' mean losses under K models.
    masks : array of bool [K, n]
        True where a model was trained on a row.

    Raises
    ------
    InputError
        For arrays that do not belong together.
    """
    losses, masks = _checked(losses, masks)
    without, trained = (~masks).sum(axis=0), masks.sum(axis=0)
    errors = np.sqrt(
        _variance(losses, ~masks) / np.maximum(without, 1)
        + _variance(losses, masks) / np.maximum(trained, 1)
    )
    return Counterfactual(difference(losses, masks), errors, without, trained)


def c_score(losses: ArrayLike, masks: ArrayLike) -> NDArray[np.float64]:
    """`mean over the models trained without x of exp(-loss of x)`, [n], from 0 to 1.

    NaN where all were trained with it. Arrays as in `counterfactual_memorization`.
    """
    return consistency(*_checked(losses, masks))


def reliability(
    losses: ArrayLike, masks: ArrayLike, seed: int = 0, *, splits: int = 100
) -> Reliability:
    """Split-half reliability of counterfactual memorization, stepped up to all K models.

    The models are split at random into K // 2 and the others, each half measures every row, and the
    Spearman correlation of both (over the rows that both can measure) is averaged over `splits`
    splits. The formula of Spearman and Brown is exact for Pearson's correlation of halves of equal
    size. Models of one seed share what that seed does: it is not in the noise.
    """
    losses, masks = _checked(losses, masks)
    if splits < 1:
        raise InputError(f"splits {splits} was given; expected at least 1")
    rng, models = np.random.default_rng(seed), len(losses)
    correlations = np.empty(splits)
    for split in range(splits):
        halves = np.split(rng.permutation(models), [models // 2])
        first, second = (difference(losses[half], masks[half]) for half in halves)
        correlations[split] = rank_correlation(first, second)
    defined = correlations[~np.isnan(correlations)]
    half = float(defined.mean()) if len(defined) else float("nan")
    value = 0.0 if half <= 0 else 2 * half / (1 + half)
    return Reliability(half, value, float(np.sqrt(value)), models, splits)


def difference(losses: NDArray[np.float64], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean loss without each row less mean loss with it, [n], of checked arrays."""
    return _mean(losses, ~masks) - _mean(losses, masks)


def consistency(losses: NDArray[np.float64], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean likelihood of each row under the models without it, [n], of checked arrays."""
    return _mean(np.exp(-losses), ~masks)


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's rho over the rows where neither is NaN. NaN for fewer than `FEWEST`."""
    both = ~(np.isnan(x) | np.isnan(y))
    return float(spearman(x[both], y[both])) if both.sum() >= FEWEST else float("nan")


def _checked(losses: ArrayLike, masks: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    losses, masks = checked(losses, "losses", ndim=2), np.asarray(masks)
    if masks.dtype != np.bool_ or masks.shape != losses.shape:
        raise InputError(
            f"masks has shape {masks.shape} and type {masks.dtype}; expected {losses.shape} of "
            "bool as losses has, True where a model was trained on a row: give both one line per "
            "model"
        )
    return losses, masks


def _mean(values: NDArray[np.float64], which: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Means [n] of the values [K, n] that are marked. NaN where none is."""
    counts = which.sum(axis=0)
    sums = np.where(which, values, 0).sum(axis=0)
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def _variance(values: NDArray[np.float64], which: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Sample variances [n] of the values [K, n] that are marked. NaN for fewer than two."""
    counts = which.sum(axis=0)
    squares = np.where(which, (values - _mean(values, which)) ** 2, 0).sum(axis=0)
    return np.divide(squares, counts - 1, out=np.full(len(counts), np.nan), where=counts > 1)
