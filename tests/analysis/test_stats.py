"""Rank correlation against a loop over scipy. The bootstrap against cases whose answer is known."""

from typing import Any

import numpy as np
import pytest
import scipy.stats

from analysis.stats import Interval, bootstrap_interval, spearman
from influence.errors import InputError


def test_spearman_by_hand_with_a_tie():
    """Ranks of (10, 20, 20, 40) are 1, 2.5, 2.5, 4. Centred -1.5, 0, 0, 1.5.

    Ranks of (1, 3, 2, 4) centred are -1.5, 0.5, -0.5, 1.5. Product 4.5, squares 4.5 and 5:
    rho = 4.5 / sqrt(22.5).
    """
    assert spearman([10, 20, 20, 40], [1, 3, 2, 4]) == pytest.approx(4.5 / np.sqrt(22.5), abs=1e-15)


def test_spearman_equals_a_loop_over_scipy():
    rng = np.random.default_rng(0)
    x = rng.integers(8, size=(3, 5, 17)).astype(float)  # many ties
    y = rng.normal(size=(3, 5, 17))
    expected = np.empty((3, 5))
    for i in np.ndindex(3, 5):
        reference: Any = scipy.stats.spearmanr(x[i], y[i])
        expected[i] = reference.statistic
    np.testing.assert_allclose(spearman(x, y), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        spearman(np.moveaxis(x, -1, 0), np.moveaxis(y, -1, 0), axis=0), expected, rtol=0, atol=1e-12
    )


def test_spearman_broadcasts_the_other_axes():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 4, 9)), rng.normal(size=(4, 9))
    np.testing.assert_array_equal(spearman(x, y), np.stack([spearman(x[0], y), spearman(x[1], y)]))


def test_spearman_is_exactly_one_for_any_increasing_map():
    x = np.random.default_rng(2).normal(size=(50, 23))
    assert (spearman(x, np.exp(x)) == 1).all()
    assert (spearman(x, -(x**3)) == -1).all()


def test_spearman_of_a_constant_or_nan_is_nan_without_a_warning():
    x = [[1, 1, 1], [1, 2, np.nan], [1, 2, 3]]
    np.testing.assert_array_equal(spearman(x, [1, 2, 3]), [np.nan, np.nan, 1])
    np.testing.assert_array_equal(spearman([1, 2, 3], x), [np.nan, np.nan, 1])


def test_spearman_refuses_unequal_lengths():
    with pytest.raises(
        InputError, match=r"given 4 and 3 values along axis -1; expected pairs: pass two arrays"
    ):
        spearman(np.zeros((2, 4)), np.zeros((2, 3)))


def test_interval_of_one_unit_is_its_value():
    assert bootstrap_interval(
        lambda i: 2.0 + i.sum(), 1, resamples=10, level=0.9, seed=3
    ) == Interval(2.0, 2.0, 0.9, 10, 3)


def test_interval_of_two_units_by_hand():
    """Two units 0 and 1 give resample means 0, 1/2, 1 with odds 1 : 2 : 1.

    The inner 40 % of that is 1/2 alone, and the inner 80 % reaches both ends.
    """
    values = np.array([0.0, 1.0])
    inner = bootstrap_interval(lambda i: values[i].mean(), 2, level=0.4)
    outer = bootstrap_interval(lambda i: values[i].mean(), 2, level=0.8)
    assert (inner.low, inner.high, outer.low, outer.high) == (0.5, 0.5, 0.0, 1.0)


def test_bootstrap_covers_the_mean_of_a_normal_sample():
    """At n = 40 the percentile interval, 1.96 sd / sqrt(n) to each side with sd dividing by n,
    covers 94 %.

    `P(|t_39| < 1.96 sqrt(39 / 40)) = 0.94`; the standard error of 400 trials is 0.012.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        sample = rng.normal(3.0, 2.0, size=40)
        interval = bootstrap_interval(
            lambda i, x=sample: x[i].mean(-1), 40, together=400, resamples=400, seed=trial
        )
        covered += interval.low <= 3.0 <= interval.high
    assert 0.90 <= covered / 400 <= 0.975


def test_bootstrap_width_is_that_of_theory():
    sample = np.random.default_rng(1).normal(size=500)
    interval = bootstrap_interval(lambda i: sample[i].mean(), 500, resamples=4000, level=0.9)
    theory = 2 * 1.6449 * sample.std() / np.sqrt(500)
    assert interval.high - interval.low == pytest.approx(theory, rel=0.06)


def test_same_seed_same_interval():
    values = np.random.default_rng(4).normal(size=30)

    def mean(indices):
        return values[indices].mean()

    assert bootstrap_interval(mean, 30, seed=5) == bootstrap_interval(mean, 30, seed=5)
    assert bootstrap_interval(mean, 30, seed=5) != bootstrap_interval(mean, 30, seed=6)


@pytest.mark.parametrize("n", [2, 7, 40, 1000])
@pytest.mark.parametrize("together", [1, 3, 50, 1000])
def test_resamples_taken_together_are_those_taken_one_by_one(n, together):
    values = np.random.default_rng(4).integers(9, size=n)  # whose sums are exact
    one_by_one = bootstrap_interval(lambda i: values[i].sum(), n, resamples=101, seed=5)
    assert one_by_one == bootstrap_interval(
        lambda i: values[i].sum(-1), n, together=together, resamples=101, seed=5
    )


def test_undefined_resamples_are_counted_and_left_out():
    def undefined_when_all_are_one_unit(i):
        return np.nan if len(set(i.tolist())) == 1 else 1.0

    interval = bootstrap_interval(undefined_when_all_are_one_unit, 2)
    assert (interval.low, interval.high) == (1.0, 1.0)
    assert interval.undefined == pytest.approx(500, abs=80)
    nothing = bootstrap_interval(lambda _: np.nan, 2, resamples=7)
    assert np.isnan(nothing.low)
    assert np.isnan(nothing.high)
    assert nothing.undefined == 7


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n": 0}, r"n = 0 units and 1000 resamples; expected at least one of each: give"),
        ({"n": 3, "resamples": 0}, r"n = 3 units and 0 resamples; expected at least one of each"),
        (
            {"n": 3, "level": 95},
            r"level 95; expected a number strictly between 0 and 1: write 95 % as 0\.95",
        ),
    ],
)
def test_bootstrap_says_what_is_wrong_with_the_call(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        bootstrap_interval(lambda _: 0.0, **arguments)
