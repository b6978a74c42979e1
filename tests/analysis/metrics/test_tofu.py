"""TOFU's measures: values by hand, counted interleavings, laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from analysis.metrics import (
    UtilitySet,
    answer_probability,
    forget_quality,
    model_utility,
    option_probability,
    truth_ratio,
)
from tests.analysis.metrics.helpers import LN2, near, samples


def test_truth_ratio_by_hand():
    """Wrong answers of 1/4 and 1/16, geometric mean 1/8, against a paraphrase of 1/2: R = 1/4."""
    assert truth_ratio([LN2], [[2 * LN2, 4 * LN2]]) == near([0.25])


def test_truth_ratio_equals_the_product_of_probabilities():
    rng = np.random.default_rng(0)
    paraphrased, perturbed = rng.uniform(0, 4, 7), rng.uniform(0, 4, (7, 5))
    wrong = [math.prod(math.exp(-loss) for loss in row) ** (1 / 5) for row in perturbed]
    expected = [p / math.exp(-loss) for p, loss in zip(wrong, paraphrased, strict=True)]
    np.testing.assert_allclose(truth_ratio(paraphrased, perturbed), expected, rtol=1e-13)


def test_probabilities_by_hand():
    """1/2 against options of 1/4 and 1/4 is half of all."""
    assert answer_probability([0, LN2]) == near([1, 0.5])
    assert option_probability([LN2], [[2 * LN2, 2 * LN2]]) == near([0.5])


def ks_by_counting(n, m, statistic):
    """Share of all ways to interleave two samples whose distribution functions are at least
    `statistic` apart.
    """
    reached = 0
    for places in itertools.combinations(range(n + m), n):
        own = np.isin(np.arange(n + m), places)
        distance = np.abs(np.cumsum(own) / n - np.cumsum(~own) / m).max()
        reached += distance >= statistic - 1e-12
    return reached / math.comb(n + m, n)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 3), (2, 7)])
def test_forget_quality_counts_interleavings(n, m):
    for seed in range(4):
        a, b = (np.exp(x) for x in samples(seed, n, m))
        everything = np.concatenate([a, b])
        distance = max(abs((a <= x).mean() - (b <= x).mean()) for x in everything)
        result = forget_quality(a, b)
        assert result.statistic == near(distance)
        assert result.value == pytest.approx(ks_by_counting(n, m, distance), rel=1e-10)
        assert (result.n, result.m) == (n, m)
        assert result.value >= result.floor * (1 - 1e-10)


def test_forget_quality_of_the_same_sample_is_one_and_of_separate_ones_its_floor():
    a, _ = samples()
    a = np.exp(a)
    assert forget_quality(a, a).value == 1
    for n, m in ((1, 1), (3, 3), (23, 23), (23, 17), (40, 8)):
        a, b = np.linspace(1, 2, n), np.linspace(3, 4, m)
        for result in (forget_quality(a, b), forget_quality(1 / a, 1 / b)):
            assert result.statistic == 1
            assert result.value == pytest.approx(result.floor, rel=1e-10)
    assert forget_quality([1.0], [2.0]).floor == 1  # one row each never shows anything


@pytest.mark.parametrize(("n", "floor"), [(40, 1.9e-23), (200, 1.9e-119), (400, 1.1e-239)])
def test_floor_of_the_published_sizes(n, floor):
    """2 / binomial(2n, n), to the two digits that are known of it."""
    result = forget_quality(np.linspace(1, 2, n), np.linspace(3, 4, n))
    assert float(f"{result.floor:.1e}") == floor
    assert result.value == pytest.approx(result.floor, rel=1e-9)


def test_floor_below_the_smallest_float_is_zero():
    result = forget_quality(np.linspace(1, 2, 700), np.linspace(3, 4, 700))
    assert (result.value, result.floor, result.statistic) == (0, 0, 1)


def full_utility():
    sets = {}
    for i, name in enumerate(("retain", "real_authors", "world_facts")):
        sets[name] = UtilitySet([0.5, 0.5 + 0.1 * i], [1, 0.2 * i], [0.5, 3])
    return sets


def test_model_utility_by_hand():
    """Means: probability 0.5, 0.55, 0.6.

    Rouge 0.5, 0.6, 0.7. Max(0, 1 - R) of 0.5 and 3: 0.25 three times.
    """
    result = model_utility(full_utility())
    expected = [0.5, 0.5, 0.25, 0.55, 0.6, 0.25, 0.6, 0.7, 0.25]
    assert list(result.parts.values()) == near(expected)
    assert list(result.parts)[:4] == [
        "retain probability",
        "retain rouge",
        "retain truth_ratio",
        "real_authors probability",
    ]
    assert result.value == near(9 / sum(1 / part for part in expected))
    assert result.missing == ()


def test_model_utility_of_fewer_parts_names_the_missing():
    """0.5 and 0.25 have the harmonic mean 2 / (2 + 4) = 1/3."""
    result = model_utility({"retain": UtilitySet(probability=[0.5], truth_ratio=[0.75])})
    assert result.value == near(1 / 3)
    assert list(result.parts) == ["retain probability", "retain truth_ratio"]
    assert len(result.missing) == 7
    assert result.missing[:2] == ("retain rouge", "real_authors probability")


def test_model_utility_is_zero_where_a_part_is_and_between_its_extremes_else():
    sets = full_utility()
    result = model_utility(sets)
    assert min(result.parts.values()) < result.value < max(result.parts.values())
    sets["retain"] = UtilitySet([0.5], [0.5], [1.0, 2.0])  # every max(0, 1 - R) is 0
    assert model_utility(sets).value == 0
