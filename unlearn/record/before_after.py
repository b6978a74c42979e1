"""What was measured of an edit, and its record: losses before and after, damage, forecast, cost.

Every way of changing an adapter (closed formula, gradient steps) is judged by the same measurements and leaves the same
record, `edit.json` (README has the keys): changed rows, a fixed sample of the untouched ones, held-out rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from influence import distributed
from influence.cost import Cost
from influence.errors import InputError
from influence.fitting import versions
from influence.gradients import loss_sum_gradient
from influence.loss import mean_losses
from influence.progress import say
from influence.rows import Examples
from influence.run import Run, spaced
from influence.tokens import TokenizedExamples
from unlearn.record.change import Change
from unlearn.record.losses import Measured, measure
from unlearn.record.sample import guard_sample
from unlearn.record.version import Version
from unlearn.retraining.recipe import recorded_recipe
from unlearn.stopping import Walk
from unlearn.unseen import Expected, scaled_to

FORMAT = 1


#: Rows of each kind whose gradient gives the linear forecast and the norm of the objective's gradient.
FORECAST_ROWS = 32


@dataclass(frozen=True, eq=False)
class State:
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
class Targets:
    """Losses to reach: of the rows S [s], of the new contents [r], and of each request [s] (its new content if it has one)."""

    old: np.ndarray
    new: np.ndarray
    edited: np.ndarray


@dataclass(eq=False, kw_only=True)
class Evidence:
    """One edit in the making: what is changed and what it has cost so far; `max_damage` and `seed` as in its options."""

    version: Version
    change: Change
    holdout: Examples | None
    heldout: TokenizedExamples | None
    max_damage: float
    seed: int
    cost: Cost = field(default_factory=Cost)

    @property
    def run(self) -> Run:
        """The run that is edited."""
        return self.version.run

    @property
    def budget(self) -> int:
        """Tokens that run at a time."""
        return self.run.manifest["token_budget"]

    @cached_property
    def sample(self) -> np.ndarray:
        """The untouched rows that are measured, positions in the version's rows."""
        gone = {request.before.content_hash for request in self.change.requests}
        return guard_sample(self.version.rows, self.change.rest, self.seed, gone)

    def measure(self, theta: Tensor) -> State:
        """Losses and extraction strengths with the adapter at `theta` [P]."""
        change, options = self.change, {"token_budget": self.budget, "cost": self.cost}
        with self.version.model.at(theta) as model:
            old, new = measure(model, change.old, **options), measure(model, change.new, **options)
            retained = measure(model, self.version.tokens.select(self.sample), **options)
            heldout = None if self.heldout is None else measure(model, self.heldout, **options)
        return State(old, new, retained, heldout, by_request(change, old.loss, new.loss))

    def since_the_fit(self, after_: State) -> float | None:
        """The relative rise of the retained sample's loss since the run's own adapter, where earlier edits came between."""
        if self.version.edits == 0 or len(self.sample) == 0:
            return None
        self.cost.forwards += len(self.sample)
        tokens = self.version.tokens.select(self.sample)
        first = mean_losses(self.version.model, tokens, token_budget=self.budget).mean()
        return float((after_.retained.loss.mean() - first) / first)

    def forecast(self, delta: Tensor, theta: Tensor | None) -> dict[str, Any]:
        """Linear forecasts of the mean losses' changes, and the retained objective's gradient norm before and after."""
        model, start = self.version.model, self.version.theta
        retained = self.version.tokens.select(self.sample[spaced(len(self.sample), FORECAST_ROWS)])
        edited = joined(
            self.change.old.select(np.flatnonzero(~self.change.replaced)), self.change.new
        )
        sets = {"edited": edited, "retained": retained, "heldout": self.heldout}
        out: dict[str, Any] = {}
        for name, tokens in sets.items():
            if tokens is None or len(tokens) == 0:
                out[name] = None
                continue
            tokens = (
                tokens if name == "edited" else tokens.select(spaced(len(tokens), FORECAST_ROWS))
            )
            weights = 1 / (tokens.counts * len(tokens))
            with model.at(start):
                gradient, _ = loss_sum_gradient(
                    model, tokens, weights, token_budget=self.budget, cost=self.cost
                )
            out[name] = float(gradient.double() @ delta.double())
            if name == "retained":
                out["objective"] = {
                    "before": float(gradient.norm()),
                    "after": None,
                    "rows": len(tokens),
                }
                if theta is not None:
                    with model.at(theta):
                        there, _ = loss_sum_gradient(
                            model, tokens, weights, token_budget=self.budget, cost=self.cost
                        )
                    out["objective"]["after"] = float(there.norm())
        return out

    def retraining(self, spent: float) -> dict[str, Any]:
        """What retraining would cost, where the recipe is recorded."""
        recipe = recorded_recipe(self.run)
        if recipe is None:
            return {"retraining": None, "ratio": None}
        total = len(self.change.after) * recipe.epochs
        return {"retraining": total, "ratio": spent / total}


def by_request(change: Change, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """One number a request: of its new content where it has one."""
    out = np.array(old, dtype=np.float64)
    out[change.replaced] = new
    return out


def joined(one: TokenizedExamples, other: TokenizedExamples) -> TokenizedExamples:
    """Both sets of rows, one after the other."""
    return TokenizedExamples([*one, *other], [*one.ids, *other.ids])


def mean_of(values: np.ndarray) -> float | None:
    """Their mean; None where there are none, or one is unknown (NaN)."""
    return known(float(np.mean(values))) if len(values) else None


def known(value: float) -> float | None:
    """The number, or None for NaN."""
    return None if np.isnan(value) else value


def plus(before: float | None, change: float | None) -> float | None:
    """`before + change`; None where one is not known."""
    return None if before is None or change is None else before + change


def rows_of(
    work: Evidence,
    before: State,
    after_: State | None,
    expected: Expected,
    targets: Targets,
    comparable: Any = None,
) -> list[dict[str, Any]]:
    """One entry a request."""
    found, new, base = [], 0, by_request(work.change, expected.base, expected.new_base)
    for place, request in enumerate(work.change.requests):
        replaced = request.after is not None
        at = new if replaced else place
        first, last = (
            (before.new, after_.new if after_ else None)
            if replaced
            else (before.old, after_.old if after_ else None)
        )
        row = {
            "id": request.before.id,
            "action": request.action,
            "before": float(first.loss[at]),
            "after": None if last is None else float(last.loss[at]),
            "target": known(float(targets.edited[place])),
            "base": float(base[place]),
            "share": known(float(expected.shares[place])),
            "extraction_before": float(first.extraction[at]),
            "extraction_after": None if last is None else float(last.extraction[at]),
            "rank": None
            if last is None or comparable is None
            else float(np.mean(comparable < last.loss[at])),
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


def report(
    work: Evidence,
    method: dict[str, Any],
    residual: dict[str, Any],
    found: Walk,
    delta: Tensor,
    before: State,
    after_: State,
    expected: Expected,
    targets: Targets,
    linear: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The record of an edit, all but the files (`unlearn.record.folder.seal`)."""
    run, version, change = work.run, work.version, work.change
    model = version.model
    with model.at(version.theta + delta):
        digest = model.adapter_digest
    comparable, source = None, None
    if after_.heldout is not None:
        comparable, source = after_.heldout.loss, "held-out rows"
    elif len(work.sample):
        with model.at(scaled_to(version, 0.0)):
            comparable = mean_losses(
                model, version.tokens.select(work.sample), token_budget=work.budget
            )
        work.cost.forwards += len(comparable)
        source = "retained rows under the base model"
    change_of = after_.retained.loss - before.retained.loss
    damage = float(change_of.mean() / before.retained.loss.mean()) if len(change_of) else None
    since = work.since_the_fit(after_)
    if (
        since is not None
        and damage is not None
        and distributed.rank() == 0
        and since > work.max_damage >= damage
    ):
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
        "adapter": {
            "before": {"path": version.path, "digest": version.digest},
            "after": {"digest": digest},
        },
        "data": {
            "before": version.rows.digest,
            "after": rows_after.digest,
            "rows_before": len(version.rows),
            "rows_after": len(rows_after),
        },
        "tokenizer": {"digest": run.manifest["identity"]["tokenizer"]},
        "requests": [request.record() for request in change.requests],
        "lineage": {"edits": version.edits + 1, **change.lineage},
        "method": method | {"rho": known(expected.rho)},
        "residual": residual | {"objective": linear.get("objective")},
        "stopped": found.stopped,
        "reached": found.reached,
        "steps": [asdict(step) for step in found.steps],
        "delta": {
            "norm": float(delta.norm()),
            "relative": float(delta.norm() / version.theta.norm()),
        },
        "losses": {
            "edited": {
                "rows": len(change.rows),
                "before": mean_of(before.edited),
                "after": mean_of(after_.edited),
                "target": mean_of(targets.edited),
                "predicted": plus(mean_of(before.edited), linear["edited"]),
            },
            "retained": {
                "rows": len(change_of),
                "before": mean_of(before.retained.loss),
                "after": mean_of(after_.retained.loss),
                "change": damage,
                "standard_error": float(change_of.std(ddof=1) / np.sqrt(len(change_of)))
                if len(change_of) > 1
                else None,
                "predicted": plus(mean_of(before.retained.loss), linear["retained"]),
            },
            "heldout": None
            if before.heldout is None or after_.heldout is None
            else {
                "rows": len(before.heldout.loss),
                "before": mean_of(before.heldout.loss),
                "after": mean_of(after_.heldout.loss),
                "predicted": plus(mean_of(before.heldout.loss), linear["heldout"]),
                "source": work.holdout.source if work.holdout is not None else None,
            },
        },
        "rows": rows_of(work, before, after_, expected, targets, comparable),
        "comparable": None if comparable is None else {"source": source, "rows": len(comparable)},
        "guard": {
            "max_damage": work.max_damage,
            "damage": damage,
            "since_the_fit": since,
            "passed": None
            if work.max_damage == float("inf")
            else damage is None or damage <= work.max_damage,
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


def refuse_text(ids: Sequence[str] | str) -> None:
    """Refuse ids that were given as one string, whose letters would be taken for ids."""
    if isinstance(ids, str):
        raise InputError(f"ids {ids!r} were given as one string; expected a list, as in [{ids!r}]")
