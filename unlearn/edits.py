"""Closed-form edits: remove, relabel, correct. One formula, three names.

Replacing the training rows S by S' moves the adapter by

    delta = (C' + lambda I)^-1 ( sum_S w grad l - sum_S' w grad l )

with C' the curvature after the edit (`unlearn.after`) and the objective's weights w, whose N_tok is kept (`influence.scores`
has the convention). `remove` (LLMEraser's *instance removal*; S' is empty), `relabel` (*response correction*: another
completion) and `correct` (*query modification*: another prompt, completion, or both) are this one edit for different S'
(Ding et al. 2024, arXiv 2412.00383), and may be mixed.

* *one-shot* (`steps=1`): delta as it stands, taken where the run looked: at several points of the path it is the sum of
  what they say, with the factors of `influence.scores` (uncalibrated).
* *re-linearised* (`steps=N`, the default): bounded steps with the gradient taken again after each, the curvature of the
  path's middle point kept (`unlearn.relinearise`), until the stopping rule holds.
* *converged* (`until="converged"`): the optimum of the edited proximal objective over all rows (`unlearn.newton`).

What an edit did is measured, not assumed: losses of the edited rows, of a sample of the untouched ones and of held-out
rows, before and after. An edit that raises the retained loss by more than `max_damage` is not saved without `force`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from influence.adapter import adapter_folder, weight_key
from influence.curvature.base import Damped
from influence.curvature.ggn import GGNOperator
from influence.curvature.hessian import HessianOperator
from influence.damping import Damping
from influence.data import Examples, TokenizedExamples, tokenize
from influence.errors import InputError, NumericalError, WorkError
from influence.fitting import versions
from influence.loss import check_rows, mean_losses
from influence.progress import say
from influence.run import AtPoint, Run, spaced
from influence.scores import Setting, make_solver
from influence.solvers import Solver
from influence.store import only_writer, read_json
from unlearn import audit
from unlearn.after import after
from unlearn.measure import Cost, Measured, measure
from unlearn.newton import optimum
from unlearn.relinearise import REST, Goals, Rest, Until, Walk, loss_sum_gradient, walk
from unlearn.requests import Change, plan, write_rows
from unlearn.retrain import recorded_recipe, refuse_taken
from unlearn.unseen import Expected, Reference, expected_losses, middle, scaled_to
from unlearn.versions import CHANGED, Version, version

FORMAT = 1
#: Untouched rows whose loss is measured before and after.
GUARD_ROWS = 64
#: Rows of each kind whose gradient gives the linear forecast and the norm of the objective's gradient.
FORECAST_ROWS = 32
#: Steps of a re-linearised edit: at most, and as many as most take.
STEPS, USUAL_STEPS = 80, 15


@dataclass(frozen=True)
class Options:
    """How an edit is made.

    Parameters
    ----------
    steps
        1: the linear answer. Else the most steps of a re-linearised edit.
    until
        `expected` (default): removed rows reach the loss a model that never saw them would have, new contents the
        retained rows' mean loss. `loss=X` (nats per token), `steps=N`, `norm=X` (length of the move), `converged`.
    max_damage
        Relative rise of the retained rows' mean loss beyond which the edit is not saved without `force`.
    rest
        Untouched rows in every step; 0: the changed rows alone.
    curvature, damping, at
        As in `influence.scores.score`; `at` is the path's middle point for a re-linearised edit.
    solver
        `direct`, `cg`, `pcg`, `lissa`, `astra`, `sgd`, or a solver object.
    start
        Adapter to edit: the folder of an earlier edit, or `original`. Default: the last edit's.
    seed
        Draws the retained rows.
    """

    steps: int = STEPS
    until: str | Until = "expected"
    max_damage: float = 0.1
    rest: int = REST
    curvature: str | None = None
    damping: str | Damping | None = None
    at: str | None = None
    solver: str | Solver = "direct"
    start: str | Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rule = Until.parse(self.until)
        object.__setattr__(self, "until", rule)
        if self.steps < 1:
            raise InputError(f"steps {self.steps} was given; expected 1 (the linear answer) or more")
        if self.one_shot and rule.kind != "expected":
            raise InputError(
                f"steps 1, the linear answer, has no stopping rule, and {rule} was given: leave one of them out"
            )
        if rule.value is not None and rule.kind == "steps" and rule.value > self.steps:
            raise InputError(f"until {rule} was given, and at most {self.steps} steps: raise steps, or leave it out")
        if not 0 <= self.max_damage < float("inf"):
            raise InputError(f"max_damage {self.max_damage} was given; expected 0 or more, as in 0.1 for 10 %")
        if self.rest < 0 or self.seed < 0:
            raise InputError(f"rest {self.rest} and seed {self.seed} were given; expected 0 or more")
        if self.solver == "datainf":
            raise InputError(
                "solver datainf inverts the empirical Fisher of all rows, not the curvature after an edit: use direct, cg, "
                "pcg, lissa, astra or sgd"
            )

    @property
    def rule(self) -> Until:
        """The stopping rule."""
        return Until.parse(self.until)

    @property
    def one_shot(self) -> bool:
        """Whether this is the linear answer."""
        return self.steps == 1


def remove(run: Run, ids: Sequence[str], *, holdout: Examples | None = None, **options: Any) -> Edit:
    """Take training rows out of the adapter (LLMEraser's instance removal). `options`: the fields of `Options`."""
    return edit(run, remove=ids, holdout=holdout, **options)


def relabel(run: Run, changes: Mapping[str, str], *, holdout: Examples | None = None, **options: Any) -> Edit:
    """Give training rows another completion (LLMEraser's response correction): `{id: completion}`."""
    return edit(run, relabel=changes, holdout=holdout, **options)


def correct(
    run: Run, changes: Mapping[str, Mapping[str, Any]], *, holdout: Examples | None = None, **options: Any
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
        For unknown, repeated or removed ids, a change that changes nothing, nothing left to train on (`unlearn.requests`).
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
        raise NumericalError("the edited adapter holds NaN or infinity: nothing is written. Raise the damping")
    after_ = work.measure(theta)
    forecast = work.forecast(delta, theta)
    report = _report(work, found, delta, before, after_, expected, targets, forecast, time.monotonic() - begun)
    return Edit(work.change, delta, report)


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
        ahead += steps * (goals + 4 / 3 * min(work.options.rest, len(work.change.rest)) + 2 * work.solving)
    ahead += (GUARD_ROWS + 2 * len(work.change.rows) + forwards) / 3
    each = took / max(spent - forwards / 3, 1.0)
    return {
        "kind": work.change.kind,
        "requests": [request.record() for request in work.change.requests],
        "rows": _rows(work, before, None, expected, targets),
        "losses": {
            "edited": {"rows": len(work.change.rows), "before": _mean(before.edited), "target": _mean(targets.edited)}
            | {"linear": _plus(_mean(before.edited), linear["edited"])},
            "retained": {"rows": len(before.retained.loss), "before": _mean(before.retained.loss)}
            | {"linear": _plus(_mean(before.retained.loss), linear["retained"])},
            "heldout": None
            if before.heldout is None
            else {
                "rows": len(before.heldout.loss),
                "before": _mean(before.heldout.loss),
                "linear": _plus(_mean(before.heldout.loss), linear["heldout"]),
            },
        },
        "residual": work.residual,
        "cost": {"row_gradients": round(ahead), "seconds": round(ahead * each, 1), **work.retraining(ahead)},
        "method": work.method(),
    }


# ---- the work ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _State:
    """What is measured at one adapter: S, the new contents, a sample of the untouched rows, held-out rows."""

    old: Measured
    new: Measured
    retained: Measured
    heldout: Measured | None
    edited: np.ndarray

    @property
    def unseen(self) -> np.ndarray | None:
        """The held-out rows' losses."""
        return None if self.heldout is None else self.heldout.loss


@dataclass(frozen=True, eq=False)
class _Targets:
    """Losses to reach: of the rows S [s], of the new contents [r], and of each request [s] (its new content if it has one)."""

    old: np.ndarray
    new: np.ndarray
    edited: np.ndarray


@dataclass(eq=False)
class _Work:
    """One edit in the making: what is changed, with what, and what it has cost so far."""

    version: Version
    change: Change
    options: Options
    holdout: Examples | None
    heldout: TokenizedExamples | None
    setting: Setting
    cost: Cost = field(default_factory=Cost)
    residual: float = 0.0
    tolerance: float | None = None
    operators: list[Damped] | None = None
    solving: float = 0.0

    @property
    def run(self) -> Run:
        return self.version.run

    @property
    def budget(self) -> int:
        return self.run.manifest["token_budget"]

    @property
    def sample(self) -> np.ndarray:
        """The untouched rows that are measured, positions in the version's rows."""
        return guard_sample(self.change.rest, self.options.seed)

    def measure(self, theta: Tensor) -> _State:
        change, options = self.change, {"token_budget": self.budget, "cost": self.cost}
        with self.version.model.at(theta) as model:
            old, new = measure(model, change.old, **options), measure(model, change.new, **options)
            retained = measure(model, self.version.tokens.select(self.sample), **options)
            heldout = None if self.heldout is None else measure(model, self.heldout, **options)
        return _State(old, new, retained, heldout, _by_request(change, old.loss, new.loss))

    def targets(self, expected: Expected, before: _State) -> _Targets:
        change, rule = self.change, self.options.rule
        known = before.retained.loss if len(self.sample) else before.old.loss  # no row is untouched
        new = np.full(len(change.new), known.mean())
        old = expected.expected
        if rule.kind == "loss" and rule.value is not None:
            new, old = np.full_like(new, rule.value), np.where(change.replaced, old, rule.value)
        return _Targets(old, new, _by_request(change, old, new))

    def since_the_fit(self, after_: _State) -> float | None:
        """The relative rise of the retained sample's loss since the run's own adapter, where earlier edits came between."""
        if self.version.edits == 0 or len(self.sample) == 0:
            return None
        self.cost.forwards += len(self.sample)
        tokens = self.version.tokens.select(self.sample)
        first = mean_losses(self.version.model, tokens, token_budget=self.budget).mean()
        return float((after_.retained.loss.mean() - first) / first)

    # -- curvature

    def each(self) -> list[tuple[float, AtPoint, Damped]]:
        """Factor, point and damped curvature after the edit, for every point that is looked at."""
        if self.operators is None:
            self.operators = [after(point, operator, self.change, self.cost) for point, operator in self.setting.each()]
        return list(zip(self.setting.factors.tolist(), self.setting.points, self.operators, strict=True))

    def solve(self, point: AtPoint, operator: Damped, rhs: Tensor) -> Tensor:
        """`T^T (C' + lambda I)^-1 T r` for a gradient r [P], its residual noted and judged."""
        spent = self.cost.total
        solver = make_solver(point, self.options.solver, operator)
        features = point.geometry.features(rhs[None])
        solution = solver.solve(operator, features)
        self.residual = max(self.residual, float(solution.residuals.max()))
        self.solving = self.cost.total - spent  # products of a matrix-free curvature pass over all rows
        self.tolerance = getattr(solver, "tolerance", self.tolerance)
        if not bool(solution.converged.all()):
            raise NumericalError(
                f"the linear solve of the edit did not converge: {solution.message or f'residual {self.residual:.1e}'}. "
                "Nothing is written"
            )
        return point.geometry.adjoint(solution.values)[0]

    def precondition(self, gradient: Tensor) -> Tensor:
        parts = [factor * self.solve(point, operator, gradient) for factor, point, operator in self.each()]
        return torch.stack(parts).sum(0)

    # -- the three ways

    def one_shot(self) -> Walk:
        """The linear answer, as a walk of one step."""
        change, version = self.change, self.version
        tokens = _joined(change.old, change.new)
        weights = np.concatenate([change.old_weights, -change.new_weights])
        delta = torch.zeros_like(version.theta)
        for factor, point, operator in self.each():
            scale = point.place.scale
            theta = point.place.theta if scale is None else scaled_to(version, scale)
            with version.model.at(theta) as model:
                gradient, _ = loss_sum_gradient(model, tokens, weights, token_budget=self.budget, cost=self.cost)
            delta += factor * self.solve(point, operator, gradient)
        return Walk(version.theta + delta, [], "one step, the linear answer", True)

    def goals(self, targets: _Targets, before: _State) -> Goals:
        """The rows that are not at their goal yet: removed and replaced ones to rise, new contents to fall."""
        change = self.change
        tokens = _joined(change.old, change.new)
        s = len(change.rows)
        goal = np.concatenate([targets.old, targets.new])
        rises = np.arange(len(tokens)) < s
        removed = np.concatenate([~change.replaced, np.zeros(len(change.new), dtype=bool)])
        now = np.concatenate([before.old.loss, before.new.loss])
        active = np.flatnonzero(Goals(tokens, goal, rises, removed).gaps(now) > 0)
        found = Goals(tokens.select(active), goal[active], rises[active], removed[active])
        reference = Reference(self.version, found.tokens, found.targets, self.cost) if found.removed.any() else None
        return Goals(found.tokens, found.targets, found.rises, found.removed, reference)

    def relinearised(self, targets: _Targets, before: _State) -> Walk:
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
                return loss_sum_gradient(model, tokens, w, token_budget=self.budget, cost=self.cost)[0]

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

    # -- evidence

    def forecast(self, delta: Tensor, theta: Tensor | None) -> dict[str, Any]:
        """Linear forecasts of the mean losses' changes, and the retained objective's gradient norm before and after."""
        model, start = self.version.model, self.version.theta
        retained = self.version.tokens.select(self.sample[spaced(len(self.sample), FORECAST_ROWS)])
        edited = _joined(self.change.old.select(np.flatnonzero(~self.change.replaced)), self.change.new)
        sets = {"edited": edited, "retained": retained, "heldout": self.heldout}
        out: dict[str, Any] = {}
        for name, tokens in sets.items():
            if tokens is None or len(tokens) == 0:
                out[name] = None
                continue
            tokens = tokens if name == "edited" else tokens.select(spaced(len(tokens), FORECAST_ROWS))
            weights = 1 / (tokens.counts * len(tokens))
            with model.at(start):
                gradient, _ = loss_sum_gradient(model, tokens, weights, token_budget=self.budget, cost=self.cost)
            out[name] = float(gradient.double() @ delta.double())
            if name == "retained":
                out["objective"] = {"before": float(gradient.norm()), "after": None, "rows": len(tokens)}
                if theta is not None:
                    with model.at(theta):
                        there, _ = loss_sum_gradient(model, tokens, weights, token_budget=self.budget, cost=self.cost)
                    out["objective"]["after"] = float(there.norm())
        return out

    def method(self) -> dict[str, Any]:
        options, setting = self.options, self.setting
        name = "one-shot" if options.one_shot else "converged" if options.rule.kind == "converged" else "re-linearised"
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

    def retraining(self, spent: float) -> dict[str, Any]:
        """What retraining would cost, where the recipe is recorded."""
        recipe = recorded_recipe(self.run)
        if recipe is None:
            return {"retraining": None, "ratio": None}
        total = len(self.change.after) * recipe.epochs
        return {"retraining": total, "ratio": spent / total}


def _prepare(
    run: Run,
    remove: Sequence[str],
    relabel: Mapping[str, str] | None,
    correct: Mapping[str, Mapping[str, Any]] | None,
    holdout: Examples | None,
    options: Options,
) -> _Work:
    """Everything that can be refused, refused."""
    if isinstance(remove, str):
        raise InputError(f"ids {remove!r} were given as one string; expected a list, as in [{remove!r}]")
    if holdout is not None and len(holdout) == 0:
        raise InputError("the held-out file has no rows: give some, or leave it out")
    start = version(run, options.start)
    change = plan(start, remove, relabel, correct)
    heldout = None
    if holdout is not None:
        known = {row.content_hash for rows in (run.train, start.rows, change.after) for row in rows}
        seen = known & {row.content_hash for row in holdout}
        if seen:
            raise InputError(
                f"{len(seen)} held-out rows are training rows (or new contents) word for word: they cannot tell what an unseen row's loss is; "
                "give rows that the adapter never saw"
            )
        heldout = tokenize(holdout, run.model.tokenizer, max_length=run.manifest["objective"]["max_length"])
        check_rows(run.model, heldout)
    at = options.at
    identity = (options.curvature or run.fitted_name) == "identity"
    if at is None and not options.one_shot and not identity:
        at = middle(run).place.label
    setting = Setting.of(run, options.curvature, options.damping, at, tuned=False, calibrated=False)
    work = _Work(start, change, options, holdout, heldout, setting)
    if options.rule.kind == "converged":
        work.refuse_unless_at_the_end()
    return work


def guard_sample(rest: np.ndarray, seed: int) -> np.ndarray:
    """The untouched rows whose loss is measured before and after an edit: `GUARD_ROWS` of `rest`, drawn by its seed."""
    return np.sort(np.random.default_rng([seed, 1]).permutation(rest)[:GUARD_ROWS])


def _by_request(change: Change, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """One number a request: of its new content where it has one."""
    out = np.array(old, dtype=np.float64)
    out[change.replaced] = new
    return out


def _joined(one: TokenizedExamples, other: TokenizedExamples) -> TokenizedExamples:
    return TokenizedExamples([*one, *other], [*one.ids, *other.ids])


# ---- the record ----------------------------------------------------------------------------------------------


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _plus(before: float | None, change: float | None) -> float | None:
    return None if before is None or change is None else before + change


def _rows(
    work: _Work, before: _State, after_: _State | None, expected: Expected, targets: _Targets, comparable: Any = None
) -> list[dict[str, Any]]:
    """One entry a request."""
    found, new, base = [], 0, _by_request(work.change, expected.base, expected.new_base)
    for place, request in enumerate(work.change.requests):
        replaced = request.after is not None
        at = new if replaced else place
        first, last = (
            (before.new, after_.new if after_ else None) if replaced else (before.old, after_.old if after_ else None)
        )
        row = {
            "id": request.before.id,
            "action": request.action,
            "before": float(first.loss[at]),
            "after": None if last is None else float(last.loss[at]),
            "target": float(targets.edited[place]),
            "base": float(base[place]),
            "share": float(expected.shares[place]),
            "extraction_before": float(first.extraction[at]),
            "extraction_after": None if last is None else float(last.extraction[at]),
            "rank": None if last is None or comparable is None else float(np.mean(comparable < last.loss[at])),
        }
        if replaced:
            row |= {
                "old_before": float(before.old.loss[place]),
                "old_after": None if after_ is None else float(after_.old.loss[place]),
                "old_target": float(targets.old[place]),
            }
            new += 1
        found.append(row)
    return found


def _report(
    work: _Work,
    found: Walk,
    delta: Tensor,
    before: _State,
    after_: _State,
    expected: Expected,
    targets: _Targets,
    linear: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The record of an edit, all but the files (`unlearn.audit.seal`)."""
    run, version, change, options = work.run, work.version, work.change, work.options
    model = version.model
    with model.at(version.theta + delta):
        digest = model.adapter_digest
    comparable, source = None, None
    if after_.heldout is not None:
        comparable, source = after_.heldout.loss, "held-out rows"
    elif len(work.sample):
        with model.at(scaled_to(version, 0.0)):
            comparable = mean_losses(model, version.tokens.select(work.sample), token_budget=work.budget)
        work.cost.forwards += len(comparable)
        source = "retained rows under the base model"
    change_of = after_.retained.loss - before.retained.loss
    damage = float(change_of.mean() / before.retained.loss.mean()) if len(change_of) else None
    since = work.since_the_fit(after_)
    if since is not None and damage is not None and since > options.max_damage >= damage:
        say(
            f"warning: this edit raises the retained rows' loss by {damage:.1%}, and {version.edits + 1} edits together by "
            f"{since:.1%} since the adapter that was fitted: each is judged by itself"
        )
    rows_after = change.after
    cost = work.cost
    return {
        "format": FORMAT,
        "kind": change.kind,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "run": {"path": str(run.directory.resolve()), "digest": run.digest},
        "base": {"path": run.manifest["base"]["path"], "digest": run.manifest["base"]["digest"]},
        "adapter": {"before": {"path": version.path, "digest": version.digest}, "after": {"digest": digest}},
        "data": {
            "before": version.rows.digest,
            "after": rows_after.digest,
            "rows_before": len(version.rows),
            "rows_after": len(rows_after),
        },
        "tokenizer": {"digest": run.manifest["identity"]["tokenizer"]},
        "requests": [request.record() for request in change.requests],
        "lineage": {"edits": version.edits + 1, **change.lineage},
        "method": work.method() | {"rho": expected.rho},
        "residual": {"solver": work.residual, "tolerance": work.tolerance, "objective": linear.get("objective")},
        "stopped": found.stopped,
        "reached": found.reached,
        "steps": [asdict(step) for step in found.steps],
        "delta": {"norm": float(delta.norm()), "relative": float(delta.norm() / version.theta.norm())},
        "losses": {
            "edited": {
                "rows": len(change.rows),
                "before": _mean(before.edited),
                "after": _mean(after_.edited),
                "target": _mean(targets.edited),
                "predicted": _plus(_mean(before.edited), linear["edited"]),
            },
            "retained": {
                "rows": len(change_of),
                "before": _mean(before.retained.loss),
                "after": _mean(after_.retained.loss),
                "change": damage,
                "standard_error": float(change_of.std(ddof=1) / np.sqrt(len(change_of)))
                if len(change_of) > 1
                else None,
                "predicted": _plus(_mean(before.retained.loss), linear["retained"]),
            },
            "heldout": None
            if before.heldout is None or after_.heldout is None
            else {
                "rows": len(before.heldout.loss),
                "before": _mean(before.heldout.loss),
                "after": _mean(after_.heldout.loss),
                "predicted": _plus(_mean(before.heldout.loss), linear["heldout"]),
                "source": work.holdout.source if work.holdout is not None else None,
            },
        },
        "rows": _rows(work, before, after_, expected, targets, comparable),
        "comparable": None if comparable is None else {"source": source, "rows": len(comparable)},
        "guard": {
            "max_damage": options.max_damage,
            "damage": damage,
            "since_the_fit": since,
            "passed": damage is None or damage <= options.max_damage,
            "forced": False,
        },
        "cost": {
            "row_gradients": cost.gradients,
            "row_forwards": cost.forwards,
            "total": cost.total,
            "seconds": seconds,
            **work.retraining(cost.total),
        },
        "agreement": None,
    }


# ---- the result ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Edit:
    """An edit that was made and measured, not yet saved.

    Attributes
    ----------
    change : Change
        What was asked, and of which version of the adapter.
    delta : Tensor [P]
        The move of the LoRA parameters, in `ParamSpace` order: old + delta is the new adapter.
    report : dict
        What `edit.json` will hold (README has the keys).
    """

    change: Change
    delta: Tensor = field(repr=False)
    report: dict[str, Any] = field(repr=False)

    @property
    def theta(self) -> Tensor:
        """The edited adapter's parameters `[P]`."""
        return self.change.version.theta + self.delta

    @property
    def passed(self) -> bool:
        """Whether the retained rows lost no more than was allowed."""
        return bool(self.report["guard"]["passed"])

    def save(self, out: str | Path, *, force: bool = False, overwrite: bool = False) -> Path:
        """Write the edited adapter to a new directory, its record beside it, and a line in the run's audit chain.

        The directory appears when it is complete. Raises `WorkError` where the guard did not pass and `force` is not given;
        nothing is written then.
        """
        run, out = self.change.version.run, Path(out)
        refuse_out(run, out, overwrite)
        if self.change.version.path and _inside(out, Path(self.change.version.path)):
            raise InputError(
                f"{out} is, or holds, or lies in {self.change.version.path}, which the edit is made from: give a new directory"
            )
        guard = self.report["guard"]
        if not self.passed and not force:
            raise WorkError(
                f"the edit raises the retained rows' loss by {guard['damage']:.1%} and {guard['max_damage']:.1%} are allowed: "
                "nothing was written. Ask for less (--until), keep more rows in the step (--rest), allow more "
                "(--max-damage), or save it nevertheless (--force)"
            )
        partial, replaced = out.with_name(out.name + ".partial"), out.with_name(out.name + ".replaced")
        version = self.change.version
        newest = version.head if version.latest else None

        def publish() -> None:
            if out.exists():
                os.replace(out, replaced)
            os.replace(partial, out)

        with only_writer(out):
            if replaced.exists() and not out.exists():  # a save was killed between the two moves
                os.replace(replaced, out)
            for left in (partial, replaced):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir(parents=True)
            self._write(partial)
            audit.seal(partial, {**self.report, "guard": {**guard, "forced": not self.passed}})
            try:
                audit.append(run.directory, out, expect=newest, publish=publish)
            except BaseException:
                if not partial.exists() and out.exists():  # published, but not on record: as it was
                    os.replace(out, partial)
                if replaced.exists() and not out.exists():
                    os.replace(replaced, out)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        run.manifest = read_json(run.directory / "manifest.json")
        return out

    def _write(self, folder: Path) -> None:
        """PEFT's configuration and weights, the move, and the contents of changed rows."""
        model = self.change.version.model
        config = model.model.peft_config[model.model.active_adapters[0]]
        source = Path(self.change.version.path or os.devnull)
        if (source / "adapter_config.json").is_file():
            for path in sorted(adapter_folder(source).iterdir()):
                if path.is_file() and _belongs(path.name):
                    shutil.copyfile(path, folder / path.name)
        else:
            config.save_pretrained(str(folder))
        names = [weight_key(leaf) for leaf in model.space.leaves]
        for name, flat in (("adapter_model.safetensors", self.theta), ("delta.safetensors", self.delta)):
            tensors = {
                key: part.detach().cpu().contiguous() for key, part in zip(names, model.space.split(flat), strict=True)
            }
            save_file(tensors, folder / name, metadata={"format": "pt"})
            (folder / name).chmod(0o644)  # as the other files: services of other users load adapters
        changed = set(self.report["lineage"]["changed"])
        if changed:  # by earlier edits too, so that this folder alone tells the rows
            write_rows((row for row in self.change.after if row.id in changed), folder / CHANGED)


def _belongs(name: str) -> bool:
    """Whether a file of the old adapter's folder is copied: configuration, tokenizer and recipe; never weights."""
    if not name.endswith((".json", ".txt", ".model", ".jinja")):
        return False
    known = (
        "adapter_config.json",
        "recipe.json",
        "vocab",
        "merges.txt",
        "added_tokens.json",
        "spiece",
        "sentencepiece",
    )
    return name.startswith((*known, "tokenizer", "special_tokens", "chat_template"))


def refuse_out(run: Run, out: Path, overwrite: bool) -> None:
    """Refuse an output directory that holds something, or that the run, its base, its adapter, its rows or an edit needs."""
    sources = [str(run.directory), *(run.manifest[key]["path"] for key in ("adapter", "base", "data"))]
    for place in sources:
        if place and Path(place).exists() and _inside(out, Path(place)):
            raise InputError(
                f"{out} is, or holds, or lies in {place}, which the edit is made from: give a new directory"
            )
    entries, own = audit.entries(run.directory), str(out.resolve())
    for entry in entries:
        if entry["edit"] != own and _inside(out, Path(entry["edit"])):
            raise InputError(
                f"{out} holds, or lies in, the edit {entry['edit']}, which is on record: give a new directory"
            )
    refuse_taken(out, overwrite)
    if overwrite and out.is_dir() and any(out.iterdir()) and not (out / "adapter_config.json").exists():
        raise InputError(
            f"{out} holds other things than an adapter, and only one may be replaced: give a new directory"
        )
    made = {entry["adapter_after"] for entry in entries if entry["edit"] == own}
    later = [entry for entry in entries if entry["adapter_before"] in made and entry["edit"] != own]
    if later:
        raise InputError(
            f"{later[0]['edit']} was made from the adapter in {out}, which therefore stays: give a new directory"
        )


def _inside(out: Path, place: Path) -> bool:
    """Whether one of two paths is, or lies in, the other."""
    out, place = out.resolve(), place.resolve()
    return out == place or out in place.parents or place in out.parents


__all__ = ["Edit", "Options", "correct", "edit", "forecast", "relabel", "remove"]
