"""Unlearning difficulty forecast from a few looks: gradients at some points of a coarse ascent, forwards between them.

The ascent that `unlearn.difficulty.measured.measure` runs takes a gradient at every step, tens of them. Here a row's gradient
is taken at `looks` points only. Between two, the optimizer's own steps go on with a gradient that is carried forward,
`g(t) = g + (g - g_before) t / h` up to the next stride's end (h: steps from the look before); after the last look the
loss is read off by forwards until it crosses the target. At that adapter `theta + d` the damage to a sampled training
row j is told in two ways:

    read off      the rise of its loss, by a forward pass: of the `READ` rows with the largest (g_j^T d)^2 T_j
    closed form   a d^T C d / 2 + b (g_j^T d)^2 T_j / 2 for the others: C the run's curvature averaged over its points,
                  g_j the gradient of row j's mean loss at the adapter, T_j its tokens; a, b >= 0 fit the rises read off

The curvature tells how much everything moves, the gradients (the cross-influence) who is hit, and the rows that are
hit hardest are looked at. With one look the walk is a straight line scan along the first step's direction (the sign
of the gradient under Adam), and one gradient is all that is taken.

Why not one look: along an ascent the gradient turns. On a 2.4 M parameter model the cosine with the first gradient
falls to 0.4 within a dozen steps of Adam and its norm grows five- to sevenfold (LOG.md), so a line scan is 1.8 times
too long by a factor that differs from row to row.
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

#: Gradients of a unit, sampled rows whose loss is read off, and forwards at most that look for the crossing.
LOOKS, READ, SCANS = 3, 6, 4
#: How much shorter an ascent is than its first step's rise suggests: sets where the looks are.
FASTER = {"adam": 1.9, "sgd": 4.0}
#: Where the crossing was not seen in `SCANS` forwards, damage is told at most this many times the last scan further on.
FARTHEST = 3.0


@dataclass(frozen=True, eq=False)
class Walked:
    """Ends of the coarse ascents of c units.

    `steps` [c]; whether the crossing was `seen` [c], or extrapolated; `closed` [c] = d^T C d / 2; of every sampled
    row `cross` [c, m] = (g_j^T d)^2 T_j / 2 and `rises` [c, m], NaN where not read off; `features` [c] each.
    """

    steps: np.ndarray
    seen: np.ndarray
    closed: np.ndarray
    cross: np.ndarray
    rises: np.ndarray
    features: dict[str, np.ndarray]


def walk(asked: Units, rows: np.ndarray, protocol: Protocol, looks: int) -> Walked:
    """Walk the units `rows` to their targets in `looks` strides, and read off what that does to the sample."""
    climb = Climb(asked.start, len(rows), protocol)
    now, gradient = asked.gradients(climb.theta, rows)
    features = _features(asked, rows, gradient, climb)
    going = CoarseAscent(asked, rows, climb, now, gradient)
    for look in range(looks - 1):
        going.stride(looks - look)
    for scan in range(SCANS):
        going.scan(last=scan == SCANS - 1)
    d = going.ends - asked.start
    products = (d @ asked.sample_gradients.T).double().cpu().numpy()
    cross = products**2 * asked.run.tokens.counts[asked.sample] / 2
    features |= {"moved": d.norm(dim=1).double().cpu().numpy()}
    return Walked(
        going.steps,
        going.seen,
        closed_form(asked.run, d),
        cross,
        _read(asked, rows, going, cross),
        features,
    )


def _read(asked: Units, rows: np.ndarray, going: CoarseAscent, cross: np.ndarray) -> np.ndarray:
    """Rises [c, m] of the `READ` sampled rows with the largest `cross` of each unit that moved; NaN for the others and its own."""
    rises = np.full(cross.shape, np.nan)
    open_ = np.where(asked.own[rows] | (going.steps == 0)[:, None], -1.0, cross)
    order = np.argsort(-open_, axis=1, kind="stable")[:, :READ]
    for places in order.T:
        some = np.flatnonzero(np.take_along_axis(open_, places[:, None], 1)[:, 0] >= 0)
        if len(some):
            found = asked.sampled_loss(going.ends[_at(some, going.ends)], places[some])
            rises[some, places[some]] = found - asked.sampled_now[places[some]]
    return rises


class CoarseAscent:
    """Coarse ascents on their way: those of the units that are not yet at their targets, by their places in the chunk `live`.

    `gradient` and `growth` [live, P]: at the last look, and what it grew by since the look before, `width` [live]
    steps earlier; `since` [live]: steps since the look; `pace` [live]: rise of the loss in a step, as last seen;
    `late` [c]: steps to be taken off.
    """

    def __init__(
        self, asked: Units, rows: np.ndarray, climb: Climb, now: np.ndarray, gradient: Tensor
    ) -> None:
        self.asked, self.rows, self.climb, self.target = asked, rows, climb, asked.target[rows]
        self.steps, self.ends = np.where(now >= self.target, 0.0, np.inf), climb.theta.clone()
        self.late, self.seen = np.zeros(len(rows)), self.steps == 0
        self.now, self.live = now.copy(), np.arange(len(rows))
        self.gradient, self.growth = gradient, torch.zeros_like(gradient)
        self.width, self.since = np.ones(len(rows)), np.zeros(len(rows), dtype=int)
        self.pace = climb.first_rate(gradient)
        self._faster = FASTER[climb.protocol.optimizer]
        self._keep(np.flatnonzero(self.steps > 0))

    def stride(self, left: int) -> None:
        """Walk a share 1 / `left` of what is left by the pace now, and look: take the gradient there."""
        if len(self.live) == 0:
            return
        h = self._steps((self.target - self.now)[self.live] / (self.pace * self._faster * left))
        origin = self._walk(h)
        later, gradient = self.asked.gradients(self._here(), self.rows[self.live])
        rate, late = self.climb.first_rate(gradient), np.zeros(len(h))
        if self.climb.protocol.optimizer == "sgd":
            # where the gradient grows, a flow of the same length is faster: dt = dl / |g|^2, |g|^2 between the looks its logarithmic mean
            first = self.climb.first_rate(self.gradient)
            ratio = rate / first
            turned = np.where(np.abs(ratio - 1) > 1e-6, ratio, 1.0 + 1e-6)
            mean = first * (turned - 1) / np.log(turned)
            late = np.where(
                later > self.now[self.live], h - (later - self.now[self.live]) / mean, 0
            )
        over = self._crossed(later, h, origin, later >= self.target[self.live], late)
        self.late[self.live] += late
        self.growth, self.width = gradient - self.gradient, h.astype(float)
        self.gradient, self.pace, self.since = gradient, rate, np.zeros_like(h)
        self.now[self.live], self._faster = later, 1.25
        self._keep(np.flatnonzero(~over & np.isfinite(later)))

    def scan(self, last: bool) -> None:
        """Go on along the carried gradient and read the loss off by a forward; the `last` time the crossing is extrapolated."""
        if len(self.live) == 0:
            return
        h = self._steps(
            (self.target - self.now)[self.live]
            / (self.pace * (1.2 if self.since.max() == 0 else 1.0)),
            up=True,
        )
        origin = self._walk(h)
        later = self.asked.losses(self._here(), self.rows[self.live])
        far = self.climb.taken[self.live] >= self.climb.protocol.steps
        rising = later > self.now[self.live]
        over = self._crossed(
            later, h, origin, ((later >= self.target[self.live]) | far | last) & rising
        )
        self.pace = np.maximum((later - self.now[self.live]) / h, 0.1 * self.pace)
        self.now[self.live] = later
        self.since = self.since + h
        self._keep(np.flatnonzero(~over & ~far & np.isfinite(later)))

    def _steps(self, wanted: np.ndarray, up: bool = False) -> np.ndarray:
        whole = np.ceil(wanted) if up else np.round(wanted)
        return np.clip(np.nan_to_num(whole, posinf=1e9), 1, self.climb.protocol.steps).astype(int)

    def _here(self) -> Tensor:
        return self.climb.theta[_at(self.live, self.climb.theta)]

    def _walk(self, h: np.ndarray) -> Tensor:
        """Take h[i] steps of the i-th live copy; returns where all of them were."""
        origin = self._here().clone()
        for t in range(int(h.max())):
            some = np.flatnonzero(t < h)
            at = _at(some, self.gradient)
            share = np.minimum((self.since[some] + t) / self.width[some], 1.0)
            carried = (
                self.gradient[at]
                + self.growth[at] * torch.from_numpy(share).to(self.gradient)[:, None]
            )
            self.climb.step(carried, self.live[some])
        return origin

    def _crossed(
        self,
        later: np.ndarray,
        h: np.ndarray,
        origin: Tensor,
        over: np.ndarray,
        late: np.ndarray | None = None,
    ) -> np.ndarray:
        """Of the copies `over` [live], note where the loss crossed the target in the h steps from `origin`, which were `late` too many."""
        places = self.live[over]
        share = ((self.target - self.now)[places]) / (later[over] - self.now[places])
        self.seen[places] = share <= 1
        taken = self.climb.taken[places] - (1 - share) * h[over] - self.late[places]
        self.steps[places] = np.maximum(taken if late is None else taken - share * late[over], 1e-6)
        share = np.minimum(share, FARTHEST)
        start, to = origin[_at(np.flatnonzero(over), origin)], _at(places, self.ends)
        self.ends[to] = start + torch.from_numpy(share).to(start)[:, None] * (
            self.climb.theta[to] - start
        )
        return over

    def _keep(self, some: np.ndarray) -> None:
        at = _at(some, self.gradient)
        self.live, self.gradient, self.growth = self.live[some], self.gradient[at], self.growth[at]
        self.width, self.since, self.pace = self.width[some], self.since[some], self.pace[some]


def _at(rows: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(like.device)


def joined(parts: Sequence[Walked]) -> Walked:
    """Parts of the units, one after the other."""
    whole = lambda name: np.concatenate([getattr(part, name) for part in parts])  # noqa: E731
    features = {
        name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features
    }
    return Walked(
        whole("steps"), whole("seen"), whole("closed"), whole("cross"), whole("rises"), features
    )


def closed_form(run: Run, d: Tensor) -> np.ndarray:
    """`d^T C d / 2` of displacements `d` [c, P], C averaged over the run's points: [c], nats (the objective's unit).

    Where the run's curvature has no product that is free of passes over the training rows, or is in other coordinates than
    the parameters', C is the identity.
    """
    if run.fitted_name not in ("ekfac", "kfac") or run.manifest["geometry"] != "raw":
        return (d * d).sum(1).double().cpu().numpy() / 2
    total = np.zeros(len(d))
    for point in run.points:
        total += (
            point.place.share * (point.curvature().matvec(d) * d).sum(1).double().cpu().numpy() / 2
        )
    return total


def _features(
    asked: Units, rows: np.ndarray, gradient: Tensor, climb: Climb
) -> dict[str, np.ndarray]:
    """What one look at the adapter tells of each unit; named in `unlearn.difficulty.forecast.predict`."""
    run, counts = asked.run, asked.run.tokens.counts
    squared = (gradient * gradient).sum(1).double().cpu().numpy()
    gap = asked.target[rows] - asked.now[rows]
    common = asked.sample_gradients.mean(0)
    alignment = (
        (gradient @ common).double().cpu().numpy()
        / np.sqrt(np.maximum(squared, 1e-300))
        / float(common.norm())
    )
    return {
        "loss": asked.now[rows],
        "base_loss": asked.base[rows],
        "gap": gap,
        "tokens": np.array([counts[asked.members[i]].sum() for i in rows], dtype=float),
        "share": np.array([len(asked.members[i]) / len(counts) for i in rows]),
        "gradient_norm": np.sqrt(squared),
        "gradient_l1": gradient.abs().sum(1).double().cpu().numpy(),
        "curvature": 2 * closed_form(run, gradient) / np.maximum(squared, 1e-300),
        "self_influence": _self_influence(asked, rows, gradient),
        "alignment": alignment,
        "first_order_steps": np.maximum(gap, 0) / np.maximum(climb.first_rate(gradient), 1e-300),
    }


def _self_influence(asked: Units, rows: np.ndarray, gradient: Tensor) -> np.ndarray:
    """First-order rise of each unit's mean loss if it is removed, `sum_i w_i T_i g^T (C + lambda I)^-1 g`, [c], nats per token.

    With the unit's mean gradient g at the adapter in the place of each of its rows', and the curvature of the run's
    last point; NaN where that has no closed inverse.
    """
    point, run = asked.run.points[-1], asked.run
    operator = point.operator()
    if not isinstance(operator.curvature, Invertible):
        return np.full(len(rows), np.nan)
    here = point.geometry.features(gradient)
    products = (here * operator.curvature.solve(here, operator.lam)).sum(1).double().cpu().numpy()
    return products * np.array(
        [(run.weights * run.tokens.counts)[asked.members[i]].sum() for i in rows]
    )


def combined(found: Walked, own: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Damage of every unit [n], the mean over the sampled rows that are not its `own` [n, m]; that of the closed form alone, and of the rises read off alone.

    NaN where no sampled row is left. The weights of the closed form are fitted on the units whose crossing was seen:
    an end that was extrapolated far beyond it would set everybody's.
    """
    told = np.stack([np.broadcast_to(found.closed[:, None], own.shape), found.cross], axis=-1)
    seen = np.isfinite(found.rises)
    read = seen & found.seen[:, None]
    scale = np.maximum(told[read].mean(0), 1e-300) if read.any() else np.ones(2)
    fit, _ = (
        nnls(told[read] / scale, found.rises[read]) if read.any() else (np.full(2, np.nan), 0.0)
    )
    closed = (told / scale) @ fit
    mean = lambda values, kept: (
        np.where(kept, values, 0).sum(1) / np.where(kept.any(1), kept.sum(1), np.nan)
    )
    return (
        mean(np.where(seen, found.rises, closed), ~own),
        mean(closed, ~own),
        mean(found.rises, seen),
    )
