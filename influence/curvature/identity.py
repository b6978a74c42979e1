"""The identity in place of `C + lambda I`: plain gradient products (TracIn at one checkpoint)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Identity:
    """Description of the identity; nothing to fit. `C + lambda I := I`, whatever the damping rule says."""

    name: str = field(default="identity", init=False)


@dataclass(frozen=True)
class IdentityCurvature:
    """`C = 0` with `lambda = 1`: the damped operator is the identity."""

    size: int
    name: str = "identity"

    @property
    def blocks(self) -> tuple[slice, ...]:
        """One block."""
        return (slice(0, self.size),)

    def matvec(self, v: Tensor) -> Tensor:
        """Zero: the damped operator adds the identity."""
        return torch.zeros_like(v)

    def solve(self, v: Tensor, lam: Tensor) -> Tensor:
        """`v / lambda`, with lambda = 1."""
        return v / lam.to(v)

    def mean_eigenvalues(self) -> Tensor:
        """One, so that every rule has a scale."""
        return torch.ones(1, dtype=torch.float64)

    def top_eigenvalues(self) -> Tensor:
        """One."""
        return torch.ones(1, dtype=torch.float64)
