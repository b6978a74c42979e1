"""Solvers of `(C + lambda I) x = v`; one file each, each returns a `Solution` with per-column residuals."""

from influence.solvers.base import Solution, Solver
from influence.solvers.cg import CG
from influence.solvers.direct import Direct

__all__ = ["CG", "Direct", "Solution", "Solver"]
