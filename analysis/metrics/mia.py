"""Membership inference: can the rows that were trained on be told from rows that never were?

An attack is a score per row, **higher = more like a member**, and `attack` says how well it
separates members from non-members. The AUC is signed: 0.5 is chance, above it members look like
members, and below it they look *less* familiar than rows nobody trained on, which is what
over-unlearning does. `max(auc, 1 - auc)` would hide it, so nothing is folded here.

Per-token arrays are of completion tokens under the attacked model: log-probabilities of the row's
own tokens, nats.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from analysis.metrics.likelihood import checked, checked_tokens
from analysis.stats import Interval, bootstrap_interval
from influence.errors import InputError
from unlearn.record.numbers import mean_of_lowest, whole_part

#: Of log p over the vocabulary: below it the distribution is one token, or flat, up to rounding.
SMALLEST_SPREAD = 1e-12


@dataclass(frozen=True, eq=False)
class Attack:
    """How well a score separates members from non-members.

    Attributes
    ----------
    auc : float
        `P(member > non-member) + P(equal) / 2`; 0.5 is chance, below it members look less familiar
        than non-members.
    tpr : mapping
        Share of members found, by the share of non-members that may be taken for members. With m
        non-members an allowed share below 1 / m allows none.
    n, m : int
        Members and non-members.
    interval : Interval
        Bootstrap interval of the AUC; members and non-members are drawn again, each group among its
        own.
    """

    auc: float
    tpr: Mapping[float, float]
    n: int
    m: int
    interval: Interval


def loss_score(losses: ArrayLike) -> NDArray[np.float64]:
    """`-loss` [n] (Yeom et al. 2018)."""
    return -checked(losses, "losses")


def zlib_score(sums: ArrayLike, texts: Sequence[str]) -> NDArray[np.float64]:
    """`-sum / bytes of the text compressed by zlib` [n]: familiar beyond what repetition explains.

    Carlini et al. 2021.

    `sums` [n] are the losses summed over the completion, `texts` the completions. The paper divides
    the mean loss; the sum is what a compressed length measures, and does not reward long rows for
    being long.
    """
    sums = checked(sums, "sums")
    if len(texts) != len(sums):
        raise InputError(
            f"texts has {len(texts)} rows; expected {len(sums)}, as sums: pass the completion of "
            "every row."
        )
    sizes = [
        len(zlib.compress(text.encode("utf-8", "surrogatepass"))) for text in texts
    ]  # data may hold half a surrogate
    return -sums / np.array(sizes)


def min_k(log_probs: Sequence[ArrayLike], k: float = 0.2) -> NDArray[np.float64]:
    """Min-K %: mean log-probability of the share k of tokens that were least likely, [n].

    Shi et al. 2023, arXiv 2310.16789.

    `max(1, floor(k T))` tokens of a row's T.
    """
    return np.array(
        [_mean_of_lowest(row, k) for row in checked_tokens(log_probs, "log_probs", float)]
    )


def min_k_plus_plus(
    log_probs: Sequence[ArrayLike],
    means: Sequence[ArrayLike],
    stds: Sequence[ArrayLike],
    k: float = 0.2,
) -> NDArray[np.float64]:
    """Min-K %++: as `min_k`, of `(log p - mu) / sigma` (Zhang et al. 2024, arXiv 2404.02936), [n].

    `means` and `stds` hold, for every token, the mean and the standard deviation of `log p(v)` over
    v drawn from the model's row next-token distribution: how likely this token is for what the
    model could have said there. Those below 1e-12 count as 1e-12.
    """
    rows = checked_tokens(log_probs, "log_probs", float)
    mu = checked_tokens(means, "means", float, rows=len(rows))
    sigma = checked_tokens(stds, "stds", float, rows=len(rows))
    scores = np.zeros(len(rows))
    for i, row in enumerate(rows):
        if not len(row) == len(mu[i]) == len(sigma[i]):
            raise InputError(
                f"Row {i} has {len(row)} log_probs, {len(mu[i])} means and {len(sigma[i])} stds; "
                "expected one of each per completion token: take all three from the same forward "
                "pass."
            )
        if (sigma[i] < 0).any():
            raise InputError(
                f"stds[{i}] has a negative value; expected standard deviations: pass roots of "
                "variances."
            )
        scores[i] = _mean_of_lowest((row - mu[i]) / np.maximum(sigma[i], SMALLEST_SPREAD), k)
    return scores


def reference_score(losses: ArrayLike, reference_losses: ArrayLike) -> NDArray[np.float64]:
    """`reference loss - loss` [n]: how much better than a model that never saw the row.

    Carlini et al. 2021.
    """
    losses = checked(losses, "losses")
    return checked(reference_losses, "reference_losses", rows=len(losses)) - losses


def gradient_norm_score(norms: ArrayLike) -> NDArray[np.float64]:
    """`-|gradient of the row's mean loss|` [n]: training leaves small gradients at its own rows.

    Nasr et al. 2019.
    """
    return -checked(norms, "norms")


def attack(
    members: ArrayLike,
    non_members: ArrayLike,
    fprs: Sequence[float] = (0.01, 0.1),
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Attack:
    """Judge one attack by its scores of members [n] and non-members [m].

    Higher = more like a member.

    The true positive rate at a false positive rate f is that of the lowest threshold which takes at
    most `floor(f m)` non-members for members; nothing is interpolated, and rows of equal score fall
    on the same side.
    """
    members, non_members = checked(members, "members"), checked(non_members, "non_members")
    if not all(0 <= fpr <= 1 for fpr in fprs):
        raise InputError(
            f"fprs is {tuple(fprs)}; expected shares between 0 and 1: write 1 % as 0.01."
        )
    n, m = len(members), len(non_members)
    rng = np.random.default_rng(seed)

    def drawn_again(
        _: NDArray[np.intp],
    ) -> float:  # two groups: the indices of one sample do not serve
        return _auc(members[rng.integers(n, size=n)], non_members[rng.integers(m, size=m)])

    interval = bootstrap_interval(drawn_again, n + m, resamples=resamples, level=level, seed=seed)
    tpr = {float(fpr): _true_positive_rate(members, non_members, fpr) for fpr in fprs}
    return Attack(_auc(members, non_members), tpr, n, m, interval)


def privleak(auc: float, auc_retrained: float) -> float:
    """PrivLeak of MUSE, percent: `(A(unlearned) - A(retrained)) / A(retrained) * 100`.

    Shi et al. 2024, arXiv 2407.06460.

    Near 0 is good, negative says under-unlearned (down to -100 %), positive over-unlearned. Both
    arguments are AUCs of **this module**: forget rows as members against held-out rows as
    non-members, higher = more like a member. MUSE's `A` is the other way round, holdout rows being
    its positives, hence `A = 1 - auc`: only so does its table give about -100 % for models that
    were never unlearned. MUSE scores by Min-K % with k = 0.4 (`min_k`).
    """
    for name, value in (("auc", auc), ("auc_retrained", auc_retrained)):
        if not 0 <= value <= 1:
            raise InputError(
                f"{name} is {value}; expected an area between 0 and 1: pass `attack(...).auc`."
            )
    if auc_retrained == 1:
        raise InputError(
            "auc_retrained is 1, and PrivLeak divides by 1 - auc_retrained; expected a retrained "
            "model that cannot tell all rows apart: compare the two AUCs as they are, and look "
            "whether the held-out rows are like the forgotten ones."
        )
    return 100 * (auc_retrained - auc) / (1 - auc_retrained)


def _auc(members: NDArray[np.float64], non_members: NDArray[np.float64]) -> float:
    """Mann-Whitney U of the members over n m. Ties share their average rank."""
    n = len(members)
    ranks = rankdata(np.concatenate([members, non_members]))[:n]
    return float((ranks.sum() - n * (n + 1) / 2) / (n * len(non_members)))


def _true_positive_rate(
    members: NDArray[np.float64], non_members: NDArray[np.float64], fpr: float
) -> float:
    allowed = whole_part(fpr * len(non_members))
    if allowed >= len(non_members):
        return 1.0
    return float(
        (members > np.sort(non_members)[::-1][allowed]).mean()
    )  # the best of those that may not be taken


def _mean_of_lowest(values: NDArray[np.float64], k: float) -> float:
    if not 0 < k <= 1:
        raise InputError(
            f"k is {k}; expected a share of the tokens above 0 and up to 1: write 20 % as 0.2."
        )
    return mean_of_lowest(values, k)
