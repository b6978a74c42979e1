"""An edit that is checked and ready: the curvature after it, and the three ways to make it.

* *one-shot*: the linear answer, taken where the run looked. At several points of the path it is the
  sum of what they say, with the factors of `influence.scores` (uncalibrated).
* *re-linearised*: bounded steps with the gradient taken again after each (`unlearn.edits.steps`),
  the curvature of the path's middle point kept.
* *converged*: the optimum of the edited proximal objective over all rows (`unlearn.edits.newton`).

Several processes (`influence.distributed`) share out the rows of every gradient, product and
measurement, and take the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.at_point import AtPoint
from influence.curvature import Damped
from influence.errors import InputError, NumericalError
from influence.progress import say
from influence.rows import Examples
from influence.run import Run
from influence.setting import Setting
from influence.shared_rows import shared_gradient
from influence.solvers.named import make_solver
from influence.tokens import TokenizedExamples
from unlearn.edits.goals import Goals
from unlearn.edits.moved import after
from unlearn.edits.newton import optimum
from unlearn.edits.options import Options
from unlearn.edits.steps import RetainedRows, walk
from unlearn.record.before_after import State, Targets, Undertaking, by_request
from unlearn.record.change import plan, refuse_text, say_copies
from unlearn.record.sample import probe_rows, unseen_rows
from unlearn.record.version import scaled_to, version
from unlearn.retraining.local import Plan, planned
from unlearn.retraining.recipe import Recipe, given_or_recorded
from unlearn.retraining.retrain import refuse_unrepeatable
from unlearn.stopping import Ending
from unlearn.unseen import Expected, expected_losses, middle_point
from unlearn.unseen_outputs import ExpectedOutputs


def prepare(
    run: Run,
    remove: Sequence[str],
    relabel: Mapping[str, str] | None,
    correct: Mapping[str, Mapping[str, Any]] | None,
    holdout: Examples | None,
    probes: Examples | None,
    options: Options,
) -> PreparedEdit:
    """Check everything that can be refused, before any work, and choose the curvature.

    Raises `InputError` for unknown, repeated or removed ids, a change that changes nothing, nothing
    left to train on, held-out or probe rows that are training rows, or options that the run cannot
    follow.
    """
    refuse_text(remove)
    start = version(run, options.start)
    change = plan(start, remove, relabel, correct)
    say_copies(change)
    at = options.at
    plain = run.is_plain(options.curvature)
    if at is None and not options.one_shot and not plain:
        # Which point hardly matters (0.4, 0.6, 0.8 and all of them; LOG.md, 2026-11-21,
        # "Closed-form edits"), and one costs one solve a step.
        at = middle_point(run).place.label
    setting = Setting.of(run, options.curvature, options.damping, at, tuned=False, calibrated=False)
    prepared = PreparedEdit(
        version=start,
        change=change,
        options=options,
        holdout=holdout,
        heldout=unseen_rows(start.run, holdout, start.rows, change.after),
        probes=probes,
        probed=probe_rows(start.run, probes, start.rows, change.after),
        generate=options.generate,
        max_damage=options.max_damage,
        seed=options.seed,
        given_recipe=options.recipe,
        setting=setting,
    )
    for point, operator in setting.each():
        make_solver(point, options.solver, operator)  # refuses what it cannot solve
    if options.rule.kind == "converged":
        prepared.refuse_unless_at_the_end()
    return prepared


@dataclass(eq=False, kw_only=True)
class PreparedEdit(Undertaking):
    """One edit in the making, with the curvature that it is made with.

    Attributes
    ----------
    options : Options
        How it is made.
    setting : Setting
        The points that are looked at and the fitted, damped curvature at each.
    residual : float
        The largest relative residual of the linear solves so far.
    tolerance : float or None
        The solver's own, where it has one.
    solving : float
        Work of the last solve, in row-gradients: products of a matrix-free curvature pass over all
        rows, those of the others cost nothing that is counted.
    """

    options: Options
    setting: Setting
    residual: float = 0.0
    tolerance: float | None = None
    solving: float = 0.0

    @cached_property
    def retrains_locally(self) -> bool:
        """Whether the edit asks a local retraining where to go.

        Not where no step looks at it (the linear answer, `converged`), nor, which is said, where
        the adapter cannot be trained from a fresh start but the rule does without.
        """
        rule = self.options.rule
        if self.options.one_shot or rule.kind == "converged":
            return False
        if rule.kind != "expected":
            try:
                refuse_unrepeatable(self.version.model)
            except InputError as error:
                say(f"note: rows are raised by their own losses alone: {error}")
                return False
        return True

    def expected(self, before: State) -> Expected | None:
        """What a model trained on the rows as they are after the edit would lose on them.

        None where the edit asks no local retraining.
        """
        if not self.retrains_locally:
            return None
        return expected_losses(
            self.change,
            self.recipe,
            before.old.loss,
            before.new.loss,
            self.cost,
            seed=self.options.seed,
        )

    def local_plan(self) -> Plan | None:
        """The local retraining that the edit would make, None where it makes none."""
        if not self.retrains_locally:
            return None
        recipe = given_or_recorded(self.run, self.given_recipe) or Recipe()
        return planned(self.change, recipe, seed=self.options.seed)

    def targets(self, expected: Expected | None) -> Targets:
        """The losses to reach: the expected ones, or the one that was asked for; NaN: none."""
        change, rule = self.change, self.options.rule
        s, r = len(change.rows), len(change.new)
        goals = np.full(s + r, np.nan) if expected is None else expected.expected
        if rule.kind == "loss" and rule.value is not None:
            goals = np.full(s + r, rule.value)
        old, new = goals[:s], goals[s:]
        return Targets(old, new, by_request(change, old, new))

    # -- curvature

    @cached_property
    def updated(self) -> list[tuple[float, AtPoint, Damped]]:
        """Factor, point and damped curvature after the edit, for every point that is looked at."""
        return [
            (factor, point, after(point, operator, self.change, self.cost))
            for factor, (point, operator) in zip(
                self.setting.factors.tolist(), self.setting.each(), strict=True
            )
        ]

    def solve(self, point: AtPoint, operator: Damped, gradient: Tensor) -> Tensor:
        """`T^T (C' + lambda I)^-1 T g` for a gradient g [P], T the point's geometry.

        The residual is noted. Raises `NumericalError` where the solver did not converge.
        """
        spent = self.cost.total
        solver = make_solver(point, self.options.solver, operator)
        features = point.geometry.features(gradient[None])
        solution = solver.solve(operator, features)
        self.residual = max(self.residual, float(solution.residuals.max()))
        self.solving = self.cost.total - spent
        self.tolerance = getattr(solver, "tolerance", self.tolerance)
        if not bool(solution.converged.all()):
            why = solution.message or f"residual {self.residual:.1e}"
            raise NumericalError(
                f"the linear solve of the edit did not converge: {why}. Nothing is written"
            )
        return point.geometry.adjoint(solution.values)[0]

    def precondition(self, gradient: Tensor) -> Tensor:
        """`sum_p factor_p (C'_p + lambda_p I)^-1 g` over the points, `[P]`."""
        parts = [
            factor * self.solve(point, operator, gradient)
            for factor, point, operator in self.updated
        ]
        return torch.stack(parts).sum(0)

    # -- the three ways

    def one_shot(self) -> Ending:
        """The linear answer, summed over the points p with their factors f:

            delta = sum_p f_p (C'_p + lambda_p I)^-1 ( sum_S w grad l - sum_S' w grad l )

        Gradients and curvature are both taken at point p.
        """
        change, version = self.change, self.version
        tokens = change.contents
        weights = np.concatenate([change.old_weights, -change.new_weights])
        delta = torch.zeros_like(version.theta)
        for factor, point, operator in self.updated:
            scale = point.place.scale
            theta = point.place.theta if scale is None else scaled_to(version, scale)
            with version.model.at(theta) as model:
                gradient, _ = shared_gradient(
                    model, tokens, weights, token_budget=self.budget, cost=self.cost
                )
            delta += factor * self.solve(point, operator, gradient)
        return Ending(version.theta + delta, [], "one step, the linear answer", True)

    def goals(self, targets: Targets, before: State, expected: Expected | None) -> Goals:
        """The rows that are not at their target yet.

        Rows that go or change rise to theirs, new contents fall to theirs. Rows that are there
        already would only be held, at the price of their gradients in every step.
        """
        change = self.change
        tokens = change.contents
        goals = np.concatenate([targets.old, targets.new])
        rises = np.arange(len(tokens)) < len(change.rows)
        losses = np.concatenate([before.old.loss, before.new.loss])
        active = np.flatnonzero(Goals(tokens, goals, rises).gaps(losses) > 0)
        tokens, outputs = tokens.select(active), None
        if expected is not None and len(active):
            outputs = ExpectedOutputs(
                self.version, tokens, expected.expected[active], expected.local, self.cost
            )
        return Goals(tokens, goals[active], rises[active], outputs)

    def relinearised(self, targets: Targets, before: State, expected: Expected | None) -> Ending:
        """Steps until the stopping rule holds."""
        options, tokens = self.options, self.version.tokens.select(self.change.rest)
        return walk(
            self.version.model,
            self.version.theta,
            self.goals(targets, before, expected),
            RetainedRows(tokens, options.rest, options.seed, options.max_damage),
            self.precondition,
            until=options.rule,
            steps=options.steps,
            token_budget=self.budget,
            cost=self.cost,
        )

    def converged(self) -> Ending:
        """The optimum of the edited proximal objective.

        Matrix-free curvatures are taken again at every iterate; factored ones are kept.
        """
        model, start, change = self.version.model, self.version.theta, self.change
        ((_, point, operator),) = self.updated
        lam = operator.diagonal(start)
        tokens_after, weights_after = change.tokens_after, change.weights_after

        def gradient(theta: Tensor, tokens: TokenizedExamples, weights: np.ndarray) -> Tensor:
            with model.at(theta):
                return shared_gradient(
                    model, tokens, weights, token_budget=self.budget, cost=self.cost
                )[0]

        held = gradient(start, self.version.tokens, self.version.weights)

        def residual(theta: Tensor) -> Tensor:
            edited = gradient(theta, tokens_after, weights_after)
            return edited - held + lam * (theta - start)

        def solve(theta: Tensor, v: Tensor) -> Tensor:
            at_theta = Damped(operator.curvature.moved_to(theta), operator.lam)
            return self.solve(point, at_theta, v)

        end = optimum(residual, solve, start)
        first, last = end.norms[0], end.norms[-1]
        why = f"the gradient of the edited objective went from {first:.1e} to {last:.1e}"
        return Ending(end.theta, [], f"{len(end.norms) - 1} Newton steps: {why}", end.converged)

    def refuse_unless_at_the_end(self) -> None:
        """Refuse `until converged` for anything but the adapter itself, in raw coordinates."""
        points = self.setting.points
        if len(points) != 1 or points[0].place.scale != 1 or self.run.manifest.geometry != "raw":
            raise InputError(
                "until converged needs a run at the adapter itself in raw coordinates: fit one "
                "with --path 1.0 (and --curvature ggn, whose products are taken again at every "
                "iterate)"
            )

    # -- the record

    def method(self) -> dict[str, Any]:
        """How the edit is made, for the record."""
        options, setting = self.options, self.setting
        if options.one_shot:
            name = "one-shot"
        elif options.rule.kind == "converged":
            name = "converged"
        else:
            name = "re-linearised"
        lam = torch.cat([operator.lam for operator in setting.operators])
        solver = options.solver if isinstance(options.solver, str) else options.solver.name
        return {
            "name": name,
            "curvature": setting.operators[0].curvature.name,
            "geometry": self.run.manifest.geometry,
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
