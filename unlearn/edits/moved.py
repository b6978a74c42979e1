"""The curvature after an edit, `C' = C - sum_{gone} w_i C_i + sum_{come} w_i C_i`, from the run's own factors.

* `fisher`: exact. With the rows that go and come as W [k, P] and signs D, Woodbury's identity around the fitted inverse
  `M = C + lambda I` needs a k x k matrix:

      (M + W^T D W)^-1 v = M^-1 v - M^-1 W^T (D + W M^-1 W^T)^-1 W M^-1 v          (D = D^-1)

* `ekfac`, `kfac`: the eigenbases stay, and the eigenvalues are those of the rows after the edit: each row's share
  `w_i (Q_S^T G_i Q_A)^2` at its sampled labels is taken out or put in. For EK-FAC that is exactly its eigenvalues refitted on
  these rows; for K-FAC an approximation, and what would fall below zero is zero.
* `ggn`, `hessian`: the products run over the rows after the edit. Exact.
* `identity` stays what it is.

lambda stays the fit's: it is the same for the edit and for a refit that checks it. Work is that of the changed rows: one
forward and backward of each at sampled labels, less where the run has stored them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

from influence.batches import collate, plan_batches
from influence.cost import Cost
from influence.curvature.base import Damped
from influence.curvature.fisher import SampleSpaceFisher
from influence.curvature.ggn import GGNOperator
from influence.curvature.hessian import HessianOperator
from influence.curvature.kfac import Kronecker, wide_side
from influence.curvature.objective import Objective, Products
from influence.errors import NumericalError
from influence.gradients import label_uniforms, max_rows, sampled_gradient, tape
from influence.loss import probabilities
from influence.run import AtPoint
from influence.store import RowFile
from influence.tokens import TokenizedExamples
from unlearn.record.change import Change


@dataclass(frozen=True, eq=False)
class Updated:
    """A fitted curvature plus `rows^T diag(signs) rows`: `rows` [k, P] with their weights' roots, `signs` [k] of +-1."""

    curvature: SampleSpaceFisher
    rows: Tensor
    signs: Tensor
    kept: dict[float, Tensor] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The fitted curvature's name."""
        return self.curvature.name

    @property
    def size(self) -> int:
        """P."""
        return self.curvature.size

    @property
    def blocks(self) -> tuple[slice, ...]:
        """One block."""
        return self.curvature.blocks

    def matvec(self, v: Tensor) -> Tensor:
        """`C' v` for every row of `v` [K, P]."""
        rows = self.rows.double()
        own = ((v.double() @ rows.T) * self.signs.to(rows)) @ rows
        return self.curvature.matvec(v) + own.to(v)

    def solve(self, v: Tensor, lam: Tensor) -> Tensor:
        """`(C' + lambda I)^-1 v` for every row of `v` [K, P]; `lam` [1].

        Where a row that goes has a leverage within rounding of 1, the solver's residual tells.
        """
        rows = self.rows.double()
        solved = self._solved(float(lam), rows)
        inner = torch.diag(self.signs.to(rows)) + rows @ solved.T
        plain = self.curvature.solve(v.double(), lam)
        found, info = torch.linalg.solve_ex(inner, rows @ plain.T)
        if bool(info):
            raise NumericalError(
                "the curvature without the changed rows cannot be solved: a row has leverage 1, it alone determines a "
                "direction. Raise the damping"
            )
        return (plain - found.T @ solved).to(v)

    def _solved(self, lam: float, rows: Tensor) -> Tensor:
        """`M^-1 W^T`, `[k, P]` float64, kept for the next right-hand side: it passes over all stored rows."""
        if lam not in self.kept:
            self.kept.clear()
            self.kept[lam] = self.curvature.solve(rows, torch.tensor([lam], dtype=torch.float64))
        return self.kept[lam]

    def mean_eigenvalues(self) -> Tensor:
        """Trace over P, `[1]`."""
        own = (self.rows.double().square().sum(1) * self.signs.to(self.rows.double())).sum()
        return self.curvature.mean_eigenvalues() + own.reshape(1).cpu() / self.size

    def top_eigenvalues(self) -> Tensor:
        """The fitted curvature's largest eigenvalue, `[1]`."""
        return self.curvature.top_eigenvalues()


@dataclass(frozen=True, eq=False)
class Moved:
    """The rows that make the difference between a fit and the rows after an edit, all earlier edits included.

    `gone` [g] are positions in `run.train`; `come` are the tokens of new contents, with their weights `come_weights`.
    """

    gone: np.ndarray
    come: TokenizedExamples
    come_weights: np.ndarray

    @classmethod
    def by(cls, change: Change) -> Moved:
        """Compare the rows after a change with those of the fit."""
        version = change.version
        now_changed = set(version.changed) | {request.before.id for request in change.requests}
        after, tokens, w = change.after, change.tokens_after, change.weights_after
        new = [place for place, id in enumerate(after.ids) if id in now_changed]
        same = {version.rows.ids[i]: version.positions[i] for i in range(len(version.rows))}
        stay = [same[id] for id in after.ids if id not in now_changed]
        gone = np.setdiff1d(np.arange(len(version.run.train)), np.array(stay, dtype=int))
        return cls(gone, tokens.select(new), w[new])


@dataclass(frozen=True)
class Counted(Objective):
    """An objective that counts the rows its products run: each as one forward and backward."""

    cost: Cost = field(default_factory=Cost)

    def product(self, v: Tensor, products: Products, only: np.ndarray | None = None) -> Tensor:
        """As in `Objective`."""
        self.cost.gradients += self.count if only is None else len(only)
        return super().product(v, products, only)


def after(point: AtPoint, operator: Damped, change: Change, cost: Cost) -> Damped:
    """The damped curvature of a run's point after a change, its lambda kept."""
    curvature, moved = operator.curvature, Moved.by(change)
    if isinstance(curvature, Kronecker):
        return replace(operator, curvature=_kronecker(point, curvature, moved, cost))
    if isinstance(curvature, SampleSpaceFisher):
        return replace(operator, curvature=_fisher(point, curvature, moved, cost))
    if isinstance(curvature, GGNOperator | HessianOperator):
        known = {
            field.name: getattr(curvature.objective, field.name)
            for field in fields(curvature.objective)
        }
        known |= {"tokens": change.tokens_after, "weights": change.weights_after}
        objective = Counted(**known, cost=cost)
        return replace(operator, curvature=replace(curvature, objective=objective))
    return operator


def _kronecker(point: AtPoint, curvature: Kronecker, moved: Moved, cost: Cost) -> Kronecker:
    """Eigenvalues of the rows after the edit, in the same eigenbases."""
    samples = point.run.manifest["curvature"]["samples"]
    inside = [block.eigenvalues.clone() for block in curvature.leaf_blocks]
    outside = [block.rest.clone() for block in curvature.leaf_blocks]
    gone = point.run.tokens.select(moved.gone)
    parts = ((gone, -point.run.weights[moved.gone]), (moved.come, moved.come_weights))
    for tokens, weights in parts:
        for rows, gradients in sampled_rows(point, tokens, samples, cost):
            share = torch.from_numpy(weights[rows] / samples).to(gradients)[:, None, None]
            for number, block in enumerate(curvature.leaf_blocks):
                coordinates, off = block.rotate(gradients[:, block.leaf.slice])
                inside[number] += (coordinates.square() * share).sum(0).to(inside[number])
                if off is not None:
                    left = wide_side(block.leaf) - block.wide.shape[1]
                    outside[number] += (off.square() * share).sum((0, 2)).to(outside[number]) / left
    blocks = (
        replace(block, eigenvalues=values.clamp(min=0), rest=rest.clamp(min=0))
        for block, values, rest in zip(curvature.leaf_blocks, inside, outside, strict=True)
    )
    return replace(curvature, leaf_blocks=tuple(blocks))


def _fisher(point: AtPoint, curvature: SampleSpaceFisher, moved: Moved, cost: Cost) -> Updated:
    """The rows that go are read from the run; those that come are computed."""
    run = point.run
    samples = run.manifest["curvature"]["samples"]
    draws = max(1, samples)
    name = "rows" if samples else "gradients"
    found = []
    with RowFile(point.file(name), name) as file:
        for row in moved.gone.tolist():
            block = torch.from_numpy(file.read(row * draws, (row + 1) * draws)).to(run.model.device)
            found.append(
                point.geometry.features(block).double() * float(np.sqrt(run.weights[row] / draws))
            )
    signs = [-1.0] * (len(moved.gone) * draws)
    for rows, gradients in sampled_rows(point, moved.come, samples, cost):
        root = torch.from_numpy(np.sqrt(moved.come_weights[rows] / draws)).to(gradients.device)
        found.append(gradients.double() * root[:, None])
        signs += [1.0] * len(rows)
    stack = torch.cat(found) if found else torch.zeros(0, curvature.size, dtype=torch.float64)
    return Updated(curvature, stack, torch.tensor(signs, dtype=torch.float64, device=stack.device))


def sampled_rows(point: AtPoint, tokens: TokenizedExamples, samples: int, cost: Cost):
    """Yield `(rows [b], features [b, P])` of gradients at labels drawn as `fit` draws them, draw after draw.

    With no samples (the empirical Fisher) at the data's own labels.
    """
    if len(tokens) == 0:
        return
    run, model = point.run, point.model
    budget, seed = run.manifest["token_budget"], run.manifest["seed"]
    cost.gradients += len(tokens) * max(1, samples)
    with model.at(point.place.theta), tape(model) as recorder:
        for rows in plan_batches(tokens, budget, max_rows=max_rows(model.space)):
            batch = collate(tokens, rows, pad_id=model.pad_id, device=model.device)
            if samples == 0:
                yield rows, point.geometry.features(recorder.run(batch, None)[0])
                continue
            part = recorder.forward(batch)
            probs = probabilities(part.logits)
            for draw in range(samples):
                own = [
                    label_uniforms(seed, draw, tokens.ids[i], int(tokens.counts[i])) for i in rows
                ]
                gradient = sampled_gradient(part, probs, torch.from_numpy(np.concatenate(own)))
                found = recorder.gradients(part, gradient, last=draw == samples - 1)
                yield rows, point.geometry.features(found)
