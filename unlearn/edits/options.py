"""The options of an edit by influence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from influence.errors import InputError
from influence.options import CurvatureOptions, option
from unlearn.options import EvidenceOption, RecipeOption, StartOption

if TYPE_CHECKING:  # a command's help does not wait for torch
    from influence.solvers import Solver
    from unlearn.stopping import EditRule

#: Steps of a re-linearised edit: at most, and as many as most take.
STEPS, USUAL_STEPS = 80, 15

#: Retained rows in a step. The default edit of LOG.md's entry "Closed-form edits" (2026-11-21) has
#: them: without any the retained loss rises from 0.873 to 0.997, with 24 it ends at 0.864.
REST = 24


@dataclass(frozen=True, kw_only=True)
class Options(StartOption, RecipeOption, EvidenceOption, CurvatureOptions):
    """How an edit is made.

    The help beside each field says what it is. `until` and `solver` may also be objects. With
    `expected`, the rows reach the losses of a model that was trained on them as they are after the
    edit (`unlearn.unseen`); `recipe` may be a `Recipe` or the path of one.

    Raises `InputError` for a value that no edit can be made with.
    """

    LISTED_AFTER: ClassVar[Mapping[str, str]] = {
        "curvature": "rest",
        "damping": "curvature",
        "recipe": "max_damage",
        "start": "solver",
    }

    steps: int = option("1: the linear answer. Else the most steps.", default=STEPS)
    until: str | EditRule = option(
        "expected, loss=X (nats per token), steps=N, norm=X, or converged.",
        default="expected",
        typed=str,
    )
    max_damage: float = option(
        "Allowed relative rise of the retained rows' loss; beyond it nothing is written.",
        default=0.1,
    )
    rest: int = option("Retained rows in every step; 0: none.", default=REST)
    at: str | None = option(
        "Point of the path whose curvature is used. Default: the middle one.", default=None
    )
    solver: str | Solver = option(
        "direct, cg, pcg, lissa, astra or sgd.", default="direct", typed=str
    )
    seed: int = option("Draws the retained rows.", default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = self.rule
        object.__setattr__(self, "until", rule)
        if self.steps < 1:
            raise InputError(
                f"steps {self.steps} was given; expected 1 (the linear answer) or more"
            )
        if self.one_shot and rule.kind != "expected":
            raise InputError(
                f"steps 1, the linear answer, has no stopping rule, and {rule} was given: "
                "leave one of them out"
            )
        if rule.value is not None and rule.kind == "steps" and rule.value > self.steps:
            raise InputError(
                f"until {rule} was given, and at most {self.steps} steps: raise steps, "
                "or leave it out"
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
                "solver datainf inverts the empirical Fisher of all rows, not the curvature after "
                "an edit: use direct, cg, pcg, lissa, astra or sgd"
            )

    @property
    def rule(self) -> EditRule:
        """The stopping rule."""
        from unlearn.stopping import EditRule

        return EditRule.parse(self.until)

    @property
    def one_shot(self) -> bool:
        """Whether this is the linear answer."""
        return self.steps == 1
