"""Curvatures: what stands for the second derivative of the training objective; one file each."""

from influence.curvature.base import Curvature, Damped, Invertible, as_linear_operator, dense
from influence.curvature.ekfac import EKFAC
from influence.curvature.fisher import Fisher
from influence.curvature.ggn import GGN
from influence.curvature.hessian import Hessian
from influence.curvature.identity import Identity
from influence.curvature.kfac import KFAC

__all__ = [
    "EKFAC",
    "GGN",
    "KFAC",
    "Curvature",
    "Damped",
    "Fisher",
    "Hessian",
    "Identity",
    "Invertible",
    "as_linear_operator",
    "dense",
]
