"""Work is counted in row-gradients."""

from __future__ import annotations

from influence.cost import Cost


def test_a_forward_is_a_third_of_a_gradient():
    assert Cost().total == 0
    assert Cost(gradients=2, forwards=6).total == 4.0
