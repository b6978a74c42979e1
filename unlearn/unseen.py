"""Losses of a model that never saw some rows, on these rows, estimated without training one.

A row that goes leaves behind what the retained rows teach about it. Influence tells how much that
is. With `s_ij = g_i^T (C + lambda I)^-1 w_j g_j`, summed over the points of the run's path (each
over its mean_i s_ii; the middle point alone where gradients are not stored), what row j teaches row
i beyond the usual is `e_ij = max(0, s_ij - median_j s_ij)^POWER`, and

    expected_i = now_i + max(0, rho base_i - now_i) * sum_{j removed} e_ij / sum_j e_ij

between the loss now (nothing about the row is lost) and `rho` times the base model's loss (all of
it is). `rho` says how much worse than the base an adapter is at rows of its kind that it never saw,
because it is surer of itself: measured where held-out rows are given, else `UNSEEN`.

What such a model would say, token by token, is in `unlearn.unseen_outputs`.

Where it fails (LOG.md, 2026-11-21, "What a model that never saw a row would lose on it"): single
rows can be far off (2.28 expected, 1.16 measured), and rows that other phrasings teach completely
are expected to be forgotten more than they are (the demo's triples, by 41 %).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence.at_point import AtPoint, evenly_spaced, memory_chunks
from influence.cost import Cost
from influence.curvature import PLAIN, Invertible
from influence.loss import mean_losses
from influence.measurements import SumLoss
from influence.path import scaled
from influence.run import Run
from influence.tokens import TokenizedExamples
from unlearn.record.change import Change
from unlearn.record.version import Version

#: Loss of rows that an adapter never saw over the base model's loss on them, where no held-out rows
#: tell it: what tofu-tiny's held-out authors lose, 5.10 over 4.24 nats (LOG.md, 2026-11-21, "What a
#: model that never saw a row would lose on it"; checked there on the demo, where it was not found).
UNSEEN = 1.2

#: Held-out rows that are enough to measure that ratio, and the largest one that is believed.
#: Choices.
ENOUGH, LARGEST = 8, 2.0

#: Power of an excess influence: strong teachers count for more than many weak ones. Found on
#: adapters of tofu-tiny retrained without some rows, checked on the demo's (the same entry).
POWER = 1.25

#: Bytes of solved gradients of S that are held, in the host's memory. Where S is larger, evenly
#: evenly_spaced rows of it stand for all. A choice.
HELD_BYTES = 2 << 30

#: Rows of S that are solved whatever they take. A choice.
FEWEST = 8

#: Retained rows whose influence is computed, at most: relatives of the removed rows, and as many
#: others for the median. A choice.
CANDIDATES = 256

#: Letters of a row that its text similarity is computed from. A choice.
LETTERS = 4000


def middle_point(run: Run) -> AtPoint:
    """The point in the middle of the run's path."""
    return run.points[len(run.points) // 2]


def scaled_to(version: Version, scale: float) -> Tensor:
    """A version's parameters `[P]` with every B multiplied by `scale`, 0 being the base."""
    with version.model.at(version.theta):
        return scaled(version.model, scale)


@dataclass(frozen=True, eq=False)
class Expected:
    """Losses of the rows S, nats per completion token, and what they were estimated from.

    Attributes
    ----------
    now : float64 array [s]
        Under the adapter.
    base : float64 array [s]
        Under the base alone.
    shares : float64 array [s]
        How much of what was taught about a row the removed rows taught, in [0, 1].
    rho : float
        Unseen over base loss, as in the module's formula.
    new_base : float64 array [r]
        The new contents' losses under the base.
    """

    now: np.ndarray
    base: np.ndarray
    shares: np.ndarray
    rho: float
    new_base: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """Losses of a model that never saw the rows, `[s]`."""
        return self.now + np.maximum(0, self.rho * self.base - self.now) * self.shares


def expected_losses(
    change: Change,
    losses: np.ndarray,
    holdout: TokenizedExamples | None,
    holdout_losses: np.ndarray | None,
    cost: Cost,
) -> Expected:
    """Estimate, for every row of S, the loss of a model that never saw S.

    It did see the new contents, where there are any.

    Parameters
    ----------
    change
        What goes and comes.
    losses : float64 array [s]
        The rows' losses under the adapter.
    holdout, holdout_losses
        Held-out rows and their losses under the adapter, of which at least `ENOUGH` are needed.
    cost
        Counts the gradients, at each point that is used, of S (twice), of the new contents and of
        at most `CANDIDATES` retained rows (none of those whose gradients the run has stored), and
        the forwards of S and the held-out rows under the base.
    """
    version, model = change.version, change.version.model
    token_budget = version.run.manifest.token_budget
    new_base, rho = np.zeros(0), UNSEEN
    with model.at(scaled_to(version, 0.0)):
        base = mean_losses(model, change.old, token_budget=token_budget)
        if len(change.new):
            new_base = mean_losses(model, change.new, token_budget=token_budget)
        cost.forwards += len(base) + len(new_base)
        if holdout is not None and holdout_losses is not None and len(holdout) >= ENOUGH:
            sample = evenly_spaced(len(holdout), CANDIDATES)
            unseen = mean_losses(model, holdout.select(sample), token_budget=token_budget).mean()
            cost.forwards += len(sample)
            rho = float(np.clip(holdout_losses[sample].mean() / unseen, 1.0, LARGEST))
    return Expected(losses, base, removed_shares(change, cost), rho, new_base)


# ---- how much of a row the removed rows taught ---------------------------------------------------


def removed_shares(change: Change, cost: Cost) -> np.ndarray:
    """`sum_{j in S} e_ij / sum_j e_ij` of every row i of S, `[s]`, in [0, 1].

    Rows of S beyond those whose solved gradients fit into `HELD_BYTES` get the mean of the others.
    """
    run, s = change.version.run, len(change.rows)
    # Without stored gradients, or after edits that changed rows, every point costs gradients.
    all_points = run.gradients_stored and not change.version.changed
    points = run.points if all_points else [middle_point(run)]
    retained, ordinary = candidates(change)
    row_bytes = run.model.space.size * run.model.dtype.itemsize
    solved = evenly_spaced(s, max(FEWEST, HELD_BYTES // row_bytes))
    influence = np.zeros((len(solved), s + len(retained) + len(change.new)))
    for point in points:
        at_point = _influence(change, point, solved, retained, cost)
        # Points differ in scale by their damping: each counts in units of its mean self-influence.
        scale = float(at_point[np.arange(len(solved)), solved].mean())
        influence += at_point / max(scale, 1e-300)
    usual = np.zeros(len(solved))
    if ordinary.any():
        usual = np.median(influence[:, s + np.flatnonzero(ordinary)], axis=1)
    excess = np.maximum(0, influence - usual[:, None]) ** POWER
    total, by_removed = excess.sum(1), excess[:, :s].sum(1)
    # A row that nothing teaches more than usual is its own only teacher.
    solved_shares = np.where(total > 0, by_removed / np.where(total > 0, total, 1), 1.0)
    shares = np.full(s, solved_shares.mean())
    shares[solved] = solved_shares
    return shares


def _influence(
    change: Change, point: AtPoint, solved: np.ndarray, retained: np.ndarray, cost: Cost
) -> np.ndarray:
    """`g_i^T (C + lambda I)^-1 w_j g_j` at a point, `[solved, s + retained + new]`.

    i runs over the positions `solved` in S, j over S, the `retained` rows and the new contents.
    Every gradient is taken once, those of S twice; the solved ones wait in the host's memory.
    """
    version, run = change.version, change.version.run
    s, k, r = len(change.rows), len(retained), len(change.new)
    curvature, lam = _inverse(run, point)
    rows = np.concatenate([change.rows, retained])
    solutions = torch.empty(len(solved), run.model.space.size, dtype=run.model.dtype)
    for part in memory_chunks(run, len(solved)):
        gradients = _gradients(version, point, change.rows[solved[part]], cost)
        solutions[torch.from_numpy(part)] = curvature.solve(gradients, lam).cpu()
    influence = np.zeros((len(solved), s + k + r))
    for part in memory_chunks(run, s + k):
        gradients = _gradients(version, point, rows[part], cost).cpu()
        influence[:, part] = (solutions @ gradients.T).double().numpy()
    for part in memory_chunks(run, r) if r else []:
        cost.gradients += len(part)
        gradients = point.query_gradients(change.new.select(part), SumLoss()).cpu()
        influence[:, s + k + part] = (solutions @ gradients.T).double().numpy()
    weights = [change.old_weights, version.weights[retained], change.new_weights]
    return influence * np.concatenate(weights)


def _inverse(run: Run, point: AtPoint) -> tuple[Invertible, Tensor]:
    """The fit's own damped curvature at a point, or what stands in for one without an inverse."""
    operator = point.operator()
    if not isinstance(operator.curvature, Invertible):
        operator = point.operator(PLAIN)
    assert isinstance(operator.curvature, Invertible)
    return operator.curvature, operator.lam


def _gradients(version: Version, point: AtPoint, rows: np.ndarray, cost: Cost) -> Tensor:
    """Gradients `[b, P]` of l_i at a point, read where the run stored them of the same contents."""
    unchanged = all(version.rows[int(row)].id not in version.changed for row in rows)
    if unchanged and point.gradients_stored:
        return point.gradients_of(version.positions[rows])
    cost.gradients += len(rows)
    return point.query_gradients(version.tokens.select(rows), SumLoss())


# ---- which retained rows may have taught it ------------------------------------------------------


def candidates(change: Change) -> tuple[np.ndarray, np.ndarray]:
    """Retained rows `[k]` that may teach what S taught, and which of them are ordinary, `[k]` bool.

    All of them where there are at most `CANDIDATES`. Else one half are relatives (the rows of the
    same groups, then those with the most similar text), and the other half are evenly spaced.
    """
    retained = change.rest
    if len(retained) <= CANDIDATES:
        return retained, np.ones(len(retained), dtype=bool)
    rows, half = change.version.rows, CANDIDATES // 2
    groups = {request.before.group for request in change.requests} - {None}
    mates = np.array([row for row in retained if rows[int(row)].group in groups], dtype=int)
    relatives = mates[evenly_spaced(len(mates), half)] if len(mates) else mates
    if len(relatives) < half:
        strangers = np.setdiff1d(retained, relatives)
        most_similar = strangers[_by_similarity(change, strangers)[: half - len(relatives)]]
        relatives = np.concatenate([relatives, most_similar])
    others = np.setdiff1d(retained, relatives)
    others = others[evenly_spaced(len(others), half)]
    # The median is taken over the others alone: relatives are chosen for teaching more than usual.
    return (
        np.concatenate([relatives, others]),
        np.arange(len(relatives) + len(others)) >= len(relatives),
    )


def _by_similarity(change: Change, rows: np.ndarray) -> np.ndarray:
    """Positions in `rows` by falling TF-IDF similarity of their text to the nearest row of S."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    text = [row.preview(LETTERS) for row in change.version.rows]
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]")
    matrix = vectorizer.fit_transform(text)
    nearest = np.zeros(len(rows))
    # 64 rows of S at a time, so that the similarities [rows, 64] stay small.
    for part in np.array_split(change.rows, -(-len(change.rows) // 64)):
        similarity = (matrix[rows] @ matrix[part].T).max(axis=1).todense()
        nearest = np.maximum(nearest, np.asarray(similarity).ravel())
    return np.argsort(-nearest, kind="stable")
