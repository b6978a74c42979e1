"""EK-FAC: K-FAC's eigenbases with refitted eigenvalues.

George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296.

    Lambda = sum_i w_i (Q_S^T G_i Q_A)^2
    (C + lambda I)^-1 V = Q_S [ (Q_S^T V Q_A) / (Lambda + lambda) ] Q_A^T

G_i is the gradient of example i's loss at labels *sampled from the model*, summed over its tokens,
so the diagonal in the eigenbasis is exact for these samples. With several draws per example, the
mean over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from influence.curvature.base import ONCE, Accumulator, Arrays, Curvature, SampledRows
from influence.curvature.kfac import KFAC, Kronecker, Moments, load_kronecker, wide_side

if TYPE_CHECKING:
    from influence.at_point import AtPoint


@dataclass(frozen=True)
class EKFAC(KFAC):
    """EK-FAC with labels sampled from the model.

    Options as in `KFAC`.
    """

    name: str = field(default="ekfac", init=False)
    reads_rows: ClassVar[str] = ONCE

    def begin(self, point: AtPoint) -> Moments:
        """K-FAC's moments, whose eigenvalues are refitted at the end."""
        return RefittedMoments.at(point, self)

    def grow(self, point: AtPoint, arrays: Arrays, *, rows: bool) -> Accumulator:
        """The moments, of which a second look at all rows makes EK-FAC; without these, the
        eigenvalues in the fitted eigenbases.
        """
        if rows:
            return RefittedMoments.at(point, self, arrays)
        return KeptBases(point, arrays, self.samples)

    def grown_otherwise(self, *, rows: bool) -> str | None:
        """Without the rows at sampled labels no eigenvalue in another basis can be known."""
        if rows:
            return None
        return (
            "the eigenvalues are those of all rows, in the eigenbases of the run before (of a run "
            "that was fitted with --growable the eigenbases are new too)"
        )

    def load(self, arrays: Arrays, point: AtPoint) -> Kronecker:
        """The refitted eigenvalues in K-FAC's eigenbases."""
        return load_kronecker(arrays, point, "ekfac", "", self.samples)

    def held(self, arrays: Arrays, point: AtPoint) -> dict[str, Callable[[], Curvature]]:
        """What a K-FAC run holds, K-FAC itself, and this."""
        kfac: dict[str, Callable[[], Curvature]] = {"kfac": lambda: KFAC.load(self, arrays, point)}
        return kfac | super().held(arrays, point)


class RefittedMoments(Moments):
    """K-FAC's moments, of which a second look at the rows makes EK-FAC."""

    def second_look(self) -> Eigenvalues:
        """The second moments in the eigenbases that these moments give."""
        return Eigenvalues(self)


class Eigenvalues(Accumulator):
    """Second moments of per-row gradients in K-FAC's eigenbases: `sum_i w_i (Q_S^T G_i Q_A)^2`."""

    by_leaf = True

    def __init__(self, moments: Moments) -> None:
        self.moments, self.kfac = moments, moments.kronecker()
        self.inside = [torch.zeros_like(block.eigenvalues) for block in self.kfac.leaf_blocks]
        self.outside = [torch.zeros_like(block.rest) for block in self.kfac.leaf_blocks]

    def add_rows(self, features: Tensor, weights: Tensor) -> None:
        """Rotate the rows into the eigenbases and add their squares."""
        for number, leaf in enumerate(self.kfac.space.leaves):
            part = features[:, leaf.slice].unflatten(1, leaf.shape)
            self.add_leaf(number, part, weights)

    def add_leaf(self, leaf: int, features: Tensor, weights: Tensor) -> None:
        """Rotate one leaf of the rows into its eigenbasis and add the squares."""
        root, block = weights.to(features).sqrt()[:, None, None], self.kfac.leaf_blocks[leaf]
        coordinates, off = block.rotate(features.flatten(1))
        inside = (coordinates * root).square_().sum(0)
        if off is not None:
            left = wide_side(block.leaf) - block.wide.shape[1]
            self.outside[leaf] += (off * root).square_().sum((0, 2)) / left
        self.inside[leaf] += inside  # last: what takes memory is made by now

    def sums(self) -> dict[str, Tensor]:
        """`inside` [r, k] and `outside` [r] of every leaf."""
        inside = {f"inside/{i}": tensor for i, tensor in enumerate(self.inside)}
        return inside | {f"outside/{i}": tensor for i, tensor in enumerate(self.outside)}

    def refitted(self) -> Kronecker:
        """K-FAC with these eigenvalues."""
        blocks = (
            replace(block, eigenvalues=eigenvalues, rest=rest)
            for block, eigenvalues, rest in zip(
                self.kfac.leaf_blocks, self.inside, self.outside, strict=True
            )
        )
        return replace(self.kfac, leaf_blocks=tuple(blocks), name="ekfac")

    def finish(self, rows: SampledRows) -> dict[str, Tensor]:
        """K-FAC's eigenbases with both eigenvalues, its own and the refitted."""
        return self.moments.arrays(self.kfac, self.refitted())


class KeptBases(Eigenvalues):
    """The eigenvalues in eigenbases that were fitted before and stay.

    They are exactly those of all rows in these bases, `sum_i w_i (Q_S^T G_i Q_A)^2`; the bases,
    and K-FAC's own eigenvalues, are those of the rows that they were fitted to.
    """

    per_row = True

    def __init__(self, point: AtPoint, arrays: Arrays, samples: int) -> None:
        self.arrays = arrays
        self.kfac = load_kronecker(arrays, point, "ekfac", "", samples)
        self.inside = [torch.zeros_like(block.eigenvalues) for block in self.kfac.leaf_blocks]
        self.outside = [torch.zeros_like(block.rest) for block in self.kfac.leaf_blocks]

    def restore(self, arrays: Arrays, factor: float) -> None:
        """Add the fitted eigenvalues."""
        for number, block in enumerate(self.kfac.leaf_blocks):
            self.inside[number] += factor * block.eigenvalues
            self.outside[number] += factor * block.rest

    def second_look(self) -> None:
        """None: the rows that come and go are enough."""

    def finish(self, rows: SampledRows) -> dict[str, Tensor]:
        """What was kept, with the new eigenvalues. What rounding left below zero is zero."""
        arrays = dict(self.arrays)
        for number, (inside, outside) in enumerate(zip(self.inside, self.outside, strict=True)):
            arrays[f"leaf/{number}/eigenvalues"] = inside.clamp(min=0)
            arrays[f"leaf/{number}/rest"] = outside.clamp(min=0)
        return arrays
