"""Membership inference: values by hand, slow oracles, laws."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest

from analysis.metrics import (
    attack,
    gradient_norm_score,
    loss_score,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_score,
    zlib_score,
)
from tests.analysis.metrics.helpers import near, samples


def test_auc_by_hand():
    """Members 3, 1, 2 against 2, 0: of 6 pairs 3>2, 3>0, 1>0, 2>0 are won, 2=2 is half: 4.5 / 6."""
    result = attack([3, 1, 2], [2, 0], resamples=5)
    assert result.auc == near(0.75)
    assert (result.n, result.m, result.interval.resamples, result.interval.seed) == (3, 2, 5, 0)


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_the_share_of_pairs_won(ties):
    for seed in range(5):
        a, b = samples(seed, ties=ties)
        won = sum(1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b)
        assert attack(a, b, resamples=1).auc == near(won / (len(a) * len(b)))


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_antisymmetric_and_never_folded(ties):
    a, b = samples(ties=ties)
    auc = attack(a, b, resamples=1).auc
    assert attack(b, a, resamples=1).auc == near(1 - auc)
    assert attack(-a, -b, resamples=1).auc == near(1 - auc)
    assert auc > 0.5 > 1 - auc
    assert attack([0, 1], [2, 3], resamples=1).auc == 0
    assert attack([2, 3], [0, 1], resamples=1).auc == 1


def test_auc_of_equal_scores_is_chance_and_any_increasing_map_changes_nothing():
    assert attack([7, 7, 7], [7, 7], resamples=1).auc == 0.5
    a, b = samples()
    mapped, plain = attack(np.exp(a), np.exp(b), resamples=50), attack(a, b, resamples=50)
    assert (mapped.auc, mapped.tpr, mapped.interval) == (plain.auc, plain.tpr, plain.interval)


def test_true_positive_rate_by_hand():
    """Ten non-members 0 ... 9.

    None may pass: only members above 9, 1 of 4. One may: above 8, so 9.5, 9 and 8.5.
    """
    result = attack([9.5, 9, 8.5, 3], np.arange(10), fprs=(0.01, 0.1, 0.19, 1), resamples=1)
    assert result.tpr == {0.01: 0.25, 0.1: 0.75, 0.19: 0.75, 1: 1}


@pytest.mark.parametrize("ties", [False, True])
def test_true_positive_rate_is_the_best_over_all_thresholds(ties):
    for seed in range(5):
        a, b = samples(seed, ties=ties)
        for fpr in (0, 0.01, 0.05, 0.1, 0.3, 0.5, 1):
            cuts = [*a, *b, np.inf]
            best = max(
                np.mean(a >= cut) for cut in cuts if np.sum(b >= cut) <= fpr * len(b) + 1e-12
            )
            assert attack(a, b, fprs=[fpr], resamples=1).tpr == {fpr: near(best)}


def test_allowed_share_is_not_lost_to_rounding():
    """0.29 of 100 is 28.999... in floats and must allow 29: members above the 30th highest, 70."""
    assert attack([70.5], np.arange(100), fprs=[0.29], resamples=1).tpr == {0.29: 1}
    assert attack([70], np.arange(100), fprs=[0.29], resamples=1).tpr == {0.29: 0}


def test_the_interval_draws_both_groups_again():
    a, b = samples()
    rng = np.random.default_rng(4)
    aucs = []
    for _ in range(40):
        x, y = a[rng.integers(23, size=23)], b[rng.integers(17, size=17)]
        aucs.append(np.mean([(i > j) + (i == j) / 2 for i in x for j in y]))
    interval = attack(a, b, resamples=40, seed=4, level=0.8).interval
    assert (interval.low, interval.high) == near(np.quantile(aucs, [0.1, 0.9]))
    assert interval.low < attack(a, b, resamples=1).auc < interval.high


def test_width_of_the_interval_is_that_of_theory():
    """Of equal distributions the AUC has variance (n + m + 1) / (12 n m) (Mann and Whitney
    1947).
    """
    rng = np.random.default_rng(0)
    interval = attack(rng.normal(size=120), rng.normal(size=80), resamples=1000, level=0.9).interval
    theory = 2 * 1.6449 * math.sqrt(201 / (12 * 120 * 80))
    assert interval.high - interval.low == pytest.approx(theory, rel=0.15)


def test_scores_by_hand():
    """All have members above: small losses, losses below a reference's, small gradients."""
    assert loss_score([0.5, 2]).tolist() == [-0.5, -2]
    assert gradient_norm_score([0.5, 2]).tolist() == [-0.5, -2]
    assert reference_score([0.5, 2], [3, 2.5]).tolist() == [2.5, 0.5]


def test_zlib_by_hand():
    """Nats per compressed byte: of two texts with the same loss the one that compresses well is
    less surprising.

    So it says less of a member to have a low loss on it: `aaaa...` scores lower.
    """
    dull, rich = "a" * 60, "The quick brown fox jumps over the lazy dog, 0123456789 times"
    scores = zlib_score([6.0, 6.0], [dull, rich])
    expected = [-6 / len(zlib.compress(dull.encode())), -6 / len(zlib.compress(rich.encode()))]
    assert scores == near(expected)
    assert scores[0] < scores[1]
    assert zlib_score([6.0], ["half a pair: \ud83d"]).shape == (
        1,
    )  # rows read from JSON may hold it


def test_min_k_by_hand():
    """Of 5 tokens the lowest 40 % are 2, -4 and -3: mean -3.5. 20 % is 1.

    Of 2 tokens it is still 1.
    """
    rows = [np.array([-1, -4, -0.5, -3, -2]), np.array([-1, -2])]
    assert min_k(rows, 0.4) == near([-3.5, -2])
    assert min_k(rows) == near([-4, -2])
    assert min_k(rows, 1) == near([-2.1, -1.5])  # all tokens: minus the mean loss
    assert min_k([-np.arange(100.0)], 0.29) == near([-np.arange(71, 100).mean()])


def test_min_k_plus_plus_by_hand():
    """Tokens z = (-1 + 2) / 0.5 = 2, (-4 + 2) / 1 = -2, (-3 + 1) / 4 = -0.5: the lowest two of
    three mean -1.25.
    """
    rows = [np.array([-1, -4, -3.0])], [np.array([-2, -2, -1.0])], [np.array([0.5, 1, 4])]
    assert min_k_plus_plus(*rows, k=0.7) == near([-1.25])
    assert min_k_plus_plus(*rows) == near([-2])


def test_min_k_plus_plus_of_the_model_itself_is_centred():
    """Of all tokens drawn from p the mean of z is 0 and that of z^2 is 1, by definition of mu and
    sigma.
    """
    p = np.array([0.5, 0.25, 0.125, 0.125])
    mu = p @ np.log(p)
    sigma = math.sqrt(p @ (np.log(p) - mu) ** 2)
    z = [min_k_plus_plus([[math.log(own)]], [[mu]], [[sigma]])[0] for own in p]
    assert p @ z == pytest.approx(0, abs=1e-14)
    assert p @ np.square(z) == pytest.approx(1, abs=1e-14)


def test_min_k_plus_plus_where_nothing_was_uncertain():
    """A distribution of one token has spread 0: its own token is as likely as expected, any other
    beyond all others.
    """
    assert min_k_plus_plus([[0.0]], [[0.0]], [[0.0]]) == [0]
    assert min_k_plus_plus([[-20.0]], [[0.0]], [[0.0]]) == [-20 / 1e-12]


def test_privleak_by_hand():
    """In MUSE's orientation areas are 1 - auc: 0.1 against 0.4 is (0.1 - 0.4) / 0.4 = -75 %."""
    assert privleak(0.9, 0.6) == near(-75)
    assert privleak(0.6, 0.6) == 0
    assert privleak(1, 0.5) == -100  # never unlearned, as the target models of MUSE's table
    assert (
        privleak(0, 0.5) == 100
    )  # over-unlearned: forgotten rows look less familiar than unseen ones
