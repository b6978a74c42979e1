"""The linear datamodeling score: sign, cases by hand, a slow oracle, errors, files, the testbed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from analysis.metrics import lds, lds_difference, read_truth
from analysis.stats import spearman
from influence.errors import InputError
from tests.analysis.metrics.lds_cases import LOSSES, MASKS, SCORES, world

TESTBED = os.environ.get("LORA_INFLUENCE_TESTBED")


def oracle(scores, masks, losses):
    """LDS of every query by plain loops and scipy. Shares nothing with the code under test."""
    values = []
    for q in range(len(scores)):
        predicted = [sum(-scores[q, i] for i in range(masks.shape[1]) if row[i]) for row in masks]
        values.append(scipy.stats.spearmanr(predicted, losses[:, q])[0])
    return np.array(values)


def test_by_hand():
    """One query, three examples with scores 3, 1, -2. Four subsets.

    {0}: -3, {1}: -1, {2}: +2, {0, 1}: -4, so predicted ranks 2, 3, 4, 1. Losses 0.5, 0.9, 0.7, 0.1
    have ranks 2, 4, 3, 1. Differences 0, -1, 1, 0: rho = 1 - 6 * 2 / (4 * 15) = 0.8.
    """
    masks = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=bool)
    result = lds([[3, 1, -2]], masks, [[0.5], [0.9], [0.7], [0.1]])
    assert result.per_query == pytest.approx([0.8], abs=1e-15)
    assert result.mean == pytest.approx(0.8, abs=1e-15)
    assert (result.subsets, result.queries, result.undefined) == (4, 1, 0)


def test_the_score_is_the_change_of_loss_on_removal():
    """The loss is high in the subsets that lack a proponent (positive score): +1, reversed scores
    -1.
    """
    scores, masks, losses = world(noise=0)
    right, wrong = lds(scores, masks, losses), lds(-scores, masks, losses)
    assert (right.per_query == 1).all()
    assert (wrong.per_query == -1).all()
    assert (right.interval.low, right.interval.high) == (1, 1)
    proponent = np.array([[1.0, 0.0, 0.0]])
    masks = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=bool)
    assert lds(proponent, masks, np.array([[0.2], [0.9], [0.2]])).mean == 1


def test_equals_the_oracle():
    scores, masks, losses = world()
    result = lds(scores.astype(np.float32), masks, losses)
    expected = oracle(scores.astype(np.float32).astype(np.float64), masks, losses)
    np.testing.assert_allclose(result.per_query, expected, rtol=0, atol=1e-12)
    assert result.mean == pytest.approx(expected.mean(), abs=1e-12)


def test_the_interval_resamples_subsets_and_keeps_every_query():
    scores, masks, losses = world()
    rng = np.random.default_rng(7)
    draws = [rng.integers(12, size=12) for _ in range(50)]
    means = [oracle(scores, masks[s], losses[s]).mean() for s in draws]
    interval = lds(scores, masks, losses, resamples=50, seed=7, level=0.8).interval
    assert (interval.low, interval.high) == pytest.approx(np.quantile(means, [0.1, 0.9]), abs=1e-12)
    assert (interval.level, interval.resamples, interval.seed) == (0.8, 50, 7)


def test_scale_unit_and_order_of_the_subsets_do_not_matter():
    scores, masks, losses = world()
    shuffled = np.random.default_rng(3).permutation(12)
    expected = lds(scores, masks, losses, resamples=1).per_query
    for again in (
        lds(1e-9 * scores, masks, losses, resamples=1),
        lds(scores, masks, np.exp(losses), resamples=1),
        lds(scores, masks[shuffled], losses[shuffled], resamples=1),
    ):
        np.testing.assert_allclose(again.per_query, expected, rtol=0, atol=1e-12)


def test_constant_losses_leave_their_query_out_and_count_it():
    scores, masks, losses = world()
    losses[:, 2] = 0.7
    result = lds(scores, masks, losses)
    assert np.isnan(result.per_query).tolist() == [False, False, True, False, False, False]
    assert result.undefined == 1
    others = [0, 1, 3, 4, 5]
    alone = lds(scores[others], masks, losses[:, others])
    assert result.mean == pytest.approx(alone.mean, abs=1e-15)
    assert result.interval == alone.interval


def test_nothing_defined_is_nan_not_a_crash():
    scores, masks, _ = world()
    result = lds(scores, masks, np.ones((12, 6)), resamples=5)
    assert np.isnan(result.mean)
    assert np.isnan(result.interval.low)
    assert (result.undefined, result.interval.undefined) == (6, 5)


def test_predictions_that_differ_by_rounding_are_ties():
    """Ten times 0.1 sums to different last bits in different orders.

    Ranking those would be ranking noise.
    """
    _, masks, losses = world()
    assert np.isnan(lds(np.full((6, 20), 0.1), masks, losses, resamples=1).per_query).all()
    assert lds(np.zeros((6, 20)), masks, losses, resamples=1).undefined == 6


def test_difference_is_paired():
    scores, masks, losses = world(queries=10, train=40, subsets=24, noise=3.0)
    other = scores + 0.3 * np.random.default_rng(1).normal(size=scores.shape)
    a, b = lds(scores, masks, losses), lds(other, masks, losses)
    difference = lds_difference(scores, other, masks, losses)
    np.testing.assert_allclose(difference.per_query, a.per_query - b.per_query, rtol=0, atol=1e-15)
    assert difference.mean == pytest.approx(a.mean - b.mean, abs=1e-12)
    width = difference.interval.high - difference.interval.low
    unpaired = np.hypot(a.interval.high - a.interval.low, b.interval.high - b.interval.low)
    assert width < 0.6 * unpaired  # what two independent sets of retrained models would give
    rng = np.random.default_rng(0)
    draws = [rng.integers(24, size=24) for _ in range(20)]
    by_hand = [
        np.mean(oracle(scores, masks[s], losses[s]) - oracle(other, masks[s], losses[s]))
        for s in draws
    ]
    interval = lds_difference(scores, other, masks, losses, resamples=20).interval
    assert (interval.low, interval.high) == pytest.approx(
        np.quantile(by_hand, [0.025, 0.975]), abs=1e-12
    )


def test_difference_of_a_method_with_itself_is_zero_and_of_opposites_two():
    scores, masks, losses = world(noise=0)
    same = lds_difference(scores, scores, masks, losses)
    assert (same.mean, same.interval.low, same.interval.high) == (0, 0, 0)
    assert lds_difference(scores, -scores, masks, losses).mean == 2


def test_difference_leaves_out_what_either_method_leaves_undefined():
    scores, masks, losses = world()
    silent = scores.copy()
    silent[4] = 0
    for pair, sign in (((scores, silent), 1), ((silent, scores), -1)):
        result = lds_difference(*pair, masks, losses)
        assert result.undefined == 1
        assert np.isnan(result.per_query[4])
        assert sign * result.mean == 0


def _with(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("scores", "masks", "losses", "sentence"),
    [
        (
            SCORES.T,
            MASKS,
            LOSSES,
            r"scores has shape \(20, 6\); .*\[queries, train\] = \(6, 20\) was expected: "
            r"pass one row",
        ),
        (SCORES[0], MASKS, LOSSES, r"scores has shape \(20,\)"),
        (
            SCORES,
            MASKS,
            LOSSES.T,
            r"masks has shape \(12, 20\) and losses \(6, 12\); expected \[subsets, train\] and .*: "
            r"give both",
        ),
        (SCORES, MASKS[0], LOSSES, r"masks has shape \(20,\) and losses \(12, 6\)"),
        (
            SCORES,
            MASKS.astype(int),
            LOSSES,
            r"masks has type int64; expected bool, .*: turn 0 and 1 into bool",
        ),
        (
            SCORES,
            MASKS[:2],
            LOSSES[:2],
            r"There are 2 retrained models; expected at least 3 .*: retrain on more",
        ),
        (
            _with(SCORES, (1, 3), np.nan),
            MASKS,
            LOSSES,
            r"scores has 1 NaN or infinite values, the first at \(1, 3\); expected finite numbers: "
            r"look for",
        ),
        (
            SCORES,
            MASKS,
            _with(LOSSES, (0, 5), np.inf),
            r"losses has 1 NaN .* first at \(0, 5\); .*: measure those again",
        ),
    ],
)
def test_errors_say_given_expected_and_what_to_do(scores, masks, losses, sentence):
    with pytest.raises(InputError, match=sentence):
        lds(scores, masks, losses)


def test_difference_names_the_method_that_is_wrong():
    with pytest.raises(InputError, match=r"scores_b has shape \(6, 19\)"):
        lds_difference(SCORES, SCORES[:, 1:], MASKS, LOSSES)


def test_forty_by_forty_with_a_thousand_resamples_is_quick():
    """Takes 0.3 s alone on one core. CPU time, so that other work on the machine does not count."""
    scores, masks, losses = world(queries=40, train=200, subsets=40)
    start = time.process_time()
    lds(scores, masks, losses)
    assert time.process_time() - start < 2


def test_read_truth_gives_back_what_was_written(tmp_path):
    np.savez(
        tmp_path / "truth.npz",
        masks=MASKS.astype(np.uint8),
        query_loss=LOSSES.astype(np.float32),
        train_loss=np.ones((12, 20)),
        full_loss=np.zeros(6),
    )
    truth = read_truth(tmp_path / "truth.npz")
    assert truth.masks.dtype == bool
    np.testing.assert_array_equal(truth.masks, MASKS)
    np.testing.assert_array_equal(truth.query_loss, LOSSES.astype(np.float32))
    assert truth.train_loss is not None
    assert truth.train_loss.shape == (12, 20)
    assert list(truth.extra) == ["full_loss"]


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (
            {"mask": MASKS, "loss": LOSSES},
            r"has no masks and no query_loss; it holds loss, mask, expected masks .*: write",
        ),
        ({"masks": MASKS}, r"has no query_loss; it holds masks"),
        ({}, r"has no masks and no query_loss; it holds nothing"),
        (
            {"masks": MASKS, "query_loss": LOSSES[:5]},
            r"truth\.npz: masks has shape \(12, 20\) and losses \(5, 6\)",
        ),
        (
            {"masks": 2 * MASKS, "query_loss": LOSSES},
            r"truth\.npz: masks has type int64; expected bool",
        ),
        (
            {"masks": MASKS, "query_loss": LOSSES, "train_loss": LOSSES},
            r"truth\.npz: train_loss has shape \(12, 6\); expected that of masks, \(12, 20\)",
        ),
        (
            {"masks": MASKS, "query_loss": LOSSES.astype(object)},
            r"cannot be read .*; expected an \.npz of plain arrays",
        ),
    ],
)
def test_read_truth_says_what_is_wrong_with_the_file(tmp_path, arrays, sentence):
    np.savez(tmp_path / "truth.npz", **arrays)
    with pytest.raises(InputError, match=sentence):
        read_truth(tmp_path / "truth.npz")


def test_read_truth_says_what_is_wrong_when_it_is_no_npz(tmp_path):
    with pytest.raises(
        InputError, match=r"There is no file .*nowhere\.npz; expected an \.npz .*: check the path"
    ):
        read_truth(tmp_path / "nowhere.npz")
    np.save(tmp_path / "one.npy", LOSSES)
    np.savez(tmp_path / "whole.npz", masks=MASKS, query_loss=LOSSES)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:200])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("masks")
    for name in ("one.npy", "cut.npz", "empty.npz", "text.npz", "."):
        with pytest.raises(
            InputError, match=r"cannot be read \(.+\); expected an \.npz of plain arrays: write one"
        ):
            read_truth(tmp_path / name)


@pytest.mark.skipif(not TESTBED, reason="LORA_INFLUENCE_TESTBED names no folder")
def test_testbed_seeds_agree_as_its_readme_says():
    """Two seeds on the same 24 halves agree at a mean Spearman of 0.45, the noise ceiling
    squared.
    """
    truth = read_truth(Path(str(TESTBED)) / "truth.npz")
    again = truth.extra["query_loss_seed1"]
    assert spearman(truth.query_loss[:24], again, axis=0).mean() == pytest.approx(0.45, abs=0.01)


@pytest.mark.skipif(not TESTBED, reason="LORA_INFLUENCE_TESTBED names no folder")
def test_testbed_datamodel_fitted_on_its_own_losses_scores_one():
    """40 losses and 200 unknowns: least squares reproduces the losses, so as scores it must reach
    +1.
    """
    truth = read_truth(Path(str(TESTBED)) / "truth.npz")
    effect_of_keeping = np.linalg.pinv(truth.masks.astype(float)) @ truth.query_loss
    assert lds(
        -effect_of_keeping.T, truth.masks, truth.query_loss, resamples=10
    ).mean == pytest.approx(1, abs=1e-9)
