"""How far training went along the path, told from the rows' losses.

Training from the base (mean loss J_0) to the adapter (J_end) is read as a gradient flow of time t
in the metric of `M = (C + lambda I)^-1`: over a stretch dt the loss falls by `a dt`, where

    a = grad J^T M grad J = sqrt(w)^T K sqrt(w),        K = F M F^T,   f_i = sqrt(w_i) grad l_i

so that each stretch between two points of the path takes `(J_p - J_p+1) / a`, with the geometric
mean of a at its two ends. At the base and, where it is no point, at the adapter log a is taken from
the two nearest points, linear in the scale of B.

The same flow lets rows that are learnt pull less and less. What they pull less by is their own
Gauss-Newton curvature: where a row's logits move along `d = M grad l`, its curvature along d is

    d^T G d = ratio (grad l^T d)^2

`ratio` is measured, not chosen (`gauss_newton_ratio`). Over the whole path `s = sum ratio dt` is
the strength with which rows share credit (`influence.credit`). Neither t K nor s K depends on the
size of M, and none of it on a constant. On four adapters what was predicted for halves of the rows
was 0.57 to 1.05 of what retraining measured (benchmarks/README.md, "Credit that is shared").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.adapter import AdaptedModel
from influence.at_point import AtPoint, evenly_spaced, memory_chunks
from influence.batches import collate
from influence.curvature.base import Invertible
from influence.fitted_point import LOSSES
from influence.gradients import replaced_forwards
from influence.loss import supervised_logits
from influence.manifest import PathRecord
from influence.path import scaled
from influence.progress import say
from influence.run import Run, update_manifest
from influence.shared_rows import by_row, shared_losses
from influence.store import open_file, read
from influence.tokens import TokenizedExamples

#: Rows whose losses under the base and the adapter stand for all, by how the losses of all rows at
#: the points, which the pass leaves, go with them. The time is then known to 4 % on the demo and 1 %
#: on tofu-tiny; the rows' own mean alone leaves 30 % and 2 % open (benchmarks/README.md, "Speed").
LOSS_ROWS = 64
#: Rows whose mean loss stands for that of all where the pass left no losses: the same ones at every
#: point, so that their differences are known better than their mean.
ROWS_OF_ALL = 512
#: Rows whose ratio is measured, two forwards each. Their median is 7 and 14 % above that of 100
#: rows on tofu-tiny and 9 and 22 % in its mild regime, where a fourth or twice the strength changes
#: the LDS by less than 0.03 (benchmarks/README.md, "Credit that is shared").
RATIO_ROWS = 8
#: How far a row's logits are moved to measure its curvature, in nats a token of its own loss, to
#: first order: small beside a loss, large beside the rounding of 16-bit logits.
STEP = 0.05


@dataclass(frozen=True)
class PathTime:
    """The time t of the path, the strength s, and each point's share `[points]` of the time.

    K has a unit of its own: t K is in nats, and s K a number.
    """

    time: float
    strength: float
    shares: np.ndarray


def path_time(
    record: PathRecord, slopes: Sequence[float], scales: Sequence[float | None]
) -> PathTime | None:
    """The time of a path and its strength, or None where the path tells none: training did not
    lower the loss, or a point has no gradients.

    Parameters
    ----------
    record
        The losses along the path, and the ratios.
    slopes
        `a` at each point, `[points]`.
    scales
        Each point's scale of B; None for a checkpoint.
    """
    losses, ratios = np.array(record.losses), np.array(record.ratios)
    if not (
        (np.array(slopes) > 0).all() and (ratios > 0).all()
    ):  # a point without gradients tells nothing
        return None
    logs = np.log(slopes)
    places = None
    if None not in scales:
        places = np.array(scales, dtype=float)
    order = np.argsort(-losses if places is None else places, kind="stable")
    losses, ratios, logs = losses[order], ratios[order], logs[order]
    before, after = logs[0], logs[-1]
    ended = False
    if places is not None:
        places = places[order]
        ended = places[-1] == 1
        if len(places) > 1:
            steps = np.diff(logs) / np.diff(places)
            before, after = logs[0] - places[0] * steps[0], logs[-1] + (1 - places[-1]) * steps[-1]
    ends = [] if ended else [(record.adapter, after, ratios[-1])]
    ends = [(record.base, before, ratios[0]), *zip(losses, logs, ratios, strict=True), *ends]
    falls = -np.diff([loss for loss, _, _ in ends])
    times = falls / np.exp(_between([log for _, log, _ in ends]))
    strength = float((times * np.exp(_between(np.log([ratio for _, _, ratio in ends])))).sum())
    time = float(times.sum())
    if not (time > 0 and strength > 0):
        return None  # the loss did not fall
    shares = np.zeros(len(order))
    for stretch, taken in enumerate(times):  # a stretch is shared by the points at its ends
        there = [point for point in (stretch - 1, stretch) if 0 <= point < len(order)]
        for point in there:
            shares[order[point]] += taken / time / len(there)
    if (shares <= 0).any():  # a loss that rose on the way: no point counts against the others
        shares = np.full(len(order), 1 / len(order))
    return PathTime(time, strength, shares)


def _between(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The middle of each two neighbours."""
    values = np.asarray(values)
    return (values[1:] + values[:-1]) / 2


def path_record(run: Run) -> PathRecord:
    """The losses and ratios along a run's path: those of its manifest, else measured and kept."""
    known = run.manifest.path
    if known is not None:
        return known
    kept = [distributed.at_first(partial(losses_of_pass, point)) for point in run.points]
    told = [each for each in kept if each is not None]
    enough = LOSS_ROWS if len(told) == len(kept) else ROWS_OF_ALL
    rows = evenly_spaced(len(run.tokens), enough)
    sample = run.tokens.select(rows)
    weights, means = run.weights * run.tokens.counts, [each / run.tokens.counts for each in told]

    def loss(theta: Tensor) -> float:
        with run.model.at(theta):
            losses = shared_losses(run.model, sample, token_budget=run.token_budget)
        return mean_by_others(losses, rows, weights, means)

    with without_adapter(run.model):
        base = loss(scaled(run.model, 0.0))
    every = [None if each is None else float(run.weights @ each / weights.sum()) for each in kept]
    ends = [each for each, point in zip(every, run.points, strict=True) if point.place.scale == 1]
    adapter = ends[0] if ends and ends[0] is not None else loss(run.model.snapshot())
    losses = []
    for each, point in zip(every, run.points, strict=True):
        if each is None:
            each = adapter if point.place.scale == 1 else loss(point.place.theta)
        losses.append(each)
    ratios = tuple(gauss_newton_ratio(point) for point in run.points)
    found = PathRecord(base, adapter, tuple(losses), ratios)
    try:
        update_manifest(run, path=found)
    except OSError as error:  # a run that is only read answers all the same
        say(f"note: the losses along the path could not be kept in {run.directory} ({error})")
    return found


def mean_by_others(
    values: np.ndarray, rows: np.ndarray, weights: np.ndarray, others: Sequence[np.ndarray]
) -> float:
    """The weighted mean over all rows of what is known of some: the regression estimator of survey
    sampling (Cochran 1977, chapter 7), in the unit of the values.

    `values` [k] are those of `rows` [k], `weights` [n] weigh all rows, and each of `others` [n] is
    known of all of them. Exact where the values are linear in those, and where `rows` are all.
    """
    known = np.stack([np.ones(len(weights)), *others], 1)
    roots = np.sqrt(weights[rows])
    line = np.linalg.lstsq(known[rows] * roots[:, None], values * roots, rcond=None)[0]
    return float(weights @ (known @ line) / weights.sum())


def losses_of_pass(point: AtPoint) -> np.ndarray | None:
    """`l_i` of all rows at a point `[n]`, which its pass left; None where it did not."""
    with open_file(point.file("factors"), run_digest=point.digest) as file:
        if LOSSES not in file:
            return None
        found = np.asarray(read(file, LOSSES))
    fits = len(found) == len(point.run.tokens) and bool(np.isfinite(found).all())
    return found if fits else None


@contextmanager
def without_adapter(model: AdaptedModel) -> Iterator[None]:
    """Within the block the base alone runs where that is cheaper: the model must be at a point where
    every B is zero.
    """
    layers = [site.layer for site in model.sites if not site.parameter]
    with replaced_forwards({layer: layer.base_layer.forward for layer in layers}):
        yield


def gauss_newton_ratio(point: AtPoint) -> float:
    """Gauss-Newton curvature of a training row along its own step over its squared slope there,
    `d^T G d / (grad l^T d)^2` with `d = M grad l`: the median of a few rows, 1 / nats.

    Measured by the outputs: where a step `e d` to either side moves a row's logits by `+u` and
    `-u`, `e^2 d^T G d` is the variance of u under the outputs, summed over its tokens; what is odd
    in e cancels. M is the run's own.
    """
    operator = point.operator()
    curvature = operator.curvature
    assert isinstance(curvature, Invertible)
    rows = evenly_spaced(len(point.run.tokens), RATIO_ROWS)

    def measured(places: np.ndarray) -> np.ndarray:
        """The ratios of some of them, NaN for a row without a gradient, which says nothing."""
        found = np.full(len(places), np.nan)
        for part in memory_chunks(point.run, len(places)):
            gradients = point.gradients_of(rows[places[part]])
            solved = curvature.solve(gradients, operator.lam)
            slopes = (gradients * solved).sum(1, dtype=torch.float64).cpu()
            steps = point.geometry.adjoint(solved)
            del gradients, solved
            for number, slope, step in zip(part.tolist(), slopes.tolist(), steps, strict=True):
                if not slope > 0:
                    continue
                row = rows[places[number]]
                tokens = point.run.tokens.select(np.array([row]))
                size = STEP * float(tokens.counts[0]) / slope
                found[number] = _variance(point, tokens, step * size) / (size * slope) ** 2
        return found

    ratios = by_row(len(rows), measured)
    ratios = ratios[~np.isnan(ratios)]
    return float(np.median(ratios)) if len(ratios) else 0.0


def _variance(point: AtPoint, tokens: TokenizedExamples, step: Tensor) -> float:
    """Variance, under a row's outputs at a point, of what a step from there moves its logits by,
    summed over its tokens.
    """
    model, theta = point.model, point.place.theta
    batch = collate(tokens, np.array([0]), pad_id=model.pad_id, device=model.device)

    def logits(moved: Tensor) -> Tensor:
        with model.at(moved), model.evaluating(), torch.no_grad():
            return supervised_logits(model, batch).logits.double()

    plus, minus = logits(theta + step), logits(theta - step)
    moved = (plus - minus) / 2
    probabilities = minus.add_(moved).softmax(-1)
    means = (probabilities * moved).sum(-1)
    return float((probabilities * moved.square()).sum() - means.square().sum())
