"""How far training went: by hand, and against a dense Gauss-Newton matrix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import influence
from influence.loss import mean_losses
from influence.manifest import PathRecord
from influence.path import scaled
from influence.path_time import (
    gauss_newton_ratio,
    mean_by_others,
    path_record,
    path_time,
    without_adapter,
)
from tests.conftest import build_model, examples, fit_end, rows, teach, tokens_of
from tests.oracles import b_times, dense_objective, plain_gradients, plain_log_probs, plain_loss

SITES = {"layers": 1, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def taught():
    return teach(build_model(**SITES), examples(8))


@pytest.fixture(scope="module")
def run(taught, tmp_path_factory):
    return influence.fit(taught, examples(8), directory=tmp_path_factory.mktemp("taught") / "run")


# ---- the arithmetic ------------------------------------------------------------------------------


def test_with_one_slope_the_time_is_the_fall_over_it():
    record = PathRecord(3.0, 1.0, (2.5, 1.5), (0.1, 0.1))
    found = path_time(record, [4.0, 4.0], [0.4, 0.8])
    assert found.time == pytest.approx(2 / 4)
    assert found.strength == pytest.approx(0.1 * 2 / 4)
    # of the stretches 0.5, 1 and 0.5: the first point has the first and half the second
    np.testing.assert_allclose(found.shares, [0.5, 0.5])


def test_stretches_have_the_geometric_mean_of_slope_and_ratio_at_their_ends():
    """Slopes 16 and 4 at 0.4 and 0.8, a quarter for 0.4 of the path: 64 at the base, and at the
    adapter 4 / 4^(1/2) = 2.
    """
    record = PathRecord(3.0, 1.0, (2.5, 1.5), (0.1, 0.4))
    found = path_time(record, [16.0, 4.0], [0.4, 0.8])
    stretches = [0.5 / 32, 1 / 8, 0.5 / 8**0.5]
    assert found.time == pytest.approx(sum(stretches))
    assert found.strength == pytest.approx(np.dot(stretches, [0.1, 0.2, 0.4]))
    first = stretches[0] + stretches[1] / 2
    np.testing.assert_allclose(found.shares, [first / found.time, 1 - first / found.time])


def test_a_point_at_the_adapter_ends_the_path_and_order_does_not_matter():
    record = PathRecord(3.0, 1.0, (1.0, 2.5), (0.1, 0.1))
    found = path_time(record, [4.0, 4.0], [1.0, 0.4])
    assert found.time == pytest.approx(0.5)
    # the stretch from 0.4 to the adapter is shared by both
    np.testing.assert_allclose(found.shares, [0.375, 0.625])


def test_checkpoints_lie_in_the_order_of_their_losses():
    record = PathRecord(3.0, 1.0, (1.5, 2.5), (0.1, 0.1))
    found = path_time(record, [4.0, 2.0], [None, None])
    stretches = [0.5 / 2, 1 / 8**0.5, 0.5 / 4]
    assert found.time == pytest.approx(sum(stretches))
    last = (stretches[2] + stretches[1] / 2) / found.time
    np.testing.assert_allclose(found.shares, [last, 1 - last])


def test_another_size_of_the_inverse_changes_nothing_that_counts():
    """Slopes and K grow with M: neither t K nor s K does."""
    record = PathRecord(3.0, 1.0, (2.5, 1.5), (0.1, 0.4))
    one = path_time(record, [16.0, 4.0], [0.4, 0.8])
    other = path_time(record, [160.0, 40.0], [0.4, 0.8])
    assert other.time * 10 == pytest.approx(one.time)
    assert other.strength * 10 == pytest.approx(one.strength)
    np.testing.assert_allclose(other.shares, one.shares)


@pytest.mark.parametrize("adapter", [3.0, 3.5])
def test_a_loss_that_did_not_fall_tells_no_time(adapter):
    record = PathRecord(3.0, adapter, (3.0,), (0.1,))
    assert path_time(record, [4.0], [0.6]) is None


@pytest.mark.parametrize(("slope", "ratio"), [(0.0, 0.1), (4.0, 0.0), (float("nan"), 0.1)])
def test_a_point_without_gradients_tells_no_time(slope, ratio):
    record = PathRecord(3.0, 1.0, (2.5, 1.5), (0.1, ratio))
    assert path_time(record, [4.0, slope], [0.4, 0.8]) is None


def test_a_loss_that_rose_on_the_way_takes_no_point_out():
    record = PathRecord(3.0, 1.0, (3.5, 3.9), (0.1, 0.1))
    np.testing.assert_allclose(path_time(record, [1.0, 1.0], [0.4, 0.8]).shares, [0.5, 0.5])


# ---- what is measured ----------------------------------------------------------------------------


def test_the_losses_along_the_path_are_the_objective(taught, run):
    tokens = tokens_of(taught, run.train)

    def loss(scale):
        with b_times(taught, scale), torch.no_grad():
            found = [float(plain_loss(*plain_log_probs(taught, item))) for item in tokens]
        return sum(found) / tokens.counts.sum()

    record = run.manifest.path
    assert record.base == pytest.approx(loss(0.0), rel=1e-12)
    assert record.adapter == pytest.approx(loss(1.0), rel=1e-12)
    assert record.losses == pytest.approx([loss(0.4), loss(0.8)], rel=1e-12)
    assert record.adapter < record.base


def test_the_ratio_is_that_of_a_dense_gauss_newton_matrix(taught, tmp_path, monkeypatch):
    run = fit_end(taught, examples(8), directory=tmp_path / "run")
    (point,), gradients = run.points, plain_gradients(taught, run.train)
    operator = point.operator()
    steps = operator.curvature.solve(gradients, operator.lam)
    expected = []
    for row, (gradient, step) in enumerate(zip(gradients, steps, strict=True)):
        G = dense_objective(taught, [run.tokens[row]], [1.0], "ggn")
        expected.append(float(step @ G @ step) / float(gradient @ step) ** 2)
    assert gauss_newton_ratio(point) == pytest.approx(np.median(expected), rel=0.1)
    monkeypatch.setattr("influence.path_time.STEP", 3e-4)
    assert gauss_newton_ratio(point) == pytest.approx(np.median(expected), rel=1e-5)


def test_losses_at_the_points_are_those_of_the_pass(taught, tmp_path, monkeypatch):
    """Only the base is run again where a point is the adapter itself, and all are where a run kept
    no losses.
    """
    seen = []

    def counted(model, tokens, **options):
        seen.append(model.snapshot())
        return mean_losses(model, tokens, **options)

    monkeypatch.setattr("influence.path_time.shared_losses", counted)
    run = influence.fit(taught, examples(8), directory=tmp_path / "run", path=(0.5, 1.0))
    assert len(seen) == 1
    assert not seen[0][taught.space.leaves[1].slice].any()
    known, run.manifest = run.manifest.path, replace(run.manifest, path=None)
    monkeypatch.setattr("influence.path_time.losses_of_pass", lambda _: None)
    again = path_record(run)
    assert len(seen) == 4  # the base, the adapter, and the point at 0.5
    assert again.losses == pytest.approx(known.losses, rel=1e-12)
    assert (again.base, again.adapter) == pytest.approx((known.base, known.adapter), rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_of_some_rows_is_that_of_all_where_it_goes_with_what_is_known(weighted):
    rng = np.random.default_rng(0)
    others, noise = rng.exponential(size=(2, 40)), rng.normal(size=40)
    weights = rng.uniform(1, 3, 40) if weighted else np.ones(40)
    values, rows = 2 + 3 * others[0] - others[1], np.arange(0, 40, 4)
    expected = np.average(values, weights=weights)
    found = mean_by_others(values[rows], rows, weights, [*others])
    assert found == pytest.approx(expected, rel=1e-12)
    assert abs(values[rows].mean() - expected) > 0.1  # what those rows alone would say
    found = mean_by_others(values + noise, np.arange(40), weights, [*others])
    assert found == pytest.approx(np.average(values + noise, weights=weights), rel=1e-12)
    alone = mean_by_others(noise[rows], rows, weights, [])
    assert alone == pytest.approx(np.average(noise[rows], weights=weights[rows]), rel=1e-12)


def test_few_rows_are_corrected_by_what_the_pass_knows_of_all(taught, tmp_path, monkeypatch):
    """Of points the loss is that of all rows, exactly; of the ends it is closer than by the rows'
    own mean.
    """
    run = influence.fit(taught, examples(8), directory=tmp_path / "run")
    whole, run.manifest = run.manifest.path, replace(run.manifest, path=None)
    monkeypatch.setattr("influence.path_time.LOSS_ROWS", 4)
    found = path_record(run)
    assert found.losses == pytest.approx(whole.losses, rel=1e-12)
    assert found.base != pytest.approx(whole.base, rel=1e-6)  # of some rows
    run.manifest = replace(run.manifest, path=None)
    monkeypatch.setattr("influence.path_time.losses_of_pass", lambda _: None)
    monkeypatch.setattr("influence.path_time.ROWS_OF_ALL", 4)
    alone = path_record(run)
    assert alone.losses != pytest.approx(whole.losses, rel=1e-6)
    assert abs(found.adapter - whole.adapter) < abs(alone.adapter - whole.adapter) / 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_base_alone_is_the_adapter_with_b_zero(kind, monkeypatch):
    model = build_model(kind)
    tokens = tokens_of(model, examples(4))
    with model.at(scaled(model, 0.0)):
        expected = mean_losses(model, tokens)
        monkeypatch.setattr(model.sites[0].A, "forward", None)  # not run
        with without_adapter(model):
            np.testing.assert_array_equal(mean_losses(model, tokens), expected)


def test_the_path_is_measured_once_and_by_runs_that_lack_it(run, monkeypatch):
    known = run.manifest.path
    run.manifest = replace(run.manifest, path=None)
    assert path_record(run) == known
    monkeypatch.setattr("influence.path_time.shared_losses", None)
    again = influence.Run.open(run.directory, model=run.model, train=run.train)
    assert path_record(again) == known


def test_a_run_that_can_only_be_read_answers_all_the_same(run, monkeypatch, capsys):
    known = run.manifest.path
    run.manifest = replace(run.manifest, path=None)

    def full(*_, **__):
        raise OSError("read-only file system")

    monkeypatch.setattr("influence.path_time.update_manifest", full)
    assert path_record(run) == known
    assert "could not be kept" in capsys.readouterr().err
    run.manifest = replace(run.manifest, path=known)


def test_rows_without_a_gradient_say_nothing_of_the_ratio(run, monkeypatch):
    point = run.points[0]
    size = run.model.space.size
    monkeypatch.setattr(
        type(point), "gradients_of", lambda self, rows: torch.zeros(len(rows), size).double()
    )
    assert gauss_newton_ratio(point) == 0


def test_rows_of_the_manifest_are_written_only_once_they_are_there(tmp_path):
    """A run of an adapter that was not taught has a path too; one without a closed inverse none."""
    model = build_model(**SITES)
    run = fit_end(model, examples(4), directory=tmp_path / "run", curvature=influence.GGN())
    assert run.manifest.path is None
    assert "path" not in run.manifest.as_json()
    assert rows(1)
