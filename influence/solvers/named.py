"""Solvers by name, with the preconditioner or the gradients that each needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any, cast

from influence.at_point import AtPoint
from influence.curvature.base import Damped
from influence.errors import InputError
from influence.run import Run
from influence.solvers import ASTRA, CG, SGD, DataInf, Direct, LiSSA, Solver


def _pcg(point: AtPoint, operator: Damped) -> Solver:
    return CG(preconditioner=point.preconditioner(operator), name="pcg")


def _astra(point: AtPoint, operator: Damped) -> Solver:
    return ASTRA(preconditioner=point.preconditioner(operator))


def _datainf(point: AtPoint, operator: Damped) -> Solver:
    if operator.curvature.undamped:
        raise InputError(
            "solver datainf inverts the empirical Fisher, and the curvature identity asks for no "
            "inverse"
        )
    leaves = tuple(leaf.slice for leaf in point.model.space.leaves)
    gradients = lambda: (block for _, block in point.gradient_blocks())  # noqa: E731
    return DataInf(gradients, point.stream_weights, leaves)


#: How each solver that is known by name is made for an operator at a point.
SOLVERS: dict[str, Callable[[AtPoint, Damped], Solver]] = {
    "direct": lambda point, operator: Direct(),
    "cg": lambda point, operator: CG(),
    "pcg": _pcg,
    "lissa": lambda point, operator: LiSSA(),
    "astra": _astra,
    "sgd": lambda point, operator: SGD(),
    "datainf": _datainf,
}


def approximates(solver: str | Solver) -> bool:
    """Whether a solver's answers have an error of their own, which no tolerance makes smaller."""
    return solver == DataInf.name if isinstance(solver, str) else solver.approximate


def make_solver(point: AtPoint | Run, solver: str | Solver, operator: Damped) -> Solver:
    """A solver by name, with the preconditioner or the gradients it needs.

    A solver object as it is.
    """
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise InputError(f"solver {solver!r} was given; expected one of {', '.join(SOLVERS)}")
    return SOLVERS[solver](point.points[-1] if isinstance(point, Run) else point, operator)


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
