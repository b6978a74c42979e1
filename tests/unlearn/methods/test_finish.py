"""What is made of a training: the negated and the controlled move, against solutions by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from influence.errors import InputError
from unlearn.methods.finish import HALVINGS, Controlled, Negated, Trained
from unlearn.methods.methods import method_of


def trained(
    after: Tensor,
    forget: Callable[[Tensor], float],
    retain: Callable[[Tensor], float],
    goal: float = 0.0,
) -> tuple[Trained, list[Tensor]]:
    """Ends 0 and `after`, and the places that were measured."""
    seen: list[Tensor] = []

    def noting(loss: Callable[[Tensor], float]) -> Callable[[Tensor], float]:
        return lambda theta: (seen.append(theta.clone()), loss(theta))[1]

    return Trained(torch.zeros_like(after), after, noting(forget), noting(retain), goal), seen


def nothing(_: Tensor) -> float:
    raise AssertionError("nobody may measure this")


MOVE = torch.tensor([3.0, -4.0], dtype=torch.float64)


def test_a_negation_by_a_given_scale():
    """before - a (after - before): from (1, 1) with after (4, -3) and a = 2 it is (-5, 9)."""
    before = torch.ones(2, dtype=torch.float64)
    given = Trained(before, before + MOVE, nothing, nothing, 0.0)
    assert Negated(2.0)(given).tolist() == [-5, 9]
    assert Negated(0.0)(given).tolist() == [1, 1]


@pytest.mark.parametrize("exact", [0.02, 0.3, 0.99, 1.0, 1.5, 2.0, 5.7, 15.9])
def test_a_negation_is_the_least_that_reaches_the_goal(exact):
    """Forget loss 1 + |theta|^2: with |move| = 5, 1 + 25 a^2 reaches 1 + 25 exact^2 at a = exact.

    The share is found to 2^-7 of its octave.
    """
    goal = 1 + 25 * exact**2
    given, seen = trained(MOVE, lambda theta: 1 + float(theta @ theta), nothing, goal)
    theta = Negated()(given)
    share = -float(theta @ MOVE) / 25
    assert torch.allclose(theta, -share * MOVE, rtol=0, atol=1e-12)
    octave = 1.0 if exact <= 1 else 2.0 ** (math.ceil(math.log2(exact)) - 1)
    assert exact - 1e-12 <= share <= exact + octave / 2**HALVINGS + 1e-12
    assert 1 + 25 * share**2 >= goal - 1e-12
    assert len(seen) <= 5 + HALVINGS


def test_a_negation_that_reaches_nothing_is_where_the_loss_was_highest():
    """The loss is 5 - (a - 4)^2 / 4 at -a times the move, its goal 9: of 1, 2, 4, 8, 16 the
    multiple 4 is nearest.
    """
    given, seen = trained(
        MOVE, lambda theta: 5 - (float(theta.norm() / MOVE.norm()) - 4) ** 2 / 4, nothing, 9.0
    )
    assert Negated()(given).tolist() == pytest.approx((-4 * MOVE).tolist())
    assert max(-float(theta @ MOVE) / 25 for theta in seen) <= 16


def test_a_negation_goes_the_other_way():
    """Fine-tuning lowered the forget loss (a quadratic with its minimum ahead).

    The negated move raises it.
    """

    def loss(theta: Tensor) -> float:
        """4 at 0, 1 after."""
        return float((theta - 2 * MOVE) @ (theta - 2 * MOVE)) / 25

    given, _ = trained(MOVE, loss, nothing, 6.25)  # (2 + a)^2 = 6.25 at a = 0.5
    theta = Negated()(given)
    assert loss(theta) >= 6.25
    assert -float(theta @ MOVE) / 25 == pytest.approx(0.5, abs=2**-HALVINGS)


@pytest.mark.parametrize("bar", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("steep", [0.1, 1.0, 30.0])
def test_control_leaves_as_much_of_the_move_as_the_bar_allows(bar, steep):
    """Retained loss 2 + steep s^2 at share s: it may rise by -log(bar), at s = sqrt(-log(bar) /
    steep) (or at 1).
    """
    given, seen = trained(MOVE, nothing, lambda theta: 2 + steep * float(theta @ theta) / 25)
    theta = Controlled(bar)(given)
    share, exact = float(theta @ MOVE) / 25, min(1.0, math.sqrt(-math.log(bar) / steep))
    assert torch.allclose(theta, share * MOVE, rtol=0, atol=1e-12)
    assert exact - 2**-HALVINGS - 1e-12 <= share <= exact + 1e-12
    assert math.exp(-steep * share**2) >= bar - 1e-12  # the likelihood that is left
    assert len(seen) <= 2 + HALVINGS
    if exact == 1.0:
        assert torch.equal(theta, MOVE)


def test_control_goes_back_to_the_start_where_nothing_is_allowed():
    given, _ = trained(MOVE, nothing, lambda theta: 2.0 if not theta.any() else 9.0)
    assert Controlled(0.9)(given).tolist() == [0, 0]


def test_control_leaves_a_move_that_helps_the_retained_rows_as_it_is():
    given, seen = trained(MOVE, nothing, lambda theta: 2 - 0.01 * float(theta @ theta))
    assert Controlled(0.9)(given) is given.after
    assert len(seen) == 2


def test_control_comes_after_another_finish():
    """The negated move is mixed with the start: retained loss 2 + 0.4 |theta|^2 / 25 at -2 s move
    rises by 1.6 s^2.
    """
    given, _ = trained(MOVE, nothing, lambda theta: 2 + 0.4 * float(theta @ theta) / 25)
    theta = Controlled(0.9, Negated(2.0))(given)
    share = float(theta @ (-2 * MOVE)) / 100
    assert share == pytest.approx(math.sqrt(-math.log(0.9) / 1.6), abs=2**-HALVINGS)


@pytest.mark.parametrize("bar", [0.0, 1.0, -0.5, 1.7, float("nan")])
def test_bars_outside_nought_and_one_are_refused(bar):
    with pytest.raises(
        InputError, match=r"expected a share of the likelihood between 0 and 1, as in 0\.9"
    ):
        Controlled(bar)
    with pytest.raises(InputError, match="control"):
        method_of("control", bar=bar)
