"""Moments of leaves fed by hand."""

from __future__ import annotations

import torch

from influence.adapter import ParamSpace
from influence.curvature import KFAC
from influence.curvature.kfac import Moments

F64 = torch.float64


def moments_of(leaves, inputs, grads, weights=None, unit=1.0, **options):
    """Moments of leaves named (name, shape) fed one batch each of x [b, T, d_in] and g [b, T,
    d_out].
    """
    space = ParamSpace.of(leaves)
    kinds = (F64, torch.device("cpu"))
    moments = Moments(space, list(range(len(leaves))), KFAC(**options), 0, unit, *kinds)
    for i, (x, g) in enumerate(zip(inputs, grads, strict=True)):
        moments.add(i, x, g, torch.ones(x.shape[:2], dtype=torch.bool), weights, 0)
    return space, moments


def random_rows(seed, *shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def replace_unit(moments: Moments, unit: float) -> Moments:
    """The same moments of rows whose largest weight is `unit`."""
    moments.unit = unit
    return moments
