"""Optimizers of the ascent; a new one is one class, which every room takes."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from influence.errors import MismatchError
from tests.unlearn.difficulty.helpers import (
    HOLDOUT,
    base_loss,
    gradient_of,
    in_order,
    losses_of,
)
from unlearn.difficulty import SGD, Adam, Optimizer, Protocol, measure, predict, read_measured
from unlearn.difficulty import optimizers as module


@dataclass(frozen=True)
class Momentum(Optimizer):
    """Heavy-ball steps, known to this file alone: `v <- decay v + g`, `theta <- theta + lr v`."""

    name: ClassVar[str] = "momentum"
    decay: float = 0.9

    def begin(self, theta: Tensor) -> tuple[Tensor, ...]:
        return (torch.zeros_like(theta),)

    def step(self, gradient, state, taken, rate):
        speed = self.decay * state[0] + gradient
        return rate * speed, (speed,)


PROTOCOL = Protocol(Momentum(decay=0.5), 0.03, steps=30)
IDS = ["r0-1", "r0-3", "r0-5", "r0-6"]


def plain_ascent(run, row: int, protocol: Protocol) -> tuple[float, np.ndarray, Tensor]:
    """Steps, losses and end of one row's ascent, by torch.optim's own momentum."""
    theta = run.model.snapshot().requires_grad_(True)
    optimizer = torch.optim.SGD([theta], lr=protocol.rate, momentum=0.5, maximize=True)
    target, losses, before = base_loss(run.model, run.tokens[row]), [], theta.detach().clone()
    for number in range(protocol.steps + 1):
        with run.model.at(theta.detach()):
            losses.append(losses_of(run.model, [run.tokens[row]])[0])
            theta.grad = gradient_of(run, [row])
        if losses[-1] >= target:
            share = (target - losses[-2]) / (losses[-1] - losses[-2])
            end = before + share * (theta.detach() - before)
            return number - 1 + share, np.array(losses), end
        before = theta.detach().clone()
        optimizer.step()
    return np.inf, np.array(losses), before


def test_a_new_optimizer_is_measured_as_a_plain_loop_climbs(run):
    result = measure(run, IDS, protocol=PROTOCOL, sample_rows=6)
    assert np.isfinite(result.steps).sum() >= 3
    sample = [run.tokens[run.train.index(id)] for id in result.sample]
    before = losses_of(run.model, sample)
    for row, id in enumerate(IDS):
        steps, losses, end = plain_ascent(run, run.train.index(id), PROTOCOL)
        np.testing.assert_allclose(result.steps[row], steps, rtol=1e-8)
        np.testing.assert_allclose(result.losses[row, : len(losses)], losses, rtol=1e-9)
        assert np.isnan(result.losses[row, len(losses) :]).all()
        if np.isfinite(steps):
            with run.model.at(end):
                rises = losses_of(run.model, sample) - before
            counted = np.isfinite(result.retained[row, -1])
            np.testing.assert_allclose(result.damage[row], rises[counted].mean(), rtol=1e-6)


def test_a_new_optimizer_is_forecast(run):
    """With a gradient at every step its forecast is what is measured."""
    truth = measure(run, IDS, protocol=PROTOCOL, sample_rows=6)
    reached = np.isfinite(truth.steps)
    exact = predict(run, IDS, protocol=PROTOCOL, sample_rows=6, looks=10_000).table
    np.testing.assert_allclose(exact["steps"][reached], truth.steps[reached], rtol=1e-7)
    np.testing.assert_allclose(exact["damage"][reached], truth.damage[reached], rtol=1e-6)
    gradients = [gradient_of(run, [run.train.index(id)]) for id in IDS]
    rates = np.array([0.03 * float((gradient**2).sum()) for gradient in gradients])
    np.testing.assert_allclose(exact["first_order_steps"], exact["gap"] / rates, rtol=1e-8)
    longer = Protocol(PROTOCOL.optimizer, 0.03, steps=300)
    for looks in (1, 3):
        table = predict(run, IDS, protocol=longer, sample_rows=6, looks=looks).table
        in_order(table)
        assert np.isfinite(table["steps"]).sum() >= 3


def test_measurements_of_a_new_optimizer_are_its_own(run, tmp_path):
    out, options = tmp_path / "m.h5", {"ids": ["r0-3"], "sample_rows": 2, "holdout": HOLDOUT}
    result = measure(run, protocol=PROTOCOL, out=out, **options)
    assert result.protocol["optimizer"] == "momentum(decay=0.5)"
    assert result.protocol["lr"] == 0.03
    assert read_measured(out).protocol == predict(run, protocol=PROTOCOL, **options).protocol
    with pytest.raises(MismatchError, match="another request"):
        measure(run, protocol=Protocol(Momentum(decay=0.4), 0.03, steps=30), out=out, **options)


def test_no_other_file_compares_the_name_of_an_optimizer():
    """What depends on the optimizer is said in its class."""
    files = sorted(Path(module.__file__).parent.glob("*.py"))
    assert len(files) > 8
    for path in files:
        compared = [
            constant.value
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Compare)
            for constant in ast.walk(node)
            if isinstance(constant, ast.Constant)
        ]
        assert not {"adam", "sgd"} & set(compared), path.name


def test_the_first_rate_that_an_optimizer_does_not_write_out_is_that_of_its_step():
    gradient = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient[0] = 0
    for rule in (Adam(), SGD()):
        derived = Optimizer.first_rate(rule, gradient, 0.1)
        np.testing.assert_allclose(rule.first_rate(gradient, 0.1), derived, rtol=1e-6)


def test_the_lag_of_adam_grows_with_the_acceleration_and_falls_with_the_looks():
    """The walk is exp((ln a / looks)^1.5) times too long: e^8 with one look at a = e^4."""
    accelerations = np.exp([4.0, 1.0, 0.0, -1.0])
    expected = [[8.0, 1.0, 0.0, 0.0], [1.0, 0.125, 0.0, 0.0]]
    found = [Adam().log_lag(looks, accelerations) for looks in (1, 4)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_lag_of_sgd_falls_with_the_looks():
    lags = [float(np.exp(SGD().log_lag(looks, np.array([3.0]))[0])) for looks in (1, 2, 3, 4)]
    assert lags == pytest.approx([5.0, 1.5, 1.15, 1.1125])
    assert SGD().log_lag(10_000, np.ones(2)) == pytest.approx(0, abs=1e-3)


def test_an_optimizer_that_was_never_measured_has_no_lag_and_the_widest_interval():
    assert Momentum().log_lag(1, np.array([5.0, 1.0])).tolist() == [0, 0]
    for looks in (1, 3, 5):
        others = [rule.log_width(looks, np.zeros(1))[0] for rule in (Adam(), SGD())]
        assert Momentum().log_width(looks, np.zeros(1))[0] >= max(others)


@pytest.mark.parametrize("rule", [Adam(), SGD(), Momentum()], ids=lambda rule: rule.name)
def test_fewer_looks_make_no_interval_narrower(rule):
    widths = [float(rule.log_width(looks, np.array([0.1]))[0]) for looks in (1, 2, 3, 5, 9)]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 2 * widths[2] > 0


def test_the_interval_of_adam_grows_with_the_lag():
    """0.02 and 0.4 of the lag's logarithm, with five looks or more."""
    lags = np.array([0.0, 0.1, 1.0])
    np.testing.assert_allclose(Adam().log_width(5, lags), [0.02, 0.06, 0.42])
    np.testing.assert_allclose(Adam().log_width(50, lags), [0.02, 0.06, 0.42])


def test_a_stride_of_gradient_steps_is_late_by_the_flow_s_own_clock():
    """dt = dl / r(l) with r linear in l: the integral from 0 to the rise, by quadrature."""
    rise, first, last = 0.7, 0.05, 0.4
    needed, _ = quad(lambda loss: 1 / (first + (last - first) * loss / rise), 0, rise)
    arrays = [np.array([value] * 2) for value in (rise, first, last)]
    arrays[0][1] = -0.1  # a loss that fell tells nothing
    np.testing.assert_allclose(SGD().lateness(np.array([9, 9]), *arrays), [9 - needed, 0])
    same = SGD().lateness(np.array([9]), np.array([0.4]), np.array([0.1]), np.array([0.1]))
    np.testing.assert_allclose(same, 5, rtol=1e-5)  # 0.4 at 0.1 a step are four
    assert Adam().lateness(np.array([9, 9]), *arrays).tolist() == [0, 0]


def test_an_optimizer_says_what_is_not_at_its_default():
    assert [str(rule) for rule in (Adam(), SGD(), Momentum())] == ["adam", "sgd", "momentum"]
    assert str(Momentum(0.1)) == "momentum(decay=0.1)"
    assert {"adam": Adam(), "sgd": SGD()} == module.OPTIMIZERS
