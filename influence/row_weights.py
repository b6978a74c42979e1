"""Weights of rows in the training objective: `J = sum_i w_i l_i`.

`l_i` is row i's summed cross-entropy, T_i its supervised tokens, n the number of rows.

==========  ===============================  ===================================================
reduction   w_i                              what a trainer with it minimises
==========  ===============================  ===================================================
`token`     `1 / N_tok`, N_tok = sum T_i     the mean over all tokens of the data
`example`   `1 / (n T_i)`                    the mean of the rows' own means
`batch:M`   `E[1 / N_batch] M / n`           the mean over the tokens of each batch of M rows, batch
                                             after batch, as Hugging Face trainers do
==========  ===============================  ===================================================

`N_batch` are the tokens of row i and of M - 1 other rows, drawn at random without replacement. A
short row meets smaller batches than a long one and so weighs more: `batch:1` is `example`, and
`batch:M` with M >= n is `token`.

The expectation is exact: `1 / N = integral of exp(-u N) du` over u > 0, and the mean of `exp(-u S)`
over all (M - 1)-subsets of rows is a ratio of elementary symmetric polynomials of `exp(-u T_j)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from influence.errors import InputError

#: The integral is a sum over `u = exp(x - exp(-x)) / N`, x in steps of this from the first to where
#: exp(-u N) is under 1e-17: a double-exponential rule, exact to 1e-13 over any range of N.
_STEP, _FIRST = 0.25, -3.7
#: Bytes that the subset means of one part of the nodes may take.
_PART_BYTES = 256 << 20


@dataclass(frozen=True)
class RowWeights:
    """The rule by which rows are weighted, and the token counts `[n]` of the rows it was fitted to.

    A row that is changed later is weighted as if it alone had changed: N_tok, n and the other rows
    of a batch stay those of the fit, so that a removal or a change renormalises nothing.
    """

    reduction: str
    counts: np.ndarray

    def fitted(self) -> np.ndarray:
        """The weights `w_i` of the rows of the fit, `[n]` float64.

        Errors: InputError for a reduction that is none.
        """
        return self.changed(np.arange(len(self.counts)), self.counts)

    def changed(self, positions: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The weights `[k]` of the rows at these positions [k], if they had `counts` [k] tokens."""
        fitted, counts = self.counts.astype(np.float64), np.asarray(counts, dtype=np.float64)
        n, rows = len(fitted), batch_size(self.reduction)
        if self.reduction == "token" or (rows is not None and rows >= n):
            return np.full(len(counts), 1.0 / fitted.sum())
        if rows is None or rows == 1:
            return 1.0 / (n * counts)
        return _inverse_batch_tokens(fitted, rows, positions, counts) * rows / n


def batch_size(reduction: str) -> int | None:
    """The M of `batch:M`, or None for `token` and `example`.

    Errors: InputError for anything else.
    """
    if reduction in ("token", "example"):
        return None
    kind, _, size = str(reduction).partition(":")
    if kind != "batch" or not size.isascii() or not size.isdigit() or int(size) < 1:
        raise InputError(
            f"reduction {reduction!r} was given; expected token, example, or batch:M with the "
            "rows of a training step (all devices and accumulated steps together), as in batch:16"
        )
    return int(size)


def _inverse_batch_tokens(
    fitted: np.ndarray, rows: int, positions: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """`E[1 / N_batch]` `[k]` for rows with `counts` [k] tokens that stand at `positions` [k].

    A batch holds the row and `rows` - 1 others of the fit, whose counts are `fitted` [n].
    """
    sizes = np.concatenate([fitted, counts])
    largest, smallest = rows * sizes.max(), rows * sizes.min()
    x = np.arange(_FIRST, np.log(40 * largest / smallest) + _STEP, _STEP)
    nodes = np.exp(x - np.exp(-x)) / largest
    shares = _STEP * nodes * (1 + np.exp(-x))
    lengths, group_of = np.unique(fitted, return_inverse=True)
    values = np.zeros(len(counts))
    part = max(1, _PART_BYTES // (8 * len(lengths) * rows))
    for some in np.array_split(np.arange(len(nodes)), -(-len(nodes) // part)):
        others = _mean_over_others(fitted, lengths, rows - 1, nodes[some])
        for start in range(0, len(counts), 4096):  # bounds the memory of [rows, nodes]
            here = slice(start, start + 4096)
            integrand = np.exp(-counts[here, None] * nodes[some])
            integrand *= others[group_of[positions[here]]]
            values[here] += integrand @ shares[some]
    return values


def _mean_over_others(
    fitted: np.ndarray, lengths: np.ndarray, drawn: int, nodes: np.ndarray
) -> np.ndarray:
    """Mean of `exp(-u S)` `[lengths, nodes]`, S the tokens of `drawn` rows other than one of this
    length.

    The rows are ordered by length. The row left out is the last of its length, so that the others
    are a beginning and an end of the order: subsets of k and of `drawn` - k rows of them are put
    together with the probability that a random subset splits so (hypergeometric). All terms are
    positive, so no digit is lost where leaving a row out by division would lose them.
    """
    from scipy.stats import hypergeom

    order, n, k = np.sort(fitted), len(fitted), np.arange(drawn + 1)
    last_of = np.searchsorted(order, lengths, side="right") - 1
    ends = dict(_subset_means(order[::-1], nodes, drawn, (n - 1 - last_of)[::-1]))
    means = np.empty((len(lengths), len(nodes)))
    beginnings = _subset_means(order, nodes, drawn, last_of)
    for group, (place, beginning) in enumerate(beginnings):
        split = hypergeom.pmf(k, n - 1, place, drawn)
        means[group] = (split * beginning * ends.pop(n - 1 - place)[:, drawn - k]).sum(1)
    return means


def _subset_means(
    order: np.ndarray, nodes: np.ndarray, most: int, stops: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """For each size j in `stops`, which rise: j and the mean of `exp(-u S)` over the k-subsets of
    the first j rows.

    `[nodes, most + 1]`, for k = 0 ... most; 0 where k > j, where there is no subset.
    """
    k = np.arange(most + 1)
    means = np.zeros((len(nodes), most + 1))
    means[:, 0] = 1.0
    j = 0
    for stop in stops.tolist():
        while j < stop:
            # a k-subset of j + 1 rows holds the last of them with probability k / (j + 1)
            share = np.minimum(k / (j + 1), 1.0)
            with_row = means[:, :-1] * np.exp(-order[j] * nodes)[:, None]
            means *= 1 - share
            means[:, 1:] += share[1:] * with_row
            j += 1
        yield j, means.copy()
