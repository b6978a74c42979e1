"""Closed-form edits: remove, relabel, correct. One formula, three names.

Replacing the training rows S by S' moves the adapter by

    delta = (C' + lambda I)^-1 ( sum_S w grad l - sum_S' w grad l )

with C' the curvature after the edit (`unlearn.edits.moved`) and the objective's weights w, whose N_tok is kept (`influence.scores`
has the convention). `remove` (LLMEraser's *instance removal*; S' is empty), `relabel` (*response correction*: another
completion) and `correct` (*query modification*: another prompt, completion, or both) are this one edit for different S'
(Ding et al. 2024, arXiv 2412.00383), and may be mixed.

* *one-shot* (`steps=1`): delta as it stands, taken where the run looked: at several points of the path it is the sum of
  what they say, with the factors of `influence.scores` (uncalibrated).
* *re-linearised* (`steps=N`, the default): bounded steps with the gradient taken again after each, the curvature of the
  path's middle point kept (`unlearn.edits.steps`), until the stopping rule holds.
* *converged* (`until="converged"`): the optimum of the edited proximal objective over all rows (`unlearn.edits.newton`).

What an edit did is measured, not assumed: losses of the edited rows, of a sample of the untouched ones and of held-out
rows, before and after. An edit that raises the retained loss by more than `max_damage` is not saved without `force`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.curvature.base import Damped
from influence.curvature.ggn import GGNOperator
from influence.curvature.hessian import HessianOperator
from influence.errors import InputError, NumericalError
from influence.gradients import loss_sum_gradient
from influence.rows import Examples
from influence.run import AtPoint, Run
from influence.setting import Setting
from influence.solvers.named import make_solver
from influence.tokens import TokenizedExamples
from unlearn.edits.goals import Goals
from unlearn.edits.moved import after
from unlearn.edits.newton import optimum
from unlearn.edits.options import USUAL_STEPS, Options
from unlearn.edits.steps import Rest, walk
from unlearn.record.before_after import (
    Evidence,
    State,
    Targets,
    by_request,
    joined,
    mean_of,
    plus,
    refuse_text,
    report,
    rows_of,
)
from unlearn.record.change import plan
from unlearn.record.sample import GUARD_ROWS, unseen_rows
from unlearn.record.save import Edit
from unlearn.record.version import version
from unlearn.stopping import Walk
from unlearn.unseen import Expected, Reference, expected_losses, middle, scaled_to


def remove(
    run: Run, ids: Sequence[str], *, holdout: Examples | None = None, **options: Any
) -> Edit:
    """Take training rows out of the adapter (LLMEraser's instance removal). `options`: the fields of `Options`."""
    return edit(run, remove=ids, holdout=holdout, **options)


def relabel(
    run: Run, changes: Mapping[str, str], *, holdout: Examples | None = None, **options: Any
) -> Edit:
    """Give training rows another completion (LLMEraser's response correction): `{id: completion}`."""
    return edit(run, relabel=changes, holdout=holdout, **options)


def correct(
    run: Run,
    changes: Mapping[str, Mapping[str, Any]],
    *,
    holdout: Examples | None = None,
    **options: Any,
) -> Edit:
    """Give training rows another prompt or completion (LLMEraser's query modification): `{id: {"prompt": ...}}`."""
    return edit(run, correct=changes, holdout=holdout, **options)


def edit(
    run: Run,
    *,
    remove: Sequence[str] = (),
    relabel: Mapping[str, str] | None = None,
    correct: Mapping[str, Mapping[str, Any]] | None = None,
    holdout: Examples | None = None,
    **options: Any,
) -> Edit:
    """Change the adapter as if training rows had been absent or different; several kinds of change in one edit.

    `holdout`: rows that the adapter never saw; they tell what an unseen row's loss is, and are measured before and
    after. The other keywords are the fields of `Options`. Nothing is written: the result's `save` does.

    Raises
    ------
    InputError
        For unknown, repeated or removed ids, a change that changes nothing, nothing left to train on (`unlearn.record.change`).
    NumericalError
        If a loss or step is NaN or infinite, or a linear solve does not reach its tolerance.
    """
    begun = time.monotonic()
    work = _prepare(run, remove, relabel, correct, holdout, Options(**options))
    before = work.measure(work.version.theta)
    expected = expected_losses(work.change, before.old.loss, work.heldout, before.unseen, work.cost)
    targets = work.targets(expected, before)
    if work.options.one_shot:
        found = work.one_shot()
    elif work.options.rule.kind == "converged":
        found = work.converged()
    else:
        found = work.relinearised(targets, before)
    delta = found.theta - work.version.theta
    theta = work.version.theta + delta  # what a reader of delta will get, bit for bit
    if not bool(torch.isfinite(theta).all()):
        raise NumericalError(
            "the edited adapter holds NaN or infinity: nothing is written. Raise the damping"
        )
    after_ = work.measure(theta)
    forecast = work.forecast(delta, theta)
    residual = {"solver": work.residual, "tolerance": work.tolerance}
    seconds = time.monotonic() - begun
    record = report(
        work,
        work.method(),
        residual,
        found,
        delta,
        before,
        after_,
        expected,
        targets,
        forecast,
        seconds,
    )
    return Edit(work.change, delta, record)


def forecast(
    run: Run,
    *,
    remove: Sequence[str] = (),
    relabel: Mapping[str, str] | None = None,
    correct: Mapping[str, Mapping[str, Any]] | None = None,
    holdout: Examples | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What an edit would do and cost, before it is made: losses now, goals, the linear answer's effect, work and time.

    The keywords are those of `edit`. Costs the changed rows' influence and one linear step, some forwards, no more.
    """
    work = _prepare(run, remove, relabel, correct, holdout, Options(**options))
    before = work.measure(work.version.theta)
    begun, forwards = time.monotonic(), work.cost.forwards
    expected = expected_losses(work.change, before.old.loss, work.heldout, before.unseen, work.cost)
    targets = work.targets(expected, before)
    delta = work.one_shot().theta - work.version.theta
    linear = work.forecast(delta, None)
    spent, took = work.cost.total, max(time.monotonic() - begun, 1e-3)
    goals, rule = len(work.goals(targets, before).tokens), work.options.rule
    steps = int(rule.value or 0) if rule.kind == "steps" else min(work.options.steps, USUAL_STEPS)
    ahead = spent
    if rule.kind == "converged":
        ahead += USUAL_STEPS * (len(work.change.after) + work.solving)
    elif not work.options.one_shot:
        ahead += steps * (
            goals + 4 / 3 * min(work.options.rest, len(work.change.rest)) + 2 * work.solving
        )
    ahead += (GUARD_ROWS + 2 * len(work.change.rows) + forwards) / 3
    each = took / max(spent - forwards / 3, 1.0)
    return {
        "kind": work.change.kind,
        "requests": [request.record() for request in work.change.requests],
        "rows": rows_of(work, before, None, expected, targets),
        "losses": {
            "edited": {
                "rows": len(work.change.rows),
                "before": mean_of(before.edited),
                "target": mean_of(targets.edited),
            }
            | {"linear": plus(mean_of(before.edited), linear["edited"])},
            "retained": {"rows": len(before.retained.loss), "before": mean_of(before.retained.loss)}
            | {"linear": plus(mean_of(before.retained.loss), linear["retained"])},
            "heldout": None
            if before.heldout is None
            else {
                "rows": len(before.heldout.loss),
                "before": mean_of(before.heldout.loss),
                "linear": plus(mean_of(before.heldout.loss), linear["heldout"]),
            },
        },
        "residual": work.residual,
        "cost": {
            "row_gradients": round(ahead),
            "seconds": round(ahead * each, 1),
            **work.retraining(ahead),
        },
        "method": work.method(),
    }


@dataclass(eq=False, kw_only=True)
class _Work(Evidence):
    """One edit in the making, with the curvature that it is made with."""

    options: Options
    setting: Setting
    residual: float = 0.0
    tolerance: float | None = None
    operators: list[Damped] | None = None
    solving: float = 0.0

    def targets(self, expected: Expected, before: State) -> Targets:
        change, rule = self.change, self.options.rule
        known = before.retained.loss if len(self.sample) else before.old.loss  # no row is untouched
        new = np.full(len(change.new), known.mean())
        old = expected.expected
        if rule.kind == "loss" and rule.value is not None:
            new, old = np.full_like(new, rule.value), np.where(change.replaced, old, rule.value)
        return Targets(old, new, by_request(change, old, new))

    # -- curvature

    def each(self) -> list[tuple[float, AtPoint, Damped]]:
        """Factor, point and damped curvature after the edit, for every point that is looked at."""
        if self.operators is None:
            self.operators = [
                after(point, operator, self.change, self.cost)
                for point, operator in self.setting.each()
            ]
        return list(
            zip(self.setting.factors.tolist(), self.setting.points, self.operators, strict=True)
        )

    def solve(self, point: AtPoint, operator: Damped, rhs: Tensor) -> Tensor:
        """`T^T (C' + lambda I)^-1 T r` for a gradient r [P], its residual noted and judged."""
        spent = self.cost.total
        solver = make_solver(point, self.options.solver, operator)
        features = point.geometry.features(rhs[None])
        solution = solver.solve(operator, features)
        self.residual = max(self.residual, float(solution.residuals.max()))
        self.solving = (
            self.cost.total - spent
        )  # products of a matrix-free curvature pass over all rows
        self.tolerance = getattr(solver, "tolerance", self.tolerance)
        if not bool(solution.converged.all()):
            raise NumericalError(
                f"the linear solve of the edit did not converge: {solution.message or f'residual {self.residual:.1e}'}. "
                "Nothing is written"
            )
        return point.geometry.adjoint(solution.values)[0]

    def precondition(self, gradient: Tensor) -> Tensor:
        parts = [
            factor * self.solve(point, operator, gradient)
            for factor, point, operator in self.each()
        ]
        return torch.stack(parts).sum(0)

    # -- the three ways

    def one_shot(self) -> Walk:
        """The linear answer, as a walk of one step."""
        change, version = self.change, self.version
        tokens = joined(change.old, change.new)
        weights = np.concatenate([change.old_weights, -change.new_weights])
        delta = torch.zeros_like(version.theta)
        for factor, point, operator in self.each():
            scale = point.place.scale
            theta = point.place.theta if scale is None else scaled_to(version, scale)
            with version.model.at(theta) as model:
                gradient, _ = loss_sum_gradient(
                    model, tokens, weights, token_budget=self.budget, cost=self.cost
                )
            delta += factor * self.solve(point, operator, gradient)
        return Walk(version.theta + delta, [], "one step, the linear answer", True)

    def goals(self, targets: Targets, before: State) -> Goals:
        """The rows that are not at their goal yet: removed and replaced ones to rise, new contents to fall."""
        change = self.change
        tokens = joined(change.old, change.new)
        s = len(change.rows)
        goal = np.concatenate([targets.old, targets.new])
        rises = np.arange(len(tokens)) < s
        removed = np.concatenate([~change.replaced, np.zeros(len(change.new), dtype=bool)])
        now = np.concatenate([before.old.loss, before.new.loss])
        active = np.flatnonzero(Goals(tokens, goal, rises, removed).gaps(now) > 0)
        found = Goals(tokens.select(active), goal[active], rises[active], removed[active])
        reference = (
            Reference(self.version, found.tokens, found.targets, self.cost)
            if found.removed.any()
            else None
        )
        return Goals(found.tokens, found.targets, found.rises, found.removed, reference)

    def relinearised(self, targets: Targets, before: State) -> Walk:
        """Steps until the stopping rule holds."""
        options, tokens = self.options, self.version.tokens.select(self.change.rest)
        return walk(
            self.version.model,
            self.version.theta,
            self.goals(targets, before),
            Rest(tokens, options.rest, options.seed, options.max_damage),
            self.precondition,
            until=options.rule,
            steps=options.steps,
            token_budget=self.budget,
            cost=self.cost,
        )

    def converged(self) -> Walk:
        """The optimum of the edited proximal objective; matrix-free curvatures are taken again at every iterate."""
        model, start, change = self.version.model, self.version.theta, self.change
        ((_, point, operator),) = self.each()
        rows, weights = change.tokens_after, change.weights_after
        lam = operator.diagonal(start)

        def gradient(theta: Tensor, tokens: TokenizedExamples, w: np.ndarray) -> Tensor:
            with model.at(theta):
                return loss_sum_gradient(
                    model, tokens, w, token_budget=self.budget, cost=self.cost
                )[0]

        held = gradient(start, self.version.tokens, self.version.weights)

        def residual(theta: Tensor) -> Tensor:
            return gradient(theta, rows, weights) - held + lam * (theta - start)

        def solve(theta: Tensor, v: Tensor) -> Tensor:
            here = operator
            if isinstance(operator.curvature, GGNOperator | HessianOperator):
                objective = replace(operator.curvature.objective, theta=theta)
                here = Damped(replace(operator.curvature, objective=objective), operator.lam)
            return self.solve(point, here, v)

        found = optimum(residual, solve, start)
        why = f"the gradient of the edited objective went from {found.norms[0]:.1e} to {found.norms[-1]:.1e}"
        return Walk(found.theta, [], f"{len(found.norms) - 1} Newton steps: {why}", found.converged)

    def refuse_unless_at_the_end(self) -> None:
        """`until converged` needs one point, the adapter itself, in raw coordinates."""
        points = self.setting.points
        if len(points) != 1 or points[0].place.scale != 1 or self.run.manifest["geometry"] != "raw":
            raise InputError(
                "until converged needs a run at the adapter itself in raw coordinates: fit one with --path 1.0 (and "
                "--curvature ggn, whose products are taken again at every iterate)"
            )

    # -- the record

    def method(self) -> dict[str, Any]:
        options, setting = self.options, self.setting
        name = (
            "one-shot"
            if options.one_shot
            else "converged"
            if options.rule.kind == "converged"
            else "re-linearised"
        )
        lam = torch.cat([operator.lam for operator in setting.operators])
        solver = options.solver if isinstance(options.solver, str) else options.solver.name
        return {
            "name": name,
            "curvature": setting.operators[0].curvature.name,
            "geometry": self.run.manifest["geometry"],
            "damping": setting.rule,
            "points": [point.place.label for point in setting.points],
            "lambda": [float(lam.min()), float(lam.max())],
            "solver": solver,
            "steps": options.steps,
            "until": str(options.rule),
            "max_damage": options.max_damage,
            "rest": options.rest,
            "seed": options.seed,
        }


def _prepare(
    run: Run,
    remove: Sequence[str],
    relabel: Mapping[str, str] | None,
    correct: Mapping[str, Mapping[str, Any]] | None,
    holdout: Examples | None,
    options: Options,
) -> _Work:
    """Everything that can be refused, refused."""
    refuse_text(remove)
    start = version(run, options.start)
    change = plan(start, remove, relabel, correct)
    at = options.at
    identity = (options.curvature or run.fitted_name) == "identity"
    if at is None and not options.one_shot and not identity:
        at = middle(run).place.label
    setting = Setting.of(run, options.curvature, options.damping, at, tuned=False, calibrated=False)
    work = _Work(
        version=start,
        change=change,
        options=options,
        holdout=holdout,
        heldout=unseen_rows(start, change.after, holdout),
        max_damage=options.max_damage,
        seed=options.seed,
        setting=setting,
    )
    if options.rule.kind == "converged":
        work.refuse_unless_at_the_end()
    return work
