"""The identity in place of `C + lambda I`: plain gradient products (TracIn at one checkpoint)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from influence.curvature.base import (
    Accumulator,
    Arrays,
    ChangedRows,
    Curvature,
    SampledRows,
    Specification,
)

if TYPE_CHECKING:
    from influence.at_point import AtPoint


class Nothing(Accumulator):
    """No sums."""

    def finish(self, rows: SampledRows) -> dict[str, Tensor]:
        """Nothing is kept."""
        return {}


@dataclass(frozen=True)
class Identity(Specification):
    """The identity.

    Nothing to fit. `C + lambda I := I`, whatever the damping rule says.
    """

    name: str = field(default="identity", init=False)
    undamped: ClassVar[bool] = True
    whitens: ClassVar[bool] = True
    sums_rows: ClassVar[bool] = False
    #: Plain products are those of the adapter itself, as in TracIn at the last checkpoint.
    default_path: ClassVar[tuple[float, ...] | None] = (1.0,)

    def begin(self, point: AtPoint) -> Accumulator:
        """No sums."""
        return Nothing()

    def load(self, arrays: Arrays, point: AtPoint) -> Curvature:
        """The identity of the adapter's size."""
        leaves = point.model.space.leaves
        return IdentityCurvature(tuple(leaf.stop - leaf.start for leaf in leaves))


@dataclass(frozen=True)
class IdentityCurvature(Curvature):
    """`C = 0` with `lambda = 1`: the damped operator is the identity on leaves of these `sizes`."""

    sizes: tuple[int, ...]
    name: str = "identity"
    undamped: ClassVar[bool] = True

    @property
    def blocks(self) -> tuple[slice, ...]:
        """One block."""
        return (slice(0, sum(self.sizes)),)

    def matvec(self, v: Tensor) -> Tensor:
        """Zero: the damped operator adds the identity."""
        return torch.zeros_like(v)

    def solve(self, v: Tensor, lam: Tensor) -> Tensor:
        """`v / lambda`, with lambda = 1."""
        return v / lam.to(v)

    def whiten(self, leaf: int, gradients: Tensor, lam: Tensor) -> Tensor:
        """The gradients `[K, d_out, d_in]` themselves, flat."""
        return gradients.flatten(1)

    def expected_squares(self, leaf: int, lam: Tensor) -> Tensor:
        """One coordinate like another."""
        return torch.ones(self.sizes[leaf])

    def mean_eigenvalues(self) -> Tensor:
        """One, so that every rule has a scale."""
        return torch.ones(1, dtype=torch.float64)

    def top_eigenvalues(self) -> Tensor:
        """One."""
        return torch.ones(1, dtype=torch.float64)

    def updated(self, gone: ChangedRows, come: ChangedRows) -> Curvature:
        """Itself: the identity is of no rows."""
        return self
