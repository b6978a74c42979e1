"""How two gradients become one, and how long a step along the result is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from unlearn.methods import automatic_rate
from unlearn.methods.automatic_rate import next_rate, parabola_minimum
from unlearn.methods.combine import Normalised, Sparse, Step, Weighted, unit

HERE = Step(0, 10, torch.zeros(2, dtype=torch.float64))


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- weighted ------------------------------------------------------------------------------------------------


def test_weighted_by_hand():
    """(1, 2) + 3 (10, -1) = (31, -1)."""
    forget, retain = vector(1, 2), vector(10, -1)
    assert Weighted(3.0)(forget, retain, HERE).tolist() == [31, -1]
    assert Weighted()(forget, retain, HERE).tolist() == [11, 1]
    assert Weighted(0.0)(forget, retain, HERE).tolist() == [1, 2]


def test_weighted_with_one_term_is_that_term():
    assert Weighted(3.0)(vector(1, 2), None, HERE).tolist() == [1, 2]
    assert Weighted(1.0)(None, vector(1, 2), HERE).tolist() == [1, 2]


# ---- normalised ----------------------------------------------------------------------------------------------


def test_normalised_by_hand():
    """The forget term is -CE, of gradient -g_F. g_F = (3, 4), g_R = (0, 2): g = -(3/5, 4/5) + (0, 1) = (-3/5, 1/5).

    <g_R, g> = 2/5 and <g_F, g> = -9/5 + 4/5 = -1: a step along -g lowers the retained and raises the forget loss.
    """
    assert Normalised()(-vector(3, 4), vector(0, 2), HERE).tolist() == pytest.approx(
        [-0.6, 0.2], abs=1e-15
    )


def test_ngdiff_never_raises_the_retained_loss_nor_lowers_the_forget_loss():
    """With c the cosine: <g_R, g> = |g_R| (1 - c) >= 0 and <g_F, g> = |g_F| (c - 1) <= 0, whatever their lengths."""
    generator = torch.Generator().manual_seed(0)
    for number in range(1000):
        size = 1 + number % 40
        g_f, g_r = torch.randn(2, size, generator=generator, dtype=torch.float64)
        g_f, g_r = g_f * 10.0 ** (number % 9 - 4), g_r * 10.0 ** (number % 7 - 3)
        g = Normalised()(-g_f, g_r, HERE)
        cosine = float(g_f @ g_r / g_f.norm() / g_r.norm())
        for of, wanted in ((g_r, 1 - cosine), (g_f, cosine - 1)):
            assert float(of @ g / of.norm()) == pytest.approx(wanted, abs=1e-13)
        assert float(g_r @ g) >= -1e-14 * float(g_r.norm())
        assert float(g_f @ g) <= 1e-14 * float(g_f.norm())
        assert float(g.norm()) <= 2 + 1e-12


def test_ngdiff_stalls_only_where_both_gradients_are_parallel():
    """Parallel: both inequalities are equalities and g = 0. Antiparallel: |g| = 2. Orthogonal: |g| = sqrt 2."""
    g_r = vector(1, -2, 3)
    for scale in (1e-6, 1.0, 1e6):
        assert float(Normalised()(-scale * g_r, g_r, HERE).norm()) < 1e-15
    assert float(Normalised()(5 * g_r, g_r, HERE).norm()) == pytest.approx(2)
    assert float(Normalised()(vector(2, 1, 0), g_r, HERE).norm()) == pytest.approx(2**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_gradient_stays_zero(dtype):
    zero, one = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    assert torch.equal(unit(zero), zero)
    assert torch.equal(Normalised()(zero, one, HERE), unit(one))
    assert torch.equal(Normalised()(one, zero, HERE), unit(one))
    assert torch.equal(Normalised()(zero, zero, HERE), zero)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_unit_vectors_have_length_one_in_float32(scale):
    """Squares of such entries leave float32's range; a length of 1e13 (or 0) in place of 1 would be one giant step (or none)."""
    found = unit(torch.full((5,), scale, dtype=torch.float32))
    assert float(found.double().norm()) == pytest.approx(1, rel=1e-5)


# ---- sparse --------------------------------------------------------------------------------------------------


def test_sparse_by_hand():
    """c = 0.5, step 3 of 10: the penalty's share is 0.5 (1 - 0.3) = 0.35, towards zero from either side; zeros stay alone."""
    theta = vector(2, -1e-9, 0)
    found = Sparse(0.5)(None, vector(1, 1, 1), Step(3, 10, theta))
    assert found.tolist() == pytest.approx([1.35, 0.65, 1], abs=1e-15)


def test_the_penalty_falls_linearly_to_zero():
    shares = [float(Sparse(2.0)(None, vector(0), Step(t, 8, vector(1)))) for t in range(8)]
    assert shares[0] == 2
    assert np.diff(shares) == pytest.approx(-0.25, abs=1e-15)
    assert shares[-1] == pytest.approx(0.25)  # and 0 after the last step


def test_combinations_leave_their_inputs_alone():
    forget, retain = vector(1, 2), vector(3, 4)
    for combine in (Weighted(2.0), Normalised(), Sparse()):
        found = combine(forget, retain, Step(0, 10, vector(5, 6)))
        found.mul_(100)
        assert (forget.tolist(), retain.tolist()) == ([1, 2], [3, 4])


# ---- GeN -----------------------------------------------------------------------------------------------------


def points() -> np.ndarray:
    return np.array([*automatic_rate.POINTS, 0.0])


def test_gens_parabola_by_hand():
    """L(-1) = 7, L(0) = 4, L(1) = 3: s* = (7 - 3) / 2 (3 - 8 + 7) = 1, the minimum of s^2 - 2 s + 4."""
    assert parabola_minimum(np.array([-1.0, 0.0, 1.0]), np.array([7.0, 4.0, 3.0])) == pytest.approx(
        1, abs=1e-12
    )


def test_the_rate_is_the_exact_line_minimum_of_a_quadratic():
    """On L(x) = x^T H x / 2 - b^T x along u: s* = -(grad L . u) / (u^T H u), for random positive H of six conditions."""
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
    """L(x) = (x - 7)^2 from x = 0 along 1 with rate 0.1: look after look the rate goes to 7, by at most sqrt 2 a time."""
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
    """Rounding may give either sign; a line's minimum is infinitely far ahead, one's own place is a rate of zero: within the clip."""
    assert 0.5**0.5 * 0.03 - 1e-15 <= next_rate(0.03, points(), losses) <= 2**0.5 * 0.03 + 1e-15


def test_infinite_losses_are_no_minimum_and_no_warning():
    for losses in ([np.inf, 4.0, 3.0, 3.0, 3.5], [np.inf] * 5, [5.0, 4.0, 3.0, np.inf, 3.5]):
        assert parabola_minimum(points(), np.array(losses)) is None


def test_flat_losses_are_no_minimum():
    """Where the move changes nothing there is nothing to fit but rounding: the rate may not drift on it."""
    for level in np.random.default_rng(0).uniform(0.1, 5, 500):
        assert next_rate(0.03, points(), np.full(5, level)) == 0.03


def test_the_fit_must_explain_ninety_five_hundredths_of_the_variance():
    s, wiggle = points(), unexplained()
    parabola = 4 - s + s**2
    spread = ((parabola - parabola.mean()) ** 2).sum()
    for share, accepted in ((0.04, True), (0.06, False)):
        scale = np.sqrt(share / (1 - share) * spread / (wiggle @ wiggle))
        found = parabola_minimum(s, parabola + scale * wiggle)
        assert (found is not None) == accepted
        if accepted:
            assert found == pytest.approx(0.5, rel=1e-9)  # the rest is orthogonal: same parabola


def test_far_minima_are_clipped_and_smoothed():
    """s* = 10 and s* = 0.01: at most a factor 2 either way, and of that the root: sqrt 2 and 1/sqrt 2."""
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
