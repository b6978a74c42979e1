"""How two gradients become one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.unlearn.methods.helpers import close
from unlearn.methods import automatic_rate
from unlearn.methods.combine import Normalised, Sparse, Step, Weighted, unit
from unlearn.methods.terms import ascent, descent

HERE = Step(0, 10, torch.zeros(2, dtype=torch.float64))


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_weighted_by_hand():
    """(1, 2) + 3 (10, -1) = (31, -1)."""
    forget, retain = vector(1, 2), vector(10, -1)
    assert Weighted(3.0)(forget, retain, HERE).tolist() == [31, -1]
    assert Weighted()(forget, retain, HERE).tolist() == [11, 1]
    assert Weighted(0.0)(forget, retain, HERE).tolist() == [1, 2]


def test_weighted_with_one_term_is_that_term():
    assert Weighted(3.0)(vector(1, 2), None, HERE).tolist() == [1, 2]
    assert Weighted(1.0)(None, vector(1, 2), HERE).tolist() == [1, 2]


def test_normalised_by_hand():
    """The forget term is -CE, of gradient -g_F.

    g_F = (3, 4), g_R = (0, 2): g = -(3/5, 4/5) + (0, 1) = (-3/5, 1/5).

    <g_R, g> = 2/5 and <g_F, g> = -9/5 + 4/5 = -1: a step along -g lowers the retained and raises
    the forget loss.
    """
    assert Normalised()(-vector(3, 4), vector(0, 2), HERE).tolist() == pytest.approx(
        [-0.6, 0.2], abs=1e-15
    )


def test_ngdiff_never_raises_the_retained_loss_nor_lowers_the_forget_loss():
    """With c the cosine: <g_R, g> = |g_R| (1 - c) >= 0 and <g_F, g> = |g_F| (c - 1) <= 0, whatever
    their lengths.
    """
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
    """Parallel: both inequalities are equalities and g = 0.

    Antiparallel: |g| = 2. Orthogonal: |g| = sqrt 2.
    """
    g_r = vector(1, -2, 3)
    for scale in (1e-6, 1.0, 1e6):
        assert float(Normalised()(-scale * g_r, g_r, HERE).norm()) < 1e-15
    assert float(Normalised()(5 * g_r, g_r, HERE).norm()) == pytest.approx(2)
    assert float(Normalised()(vector(2, 1, 0), g_r, HERE).norm()) == pytest.approx(2**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_gradient_stays_zero(dtype):
    zero, ones = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    assert torch.equal(unit(zero), zero)
    assert torch.equal(Normalised()(zero, ones, HERE), unit(ones))
    assert torch.equal(Normalised()(ones, zero, HERE), unit(ones))
    assert torch.equal(Normalised()(zero, zero, HERE), zero)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-12, 1.0, 1e12, 1e25])
def test_unit_vectors_have_length_one_in_float32(scale):
    """Squares of such entries leave float32's range.

    A length of 1e13 (or 0) in place of 1 would be one giant step (or none).
    """
    combined = unit(torch.full((5,), scale, dtype=torch.float32))
    assert float(combined.double().norm()) == pytest.approx(1, rel=1e-5)


def test_sparse_by_hand():
    """c = 0.5, step 3 of 10: the penalty's share is 0.5 (1 - 0.3) = 0.35.

    It pulls towards zero from either side, and leaves zeros alone.
    """
    theta = vector(2, -1e-9, 0)
    combined = Sparse(0.5)(None, vector(1, 1, 1), Step(3, 10, theta))
    assert combined.tolist() == pytest.approx([1.35, 0.65, 1], abs=1e-15)


def test_the_penalty_falls_linearly_to_zero():
    shares = [float(Sparse(2.0)(None, vector(0), Step(t, 8, vector(1)))) for t in range(8)]
    assert shares[0] == 2
    assert np.diff(shares) == pytest.approx(-0.25, abs=1e-15)
    assert shares[-1] == pytest.approx(0.25)  # and 0 after the last step


def test_combinations_leave_their_inputs_alone():
    forget, retain = vector(1, 2), vector(3, 4)
    for combine in (Weighted(2.0), Normalised(), Sparse()):
        combined = combine(forget, retain, Step(0, 10, vector(5, 6)))
        combined.mul_(100)
        assert (forget.tolist(), retain.tolist()) == ([1, 2], [3, 4])


def test_both_combinations_are_what_they_are_called():
    forget, retain, step = (
        torch.tensor([3.0, 4.0]),
        torch.tensor([0.0, 2.0]),
        Step(0, 1, torch.zeros(2)),
    )
    assert torch.equal(Weighted(0.5)(forget, retain, step), torch.tensor([3.0, 5.0]))
    close(Normalised()(forget, retain, step), torch.tensor([0.6, 1.8]), 1e-6)
    assert ascent.per == descent.per == "token"
    assert automatic_rate.EVERY == 10
