"""Coarse ascents: gradients at a few points, forwards between them, and the damage at their ends.

The ascent that `unlearn.difficulty.measured.measure` runs takes a gradient at every step, tens of
them. Here a unit's gradient is taken at `looks` points only. Between two, the optimizer's own steps
go on with a gradient that is carried forward, `g(t) = g + (g - g_before) t / h` up to the next
stride's end (h: steps from the look before); after the last look the loss is read off by forwards
until it crosses the target. At that adapter `theta + d` the damage to a sampled training row j is
told in two ways:

    read off      the rise of its loss, by a forward pass: of the `READ` rows with the largest
                  (g_j^T d)^2 T_j
    closed form   a d^T C d / 2 + b (g_j^T d)^2 T_j / 2 for the others: C the run's curvature
                  averaged over its points, g_j the gradient of row j's mean loss at the adapter,
                  T_j its tokens; a, b >= 0 fit the rises read off

The curvature tells how much everything moves, the gradients (the cross-influence) who is hit, and
the rows that are hit hardest are looked at. With one look the walk is a straight line scan along
the first step's direction (the sign of the gradient under Adam), and one gradient is all that is
taken.

Why not one look: along an ascent the gradient turns. On a 2.4 M parameter model the cosine with the
first gradient falls to 0.4 within a dozen steps of Adam and its norm grows five- to sevenfold, so a
line scan is 1.8 times too long by a factor that differs from row to row (LOG.md, 2026-11-21).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from influence.curvature.base import Invertible
from influence.run import Run
from unlearn.difficulty.ascent import Climb
from unlearn.difficulty.protocol import Protocol
from unlearn.difficulty.units import Units

#: Gradients of a unit. With five the ranks of the steps are 0.95 and more in five worlds under Adam,
#: with three 0.89 and more, with one 0.53 and more (benchmarks/README.md, "Difficulty of
#: unlearning").
LOOKS = 5
#: Sampled rows whose loss is read off. Six give the damage a rank of 0.89 and 0.95 there, all
#: sixteen would give 0.97 and 0.99 (the same entry).
READ = 6
#: Forwards at most that look for the crossing: with six rows read off, ten a unit. A choice.
SCANS = 4
#: How many times faster than last seen the loss is taken to rise after a look: in a stride, and in
#: the first scan. Choices: they set where the looks and the scans are, not what is found there.
FASTER_STRIDE, FASTER_SCAN = 1.25, 1.2
#: The least pace, as a share of the one before, that a scan which hardly rose leaves behind. A
#: choice.
LEAST_PACE = 0.1
#: Where the crossing was not seen, damage is told at most this many times the last scan further on.
#: A choice.
FARTHEST = 3.0


@dataclass(frozen=True, eq=False)
class Walked:
    """Ends of the coarse ascents of c units.

    Attributes
    ----------
    steps : array [c]
        Infinite where no crossing was found.
    seen : bool array [c]
        Whether the crossing was seen; else it was extrapolated.
    closed : array [c]
        d^T C d / 2, nats.
    cross : array [c, m]
        (g_j^T d)^2 T_j / 2 of every sampled row, nats.
    rises : array [c, m]
        Rises of the sampled rows' losses, nats per token; NaN where they were not read off.
    features : dict of arrays [c]
        Named in `unlearn.difficulty.forecast.predict`.
    """

    steps: np.ndarray
    seen: np.ndarray
    closed: np.ndarray
    cross: np.ndarray
    rises: np.ndarray
    features: dict[str, np.ndarray]


def walk(units: Units, rows: np.ndarray, protocol: Protocol, looks: int) -> Walked:
    """Walk the units `rows` to their targets with `looks` gradients, and measure the sample."""
    climb = Climb(units.start, len(rows), protocol)
    losses, gradient = units.gradients(climb.theta, rows)
    features = _features(units, rows, gradient, climb)
    ascent = CoarseAscent(units, rows, climb, losses, gradient)
    for look in range(looks - 1):
        ascent.stride(looks - look)
    for scan in range(SCANS):
        ascent.scan(last=scan == SCANS - 1)
    d = ascent.ends - units.start
    cross = units.sample_gradients.products(d) ** 2 * units.run.tokens.counts[units.sample] / 2
    features["moved"] = d.norm(dim=1).double().cpu().numpy()
    return Walked(
        steps=ascent.steps,
        seen=ascent.seen,
        closed=closed_form(units.run, d),
        cross=cross,
        rises=_rises_read_off(units, rows, ascent, cross),
        features=features,
    )


def _rises_read_off(
    units: Units, rows: np.ndarray, ascent: CoarseAscent, cross: np.ndarray
) -> np.ndarray:
    """Rises [c, m] of the `READ` sampled rows with the largest `cross` of each unit that moved.

    NaN for the others, and for those that do not count for the unit.
    """
    rises = np.full(cross.shape, np.nan)
    candidates = np.where(units.excluded[rows] | (ascent.steps == 0)[:, None], -1.0, cross)
    order = np.argsort(-candidates, axis=1, kind="stable")[:, :READ]
    for places in order.T:
        counted = np.take_along_axis(candidates, places[:, None], 1)[:, 0] >= 0
        which = np.flatnonzero(counted)
        if len(which):
            ends, places = ascent.ends[_index(which, ascent.ends)], places[which]
            losses = units.sampled_row_losses(ends, places)
            rises[which, places] = losses - units.sample_loss[places]
    return rises


class CoarseAscent:
    """Coarse ascents of c units on their way.

    Arrays [c] are of all units, arrays [live] of those that are not yet at their targets.

    Attributes
    ----------
    live : int array [live]
        Places of the units that go on.
    losses, target : arrays [c]
        Losses as last seen, and where the ascent ends.
    steps, seen, ends : arrays [c], [c], [c, P]
        As in `Walked`; `ends` are the adapters at the crossings.
    late : array [c]
        Steps to be taken off, for strides that the ascent itself would make in fewer.
    gradient, growth : Tensors [live, P]
        The gradient at the last look, and what it grew by since the look before.
    width : array [live]
        Steps between these two looks.
    since : int array [live]
        Steps since the last look.
    pace : array [live]
        Rise of the loss in a step, as last seen.
    """

    def __init__(
        self, units: Units, rows: np.ndarray, climb: Climb, losses: np.ndarray, gradient: Tensor
    ) -> None:
        self.units, self.rows, self.climb, self.target = units, rows, climb, units.target[rows]
        self.steps, self.ends = np.where(losses >= self.target, 0.0, np.inf), climb.theta.clone()
        self.late, self.seen = np.zeros(len(rows)), self.steps == 0
        self.losses, self.live = losses.copy(), np.arange(len(rows))
        self.gradient, self.growth = gradient, torch.zeros_like(gradient)
        self.width, self.since = np.ones(len(rows)), np.zeros(len(rows), dtype=int)
        self.pace = climb.first_rate(gradient)
        self._faster = climb.protocol.rule.faster
        self._keep(np.flatnonzero(self.steps > 0))

    def stride(self, remaining: int) -> None:
        """Walk a share 1 / `remaining` of the gap at the pace now, and take the gradient there."""
        if len(self.live) == 0:
            return
        h = self._whole_steps(np.round(self._gap / (self.pace * self._faster * remaining)))
        origin = self._walk(h)
        losses, gradient = self.units.gradients(self._thetas, self.rows[self.live])
        rate, rise = self.climb.first_rate(gradient), losses - self.losses[self.live]
        # No scan came yet: the pace is still the first-order rise along the last look's gradient.
        late = self.climb.protocol.rule.lateness(h, rise, self.pace, rate)
        crossed = losses >= self.target[self.live]
        self._note_crossings(crossed, losses, h, origin, late)
        self.late[self.live] += late
        self.growth, self.width = gradient - self.gradient, h.astype(float)
        self.gradient, self.pace, self.since = gradient, rate, np.zeros_like(h)
        self.losses[self.live], self._faster = losses, FASTER_STRIDE
        self._keep(np.flatnonzero(~crossed & np.isfinite(losses)))

    def scan(self, last: bool) -> None:
        """Go on along the carried gradient and read the loss off by a forward.

        The `last` time the crossing is extrapolated.
        """
        if len(self.live) == 0:
            return
        faster = FASTER_SCAN if self.since.max() == 0 else 1.0
        h = self._whole_steps(np.ceil(self._gap / (self.pace * faster)))
        origin = self._walk(h)
        losses = self.units.losses(self._thetas, self.rows[self.live])
        rise = losses - self.losses[self.live]
        beyond = self.climb.taken[self.live] >= self.climb.protocol.steps
        # A loss that fell has no crossing ahead on the line through its last two values.
        crossed = ((losses >= self.target[self.live]) | beyond | last) & (rise > 0)
        self._note_crossings(crossed, losses, h, origin)
        self.pace = np.maximum(rise / h, LEAST_PACE * self.pace)
        self.losses[self.live] = losses
        self.since = self.since + h
        self._keep(np.flatnonzero(~crossed & ~beyond & np.isfinite(losses)))

    @property
    def _gap(self) -> np.ndarray:
        return (self.target - self.losses)[self.live]

    @property
    def _thetas(self) -> Tensor:
        return self.climb.theta[_index(self.live, self.climb.theta)]

    def _whole_steps(self, wanted: np.ndarray) -> np.ndarray:
        steps = np.clip(np.nan_to_num(wanted, posinf=1e9), 1, self.climb.protocol.steps)
        return steps.astype(int)

    def _walk(self, h: np.ndarray) -> Tensor:
        """Take h[i] steps of the i-th live copy, and return where all of them were, [live, P]."""
        origin = self._thetas.clone()
        for t in range(int(h.max())):
            walking = np.flatnonzero(t < h)
            index = _index(walking, self.gradient)
            # Carried forward no further than it was seen to grow: beyond a stride's width it stays.
            share = np.minimum((self.since[walking] + t) / self.width[walking], 1.0)
            gradient = self.growth[index].mul_(torch.from_numpy(share).to(self.gradient)[:, None])
            gradient += self.gradient[index]
            self.climb.step(gradient, self.live[walking])
        return origin

    def _note_crossings(
        self,
        crossed: np.ndarray,
        losses: np.ndarray,
        h: np.ndarray,
        origin: Tensor,
        late: np.ndarray | None = None,
    ) -> None:
        """Note where the `crossed` copies [live] met their targets in the h steps from `origin`.

        The loss is taken to be linear on the way; `late` [live] of the h steps were too many.
        """
        places = self.live[crossed]
        share = self._gap[crossed] / (losses[crossed] - self.losses[places])
        self.seen[places] = share <= 1
        taken = self.climb.taken[places] - (1 - share) * h[crossed] - self.late[places]
        if late is not None:  # of this stride, only the part before the crossing
            taken = taken - share * late[crossed]
        self.steps[places] = np.maximum(taken, 1e-6)  # 0 is for units that needed none
        share = np.minimum(share, FARTHEST)
        start, index = origin[_index(np.flatnonzero(crossed), origin)], _index(places, self.ends)
        way = self.climb.theta[index] - start
        self.ends[index] = start + torch.from_numpy(share).to(start)[:, None] * way

    def _keep(self, rows: np.ndarray) -> None:
        index = _index(rows, self.gradient)
        self.live, self.gradient = self.live[rows], self.gradient[index]
        self.growth, self.pace = self.growth[index], self.pace[rows]
        self.width, self.since = self.width[rows], self.since[rows]


def _index(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)


def joined(parts: Sequence[Walked]) -> Walked:
    """Parts of the units, one after the other."""

    def whole(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    features = {
        name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features
    }
    return Walked(
        steps=whole("steps"),
        seen=whole("seen"),
        closed=whole("closed"),
        cross=whole("cross"),
        rises=whole("rises"),
        features=features,
    )


def closed_form(run: Run, d: Tensor) -> np.ndarray:
    """`d^T C d / 2` of displacements `d` [c, P], C averaged over the run's points: [c], nats.

    Where the run's curvature has no product that is free of passes over the training rows, or is in
    other coordinates than the parameters', C is the identity.
    """
    if not run.curvature().in_memory or run.manifest.geometry != "raw":
        return (d * d).sum(1).double().cpu().numpy() / 2
    total = np.zeros(len(d))
    for point in run.points:
        products = (point.curvature().matvec(d) * d).sum(1).double().cpu().numpy()
        total += point.place.share * products / 2
    return total


def _features(
    units: Units, rows: np.ndarray, gradient: Tensor, climb: Climb
) -> dict[str, np.ndarray]:
    """Features [c] of each unit at the adapter, named in `unlearn.difficulty.forecast.predict`."""
    run, counts = units.run, units.run.tokens.counts
    squared = (gradient * gradient).sum(1).double().cpu().numpy()
    gap = units.target[rows] - units.loss[rows]
    common = units.sample_gradients.mean
    along = (gradient @ common).double().cpu().numpy()
    return {
        "loss": units.loss[rows],
        "base_loss": units.base_loss[rows],
        "gap": gap,
        "tokens": np.array([counts[units.members[i]].sum() for i in rows], dtype=float),
        "share": np.array([len(units.members[i]) / len(counts) for i in rows]),
        "gradient_norm": np.sqrt(squared),
        "gradient_l1": gradient.abs().sum(1).double().cpu().numpy(),
        "curvature": 2 * closed_form(run, gradient) / np.maximum(squared, 1e-300),
        "self_influence": _self_influence(units, rows, gradient),
        "alignment": along / np.sqrt(np.maximum(squared, 1e-300)) / float(common.norm()),
        "first_order_steps": np.maximum(gap, 0) / np.maximum(climb.first_rate(gradient), 1e-300),
    }


def _self_influence(units: Units, rows: np.ndarray, gradient: Tensor) -> np.ndarray:
    """First-order rise of each unit's mean loss if it is removed, [c], nats per token.

    `sum_i w_i T_i g^T (C + lambda I)^-1 g`, with the unit's mean gradient g at the adapter in the
    place of each of its rows', and the curvature of the run's last point; NaN where that has no
    closed inverse.
    """
    point, run = units.run.points[-1], units.run
    operator = point.operator()
    if not isinstance(operator.curvature, Invertible):
        return np.full(len(rows), np.nan)
    features = point.geometry.features(gradient)
    solved = operator.curvature.solve(features, operator.lam)
    products = (features * solved).sum(1).double().cpu().numpy()
    weights = run.weights * run.tokens.counts
    return products * np.array([weights[units.members[i]].sum() for i in rows])


def combined(walked: Walked, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Damage of every unit [n]: in all, by the closed form alone, and by the rises read off alone.

    A mean over the sampled rows that count for it, which are not `excluded` [n, m]; NaN where there
    are none. The weights of the closed form are fitted on the units whose crossing was seen: an end
    that was extrapolated far beyond it would set everybody's.
    """
    closed = np.broadcast_to(walked.closed[:, None], excluded.shape)
    terms = np.stack([closed, walked.cross], axis=-1)
    read = np.isfinite(walked.rises)
    fitted = read & walked.seen[:, None]
    scale, fit = np.ones(2), np.full(2, np.nan)
    if fitted.any():
        scale = np.maximum(terms[fitted].mean(0), 1e-300)
        fit, _ = nnls(terms[fitted] / scale, walked.rises[fitted])
    told = (terms / scale) @ fit
    return (
        mean_of(np.where(read, walked.rises, told), ~excluded),
        mean_of(told, ~excluded),
        mean_of(walked.rises, read),
    )


def mean_of(values: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Mean [n] of the `counted` ones of `values` [n, m], NaN where there are none."""
    number = np.where(counted.any(1), counted.sum(1), np.nan)
    return np.where(counted, values, 0).sum(1) / number
