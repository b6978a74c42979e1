"""Counterfactual memorization, C-score and reliability, by plain loops and known rows."""

from __future__ import annotations

import math
from statistics import mean, stdev

import numpy as np
import pytest
from scipy.stats import spearmanr

from analysis.studies.counterfactual import c_score, counterfactual_memorization, reliability
from influence.errors import InputError
from tests.analysis.studies.helpers import subsets


def test_counterfactual_memorization_and_c_score_are_plain_loops():
    losses, masks = subsets()
    found, score = counterfactual_memorization(losses, masks), c_score(losses, masks)
    for i in range(7):
        out = [float(losses[k, i]) for k in range(9) if not masks[k, i]]
        within = [float(losses[k, i]) for k in range(9) if masks[k, i]]
        assert (found.without[i], found.trained[i]) == (len(out), len(within))
        expected = mean(out) - mean(within) if out and within else math.nan
        error = math.nan
        if min(len(out), len(within)) > 1:
            error = math.sqrt(stdev(out) ** 2 / len(out) + stdev(within) ** 2 / len(within))
        assert found.values[i] == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert found.errors[i] == pytest.approx(error, rel=1e-12, nan_ok=True)
        likelihood = mean(math.exp(-loss) for loss in out) if out else math.nan
        assert score[i] == pytest.approx(likelihood, rel=1e-12, nan_ok=True)
    assert np.isnan(found.values).tolist() == [True, True] + [False] * 5
    assert np.isnan(found.errors[:3]).all()
    assert not np.isnan(found.errors).all()
    assert np.isnan(score).tolist() == [True] + [False] * 6


def test_what_was_planted_is_found_and_its_error_is_that_of_fresh_draws():
    """mem(x) = 0, 1, 2, ... nats whatever x's own loss.

    The spread over many sets of models is the standard error.
    """
    rng = np.random.default_rng(1)
    planted = np.arange(5.0)
    draws, errors = [], []
    for _ in range(400):
        masks = rng.random((30, 5)) < 0.5
        losses = rng.gamma(2, 1, 5) + 5 + planted * ~masks + rng.normal(0, 0.5, (30, 5))
        found = counterfactual_memorization(losses, masks)
        draws.append(found.values)
        errors.append(found.errors)
    np.testing.assert_allclose(np.mean(draws, axis=0), planted, atol=0.04)
    np.testing.assert_allclose(np.std(draws, axis=0), np.mean(errors, axis=0), rtol=0.15)
    masks = rng.random((30, 5)) < 0.5
    losses = 1 + planted * ~masks
    np.testing.assert_allclose(
        counterfactual_memorization(losses, masks).values, planted, atol=1e-12
    )
    np.testing.assert_allclose(
        counterfactual_memorization(losses, ~masks).values, -planted, atol=1e-12
    )
    np.testing.assert_allclose(c_score(losses, masks), np.exp(-1 - planted), rtol=1e-12)


def test_reliability_is_a_plain_loop():
    losses, masks = subsets(n=12)
    rng, found = np.random.default_rng(5), []
    for _ in range(20):
        order = rng.permutation(9)
        halves = []
        for half in (order[:4], order[4:]):
            values = []
            for i in range(12):
                out = [losses[k, i] for k in half if not masks[k, i]]
                within = [losses[k, i] for k in half if masks[k, i]]
                values.append(np.mean(out) - np.mean(within) if out and within else math.nan)
            halves.append(values)
        both = [i for i in range(12) if not math.isnan(halves[0][i] + halves[1][i])]
        found.append(
            spearmanr([halves[0][i] for i in both], [halves[1][i] for i in both]).statistic
        )
    result = reliability(losses, masks, 5, splits=20)
    assert result.half == pytest.approx(np.mean(found), rel=1e-12)
    assert (result.models, result.splits) == (9, 20)
    assert result == reliability(losses, masks, 5, splits=20)
    assert result != reliability(losses, masks, 6, splits=20)


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_reliability_and_ceiling_are_those_of_ten_thousand_known_rows(noise):
    """mem ~ N(0, 1) measured with variance noise^2 (1 / k_without + 1 / k_trained): the share that
    is mem, and its root.
    """
    rng = np.random.default_rng(2)
    n, models = 10_000, 24
    planted = rng.normal(size=n)
    masks = np.argsort(rng.random((models, n)), axis=0) < models // 2
    losses = 9 + planted * ~masks + rng.normal(0, noise, (models, n))
    found = reliability(losses, masks, splits=5)
    share = 1 / (1 + noise**2 * 4 / models)
    assert found.value == pytest.approx(share, abs=0.04)  # halves are not balanced in each row
    measured = counterfactual_memorization(losses, masks).values
    assert spearmanr(planted, measured).statistic == pytest.approx(found.ceiling, abs=0.02)


def test_reliability_of_noise_of_one_row_and_of_too_few_models():
    rng = np.random.default_rng(3)
    masks = rng.random((20, 500)) < 0.5
    noise = reliability(rng.random((20, 500)), masks, splits=20)
    assert abs(noise.half) < 0.05
    assert noise.value <= 0.1
    opposed = reliability(
        np.array([[1.0, 2, 3], [0, 0, 0], [3, 2, 1], [0, 0, 0]]),
        np.array([[0] * 3, [1] * 3] * 2, bool),
    )
    assert opposed.half < 0
    assert (opposed.value, opposed.ceiling) == (0, 0)
    for losses, few in ((rng.random((20, 1)), masks[:, :1]), (rng.random((3, 500)), masks[:3])):
        unknown = reliability(losses, few)
        assert math.isnan(unknown.half)
        assert math.isnan(unknown.value)
        assert math.isnan(unknown.ceiling)


def test_arrays_that_do_not_belong_together_are_refused():
    losses, masks = subsets()
    for function in (counterfactual_memorization, c_score, reliability):
        with pytest.raises(
            InputError, match=r"masks has shape \(9, 6\) and type bool; expected \(9, 7\)"
        ):
            function(losses, masks[:, :6])
        with pytest.raises(InputError, match="type int64; expected"):
            function(losses, masks.astype(np.int64))
        with pytest.raises(InputError, match="NaN or infinite"):
            function(np.where(masks, losses, np.nan), masks)
        with pytest.raises(InputError, match=r"expected \[n, k\]"):
            function(losses[0], masks[0])
    with pytest.raises(InputError, match="splits 0"):
        reliability(losses, masks, splits=0)
