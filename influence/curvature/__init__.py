"""Curvatures: what stands for the second derivative of the training objective.

One file each.

A curvature that is asked for by name, on the command line or when a run is opened again, is a line
of `SPECIFICATIONS`.
"""

from influence.curvature.base import (
    Accumulator,
    Curvature,
    Damped,
    Invertible,
    Specification,
    as_linear_operator,
    dense,
)
from influence.curvature.ekfac import EKFAC
from influence.curvature.fisher import Fisher
from influence.curvature.ggn import GGN
from influence.curvature.hessian import Hessian
from influence.curvature.identity import Identity
from influence.curvature.kfac import KFAC

#: Every curvature that is known by name.
SPECIFICATIONS: dict[str, type[Specification]] = {
    kind.name: kind for kind in (EKFAC, KFAC, Fisher, GGN, Hessian, Identity)
}
#: What `fit` takes unless told otherwise.
DEFAULT = EKFAC()
#: The name of plain gradient products, which every run holds, and of the exact curvature that
#: others are compared with.
PLAIN, EXACT = Identity.name, GGN.name

__all__ = [
    "DEFAULT",
    "EKFAC",
    "EXACT",
    "GGN",
    "KFAC",
    "PLAIN",
    "SPECIFICATIONS",
    "Accumulator",
    "Curvature",
    "Damped",
    "Fisher",
    "Hessian",
    "Identity",
    "Invertible",
    "Specification",
    "as_linear_operator",
    "dense",
]
