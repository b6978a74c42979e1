"""The factor of measured edits: measured over predicted rise, through the origin."""

from __future__ import annotations

import numpy as np
import pytest

import influence
from influence.calibration import Edits, calibrate_once, measured_edits, measured_factor, some_rows
from influence.loss import mean_losses
from influence.setting import Setting
from tests.conftest import build_model, examples
from tests.oracles import plain_gradients, plain_mean


def test_the_factor_and_the_selectivity_of_edits_by_hand():
    """Two edited rows among three probes: predicted rises 1 and 2, measured 3 and 4.

    factor = (1 * 3 + 2 * 4) / (1 + 4) = 2.2; the other changes are 1, 1, 2, 0, their mean is 1,
    and the mean rise of the edited rows 3.5.
    """
    predicted = np.array([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
    measured = np.array([[3.0, -1.0], [1.0, 4.0], [-2.0, 0.0]])
    edits = Edits(np.array([4, 7]), np.array([4, 7, 9]), np.ones(2), predicted, measured)
    assert edits.factor == pytest.approx(2.2)
    assert edits.selectivity == pytest.approx(3.5)


@pytest.fixture(scope="module", params=["always", "never"])
def run(request, tmp_path_factory):
    model = build_model("gpt2", layers=1, target_modules=["attn.c_attn"])
    directory = tmp_path_factory.mktemp("calibrated") / "run"
    return influence.fit(
        model, examples(9), directory=directory, path=(0.4, 0.8), store=request.param
    )


def test_edits_are_measured_as_a_loop_measures_them(run):
    """Each row's own direction, the gradients of mean losses, and losses after moves by hand."""
    setting = Setting.of(run, calibrated=False)
    rows, probes = np.array([4, 1]), np.array([2, 7])
    edits = measured_edits(setting, rows, probes)
    predicted = np.zeros((4, 2))
    deltas = 0
    for factor, (point, operator) in zip(setting.factors, setting.each(), strict=True):
        with run.model.at(point.place.theta):
            own = plain_gradients(run.model, run.train.select(rows))
            means = plain_gradients(run.model, run.train.select(edits.probes), plain_mean)
        solved = factor * run.weights[0] * operator.curvature.solve(own, operator.lam)
        predicted += (means @ solved.T).numpy()
        deltas = deltas + solved
    np.testing.assert_allclose(edits.predicted, predicted * edits.sizes, rtol=1e-6)
    tokens = run.tokens.select(edits.probes)
    before = mean_losses(run.model, tokens)
    for number, delta in enumerate(deltas):
        with run.model.moved(delta * edits.sizes[number]):
            after = mean_losses(run.model, tokens)
        np.testing.assert_allclose(edits.measured[:, number], after - before, atol=1e-9)


def test_the_factor_needs_the_edited_rows_alone(run):
    setting, rows = Setting.of(run, calibrated=False), some_rows(run, 3)
    assert measured_factor(setting, rows) == pytest.approx(
        measured_edits(setting, rows, rows).factor
    )


def test_the_scales_of_the_points_are_kept_with_the_calibration(run, monkeypatch):
    """Scores need no solve for them again; another damping does, and has its own."""
    calibrate_once(run)
    (calibration,) = run.manifest.calibration.values()
    expected = [point.scale(operator) for point, operator in Setting.of(run).each()]
    assert list(calibration.scales) == expected
    opened = influence.Run.open(run.directory, model=run.model, train=run.train)
    monkeypatch.setattr("influence.at_point.AtPoint.scale", None)
    np.testing.assert_array_equal(Setting.of(opened).scales, expected)
    with pytest.raises(TypeError, match="not callable"):
        Setting.of(opened, damping="mean:1")
