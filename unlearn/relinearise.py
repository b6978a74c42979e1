"""Re-linearised edits: bounded steps, the gradient taken again after each, a trust region, a stopping rule.

The rows S that go or change, and their new contents S', each have a goal: a loss to rise to (what a model that never saw the
row would have, `unlearn.unseen`) or to fall to (the retained rows' mean loss). What is brought down is, in nats per token,

    M = sum_i v_i [ KL(q_i || p_i) + h(t_i - L_i) ]   +   sum_j v_j h(+-(t_j - L_j)),      v = T / sum T

over removed rows i (q_i: what a model that never saw the row might say; `Reference`) and replaced contents j, with L the mean
loss, t its goal, and h(x) = 0 for x <= 0, x^2 / 2s up to s = t/2, then x - s/2: rows at their goal are left alone. A step is

    delta_k = length * d / |d|,      d = (C' + lambda I)^-1 ( -grad M / |grad M| - b grad R / |grad R| )

with R the mean loss of a fixed number of untouched rows, drawn anew for each step, the preconditioner kept. It lowers M by at
most a tenth of what it was at first, by the linear forecast (`STRIDE`), and stays in a radius (1.5 times the first step) that grows
and shrinks with measured over predicted change; a step that raises M is taken back. b is 1, doubles where the drawn rows have lost more than half of what
`max_damage` allows, and is halved (at last 0) where the step would raise M.

Two things differ from the plain `g_S(theta_k) - g_S'(theta_k) - [g_rest(theta_k) - g_rest(theta_0)]`, because of what
was measured on the testbed (LOG.md): raising a removed row's loss by its own labels alone makes the adapter wrong in a way
that no retrained one is (KL to it 3.5 nats, before the edit 2.9; towards q 1.7), and the normalised difference of both parts
(NGDiff, Bu et al. 2024, arXiv 2410.22086) keeps the retained loss where a sum of weighted gradients does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.data import TokenizedExamples, collate, plan_batches
from influence.errors import InputError, NumericalError
from influence.gradients import Tape, tape
from influence.loss import Supervised, loss_gradient, mean_losses, probabilities, token_losses
from influence.progress import track
from unlearn.measure import Cost
from unlearn.unseen import Reference

#: The share of M at first that a step may lower it by, as the linear forecast says.
STRIDE = 0.1
#: Untouched rows in a step.
REST = 24
#: How near to its goal, relative to it, a loss must come.
NEAR = 0.03
#: Measured over predicted change below which the radius shrinks, above which it grows.
POOR, GOOD = 0.3, 0.8
#: Steps taken back in a row before the edit gives up.
RETRIES = 6


@dataclass(frozen=True)
class Until:
    """A stopping rule: `expected`, `loss=X` (nats per token), `steps=N`, `norm=X` (length of the whole move), `converged`."""

    WORDS: ClassVar[tuple[str, ...]] = ("expected", "converged")
    NUMBERS: ClassVar[tuple[str, ...]] = ("loss", "steps", "norm")
    CHOICES: ClassVar[str] = "expected, loss=X (nats per token), steps=N, norm=X, converged"

    kind: str = "expected"
    value: float | None = None

    @classmethod
    def parse(cls, text: str | Self) -> Self:
        """From `loss=2.5` and so on."""
        if isinstance(text, cls):
            return text
        kind, equals, number = str(text).partition("=")
        if kind in cls.WORDS and not equals:
            return cls(kind)
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        sound = np.isfinite(value) and value > 0 and (kind != "steps" or value == round(value))
        if kind not in cls.NUMBERS or not sound:
            raise InputError(
                f"stopping rule {text!r} was given; expected one of {cls.CHOICES}, with X above 0 and N whole"
            )
        return cls(kind, value)

    def __str__(self) -> str:
        """As it is typed."""
        return self.kind if self.value is None else f"{self.kind}={self.value:g}"


# ---- weighted gradients --------------------------------------------------------------------------------------


def summed_gradient(
    model: AdaptedModel,
    tokens: TokenizedExamples,
    by_logits: Callable[[np.ndarray, Supervised], Tensor],
    *,
    token_budget: int,
    cost: Cost,
    ahead: Callable[[np.ndarray], None] | None = None,
) -> Tensor:
    """The gradient `[P]` of a sum over rows, where the model is now, from its gradient by the supervised logits.

    `by_logits(rows [b], part)` gives that of a batch, `[N, V]`; `ahead(rows)` is called before the batch runs and may move the
    model meanwhile, which is not allowed while a graph is alive. No row's own gradient is held.
    """
    space = model.space
    total = torch.zeros(space.size, dtype=model.dtype, device=model.device)
    cost.gradients += len(tokens)

    def add(leaf: int, x: Tensor, g: Tensor, valid: Tensor) -> None:
        place = total[space.leaves[leaf].slice].unflatten(0, space.leaves[leaf].shape)
        place += g.flatten(0, 1).T @ x.flatten(0, 1)

    with tape(model) as recorder:
        for rows in plan_batches(tokens, token_budget) if len(tokens) else []:
            if ahead is not None:
                ahead(rows)
            _one_batch(recorder, tokens, rows, by_logits, add)
    return total


def _one_batch(
    recorder: Tape,
    tokens: TokenizedExamples,
    rows: np.ndarray,
    by_logits: Callable[[np.ndarray, Supervised], Tensor],
    add: Callable[[int, Tensor, Tensor, Tensor], None],
) -> None:
    """One batch; its graph is gone when this returns."""
    model = recorder.model
    part = recorder.forward(collate(tokens, rows, pad_id=model.pad_id, device=model.device))
    with torch.no_grad():
        gradient = by_logits(rows, Supervised(part.logits.detach(), part.targets, part.counts))
    recorder.backward(part.logits, gradient, add)


def loss_sum_gradient(
    model: AdaptedModel, tokens: TokenizedExamples, weights: np.ndarray, *, token_budget: int, cost: Cost
) -> tuple[Tensor, np.ndarray]:
    """The gradient `[P]` of `sum_i weights_i l_i` (l the summed loss) and the mean losses `[n]`, where the model is now."""
    losses = np.zeros(len(tokens))
    unit = _unit_of(float(np.abs(weights).max()) if len(weights) else 1.0)

    def by_logits(rows: np.ndarray, part: Supervised) -> Tensor:
        sums = part.per_example(token_losses(part.logits, part.targets)).double()
        losses[rows] = sums.cpu().numpy() / tokens.counts[rows]
        gradient = loss_gradient(probabilities(part.logits), part.targets)
        return gradient * _per_token(weights[rows] / unit, part, gradient)

    gradient = summed_gradient(model, tokens, by_logits, token_budget=token_budget, cost=cost)
    return gradient * unit, losses


def _unit_of(weight: float) -> float:
    """A power of 2 near the largest weight, taken out of a backward and put in again: 16-bit bases cannot hold 1 / N_tok."""
    return 2.0 ** np.floor(np.log2(weight)) if weight > 0 else 1.0


def _per_token(values: np.ndarray, part: Supervised, like: Tensor) -> Tensor:
    """Numbers of the rows `[b]` repeated over their tokens, `[N, 1]`."""
    repeated = np.repeat(np.asarray(values, dtype=np.float64), part.counts)
    return torch.from_numpy(repeated).to(like)[:, None]


# ---- goals ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pull:
    """M at some parameters: its value, gradient `[P]`, and the goals' mean losses `[m]`, nats per token."""

    merit: float
    gradient: Tensor
    losses: np.ndarray


@dataclass(frozen=True, eq=False)
class Goals:
    """Where the losses of the changed rows should go.

    Attributes
    ----------
    tokens : TokenizedExamples
        m rows: removed, replaced, and new contents.
    targets : float64 array [m]
        Mean losses to reach, nats per completion token.
    rises : bool array [m]
        Whether the loss should rise to its target (removed and replaced) or fall to it (new).
    removed : bool array [m]
        Rows that are drawn to `reference` as well.
    reference : Reference or None
        Of these very rows.
    """

    tokens: TokenizedExamples
    targets: np.ndarray
    rises: np.ndarray
    removed: np.ndarray
    reference: Reference | None = None

    def gaps(self, losses: np.ndarray) -> np.ndarray:
        """How much is missing to each goal, nats, `[m]`; 0 where it is reached."""
        return np.maximum(0, np.where(self.rises, self.targets - losses, losses - self.targets))

    def reached(self, losses: np.ndarray) -> bool:
        """Whether the rows that rise, and those that fall, are on average near their goals."""
        gaps, sides = self.gaps(losses), (self.rises, ~self.rises)
        return all(gaps[side].mean() <= NEAR * self.targets[side].mean() for side in sides if side.any())

    def pull(self, model: AdaptedModel, *, token_budget: int, cost: Cost) -> Pull:
        """M and its gradient where the model is now: one forward and backward of every row."""
        tokens, each = self.tokens, 1 / float(self.tokens.counts.sum())
        share, unit = tokens.counts * each, _unit_of(each)
        losses, merits = np.zeros(len(tokens)), np.zeros(len(tokens))
        references: list[Tensor] = []

        def ahead(rows: np.ndarray) -> None:
            references.clear()
            if self.reference is not None and self.removed[rows].any():
                references.append(self.reference.of(rows[self.removed[rows]]))

        def by_logits(rows: np.ndarray, part: Supervised) -> Tensor:
            lengths = tokens.counts[rows]
            sums = part.per_example(token_losses(part.logits, part.targets)).double()
            losses[rows] = sums.cpu().numpy() / lengths
            gap = np.where(self.rises[rows], self.targets[rows] - losses[rows], losses[rows] - self.targets[rows])
            width = 0.5 * self.targets[rows]
            merits[rows] = share[rows] * np.where(gap < width, np.maximum(gap, 0) ** 2 / (2 * width), gap - width / 2)
            slope = np.clip(gap / width, 0, 1) * np.where(self.rises[rows], -1, 1) * (each / unit)
            probs = probabilities(part.logits)
            gradient = loss_gradient(probs, part.targets) * _per_token(slope, part, probs)
            for log_q in references:
                where = torch.from_numpy(np.repeat(self.removed[rows], part.counts)).to(probs.device)
                log_p = torch.log_softmax(part.logits[where].to(log_q), -1)
                divergence = torch.zeros(len(where), dtype=log_q.dtype, device=log_q.device)
                divergence[where] = (log_q.exp() * (log_q - log_p)).sum(-1)
                kl = part.per_example(divergence).double().cpu().numpy() / lengths
                merits[rows] += share[rows] * kl
                gradient[where] += (probs[where] - log_q.exp().to(probs)) * (each / unit)
            return gradient

        gradient = summed_gradient(model, tokens, by_logits, token_budget=token_budget, cost=cost, ahead=ahead)
        gradient = gradient * unit
        merit = float(merits.sum())
        if not (np.isfinite(merit) and bool(torch.isfinite(gradient).all())):
            raise NumericalError(
                "the loss of the changed rows became NaN or infinite: nothing is written. Raise the damping, or load the base "
                "in float32"
            )
        return Pull(merit, gradient, losses)


# ---- the steps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step: its number, length, the radius it had to stay in, M's predicted and measured fall, and what came of it.

    `forget` is the mean loss of the rows that rise, `learn` of those that fall, after it; `retained` that of the drawn retained
    rows before it, and `damage` its relative rise so far; nats per token.
    """

    step: int
    length: float
    radius: float | None
    predicted: float
    measured: float
    accepted: bool
    forget: float | None
    learn: float | None
    retained: float | None
    damage: float | None


@dataclass(frozen=True, eq=False)
class Walk:
    """Where the steps led: parameters `[P]`, the steps, and why they ended. `reached`: the stopping rule held."""

    theta: Tensor
    steps: list[Step] = field(repr=False)
    stopped: str
    reached: bool | None


@dataclass(frozen=True, eq=False)
class Rest:
    """The untouched rows, of which each step draws `count`; `max_damage` is the rise of their loss that is allowed."""

    tokens: TokenizedExamples
    count: int
    seed: int
    max_damage: float

    def __len__(self) -> int:
        return min(self.count, len(self.tokens))


def walk(
    model: AdaptedModel,
    theta: Tensor,
    goals: Goals,
    rest: Rest,
    precondition: Callable[[Tensor], Tensor],
    *,
    until: Until,
    steps: int,
    token_budget: int,
    cost: Cost,
) -> Walk:
    """Take steps from `theta` [P] until the rule holds, or `steps` of them. `precondition` is `(C' + lambda I)^-1` of `[P]`."""
    start, done, rng = theta, [], np.random.default_rng(rest.seed)
    radius, weight, refused = float("inf"), 1.0, 0
    before: dict[int, float] = {}
    budget: dict[str, Any] = {"token_budget": token_budget, "cost": cost}
    if len(goals.tokens) == 0:
        return Walk(theta, [], "every row was at its goal already: the adapter stays as it is", True)
    with model.at(theta):
        here = goals.pull(model, **budget)
    first = here.merit
    most = int(until.value or 0) if until.kind == "steps" else steps
    for number in track(range(1, most + 1), "steps (it may stop before)"):
        if until.kind in ("expected", "loss") and goals.reached(here.losses):
            return Walk(theta, done, _reached(goals, here, until), True)
        with model.at(start):
            drawn = rng.choice(len(rest.tokens), len(rest), replace=False) if len(rest) else np.zeros(0, dtype=int)
            new = np.array([row for row in drawn.tolist() if row not in before], dtype=int)
            if len(new):
                cost.forwards += len(new)
                found = mean_losses(model, rest.tokens.select(new), token_budget=token_budget)
                before |= dict(zip(new.tolist(), found.tolist(), strict=True))
        with model.at(theta):
            move, retained, damage = _direction(model, here, rest, drawn, before, weight, precondition, budget)
        weight = min(8.0, 2 * weight) if damage is not None and damage > rest.max_damage / 2 else max(1.0, weight / 1.5)
        slope = -float(here.gradient.double() @ move.double())
        if not slope > 0:
            return Walk(theta, done, "no step lowers what is left: the retained rows hold it", until.kind == "steps")
        length = min(radius, min(STRIDE * first, here.merit / 2) / slope)
        finished = False
        if until.kind == "norm":
            length, finished = _within(theta - start, move, length, float(until.value or 0))
        with model.at(theta + length * move):
            there = goals.pull(model, **budget)
        predicted, measured = slope * length, here.merit - there.merit
        good = measured > 0
        after = there if good else here
        done.append(
            Step(
                number,
                length,
                None if radius == float("inf") else radius,
                predicted,
                measured,
                good,
                _mean(after.losses[goals.rises]),
                _mean(after.losses[~goals.rises]),
                retained,
                damage,
            )
        )
        if good:
            theta, here, refused = theta + length * move, there, 0
            if measured < POOR * predicted:
                radius = 0.6 * length
            elif measured > GOOD * predicted and length >= radius:
                radius *= 1.5
            radius = min(radius, 1.5 * length) if len(done) == 1 else radius
            if finished:
                return Walk(theta, done, f"the move has the length {until.value:g} that was asked for", True)
        else:
            radius, refused = 0.4 * length, refused + 1
            if refused == RETRIES:
                return Walk(theta, done, f"{RETRIES} steps in a row made things worse and were taken back", False)
    if until.kind == "steps":
        return Walk(theta, done, f"{most} steps were taken, as asked", True)
    if until.kind in ("expected", "loss") and goals.reached(here.losses):
        return Walk(theta, done, _reached(goals, here, until), True)
    return Walk(theta, done, f"{most} steps were not enough: raise --steps", False)


def _direction(
    model: AdaptedModel,
    here: Pull,
    rest: Rest,
    drawn: np.ndarray,
    before: dict[int, float],
    weight: float,
    precondition: Callable[[Tensor], Tensor],
    budget: dict[str, Any],
) -> tuple[Tensor, float | None, float | None]:
    """The step's direction `[P]` of length 1, the drawn retained rows' mean loss, and its relative rise so far."""
    pull, retained, damage = -_unit(here.gradient), None, None
    if len(drawn):
        tokens = rest.tokens.select(drawn)
        weights = np.full(len(drawn), 1 / tokens.counts.sum())
        gradient, losses = loss_sum_gradient(model, tokens, weights, **budget)
        earlier, retained = np.mean([before[row] for row in drawn.tolist()]), float(losses.mean())
        damage = float((retained - earlier) / earlier)
        towards, held = precondition(pull), precondition(_unit(gradient))
        for share in (weight, weight / 2, weight / 4):  # as much of the retained part as still goes downhill
            move = _unit(towards - share * held)
            if float(move @ here.gradient) < 0:
                return move, retained, damage
        return _unit(towards), retained, damage
    return _unit(precondition(pull)), retained, damage


def _unit(v: Tensor) -> Tensor:
    """`v / |v|`; zero stays zero."""
    length = v.double().norm()
    if not bool(torch.isfinite(length)):
        raise NumericalError("a step is NaN or infinite: nothing is written. Raise the damping")
    return v if float(length) == 0 else (v.double() / length).to(v)


def _within(moved: Tensor, move: Tensor, length: float, norm: float) -> tuple[float, bool]:
    """The step length at which the whole move is at most `norm` long, and whether it is that long then."""
    a, b = float(moved.double() @ move.double()), float(moved.double().square().sum())
    most = -a + float(np.sqrt(max(0.0, a * a - b + norm * norm)))
    return (most, True) if most <= length else (length, False)


def _reached(goals: Goals, here: Pull, until: Until) -> str:
    parts = []
    for side, verb in ((goals.rises, "rose"), (~goals.rises, "fell")):
        if side.any():
            expected = "expected of a model that never saw them" if verb == "rose" else "the mean of the retained rows"
            asked = until.kind == "loss" and (verb == "fell" or bool(goals.removed[side].all()))
            parts.append(
                f"the mean loss of {int(side.sum())} {'row' if side.sum() == 1 else 'rows'} {verb} to "
                f"{here.losses[side].mean():.2f} nats per token ({goals.targets[side].mean():.2f} is "
                f"{'what was asked for' if asked else expected})"
            )
    return "; ".join(parts)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
