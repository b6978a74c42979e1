"""When a training stops, and how its last step is shortened so that a rule just holds.

A training stops when the forget rows' mean loss has reached its goal, or when the retained rows'
mean loss has risen by `stop_damage`. Where a step does not run all forget rows, a sample of them is
measured now and then, and whenever the step's own rows are at their goal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from influence.at_point import evenly_spaced
from influence.errors import InputError, NumericalError
from unlearn.methods.batches import TermGradient
from unlearn.methods.preparation import Work
from unlearn.record.before_after import State, Targets

#: Forget rows that are measured where a step does not run all of them. A choice.
CHECK_ROWS = 64
#: Steps from one such measurement to the next. A choice.
CHECK_EVERY = 10
#: How near to its goal or limit a shortened step ends, relative to it. A choice.
CLOSE = 0.005
#: Halvings after which a step that is shortened is let be. A choice.
SHORTENINGS = 14


@dataclass(frozen=True)
class Stopped:
    """Why a training stopped, and the `share` of its last step that was kept."""

    reason: str
    share: float


@dataclass(eq=False)
class StopRules:
    """The rules that stop one training.

    Attributes
    ----------
    work : Work
        The training.
    before : State
        What was measured before it.
    goals : Targets
        The losses that the forget rows should reach.
    anchor : Tensor [P], optional
        Where the forget rows were last seen below their goal.
    """

    work: Work
    before: State
    goals: Targets
    anchor: Tensor | None = None

    def reached(
        self, step: int, forget_gradient: TermGradient | None, *, last: bool = False
    ) -> Stopped | None:
        """That the forget rows are at their goal before `step`, or None.

        The model then goes back on the line to where they were last seen below it, so far that they
        just are. `last` measures whatever the step's number.
        """
        if self.work.stop.kind == "steps":
            return None
        measured = self._forget_loss(step, forget_gradient, last)
        if measured is None:
            return None
        model, (loss, goal) = self.work.version.model, measured
        if loss < goal:
            self.anchor = model.snapshot()
            return None
        if self.anchor is None:
            raise InputError(
                f"nothing to do: the forget rows' mean loss is {loss:.2f} before the first step "
                f"and their goal is {goal:.2f}; ask for more (--until loss=X or steps=N)"
            )
        rows = self.checked_rows
        checked_goal = self.goal(rows)
        share = self._shorten(
            self.anchor,
            lambda: self.work.mean_loss(self.work.forget, rows) / checked_goal,
            above=True,
        )
        reason = f"the forget rows' mean loss reached its goal, {goal:.2f}, in step {step}"
        return Stopped(reason, share)

    def damaged(self, step: int, start: Tensor) -> Stopped | None:
        """That the retained rows have lost more than is allowed before `step`, or None.

        The step from `start` [P] is then shortened so that they just have not.
        """
        work, allowed = self.work, self.work.options.stop_damage
        if allowed is None or len(work.sample) == 0 or step == 0:
            return None
        limit = float(self.before.retained.loss.mean()) * (1 + allowed)
        if work.mean_loss(work.version.tokens, work.sample) <= limit:
            return None
        share = self._shorten(
            start, lambda: work.mean_loss(work.version.tokens, work.sample) / limit, above=False
        )
        return Stopped(
            f"the retained rows' mean loss has risen by {allowed:.1%}, all that is allowed, "
            f"in step {step}",
            share,
        )

    @property
    def checked_rows(self) -> np.ndarray:
        """The forget rows that are measured."""
        return evenly_spaced(len(self.work.forget), CHECK_ROWS)

    def goal(self, rows: np.ndarray) -> float:
        """The mean loss that these forget rows should reach."""
        return float(self.goals.old[rows].mean())

    def _forget_loss(
        self, step: int, forget_gradient: TermGradient | None, last: bool
    ) -> tuple[float, float] | None:
        """The forget rows' mean loss and its goal, or None where nothing is measured.

        The step's own loss where it runs all of them, else that of a sample.
        """
        at_goal = False
        if forget_gradient is not None:
            loss, goal = float(forget_gradient.losses.mean()), self.goal(forget_gradient.rows)
            if len(forget_gradient.rows) == len(self.work.forget):
                return loss, goal
            at_goal = loss >= goal
        if step % CHECK_EVERY and not last and not at_goal:
            return None
        rows = self.checked_rows
        return self.work.mean_loss(self.work.forget, rows), self.goal(rows)

    def _shorten(self, start: Tensor, loss: Callable[[], float], *, above: bool) -> float:
        """Go back on the line to `start` until `loss()`, relative to its goal or limit, is 1.

        It ends within `CLOSE` of 1, above or below. Gives the share of the line that is left.
        """
        model, end = self.work.version.model, self.work.version.model.snapshot()
        low, high = 0.0, 1.0
        for _ in range(SHORTENINGS):
            share = (low + high) / 2
            model.restore(start + share * (end - start))
            try:
                relative = loss()
            except NumericalError:  # so far out that nothing is finite
                relative = float("inf")
            low, high = (low, share) if relative >= 1 else (share, high)
            if (1 <= relative <= 1 + CLOSE) if above else (1 - CLOSE <= relative < 1):
                break
        share = high if above else low
        model.restore(start + share * (end - start))
        return share
