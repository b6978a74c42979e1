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

from dataclasses import dataclass

import numpy as np

from influence.errors import InputError

#: Step of the trapezoid rule in log u. Its error falls as exp(-pi^2 / step): 5e-15 here.
_LOG_STEP = 0.3


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
    # below the first node the integrand is 1 to 1e-16; beyond the last it is under exp(-40)
    first, last = np.log(1e-16 / (rows * sizes.max())), np.log(40 / (rows * sizes.min()))
    nodes = np.exp(np.arange(first, last + _LOG_STEP, _LOG_STEP))
    lengths, group_of = np.unique(fitted, return_inverse=True)
    others = _mean_over_others(fitted, lengths, rows - 1, nodes)
    values = np.empty(len(counts))
    for start in range(0, len(counts), 4096):  # bounds the memory of [rows, nodes]
        part = slice(start, start + 4096)
        integrand = np.exp(-counts[part, None] * nodes) * others[group_of[positions[part]]]
        values[part] = _LOG_STEP * (integrand * nodes).sum(1)
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
    before = _subset_means(order, nodes, drawn, stops=set(last_of.tolist()))
    after_sizes = n - 1 - last_of
    after = _subset_means(order[::-1], nodes, drawn, stops=set(after_sizes.tolist()))
    means = np.empty((len(lengths), len(nodes)))
    for group, place in enumerate(last_of):
        split = hypergeom.pmf(k, n - 1, place, drawn)
        ends = after[int(after_sizes[group])][:, drawn - k]
        means[group] = (split * before[int(place)] * ends).sum(1)
    return means


def _subset_means(
    order: np.ndarray, nodes: np.ndarray, most: int, stops: set[int]
) -> dict[int, np.ndarray]:
    """For each size j in `stops`: the mean of `exp(-u S)` over the k-subsets of the first j rows.

    `[nodes, most + 1]`, for k = 0 ... most; 0 where k > j, where there is no subset.
    """
    k = np.arange(most + 1)
    means = np.zeros((len(nodes), most + 1))
    means[:, 0] = 1.0
    found = {0: means.copy()} if 0 in stops else {}
    for j in range(1, max(stops) + 1):
        # a k-subset of j rows holds the j-th with probability k / j
        share = np.minimum(k / j, 1.0)
        with_row = means[:, :-1] * np.exp(-order[j - 1] * nodes)[:, None]
        means *= 1 - share
        means[:, 1:] += share[1:] * with_row
        if j in stops:
            found[j] = means.copy()
    return found
