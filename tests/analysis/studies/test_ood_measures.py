"""Exposure, steps, damage and leverage of planted rows, by hand and by a dense solve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import influence
from analysis.studies.ood_measures import (
    exposures,
    leverage,
    matched_damage,
    original_alone,
    steps_to_levels,
)
from influence.errors import InputError
from tests.analysis.studies.ood_cases import measured
from tests.conftest import build_model, examples, fit_end
from unlearn.difficulty.measured import Protocol, measure


def test_exposures_by_hand():
    """Row 0 goes from 1 to 3 nats, row 1 stops between its levels, row 2 began beyond its
    target.
    """
    losses = [[1, 2.5, 3.5, np.nan], [1, 2.2, 2.4, 2.5], [4, np.nan, np.nan, np.nan]]
    heldout = [[[2.5, 4], [3, 5]], [[1, 1], [np.nan, np.nan]], [[2, 2], [2, 2]]]
    found = exposures(
        measured([1, 1, 4], [3, 5, 3], losses, heldout=heldout), [[2, 3, 4], [4, 3, 4]]
    )
    np.testing.assert_array_equal(found.levels, [0, 0.5, 1])
    np.testing.assert_array_equal(found.losses, [[1, 2, 3], [1, np.nan, np.nan], [4, 4, 4]])

    def bits(loss: float, others: list[float]) -> float:
        return -loss / math.log(2) - math.log2(
            sum(math.exp(-other) for other in others) / len(others)
        )

    for level, loss in enumerate([1, 2, 3]):
        assert found.generalized[0, level] == pytest.approx(bits(loss, [2, 4]), rel=1e-12)
        assert found.relative[0, level] == pytest.approx(
            bits(loss, [[2, 2], [2.5, 4], [3, 5]][level]), rel=1e-12
        )
    assert found.generalized[1, 0] == pytest.approx(2 / math.log(2))
    assert np.isnan(found.generalized[1, 1:]).all()
    assert np.isnan(found.relative[1, 1:]).all()
    np.testing.assert_allclose(found.generalized[2], 0, atol=1e-12)
    with pytest.raises(InputError, match="losses of 2 rows; expected 3"):
        exposures(measured([1, 1, 4], [3, 5, 3], losses), [[2, 3]])


def test_exposure_without_heldout_rows():
    found = exposures(measured([1], [3], [[1, 4]]), [[2]])
    assert np.isnan(found.relative).all()
    np.testing.assert_allclose(found.generalized[0] * math.log(2), [1, 0, -1], atol=1e-12)


def test_steps_to_levels_by_hand():
    losses = [[1, 1.5, 3.5, np.nan], [1, 2, 2.2, 2.5], [4, np.nan, np.nan, np.nan]]
    found = steps_to_levels(measured([1, 1, 4], [3, 5, 3], losses))
    np.testing.assert_allclose(found, [[0, 1.25, 1.75], [0, np.nan, np.nan], [0, 0, 0]])


def test_the_way_is_that_of_the_ascent(tmp_path):
    model = build_model(layers=1, target_modules=["q_proj", "v_proj"])
    run = fit_end(model, examples(8), directory=tmp_path / "run", store="never")
    found = measure(run, run.train.ids[:3], protocol=Protocol(lr=0.03, steps=10), sample_rows=5)
    np.testing.assert_allclose(
        steps_to_levels(found)[:, -1], np.where(np.isinf(found.steps), np.nan, found.steps)
    )
    exposed = exposures(found, found.target[None])
    np.testing.assert_array_equal(np.isnan(exposed.generalized[:, -1]), np.isinf(found.steps))
    assert np.isfinite(found.steps).any()
    np.testing.assert_allclose(np.nan_to_num(np.minimum(exposed.generalized[:, -1], 0)), 0, atol=2)
    known = run.train.ids
    assert original_alone(found, known).damage.tolist() == found.damage.tolist()
    some = found.sample[:3]
    kept = original_alone(found, some)
    np.testing.assert_allclose(kept.damage, np.nanmean(found.retained[:, -1, :3], axis=1))
    with pytest.raises(InputError, match="none of the 5 training rows"):
        original_alone(found, ["nobody"])


def test_leverage_is_that_of_a_dense_solve(tmp_path):
    """Gradients by one backward a row, the curvature column by column."""
    model = build_model(layers=1, target_modules=["q_proj", "v_proj"])
    run = influence.fit(model, examples(6), path=(0.5, 0.8), directory=tmp_path / "run")
    new = examples(4, seed=3)
    found = leverage(run, new)
    point = run.points[-1]
    size = model.space.size
    matrix = point.operator().matvec(torch.eye(size, dtype=torch.float64)).numpy()
    with model.at(point.place.theta):
        for row, value in zip(run.tokenized(new), found, strict=True):
            for parameter in model.parameters:
                parameter.requires_grad_(True)
            ids = torch.from_numpy(row.input_ids)[None]
            losses = torch.nn.functional.cross_entropy(
                model.model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
            )
            gradients = torch.autograd.grad(
                losses[torch.from_numpy(row.supervised[1:])].mean(), model.parameters
            )
            g = model.space.flatten(list(gradients)).numpy()
            assert value == pytest.approx(g @ np.linalg.solve(matrix, g), rel=1e-8)
    assert (found > 0).all()


def test_matched_damage_by_hand():
    """Row 1 went 4 nats, its partner 2: at 2 nats row 1 was half way, with damage 0.1.

    Row 0 has no damage left to go.
    """
    curve = np.array([[0, 0.2, 0.6], [0, 0.1, 0.9], [0, 0.3, 0.5]])
    gap = np.array([2.0, 4.0, -1.0])
    own, theirs = matched_damage(np.array([0, 0.5, 1]), gap, curve, np.array([0, 0, 0]))
    np.testing.assert_allclose(own[:2], [0.6, 0.1])
    np.testing.assert_allclose(theirs, [0.6, 0.6, 0])
