"""Exposure: values by hand, sorting as an oracle, laws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from analysis.metrics import exposure, exposure_of, generalized_exposure, relative_exposure
from tests.analysis.metrics.helpers import LN2, near


def test_exposure_by_hand():
    """Of 1024 candidates rank 1 is 10 bits, rank 2 is 9, the last is 0."""
    assert exposure([1, 2, 1024], 1024).tolist() == [10, 9, 0]
    assert exposure(1, 8) == 3


def test_exposure_of_by_hand():
    """Losses 1, 2, 9 among three others 1.5, 2, 3: ranks 1, 2.5 (tied with one), 4 of 4: 2, log2
    1.6, 0 bits.
    """
    result = exposure_of([1, 2, 9], np.tile([1.5, 2, 3], (3, 1)))
    assert result.values == near([2, math.log2(1.6), 0])
    assert result.value == near((2 + math.log2(1.6)) / 3)


def test_exposure_of_equals_sorting():
    rng = np.random.default_rng(0)
    losses, others = rng.normal(size=6), rng.normal(size=(6, 31))
    ranks = [1 + sorted([own, *row]).index(own) for own, row in zip(losses, others, strict=True)]
    assert exposure_of(losses, others).values == near([5 - math.log2(rank) for rank in ranks])


def test_exposure_of_a_model_that_cannot_tell():
    """All m + 1 tie at the rank (m + 2) / 2: below 1 bit, whatever m."""
    for m in (1, 3, 1000):
        value = exposure_of([2.0], np.full((1, m), 2.0)).value
        assert value == near(math.log2(2 * (m + 1) / (m + 2)))
        assert value < 1


def test_generalized_exposure_by_hand():
    """p = 1/2 against references 1/4 and 1/8, mean 3/16: log2(8/3).

    The second row is 1/8 against 1/8: 0.
    """
    result = generalized_exposure([LN2, 3 * LN2], [[2 * LN2, 3 * LN2], [3 * LN2, 3 * LN2]])
    assert result.values == pytest.approx([math.log2(8 / 3), 0], abs=1e-14)
    assert result.value == near(math.log2(8 / 3) / 2)


def test_generalized_exposure_is_zero_as_if_never_seen_and_one_bit_per_halving():
    losses = np.random.default_rng(0).uniform(1, 6, size=9)
    assert generalized_exposure(losses, [losses]).values == pytest.approx(np.zeros(9), abs=1e-14)
    assert generalized_exposure(losses - LN2, [losses]).values == pytest.approx(
        np.ones(9), abs=1e-14
    )
    assert (
        generalized_exposure(losses + 1, [losses, losses + 0.5]).values < 0
    ).all()  # over-unlearned


def test_the_reference_is_the_mean_of_likelihoods_not_of_losses():
    """References 1 and 0 in likelihood (losses 0 and 5000, which underflows): mean 1/2, so p = 1/2
    is 0 bits.
    """
    assert generalized_exposure([LN2], [[0.0], [5000.0]]).values == pytest.approx([0], abs=1e-14)
    assert generalized_exposure([5000.0], [[5001.0]]).values == pytest.approx([1 / LN2], rel=1e-12)


def test_relative_exposure_by_hand():
    """Unseen rows of likelihood 1/2 and 1/8, mean 5/16.

    Rows of 1 and 5/16: log2(16/5) and 0 bits.
    """
    result = relative_exposure([0.0, -math.log(5 / 16)], [LN2, 3 * LN2])
    assert result.values == pytest.approx([math.log2(16 / 5), 0], abs=1e-14)
    assert result.value == near(math.log2(16 / 5) / 2)


def test_relative_exposure_is_generalized_exposure_where_unseen_rows_say_what_references_would():
    losses, comparable = np.array([1.0, 2.5, 4.0]), np.array([3.0, 3.5, 5.0])
    reference = np.tile(
        comparable[:, None], (1, 3)
    )  # three models that find every row as hard as some unseen row
    expected = generalized_exposure(losses, reference)
    np.testing.assert_allclose(
        relative_exposure(losses, comparable).values, expected.values, rtol=0, atol=1e-14
    )
