"""EK-FAC: K-FAC's eigenbases with refitted eigenvalues (George et al. 2018.

Grosse et al. 2023, arXiv 2308.03296).

    Lambda = sum_i w_i (Q_S^T G_i Q_A)^2
    (C + lambda I)^-1 V = Q_S [ (Q_S^T V Q_A) / (Lambda + lambda) ] Q_A^T

G_i is the gradient of example i's loss at labels *sampled from the model*, summed over its tokens,
so the diagonal in the eigenbasis is exact for these samples. With several draws per example, the
mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from influence.curvature.base import ONCE, Arrays, Curvature, SampledRows
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

    def load(self, arrays: Arrays, point: AtPoint) -> Kronecker:
        """The refitted eigenvalues in K-FAC's eigenbases."""
        return load_kronecker(arrays, point, "ekfac", "")

    def held(self, arrays: Arrays, point: AtPoint) -> dict[str, Callable[[], Curvature]]:
        """What a K-FAC run holds, K-FAC itself, and this."""
        kfac: dict[str, Callable[[], Curvature]] = {"kfac": lambda: KFAC.load(self, arrays, point)}
        return kfac | super().held(arrays, point)


class RefittedMoments(Moments):
    """K-FAC's moments.

    `finish` refits the eigenvalues on per-row gradients.
    """

    def finish(self, rows: SampledRows) -> dict[str, Tensor]:
        """K-FAC's eigenbases with both eigenvalues, its own and the refitted."""
        kfac = self.kronecker()
        return self.arrays(kfac, refit_eigenvalues(kfac, weighted(rows)))


def weighted(rows: SampledRows) -> Iterable[tuple[Tensor, Tensor]]:
    """Blocks `[b, P]` with their own weights `[b]`."""
    start = 0
    for block in rows:
        yield block, rows.weights[start : start + len(block)].to(block)
        start += len(block)


def refit_eigenvalues(kfac: Kronecker, rows: Iterable[tuple[Tensor, Tensor]]) -> Kronecker:
    """Replace K-FAC's eigenvalues by the second moments of per-example gradients in its eigenbasis.

    `rows` yields `(gradients [b, P], weights [b])`; the weights of all rows are `w_i / samples`.
    """
    inside = [torch.zeros_like(block.eigenvalues) for block in kfac.leaf_blocks]
    outside = [torch.zeros_like(block.rest) for block in kfac.leaf_blocks]
    for gradients, weights in rows:
        root = weights.sqrt().to(gradients)[:, None, None]
        for number, block in enumerate(kfac.leaf_blocks):
            coordinates, off = block.rotate(gradients[:, block.leaf.slice])
            inside[number] += (coordinates * root).square_().sum(0)
            if off is not None:
                left = wide_side(block.leaf) - block.wide.shape[1]
                outside[number] += (off * root).square_().sum((0, 2)) / left
    blocks = (
        replace(block, eigenvalues=new, rest=rest)
        for block, new, rest in zip(kfac.leaf_blocks, inside, outside, strict=True)
    )
    return replace(kfac, leaf_blocks=tuple(blocks), name="ekfac")
