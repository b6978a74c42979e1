"""EK-FAC: K-FAC's eigenbases with refitted eigenvalues (George et al. 2018; Grosse et al. 2023, arXiv 2308.03296).

    Lambda = sum_i w_i (Q_S^T G_i Q_A)^2,      (C + lambda I)^-1 V = Q_S [ (Q_S^T V Q_A) / (Lambda + lambda) ] Q_A^T

G_i is the gradient of example i's loss at labels *sampled from the model*, summed over its tokens, so the
diagonal in the eigenbasis is exact for these samples. With several draws per example, the mean over them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from influence.curvature.kfac import KFAC, Kronecker, wide_side


@dataclass(frozen=True)
class EKFAC(KFAC):
    """EK-FAC with labels sampled from the model; options as in `KFAC`."""

    name: str = field(default="ekfac", init=False)


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
    return Kronecker(kfac.space, tuple(blocks), "ekfac")
