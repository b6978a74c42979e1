"""Solvers of `(C + lambda I) x = v`, one file each.

Each returns a `Solution` with the true residual of every column.
"""

from influence.solvers.astra import ASTRA
from influence.solvers.base import Solution, Solver
from influence.solvers.cg import CG
from influence.solvers.datainf import DataInf
from influence.solvers.direct import Direct
from influence.solvers.lissa import LiSSA
from influence.solvers.sgd import SGD

__all__ = ["ASTRA", "CG", "SGD", "DataInf", "Direct", "LiSSA", "Solution", "Solver"]
