"""GeN: how long a step along a direction is, by the retained rows' loss along it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from unlearn.methods import automatic_rate
from unlearn.methods.automatic_rate import next_rate, parabola_minimum


def points() -> np.ndarray:
    return np.array([*automatic_rate.POINTS, 0.0])


def test_gens_parabola_by_hand():
    """L(-1) = 7, L(0) = 4, L(1) = 3: s* = (7 - 3) / 2 (3 - 8 + 7) = 1.

    That is the minimum of s^2 - 2 s + 4.
    """
    assert parabola_minimum(np.array([-1.0, 0.0, 1.0]), np.array([7.0, 4.0, 3.0])) == pytest.approx(
        1, abs=1e-12
    )


def test_the_rate_is_the_exact_line_minimum_of_a_quadratic():
    """On L(x) = x^T H x / 2 - b^T x along u: s* = -(grad L . u) / (u^T H u), for random positive H
    of six conditions.
    """
    generator = np.random.default_rng(0)
    for number in range(200):
        n = 2 + number % 6
        rotation = np.linalg.qr(generator.normal(size=(n, n)))[0]
        H = rotation @ np.diag(10.0 ** generator.uniform(-3, number % 6 - 2, n)) @ rotation.T
        b, x = generator.normal(size=(2, n))
        gradient = H @ x - b
        exact = 10.0 ** generator.uniform(-1, 1)  # where along the move the minimum shall be
        u = -gradient - 0.5 * np.linalg.norm(gradient) * generator.normal(size=n) / n
        if gradient @ u >= 0:
            continue
        u *= -(gradient @ u) / (u @ H @ u) / exact
        losses = np.array([(x + s * u) @ H @ (x + s * u) / 2 - b @ (x + s * u) for s in points()])
        assert parabola_minimum(points(), losses) == pytest.approx(exact, rel=1e-6)
        change = (
            min(max(exact, 0.5), 2.0) ** 0.5
        )  # clipped to a factor 2, then the geometric mean with the present rate
        assert next_rate(0.03, points(), losses) == pytest.approx(0.03 * change, rel=1e-6)


def test_looks_reach_the_exact_minimum_of_a_quadratic():
    """L(x) = (x - 7)^2 from x = 0 along 1 with rate 0.1: the rate goes to 7, by at most sqrt 2."""
    rate, ratios = 0.1, []
    for _ in range(60):
        losses = np.array([(rate * s - 7) ** 2 for s in points()])
        new = next_rate(rate, points(), losses)
        ratios.append(new / rate)
        rate = new
    assert max(ratios) == pytest.approx(2**0.5)
    assert rate == pytest.approx(7, rel=1e-6)
    assert next_rate(
        7.0, points(), np.array([(7 * s - 7) ** 2 for s in points()])
    ) == pytest.approx(7, rel=1e-12)


def unexplained() -> np.ndarray:
    """What no parabola through the points explains at all."""
    wiggle, design = np.array([1.0, -1.0, 1.0, -1.0, 0.0]), np.vander(points(), 3)
    return wiggle - design @ np.linalg.lstsq(design, wiggle, rcond=None)[0]


def refused() -> dict[str, np.ndarray]:
    s = points()
    return {
        "concave, falling": 4 - s - 0.3 * s**2,
        "rising": 4 + s + s**2,
        "rising and concave": 4 + s - s**2,
        "no parabola": 4 - 0.1 * s + 0.1 * s**2 + unexplained(),
        "a step": np.where(s > 0.7, 1.0, 4.0) + 0.01 * s**2,
        "NaN": np.array([4.0, 3.0, np.nan, 2.0, 3.0]),
    }


@pytest.mark.parametrize("name", refused())
def test_looks_that_show_no_minimum_ahead_leave_the_rate_alone(name):
    losses = refused()[name]
    assert parabola_minimum(points(), losses) is None
    assert next_rate(0.03, points(), losses) == 0.03


@pytest.mark.parametrize(
    "losses", [4 - points(), 4 + points() ** 2], ids=["a line", "at its minimum"]
)
def test_degenerate_parabolas_do_not_run_away(losses):
    """Rounding may give either sign.

    A line's minimum is infinitely far ahead, one's own place is a rate of zero: within the clip.
    """
    assert 0.5**0.5 * 0.03 - 1e-15 <= next_rate(0.03, points(), losses) <= 2**0.5 * 0.03 + 1e-15


def test_infinite_losses_are_no_minimum_and_no_warning():
    for losses in ([np.inf, 4.0, 3.0, 3.0, 3.5], [np.inf] * 5, [5.0, 4.0, 3.0, np.inf, 3.5]):
        assert parabola_minimum(points(), np.array(losses)) is None


def test_flat_losses_are_no_minimum():
    """Where the move changes nothing the rate may not drift on rounding."""
    for level in np.random.default_rng(0).uniform(0.1, 5, 500):
        assert next_rate(0.03, points(), np.full(5, level)) == 0.03


def test_the_fit_must_explain_ninety_five_hundredths_of_the_variance():
    s, wiggle = points(), unexplained()
    parabola = 4 - s + s**2
    spread = ((parabola - parabola.mean()) ** 2).sum()
    for share, accepted in ((0.04, True), (0.06, False)):
        scale = np.sqrt(share / (1 - share) * spread / (wiggle @ wiggle))
        minimum = parabola_minimum(s, parabola + scale * wiggle)
        assert (minimum is not None) == accepted
        if accepted:
            assert minimum == pytest.approx(0.5, rel=1e-9)  # the rest is orthogonal: same parabola


def test_far_minima_are_clipped_and_smoothed():
    """s* = 10 and s* = 0.01: at most a factor 2 either way, and of that the root."""
    assert next_rate(1.0, points(), (points() - 10) ** 2) == pytest.approx(2**0.5, rel=1e-12)
    assert next_rate(1.0, points(), (points() - 0.01) ** 2) == pytest.approx(0.5**0.5, rel=1e-12)
    assert next_rate(1.0, points(), (points() - 1.5) ** 2) == pytest.approx(1.5**0.5, rel=1e-9)
    assert isinstance(json.loads(json.dumps(next_rate(1.0, points(), (points() - 1) ** 2))), float)


def test_a_shifted_or_scaled_loss_has_the_same_rate():
    losses = (points() - 1.3) ** 2
    for changed in (losses + 100, losses * 1e-4, losses * 1e6 + 3):
        assert next_rate(0.2, points(), changed) == pytest.approx(
            next_rate(0.2, points(), losses), rel=1e-6
        )
