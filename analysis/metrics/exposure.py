"""Exposure: how many bits the model gives away about a row, against what else it could have said.

**Exposure** (Carlini et al. 2019, arXiv 1802.08232) ranks a canary among the candidates that might
have been inserted instead, `log2 |R| - log2 rank`. **Generalized** and **relative exposure** need
no candidates; names and idea are those of Baluta et al. 2024, arXiv 2411.04388, the formulas are
defined here and their numbers may differ. With the per-token likelihood of a row, the geometric
mean over its tokens, `p(x) = exp(-mean loss)`,

    GenEx(x) = log2 p_unlearned(x) - log2 mean_k p_ref_k(x)    bits per token,
    RelEx(x) = log2 p_unlearned(x) - log2 mean_j p_unlearned(y_j),

where ref_k are models that never saw x, and y_j rows comparable with x that the unlearned model
never saw. Both are 0 where the row is as likely as if never seen, positive where it is still
exposed, negative where it was over-unlearned. RelEx takes the likelihoods of the y_j for those of x
under the missing reference models: right on average if x is, apart from having been seen, a row
like any y_j; for a single row it also says whether x is easier than they are. Means are over
likelihoods, not losses, so the easiest y_j weigh most.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from analysis.metrics.likelihood import PerRow, checked
from influence.errors import InputError


def exposure(rank: ArrayLike, size: int) -> NDArray[np.float64]:
    """`log2 size - log2 rank`, bits, of ranks in 1 ... size, 1 being the most likely candidate."""
    rank = np.asarray(rank, dtype=np.float64)
    if not ((rank >= 1) & (rank <= size)).all():  # NaN fails too
        raise InputError(
            f"A rank among {size} candidates was given as {rank.tolist()}; expected numbers from 1 "
            f"(the most likely) to {size}: count the canary among the candidates."
        )
    return np.log2(size) - np.log2(rank)


def exposure_of(losses: ArrayLike, others: ArrayLike) -> PerRow:
    """Exposure of canaries from losses, bits, and the mean.

    `losses` [n] are the canaries', `others` [n, m] those of m other candidates each.

    Candidates are ranked by loss, the lowest first, among `|R| = m + 1`: the canary is one of them.
    **Ties** share their average rank, so a model that cannot tell the candidates apart gives
    `log2(2 (m + 1) / (m + 2))`, below 1 bit. Use sums over the tokens, not means, where candidates
    differ in length.
    """
    losses = checked(losses, "losses")
    others = checked(others, "others", ndim=2, rows=len(losses))
    below = (others < losses[:, None]).sum(axis=1)
    equal = (others == losses[:, None]).sum(axis=1)
    return _with_mean(exposure(1 + below + equal / 2, others.shape[1] + 1))


def generalized_exposure(losses: ArrayLike, reference: ArrayLike) -> PerRow:
    """`log2 p_unlearned - log2 mean_k p_ref_k` per row, bits per token, and the mean over rows.

    `losses` [n] are mean losses under the unlearned model, `reference` [K, n] the same rows' under
    K models that saw none of them.
    """
    losses = checked(losses, "losses")
    reference = checked(np.transpose(reference), "reference, transposed,", ndim=2, rows=len(losses))
    return _with_mean(-(losses + _log_mean_likelihood(reference)) / np.log(2))


def relative_exposure(losses: ArrayLike, comparable: ArrayLike) -> PerRow:
    """`log2 p(x) - log2 mean_j p(y_j)` per row, bits per token, and the mean over rows.

    GenEx without reference models.

    `losses` [n] of the rows and `comparable` [m] of rows like them that were never trained on, both
    mean losses under the unlearned model. See the module for what this approximates.
    """
    losses, comparable = checked(losses, "losses"), checked(comparable, "comparable")
    return _with_mean(-(losses + _log_mean_likelihood(comparable)) / np.log(2))


def _log_mean_likelihood(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """`ln mean exp(-loss)` over the last axis, without underflow."""
    return np.asarray(logsumexp(-losses, axis=-1)) - np.log(losses.shape[-1])


def _with_mean(values: NDArray[np.float64]) -> PerRow:
    return PerRow(values, float(values.mean()))
