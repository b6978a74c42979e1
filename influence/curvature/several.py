"""Several dampings of a curvature at once, for little more than the price of one.

What rotates a vector into the basis in which a curvature is diagonal does not depend on lambda.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from influence.curvature.base import Curvature, Damped, Invertible, inverse_products


@runtime_checkable
class Several(Protocol):
    """A curvature that shares work between lambdas, each `[blocks]`."""

    def solve_several(self, v: Tensor, lams: Sequence[Tensor]) -> list[Tensor]:
        """`(C + lambda I)^-1 v` for every row of `v` [K, P], for each lambda: `[K, P]` each."""
        ...

    def inverse_products_several(self, v: Tensor, lams: Sequence[Tensor]) -> Tensor:
        """`v^T (C + lambda I)^-1 v` of every row of `v` [K, P], `[lambdas, K]` float64."""
        ...


def solve_all(operators: Sequence[Damped], v: Tensor) -> list[Tensor]:
    """The answers `[K, P]` of closed inverses for the rows of `v` [K, P], one for each operator."""
    found: list[Tensor | None] = [None] * len(operators)
    for curvature, places in _by_curvature(operators):
        lams = [operators[place].lam for place in places]
        if isinstance(curvature, Several):
            answers = curvature.solve_several(v, lams)
        else:
            assert isinstance(curvature, Invertible)
            answers = [curvature.solve(v, lam) for lam in lams]
        for place, answer in zip(places, answers, strict=True):
            found[place] = answer
    return [answer for answer in found if answer is not None]


def all_inverse_products(operators: Sequence[Damped], v: Tensor) -> Tensor:
    """`v^T (C + lambda I)^-1 v` of every row of `v` [K, P], `[operators, K]` float64."""
    found = torch.empty(len(operators), len(v), dtype=torch.float64, device=v.device)
    for curvature, places in _by_curvature(operators):
        if isinstance(curvature, Several):
            lams = [operators[place].lam for place in places]
            found[places] = curvature.inverse_products_several(v, lams)
        else:
            for place in places:
                found[place] = inverse_products(operators[place], v)
    return found


def _by_curvature(operators: Sequence[Damped]) -> list[tuple[Curvature, list[int]]]:
    """Each curvature with the places of its operators."""
    groups: dict[int, tuple[Curvature, list[int]]] = {}
    for place, operator in enumerate(operators):
        groups.setdefault(id(operator.curvature), (operator.curvature, []))[1].append(place)
    return list(groups.values())
