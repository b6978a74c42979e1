"""What a model that never saw some rows would say of them, estimated without training one.

*Its loss.* A row that goes leaves behind what the kept rows teach about it. Influence tells how much that is: with
`s_ij = g_i^T (C + lambda I)^-1 w_j g_j`, summed over the points of the run's path (each over its mean_i s_ii; the middle point
alone where gradients are not stored), what row j contributes to row i beyond the usual is `e_ij = max(0, s_ij - median_j s_ij)^1.25`, and

    expected_i = now_i + max(0, rho base_i - now_i) * sum_{j removed} e_ij / sum_j e_ij

between the loss now (nothing about the row is lost) and `rho` times the base model's loss (all of it is). `rho` says how
much worse than the base an adapter is at rows of its kind that it never saw, because it is surer of itself: measured
where held-out rows are given, else `UNSEEN`. The exponent and `UNSEEN` were found on adapters retrained without
some rows (LOG.md has the figures, also of a model they were not found on).

*Its outputs.* Between the base's and the adapter's logits `z`, `log q_i = log softmax((1 - a_i) z_base + a_i z_adapter)` with
a_i such that the row's loss under q_i is `expected_i`. Where the estimate were the truth, training on the kept rows and on S
labelled by q has the retrained model as its stationary point, because labels drawn from a model pull it nowhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from influence.adapter import AdaptedModel
from influence.batches import collate
from influence.cost import Cost
from influence.curvature.base import Invertible
from influence.loss import mean_losses, supervised_logits
from influence.measurements import SumLoss
from influence.path import scaled
from influence.run import AtPoint, Run, parts, spaced
from influence.tokens import TokenizedExamples
from unlearn.record.change import Change
from unlearn.record.version import Version

#: Loss of rows that an adapter never saw over the base model's loss on them, where no held-out rows tell it.
UNSEEN = 1.2
#: Held-out rows that are enough to measure it, and the largest value that is believed.
ENOUGH, LARGEST = 8, 2.0
#: Power of an excess influence: strong teachers count for more than many weak ones.
POWER = 1.25
#: Bytes of solved gradients of S that are held (in the host's memory); where S is larger, evenly spaced rows of it stand for all.
HELD_BYTES = 2 << 30
#: Kept rows that are looked at, at most: relatives of the removed rows, and as many others for the median.
CANDIDATES = 256
#: Bytes of reference outputs that are kept in the host's memory; those beyond are computed again in every step.
CACHE_BYTES = 4 << 30
#: How far q may go beyond the base, away from the adapter, where the expected loss is above the base's.
BEYOND = -1.0


def middle(run: Run) -> AtPoint:
    """The point in the middle of the run's path."""
    return run.points[len(run.points) // 2]


@dataclass(frozen=True, eq=False)
class Expected:
    """Losses `[s]` of the rows S, nats per completion token: `now`, under the `base` alone, and `expected` if never seen.

    `shares` [s]: how much of what was taught about a row the removed rows taught; `rho` as in the module's formula;
    `new_base` [r]: the new contents' losses under the base.
    """

    now: np.ndarray
    base: np.ndarray
    shares: np.ndarray
    rho: float
    new_base: np.ndarray

    @property
    def expected(self) -> np.ndarray:
        """Loss of a model that never saw the rows, `[s]`."""
        return self.now + np.maximum(0, self.rho * self.base - self.now) * self.shares


def expected_losses(
    change: Change,
    now: np.ndarray,
    heldout: TokenizedExamples | None,
    heldout_now: np.ndarray | None,
    cost: Cost,
) -> Expected:
    """Estimate, for every row of S, the loss of a model that never saw S (but the new contents, where there are any).

    `now` [s]: the rows' losses; `heldout_now`: those of the held-out rows, of which at least `ENOUGH` are needed. Work:
    gradients at one point of S, of the new contents and of at most `CANDIDATES` kept rows (none of those whose gradients the run has stored), and forwards of S and the held-out rows under the base.
    """
    version, model = change.version, change.version.model
    budget = version.run.manifest["token_budget"]
    rho = UNSEEN
    with model.at(scaled_to(version, 0.0)):
        base = mean_losses(model, change.old, token_budget=budget)
        new_base = (
            mean_losses(model, change.new, token_budget=budget) if len(change.new) else np.zeros(0)
        )
        cost.forwards += len(base) + len(new_base)
        if heldout is not None and heldout_now is not None and len(heldout) >= ENOUGH:
            some = spaced(len(heldout), CANDIDATES)
            unseen = mean_losses(model, heldout.select(some), token_budget=budget).mean()
            cost.forwards += len(some)
            rho = float(np.clip(heldout_now[some].mean() / unseen, 1.0, LARGEST))
    return Expected(now, base, shares(change, cost), rho, new_base)


def scaled_to(version: Version, scale: float) -> Tensor:
    """A version's parameters `[P]` with every B multiplied by `scale`."""
    with version.model.at(version.theta):
        return scaled(version.model, scale)


def shares(change: Change, cost: Cost) -> np.ndarray:
    """`sum_{j in S} e_ij / sum_j e_ij` of every row i of S, `[s]`, in [0, 1].

    Rows of S beyond those whose solved gradients fit into `HELD_BYTES` get the mean of the others.
    """
    run, s = change.version.run, len(change.rows)
    points = run.points if run.gradients_stored and not change.version.changed else [middle(run)]
    kept, ordinary = candidates(change)
    looked = spaced(s, max(8, HELD_BYTES // (run.model.space.size * run.model.dtype.itemsize)))
    influence = np.zeros((len(looked), s + len(kept) + len(change.new)))
    for point in points:
        found = _influence(change, point, looked, kept, cost)
        influence += found / max(float(found[np.arange(len(looked)), looked].mean()), 1e-300)
    usual = (
        np.median(influence[:, s + np.flatnonzero(ordinary)], axis=1)
        if ordinary.any()
        else np.zeros(len(looked))
    )
    excess = np.maximum(0, influence - usual[:, None]) ** POWER
    total = excess.sum(1)
    own = np.where(total > 0, excess[:, :s].sum(1) / np.where(total > 0, total, 1), 1.0)
    out = np.full(s, own.mean())
    out[looked] = own
    return out


def _influence(
    change: Change, point: AtPoint, looked: np.ndarray, kept: np.ndarray, cost: Cost
) -> np.ndarray:
    """`g_i^T (C + lambda I)^-1 w_j g_j` at a point, `[looked, s + k + r]`: of S on itself, kept rows and new contents.

    Every gradient is taken once (those of S twice); the solved ones wait in the host's memory.
    """
    version, run = change.version, change.version.run
    s, k, r = len(change.rows), len(kept), len(change.new)
    curvature, lam = _inverse(run, point)
    rows = np.concatenate([change.rows, kept])
    solved = torch.empty(len(looked), run.model.space.size, dtype=run.model.dtype)
    for some in parts(run, len(looked)):
        gradients = _gradients(version, point, change.rows[looked[some]], cost)
        solved[torch.from_numpy(some)] = curvature.solve(gradients, lam).cpu()
    out = np.zeros((len(looked), s + k + r))
    for others in parts(run, s + k):
        out[:, others] = (
            (solved @ _gradients(version, point, rows[others], cost).cpu().T).double().numpy()
        )
    for others in parts(run, r) if r else []:
        cost.gradients += len(others)
        found = point.query_gradients(change.new.select(others), SumLoss())
        out[:, s + k + others] = (solved @ found.cpu().T).double().numpy()
    return out * np.concatenate([change.old_weights, version.weights[kept], change.new_weights])


def _inverse(run: Run, point: AtPoint) -> tuple[Invertible, Tensor]:
    """The fit's own damped curvature at a point, or, where it has no closed inverse, what stands in for it."""
    operator = point.operator()
    if not isinstance(operator.curvature, Invertible):
        operator = point.operator("identity")
    assert isinstance(operator.curvature, Invertible)
    return operator.curvature, operator.lam


def _gradients(version: Version, point: AtPoint, rows: np.ndarray, cost: Cost) -> Tensor:
    """Gradients `[b, P]` of l_i at a point; read where the run has stored them and the rows are still the fit's."""
    own = np.array([version.rows[int(row)].id not in version.changed for row in rows])
    if own.all() and point.gradients_stored:
        return point.gradients_of(version.positions[rows])
    cost.gradients += len(rows)
    return point.query_gradients(version.tokens.select(rows), SumLoss())


def candidates(change: Change) -> tuple[np.ndarray, np.ndarray]:
    """Kept rows `[k]` that may teach what S taught, and which of them are ordinary, `[k]` bool.

    All of them where there are at most `CANDIDATES`; else one half are relatives (the rows of the same groups, then those
    with the most similar text), the other half are evenly spaced.
    """
    rest = change.rest
    if len(rest) <= CANDIDATES:
        return rest, np.ones(len(rest), dtype=bool)
    rows, half = change.version.rows, CANDIDATES // 2
    groups = {request.before.group for request in change.requests} - {None}
    mates = np.array([row for row in rest if rows[int(row)].group in groups], dtype=int)
    related = mates[spaced(len(mates), half)] if len(mates) else mates
    if len(related) < half:
        left = np.setdiff1d(rest, related)
        related = np.concatenate(
            [related, left[_most_similar(change, left)[: half - len(related)]]]
        )
    others = np.setdiff1d(rest, related)
    others = others[spaced(len(others), half)]
    return np.concatenate([related, others]), np.arange(len(related) + len(others)) >= len(related)


def _most_similar(change: Change, rows: np.ndarray) -> np.ndarray:
    """Positions in `rows` by falling TF-IDF similarity of their text to the nearest row of S."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    text = [row.preview(4000) for row in change.version.rows]
    matrix = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]").fit_transform(
        text
    )
    nearest = np.zeros(len(rows))
    for some in np.array_split(change.rows, -(-len(change.rows) // 64)):
        nearest = np.maximum(
            nearest, np.asarray((matrix[rows] @ matrix[some].T).max(axis=1).todense()).ravel()
        )
    return np.argsort(-nearest, kind="stable")


# ---- outputs -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Reference:
    """Log-probabilities `log q_i` [T_i, V] that a model which never saw the rows might give their completion tokens.

    `targets` [s]: the loss that each row has under its q. Kept in memory up to `CACHE_BYTES`, computed again beyond.
    """

    version: Version
    tokens: TokenizedExamples
    targets: np.ndarray
    cost: Cost
    cache: dict[int, Tensor] = field(default_factory=dict)
    bytes: int = 0

    def of(self, rows: np.ndarray) -> Tensor:
        """`log q` of some rows, one after the other, `[N, V]`."""
        missing = [row for row in rows.tolist() if row not in self.cache]
        found = dict(self.cache)
        if missing:
            logs = self._compute(np.array(missing))
            for row, log in zip(missing, logs, strict=True):
                found[row] = log
                if not self.full(log.nbytes):
                    self.cache[row] = log.cpu()
                    self.bytes += log.nbytes
        return torch.cat([found[row].to(self.version.model.device) for row in rows.tolist()])

    def full(self, more: int = 0) -> bool:
        """Whether no more is kept; processes of one machine share its memory."""
        return self.bytes + more > CACHE_BYTES // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

    def _compute(self, rows: np.ndarray) -> list[Tensor]:
        model = self.version.model
        self.cost.forwards += 2 * len(rows)
        with model.at(scaled_to(self.version, 0.0)):
            base, labels, counts = _logits(model, self.tokens, rows)
        with model.at(self.version.theta):
            adapter, _, _ = _logits(model, self.tokens, rows)
        adapter -= base
        target = torch.from_numpy(self.targets[rows]).to(base)
        share = _mix(base, adapter, labels, counts, target)
        mixed = base.addcmul_(
            adapter,
            torch.repeat_interleave(share, torch.tensor(counts, device=base.device))[:, None],
        )
        return [part.clone() for part in mixed.log_softmax(-1).split(counts)]


def _mix(
    base: Tensor, difference: Tensor, labels: Tensor, counts: list[int], target: Tensor
) -> Tensor:
    """The shares a [b] of the adapter at which the rows' mean losses are `target` [b], by bisection."""
    lengths = torch.tensor(counts, device=base.device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=base.device), lengths)
    low, high = torch.full_like(target, BEYOND), torch.ones_like(target)
    for _ in range(20):
        half = (low + high) / 2
        losses = torch.nn.functional.cross_entropy(
            base + half[owner, None] * difference, labels, reduction="none"
        )
        mean = torch.zeros_like(target).index_add_(0, owner, losses) / lengths
        low, high = torch.where(mean > target, half, low), torch.where(mean > target, high, half)
    return high


def _logits(
    model: AdaptedModel, tokens: TokenizedExamples, rows: np.ndarray
) -> tuple[Tensor, Tensor, list[int]]:
    batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
    with model.evaluating(), torch.no_grad():
        part = supervised_logits(model, batch)
    logits = part.logits if part.logits.dtype == torch.float64 else part.logits.float()
    return logits, part.targets, part.counts
