"""Solvers by name, with the preconditioner or the gradients that each needs."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any, cast

from influence.at_point import AtPoint
from influence.curvature.base import Damped
from influence.errors import InputError
from influence.run import Run
from influence.solvers import ASTRA, CG, SGD, DataInf, Direct, LiSSA, Solver

SOLVERS = ("direct", "cg", "pcg", "lissa", "astra", "sgd", "datainf")


#: Vectors [K, P] that a solver holds beside the right-hand sides, counted in its code; of any other
#: solver the most.
COPIES = {"direct": 4, "cg": 8, "pcg": 8, "datainf": 10, "lissa": 12, "sgd": 12, "astra": 12}


def make_solver(point: AtPoint | Run, solver: str | Solver, operator: Damped) -> Solver:
    """A solver by name, with the preconditioner or the gradients it needs.

    A solver object as it is.
    """
    if not isinstance(solver, str):
        return solver
    point = point.points[-1] if isinstance(point, Run) else point
    if solver == "pcg":
        return CG(preconditioner=point.preconditioner(operator), name="pcg")
    if solver == "astra":
        return ASTRA(preconditioner=point.preconditioner(operator))
    if solver == "datainf" and operator.curvature.undamped:
        raise InputError(
            "solver datainf inverts the empirical Fisher, and the curvature identity asks for no "
            "inverse"
        )
    if solver == "datainf":
        leaves = tuple(leaf.slice for leaf in point.model.space.leaves)
        return DataInf(
            lambda: (block for _, block in point.gradient_blocks()), point.stream_weights, leaves
        )
    solvers: dict[str, Solver] = {"direct": Direct(), "cg": CG(), "lissa": LiSSA(), "sgd": SGD()}
    if solver not in solvers:
        raise InputError(f"solver {solver!r} was given; expected one of {', '.join(SOLVERS)}")
    return solvers[solver]


def with_limits(solver: Solver, limits: dict[str, Any]) -> Solver:
    """An iterative solver with other limits."""
    if not limits:
        return solver
    if not (
        hasattr(solver, "max_iterations") and is_dataclass(solver) and not isinstance(solver, type)
    ):
        raise InputError(
            f"{' and '.join(limits)} were given, and the solver {solver.name} does not iterate: "
            "leave them out, or give cg, pcg, astra, lissa or sgd"
        )
    for key, value in limits.items():
        if not value > 0:
            raise InputError(f"{key} {value} was given; expected a positive number")
    return cast(Solver, replace(solver, **limits))


def solver_options(solver: Solver) -> str:
    """A solver's own numbers, for the record (its preconditioner is told by its name)."""
    return ", ".join(
        f"{key}={value}"
        for key, value in vars(solver).items()
        if isinstance(value, int | float | str)
    )
