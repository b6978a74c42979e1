"""Weights of rows against their definitions: every batch written out, and simulated trainers."""

from itertools import combinations

import numpy as np
import pytest

import influence
from influence.row_weights import RowWeights, batch_size


def enumerated(counts, size):
    """`E[1 / N_batch] M / n` of every row, from all batches of `size` rows that hold it."""
    n = len(counts)
    out = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        tokens = [
            counts[i] + sum(counts[j] for j in rest) for rest in combinations(others, size - 1)
        ]
        out.append(np.mean(1 / np.array(tokens, dtype=float)) * size / n)
    return np.array(out)


@pytest.mark.parametrize(
    "counts", [[3, 1, 4, 1, 5, 9, 2, 6], [1, 1, 1, 1, 1], [1, 500, 2, 3000, 7, 7, 40], [8]]
)
def test_batch_weights_are_those_of_all_batches_written_out(counts):
    for size in range(1, len(counts) + 1):
        fast = RowWeights(f"batch:{size}", np.array(counts)).fitted()
        np.testing.assert_allclose(fast, enumerated(counts, size), rtol=1e-12)


def test_one_row_a_batch_is_example_and_all_rows_are_token():
    counts = np.array([5, 1, 9, 9, 2])
    for size, reduction in ((1, "example"), (5, "token"), (70, "token")):
        batched = RowWeights(f"batch:{size}", counts).fitted()
        np.testing.assert_allclose(batched, RowWeights(reduction, counts).fitted(), rtol=1e-13)
    np.testing.assert_array_equal(RowWeights("token", counts).fitted(), np.full(5, 1 / 26))
    np.testing.assert_allclose(RowWeights("example", counts).fitted(), 1 / (5 * counts))


def test_a_trainers_average_gradient_is_that_of_the_objective():
    """The mean over many epochs of batches of `token mean`s, of rows of lognormal lengths.

    2,000 epochs of 60 batches: a row's mean of `1 / N_batch` has a relative error of about 1 %.
    """
    generator = np.random.default_rng(0)
    counts = np.maximum(1, np.exp(generator.normal(3, 1, 240)).astype(int))
    simulated = np.zeros(240)
    for _ in range(2000):
        batches = generator.permutation(240).reshape(60, 4)
        simulated[batches] += (1 / counts[batches].sum(1))[:, None] / 60 / 2000
    weights = RowWeights("batch:4", counts).fitted()
    assert np.abs(simulated / weights - 1).max() < 0.05
    assert np.abs(simulated / weights - 1).mean() < 0.01
    order = np.argsort(counts)
    short, long = (weights[part].mean() for part in (order[:24], order[-24:]))
    assert 2 < short / long < 4  # what the reduction is for
    assert abs((weights * counts).sum() - 1) < 1e-12  # every batch's weights sum to 1


def test_a_changed_row_alone_gets_another_weight():
    counts = np.array([3, 1, 4, 1, 5, 9])
    rule = RowWeights("batch:3", counts)
    np.testing.assert_allclose(
        rule.changed(np.array([4, 2]), counts[[4, 2]]), rule.fitted()[[4, 2]], rtol=1e-14
    )
    (changed,) = rule.changed(np.array([5]), np.array([2]))
    np.testing.assert_allclose(changed, enumerated([3, 1, 4, 1, 5, 2], 3)[5], rtol=1e-12)
    for reduction, weight in (("token", 1 / 23), ("example", 1 / (6 * 2))):
        (changed,) = RowWeights(reduction, counts).changed(np.array([5]), np.array([2]))
        assert changed == pytest.approx(weight, rel=1e-15)


def test_many_long_rows_are_weighed_in_seconds_without_overflow():
    counts = np.random.default_rng(1).integers(1, 2000, 4000)
    weights = RowWeights("batch:32", counts).fitted()
    assert np.isfinite(weights).all()
    assert abs((weights * counts).sum() - 1) < 1e-9
    assert (np.diff(weights[np.argsort(counts, kind="stable")]) <= 1e-18).all()


@pytest.mark.parametrize(
    "reduction", ["row", "batch", "batch:", "batch:0", "batch:-1", "batch:2.5"]
)
def test_other_reductions_are_refused(reduction):
    with pytest.raises(influence.errors.InputError, match="expected token, example, or batch:M"):
        batch_size(reduction)
