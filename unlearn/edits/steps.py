"""Re-linearised edits: bounded steps in a trust region, the gradient taken again after each.

The rows S that go or change, and their new contents S', each have a target: the loss to rise or to
fall to that a model trained on the rows as they are after the edit would have (`unlearn.unseen`).
What is brought down is the merit, in nats per token (`unlearn.edits.goals`),

    M = sum_i v_i [ KL(q_i || p_i) + h(+-(t_i - L_i)) ],   v = T / sum T

with q_i what such a model might say (`unlearn.unseen_outputs`), L the mean loss, t its target, T
its tokens, and h(x) = 0 for x <= 0, x^2 / 2s up to s = t/2, then x - s/2: rows at their target are
left alone. A step is

    delta_k = length * d / |d|
    d = (C' + lambda I)^-1 ( -grad M / |grad M| - b grad R / |grad R| )

with R the mean loss of a fixed number of retained rows, drawn anew for each step. The
preconditioner is kept from step to step. The length is limited twice:

* by the linear forecast: a step promises at most `STRIDE` of what M was at first;
* by a radius, which begins at 1.5 times the first step and then shrinks and grows with the measured
  over the predicted fall of M. A step that raises M is taken back.

b is what keeps the mean loss of the drawn rows as it is, to first order. Where they have lost since
the start it is at least 1; that doubles where they have lost more than half of what `max_damage`
allows. It is halved (at last 0) where the step would raise M. So the retained rows are held where
they were, and not trained further.

Two things differ from the plain `g_S(theta_k) - g_S'(theta_k) - [g_rest(theta_k) -
g_rest(theta_0)]`, because of what was measured on tofu-tiny (LOG.md, 2026-11-21, "Closed-form
edits"). Raising a removed row's loss by its own labels alone makes the adapter wrong in a way that
no retrained one is: KL to it 3.5 nats, before the edit 2.9, towards q 1.7. And the normalised
difference of both parts (NGDiff, Bu et al. 2024, arXiv 2410.22086) keeps the retained loss where a
sum of weighted gradients does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.adapter import AdaptedModel
from influence.cost import Cost
from influence.errors import NumericalError
from influence.progress import track
from influence.shared_rows import shared_gradient, shared_losses
from influence.tokens import TokenizedExamples
from unlearn.edits.goals import Goals, Merit
from unlearn.stopping import EditRule, Ending, StepRecord

#: The share of M at first that a step may lower it by, as the linear forecast says. Twentieths cost
#: twice the work and end in the same place (tofu-tiny; LOG.md, 2026-11-21, "Closed-form edits").
STRIDE = 0.1

#: Measured over predicted fall of M below which the radius shrinks, above which it grows. A choice.
POOR, GOOD = 0.3, 0.8

#: The radius after a step, over the step's length: after the first one, after a poor one, after one
#: that was taken back. A choice.
FIRST, SHRUNK, TAKEN_BACK = 1.5, 0.6, 0.4

#: Factor by which the radius grows, and by which the retained part's weight falls. A choice.
GROWTH = 1.5

#: The most that the retained part's weight b may be. A choice.
HEAVIEST = 8.0

#: Fall of M in a step, over M at first, below which M has settled. At 0.01 the removed author's KL to
#: retraining is nearer to what twice as many steps give than to the first step at the goal
#: (LOG.md, 2026-11-28, "What a model that never saw the rows would say").
SETTLED = 0.01

#: Draws of retained rows that the rise of their loss is averaged over. A choice.
SMOOTHED = 3

#: Steps taken back in a row before the edit gives up. A choice.
RETRIES = 6


@dataclass(frozen=True, eq=False)
class RetainedRows:
    """The retained rows, and how the steps use them.

    Attributes
    ----------
    tokens : TokenizedExamples
        All of them, n rows.
    count : int
        Rows that a step draws, where there are so many; 0: steps look at the changed rows alone.
    seed : int
        Seed of the draws.
    max_damage : float
        Relative rise of their mean loss that is allowed.
    """

    tokens: TokenizedExamples
    count: int
    seed: int
    max_damage: float

    @property
    def drawn(self) -> int:
        """Rows that each step draws."""
        return min(self.count, len(self.tokens))


@dataclass(frozen=True)
class RetainedLoss:
    """What a step saw of its drawn retained rows.

    Mean `loss`, and `damage`, its relative rise so far; both are None where no row was drawn.
    """

    loss: float | None = None
    damage: float | None = None


@dataclass
class TrustRegion:
    """How far a step may go.

    Attributes
    ----------
    first : float
        M before the first step.
    radius : float
        The longest step; infinite until one was taken.
    """

    first: float
    radius: float = float("inf")

    @property
    def known_radius(self) -> float | None:
        """The radius, or None before the first step."""
        return None if self.radius == float("inf") else self.radius

    def length(self, merit: float, slope: float) -> float:
        """The next step's length, where M is `merit` and falls by `slope` a unit of length.

        Not more than half of what is left of M is promised at a time, so the last steps get shorter
        on the way to the targets.
        """
        return min(self.radius, min(STRIDE * self.first, merit / 2) / slope)

    def judge(self, length: float, predicted: float, measured: float) -> None:
        """Set the radius after a step of this length, by M's predicted and measured fall."""
        if not measured > 0:
            self.radius = TAKEN_BACK * length
        elif measured < POOR * predicted:
            self.radius = SHRUNK * length
        elif self.radius == float("inf"):  # only after the first step: the forecast had no limit
            self.radius = FIRST * length
        elif measured > GOOD * predicted and length >= self.radius:
            # A shorter step was held back by the forecast, so it says nothing about the radius.
            self.radius *= GROWTH


def walk(
    model: AdaptedModel,
    theta: Tensor,
    goals: Goals,
    retained: RetainedRows,
    precondition: Callable[[Tensor], Tensor],
    *,
    until: EditRule,
    steps: int,
    token_budget: int,
    cost: Cost,
) -> Ending:
    """Take steps from `theta` [P] until the rule holds, or at most `steps` of them.

    `precondition` is `(C' + lambda I)^-1` of a gradient `[P]`. Raises `NumericalError` where a loss
    or a step is NaN or infinite.
    """
    if len(goals.tokens) == 0:
        return Ending(
            theta, [], "every row was at its goal already: the adapter stays as it is", True
        )
    with model.at(theta):
        merit = goals.merit(model, token_budget=token_budget, cost=cost)
    most = int(until.value or 0) if until.kind == "steps" else steps
    return _Walk(
        model=model,
        start=theta,
        theta=theta,
        merit=merit,
        goals=goals,
        retained=retained,
        precondition=precondition,
        until=until,
        most=most,
        token_budget=token_budget,
        cost=cost,
        region=TrustRegion(merit.value),
        rng=np.random.default_rng(retained.seed),
        losses_before=np.full(len(retained.tokens), np.nan),
    ).to_its_end()


@dataclass(eq=False, kw_only=True)
class _Walk:
    """A walk on its way: what does not change, then where it stands."""

    model: AdaptedModel
    start: Tensor
    goals: Goals
    retained: RetainedRows
    precondition: Callable[[Tensor], Tensor]
    until: EditRule
    most: int
    token_budget: int
    cost: Cost
    rng: np.random.Generator

    theta: Tensor
    merit: Merit
    region: TrustRegion
    losses_before: np.ndarray
    weight: float = 1.0
    taken_back: int = 0
    damages: list[float] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)

    def to_its_end(self) -> Ending:
        """Step until the rule holds, no step helps, or `most` steps were tried."""
        for number in track(range(1, self.most + 1), "steps (it may stop before)"):
            if self.at_the_goals:
                return self.ended(_goals_text(self.goals, self.merit, self.until), True)
            direction, seen = self.direction(self.draw())
            distributed.hand_out([direction], 0)  # all take the same step, to the last bit
            self.weigh(seen)
            slope = -float(self.merit.gradient.double() @ direction.double())
            if not slope > 0:
                return self.ended(
                    "no step lowers what is left: the retained rows hold it",
                    self.until.kind == "steps",
                )
            length, at_the_norm = self.length(direction, slope)
            accepted = self.take(number, direction, length, slope, seen)
            if accepted and at_the_norm:
                norm = f"{self.until.value:g}"
                return self.ended(f"the move has the length {norm} that was asked for", True)
            if self.taken_back == RETRIES:
                return self.ended(
                    f"{RETRIES} steps in a row made things worse and were taken back", False
                )
        if self.until.kind == "steps":
            return self.ended(f"{self.most} steps were taken, as asked", True)
        if self.at_the_goals:
            return self.ended(_goals_text(self.goals, self.merit, self.until), True)
        return self.ended(f"{self.most} steps were not enough: raise --steps", False)

    def ended(self, why: str, reached: bool) -> Ending:
        """The ending where the walk stands."""
        return Ending(self.theta, self.steps, why, reached)

    @property
    def at_the_goals(self) -> bool:
        """Whether the rule looks at the rows' losses, and they are at their targets.

        For expected ones M must have settled too: the outputs are not yet theirs when the mean loss
        is.
        """
        if not (self.until.by_loss and self.goals.reached(self.merit.losses)):
            return False
        if self.until.kind == "loss" or not self.steps:
            return True
        return max(self.steps[-1].measured, 0.0) < SETTLED * self.region.first

    @property
    def lost(self) -> float:
        """The retained rows' relative rise so far: mean of the last `SMOOTHED` draws."""
        return float(np.mean(self.damages[-SMOOTHED:]))

    # -- one step, part by part

    def draw(self) -> np.ndarray:
        """Draw this step's retained rows `[drawn]`, and measure new ones at the start."""
        if self.retained.drawn == 0:
            return np.zeros(0, dtype=int)
        tokens = self.retained.tokens
        rows = self.rng.choice(len(tokens), self.retained.drawn, replace=False)
        new = rows[np.isnan(self.losses_before[rows])]
        if len(new):
            # Only drawn rows are measured at the start: measuring all of them would cost a pass
            # over the training rows before the first step.
            self.cost.forwards += len(new)
            with self.model.at(self.start):
                self.losses_before[new] = shared_losses(
                    self.model, tokens.select(new), token_budget=self.token_budget
                )
        return rows

    def direction(self, rows: np.ndarray) -> tuple[Tensor, RetainedLoss]:
        """The step's direction `[P]`, of length 1, and what was seen of the drawn retained rows."""
        downhill = -_unit(self.merit.gradient)
        if len(rows) == 0:
            return _unit(self.precondition(downhill)), RetainedLoss()
        tokens = self.retained.tokens.select(rows)
        weights = np.full(len(rows), 1 / tokens.counts.sum())
        with self.model.at(self.theta):
            gradient, losses = shared_gradient(
                self.model, tokens, weights, token_budget=self.token_budget, cost=self.cost
            )
        before, loss = np.mean(self.losses_before[rows]), float(losses.mean())
        damage = float((loss - before) / before)
        self.damages.append(damage)
        seen = RetainedLoss(loss, damage)
        # Both parts have length 1 before they are solved (NGDiff): so the retained rows weigh as
        # much as the changed ones however small their gradient is.
        towards, held = self.precondition(downhill), self.precondition(_unit(gradient))
        whole = retained_weight(towards, held, gradient, self.weight if self.lost > 0 else 0.0)
        for weight in (whole, whole / 2, whole / 4):
            # As much of the retained part as still goes downhill in M.
            direction = _unit(towards - weight * held)
            if float(direction @ self.merit.gradient) < 0:
                return direction, seen
        return _unit(towards), seen

    def weigh(self, seen: RetainedLoss) -> None:
        """Set the retained part's weight for the next step by what this one saw."""
        if seen.damage is not None and self.lost > self.retained.max_damage / 2:
            self.weight = min(HEAVIEST, 2 * self.weight)
        else:
            self.weight = max(1.0, self.weight / GROWTH)

    def length(self, direction: Tensor, slope: float) -> tuple[float, bool]:
        """The step's length, and whether the whole move has the length that was asked for then."""
        length = self.region.length(self.merit.value, slope)
        if self.until.kind == "norm":
            return _within(self.theta - self.start, direction, length, float(self.until.value or 0))
        return length, False

    def take(
        self, number: int, direction: Tensor, length: float, slope: float, seen: RetainedLoss
    ) -> bool:
        """Try the step, keep it where it lowers M, and note it. Returns whether it was kept."""
        theta = self.theta + length * direction
        with self.model.at(theta):
            merit = self.goals.merit(self.model, token_budget=self.token_budget, cost=self.cost)
        predicted, measured = slope * length, self.merit.value - merit.value
        accepted = measured > 0
        if accepted:
            self.theta, self.merit, self.taken_back = theta, merit, 0
        else:
            self.taken_back += 1
        rises, losses = self.goals.rises, self.merit.losses
        self.steps.append(
            StepRecord(
                step=number,
                length=length,
                radius=self.region.known_radius,
                predicted=predicted,
                measured=measured,
                accepted=accepted,
                forget=_mean(losses[rises]),
                learn=_mean(losses[~rises]),
                retained=seen.loss,
                damage=seen.damage,
            )
        )
        self.region.judge(length, predicted, measured)
        return accepted


def retained_weight(towards: Tensor, held: Tensor, gradient: Tensor, least: float) -> float:
    """The b of the direction `towards - b held` at which the retained loss stays as it is.

    To first order, by its `gradient` [P]: 0 where it falls of itself. At least `least`.
    """
    rise, fall = float(towards @ gradient), float(held @ gradient)
    return max(rise / fall if fall > 0 else 0.0, least)


def _unit(v: Tensor) -> Tensor:
    """`v / |v|`, where zero stays zero."""
    length = v.double().norm()
    if not bool(torch.isfinite(length)):
        raise NumericalError("a step is NaN or infinite: nothing is written. Raise the damping")
    return v if float(length) == 0 else (v.double() / length).to(v)


def _within(moved: Tensor, direction: Tensor, length: float, norm: float) -> tuple[float, bool]:
    """The step length at which the whole move is at most `norm` long, and whether it is that long.

    The positive root s of `|moved + s direction|^2 = norm^2`, for a direction of length 1.
    """
    a, b = float(moved.double() @ direction.double()), float(moved.double().square().sum())
    most = -a + float(np.sqrt(max(0.0, a * a - b + norm * norm)))
    return (most, True) if most <= length else (length, False)


def _goals_text(goals: Goals, merit: Merit, until: EditRule) -> str:
    """Which rows rose and fell to what, in a sentence."""
    parts = []
    for side, verb in ((goals.rises, "rose"), (~goals.rises, "fell")):
        if not side.any():
            continue
        if until.kind == "loss":
            source = "what was asked for"
        elif verb == "rose":
            source = "expected of a model that never saw them"
        else:
            source = "expected of a model that was trained on them"
        count, loss, target = int(side.sum()), merit.losses[side].mean(), goals.targets[side].mean()
        rows = f"{count} {'row' if count == 1 else 'rows'}"
        parts.append(
            f"the mean loss of {rows} that had not reached their goal {verb} to {loss:.2f} nats per token "
            f"({target:.2f} is {source})"
        )
    return "; ".join(parts)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
