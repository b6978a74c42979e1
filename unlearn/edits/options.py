"""How an edit is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from influence.damping import Damping
from influence.errors import InputError
from influence.solvers import Solver
from unlearn.edits.steps import REST
from unlearn.stopping import Until

#: Steps of a re-linearised edit: at most, and as many as most take.
STEPS, USUAL_STEPS = 80, 15


@dataclass(frozen=True)
class Options:
    """How an edit is made.

    Parameters
    ----------
    steps
        1: the linear answer. Else the most steps of a re-linearised edit.
    until
        `expected` (default): removed rows reach the loss a model that never saw them would have, new contents the
        retained rows' mean loss. `loss=X` (nats per token), `steps=N`, `norm=X` (length of the move), `converged`.
    max_damage
        Relative rise of the retained rows' mean loss beyond which the edit is not saved without `force`.
    rest
        Untouched rows in every step; 0: the changed rows alone.
    curvature, damping, at
        As in `influence.scores.score`; `at` is the path's middle point for a re-linearised edit.
    solver
        `direct`, `cg`, `pcg`, `lissa`, `astra`, `sgd`, or a solver object.
    start
        Adapter to edit: the folder of an earlier edit, or `original`. Default: the last edit's.
    seed
        Draws the retained rows.
    """

    steps: int = STEPS
    until: str | Until = "expected"
    max_damage: float = 0.1
    rest: int = REST
    curvature: str | None = None
    damping: str | Damping | None = None
    at: str | None = None
    solver: str | Solver = "direct"
    start: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rule = Until.parse(self.until)
        object.__setattr__(self, "until", rule)
        if self.steps < 1:
            raise InputError(
                f"steps {self.steps} was given; expected 1 (the linear answer) or more"
            )
        if self.one_shot and rule.kind != "expected":
            raise InputError(
                f"steps 1, the linear answer, has no stopping rule, and {rule} was given: leave one of them out"
            )
        if rule.value is not None and rule.kind == "steps" and rule.value > self.steps:
            raise InputError(
                f"until {rule} was given, and at most {self.steps} steps: raise steps, or leave it out"
            )
        if not 0 <= self.max_damage < float("inf"):
            raise InputError(
                f"max_damage {self.max_damage} was given; expected 0 or more, as in 0.1 for 10 %"
            )
        if self.rest < 0 or self.seed < 0:
            raise InputError(
                f"rest {self.rest} and seed {self.seed} were given; expected 0 or more"
            )
        if self.solver == "datainf":
            raise InputError(
                "solver datainf inverts the empirical Fisher of all rows, not the curvature after an edit: use direct, cg, "
                "pcg, lissa, astra or sgd"
            )

    @property
    def rule(self) -> Until:
        """The stopping rule."""
        return Until.parse(self.until)

    @property
    def one_shot(self) -> bool:
        """Whether this is the linear answer."""
        return self.steps == 1
