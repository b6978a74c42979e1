"""Measurements of an edit before and after, and its record: losses, damage, forecast, cost.

Every way of changing an adapter (closed formula, gradient steps) is judged by the same measurements
and leaves the same record (`unlearn.record.edit_record`): edited rows, a fixed sample of the
untouched ones, held-out rows.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from influence import distributed
from influence.at_point import evenly_spaced
from influence.cost import Cost
from influence.prepared import versions
from influence.progress import say
from influence.rows import Examples
from influence.run import Run
from influence.shared_rows import shared_gradient, shared_losses
from influence.tokens import TokenizedExamples
from unlearn.record.change import Change, Request
from unlearn.record.edit_record import (
    Adapters,
    Comparable,
    CostRecord,
    Digest,
    EditedLosses,
    EditRecord,
    EvidenceRecord,
    Expectation,
    GradientNorms,
    Guard,
    HeldOutLosses,
    Lineage,
    Losses,
    MethodRecord,
    Move,
    Place,
    RequestRecord,
    Residual,
    RetainedLosses,
    RowRecord,
    ShippedRecord,
    TrainingRows,
    WalkStep,
)
from unlearn.record.losses import Measured, measure
from unlearn.record.numbers import mean_or_none, number_or_none, sum_or_none
from unlearn.record.sample import guard_sample
from unlearn.record.shipped import DTYPE, as_shipped
from unlearn.record.version import Version
from unlearn.retraining.estimate import known_or_estimated
from unlearn.retraining.recipe import Recipe, given_or_recorded
from unlearn.stopping import Ending
from unlearn.unseen import Expected, base_losses

#: Rows of each kind whose gradient gives the linear forecast and the norm of the objective's
#: gradient (a choice).
FORECAST_ROWS = 32


@dataclass(frozen=True, eq=False)
class State:
    """What is measured at one adapter.

    Of the rows S (`old`), their new contents, a sample of the untouched rows, and held-out rows.
    `edited` [s] is the loss of each request: of its new content, where it has one.
    """

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
    """Losses to reach: of the rows S [s], of the new contents [r], and of each request [s]."""

    old: np.ndarray
    new: np.ndarray
    edited: np.ndarray


@dataclass(frozen=True)
class LinearForecast:
    """Rises of the mean losses to first order, and the retained objective's norms.

    None: there are no such rows.
    """

    edited: float | None
    retained: float | None
    heldout: float | None
    objective: GradientNorms | None


@dataclass(eq=False, kw_only=True)
class Undertaking:
    """An edit in the making: what is changed, what is measured beside it, and its cost so far.

    `holdout` are the held-out rows and `heldout` their tokens, `probes` the probe rows and `probed`
    theirs; `generate`, `max_damage`, `seed` and `given_recipe` are as in the edit's options. Several
    processes share the measured rows out, and have the same answers.
    """

    version: Version
    change: Change
    holdout: Examples | None
    heldout: TokenizedExamples | None
    max_damage: float
    seed: int
    given_recipe: str | Path | Recipe | None = None
    probes: Examples | None = None
    probed: TokenizedExamples | None = None
    generate: int = 0
    cost: Cost = field(default_factory=Cost)

    @property
    def run(self) -> Run:
        """The run that is edited."""
        return self.version.run

    @property
    def budget(self) -> int:
        """Tokens that run at a time."""
        return self.run.token_budget

    @cached_property
    def recipe(self) -> Recipe:
        """How the run's adapter was trained: as given, as recorded, or estimated, which is said."""
        return known_or_estimated(self.version, self.given_recipe, self.cost)

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

    def base_losses(self, tokens: TokenizedExamples) -> np.ndarray:
        """Losses of rows under the base alone, `[m]`."""
        return base_losses(self.version, tokens, token_budget=self.budget, cost=self.cost)

    def since_the_fit(self, after: State) -> float | None:
        """Relative rise of the retained sample's loss since the run's own adapter.

        None where no edit came between.
        """
        if self.version.edits == 0 or len(self.sample) == 0:
            return None
        self.cost.forwards += len(self.sample)
        tokens = self.version.tokens.select(self.sample)
        first = shared_losses(self.version.model, tokens, token_budget=self.budget).mean()
        return float((after.retained.loss.mean() - first) / first)

    def forecast(self, delta: Tensor, theta: Tensor | None) -> LinearForecast:
        """First-order rises of the mean losses for a move `delta` [P], at the adapter before.

        With `theta` [P], the adapter after, the retained objective's gradient is taken there too.
        """
        change, start = self.change, self.version.theta
        retained = self.version.tokens.select(
            self.sample[evenly_spaced(len(self.sample), FORECAST_ROWS)]
        )
        heldout = self.heldout
        if heldout is not None:
            heldout = heldout.select(evenly_spaced(len(heldout), FORECAST_ROWS))
        sets = {
            "edited": change.edited,
            "retained": retained,
            "heldout": heldout,
        }
        rises: dict[str, float | None] = dict.fromkeys(sets)
        objective = None
        for name, tokens in sets.items():
            if tokens is None or len(tokens) == 0:
                continue
            gradient = self._mean_gradient(tokens, start)
            rises[name] = float(gradient.double() @ delta.double())
            if name == "retained":
                after = None if theta is None else float(self._mean_gradient(tokens, theta).norm())
                norm = float(gradient.norm())
                objective = GradientNorms(before=norm, after=after, rows=len(tokens))
        return LinearForecast(**rises, objective=objective)

    def _mean_gradient(self, tokens: TokenizedExamples, theta: Tensor) -> Tensor:
        """Gradient `[P]` of the rows' mean loss at an adapter."""
        weights = 1 / (tokens.counts * len(tokens))
        with self.version.model.at(theta) as model:
            return shared_gradient(
                model, tokens, weights, token_budget=self.budget, cost=self.cost
            )[0]

    def retraining(self, spent: float) -> dict[str, float | None]:
        """What retraining would cost in row gradients, and `spent` over it.

        None where the recipe is not recorded.
        """
        recipe = given_or_recorded(self.run, self.given_recipe)
        if recipe is None:
            return {"retraining": None, "ratio": None}
        total = recipe.rows_read(len(self.change.after))
        return {"retraining": total, "ratio": spent / total}


def by_request(change: Change, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """One number a request `[s]`: of its new content where it has one."""
    values = np.array(old, dtype=np.float64)
    values[change.replaced] = new
    return values


def rows_of(
    work: Undertaking,
    before: State,
    after: State | None,
    base: np.ndarray,
    expected: Expected | None,
    targets: Targets,
    comparable: np.ndarray | None = None,
) -> tuple[RowRecord, ...]:
    """What was measured of each request, with its rank among the losses `comparable`.

    `base` [m]: losses of the changed rows and of the new contents under the base alone.
    """
    replaced, s = work.change.replaced, len(work.change.rows)
    place_of_new = np.cumsum(replaced) - 1
    unknown = np.full(len(base), np.nan)
    low, high = (unknown, unknown) if expected is None else expected.intervals()
    base, low, high = (by_request(work.change, v[:s], v[s:]) for v in (base, low, high))

    def record(place: int, request: Request) -> RowRecord:
        """What was measured of one request."""
        at = int(place_of_new[place]) if replaced[place] else place
        first, last = before.old, None if after is None else after.old
        old_losses: dict[str, float | None] = {}
        if replaced[place]:
            old_losses = {
                "old_before": float(first.loss[place]),
                "old_after": None if last is None else float(last.loss[place]),
                "old_target": float(targets.old[place]),
            }
            first, last = before.new, None if after is None else after.new
        rank = None
        if last is not None and comparable is not None:
            rank = float(np.mean(comparable < last.loss[at]))
        return RowRecord(
            id=request.before.id,
            action=request.action,
            before=float(first.loss[at]),
            after=None if last is None else float(last.loss[at]),
            target=number_or_none(float(targets.edited[place])),
            base=float(base[place]),
            share=None,
            low=number_or_none(float(low[place])),
            high=number_or_none(float(high[place])),
            extraction_before=float(first.extraction[at]),
            extraction_after=None if last is None else float(last.extraction[at]),
            rank=rank,
            **old_losses,
        )

    return tuple(record(place, request) for place, request in enumerate(work.change.requests))


def report(
    work: Undertaking,
    method: dict[str, Any],
    residual: dict[str, Any],
    ending: Ending,
    delta: Tensor,
    before: State,
    after: State,
    base: np.ndarray,
    expected: Expected | None,
    targets: Targets,
    linear: LinearForecast,
    evidence: EvidenceRecord,
    seconds: float,
) -> EditRecord:
    """The record of an edit, all but the files (`unlearn.record.folder.seal`).

    `method` are the settings by name, `residual` the linear solves' residual and tolerance,
    `ending` where the steps led, `delta` [P] the whole move, `evidence` what it did not aim at, and
    `seconds` the time that all of it took; `base` and `expected` as in `rows_of`.
    """
    run, version, change = work.run, work.version, work.change
    with version.model.at(version.theta + delta) as model:
        digest = model.adapter_digest
    comparable, source = _comparable_losses(work, after)
    guard = guard_of(work, before, after)
    rows_after = change.after
    return EditRecord(
        kind=change.kind,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        versions=versions(),
        run=Place(path=str(run.directory.resolve()), digest=run.digest),
        base=Place(path=run.manifest.base.path, digest=run.manifest.base.digest),
        adapter=Adapters(
            before=Place(path=version.path, digest=version.digest), after=Digest(digest=digest)
        ),
        data=TrainingRows(
            before=version.rows.digest,
            after=rows_after.digest,
            rows_before=len(version.rows),
            rows_after=len(rows_after),
        ),
        tokenizer=Digest(digest=run.manifest.tokenizer.digest),
        requests=tuple(RequestRecord(**request.record()) for request in change.requests),
        lineage=Lineage(
            edits=version.edits + 1,
            removed=tuple(change.lineage["removed"]),
            changed=tuple(change.lineage["changed"]),
        ),
        method=MethodRecord.of(method),
        residual=Residual(**residual, objective=linear.objective),
        stopped=ending.stopped,
        reached=ending.reached,
        steps=tuple(WalkStep(**asdict(step)) for step in ending.steps),
        delta=Move(norm=float(delta.norm()), relative=float(delta.norm() / version.theta.norm())),
        losses=_losses(work, before, after, targets, linear),
        rows=rows_of(work, before, after, base, expected, targets, comparable),
        comparable=None if comparable is None else Comparable(source=source, rows=len(comparable)),
        guard=guard,
        expected=None if expected is None else _expectation(work, expected),
        evidence=evidence,
        shipped=_shipped(work, delta),
        cost=CostRecord(
            row_gradients=work.cost.gradients,
            row_forwards=work.cost.forwards,
            total=work.cost.total,
            seconds=seconds,
            **work.retraining(work.cost.total),
        ),
        agreement=None,
    )


def _expectation(work: Undertaking, expected: Expected) -> Expectation:
    """What the changed rows are expected to lose, and where that is from."""
    s, local = len(work.change.rows), expected.local
    old = np.arange(s)
    low, high = expected.interval(old)
    return Expectation(
        loss=float(expected.expected[old].mean()),
        low=low,
        high=high,
        faithfulness=expected.faithfulness,
        share=local.share,
        trainings=len(local.after) + 1,
        near=len(local.near),
        others=len(local.others),
        recipe=local.recipe.as_json(),
        row_gradients=local.row_gradients,
    )


def _shipped(work: Undertaking, delta: Tensor) -> ShippedRecord | None:
    """The edit on merged and rounded weights."""
    version, change = work.version, work.change
    found = as_shipped(
        version.model,
        version.theta,
        version.theta + delta,
        change.edited,
        version.tokens.select(work.sample),
        token_budget=work.budget,
        cost=work.cost,
    )
    if found is None:
        return None
    edited, retained = found.edited or (None, None), found.retained or (None, None)
    return ShippedRecord(
        dtype=str(DTYPE).removeprefix("torch."),
        edited_before=edited[0],
        edited_after=edited[1],
        retained_before=retained[0],
        retained_after=retained[1],
        kept=found.kept,
    )


def _comparable_losses(work: Undertaking, after: State) -> tuple[np.ndarray | None, str | None]:
    """Losses of rows that are as unseen as an edited row should be, and what rows they are."""
    if after.heldout is not None:
        return after.heldout.loss, "held-out rows"
    if len(work.sample) == 0:
        return None, None
    tokens = work.version.tokens.select(work.sample)
    return work.base_losses(tokens), "retained rows under the base model"


def _losses(
    work: Undertaking, before: State, after: State, targets: Targets, linear: LinearForecast
) -> Losses:
    """Mean losses of the edited, the retained and the held-out rows."""
    rises, heldout = after.retained.loss - before.retained.loss, None
    error = float(rises.std(ddof=1) / np.sqrt(len(rises))) if len(rises) > 1 else None
    if before.heldout is not None and after.heldout is not None:
        was = mean_or_none(before.heldout.loss)
        heldout = HeldOutLosses(
            rows=len(before.heldout.loss),
            before=was,
            after=mean_or_none(after.heldout.loss),
            predicted=sum_or_none(was, linear.heldout),
            source=work.holdout.source if work.holdout is not None else None,
        )
    edited_before, retained_before = mean_or_none(before.edited), mean_or_none(before.retained.loss)
    return Losses(
        edited=EditedLosses(
            rows=len(work.change.rows),
            before=edited_before,
            after=mean_or_none(after.edited),
            target=mean_or_none(targets.edited),
            predicted=sum_or_none(edited_before, linear.edited),
        ),
        retained=RetainedLosses(
            rows=len(rises),
            before=retained_before,
            after=mean_or_none(after.retained.loss),
            change=damage_of(before, after),
            standard_error=error,
            predicted=sum_or_none(retained_before, linear.retained),
        ),
        heldout=heldout,
    )


def damage_of(before: State, after: State) -> float | None:
    """Relative rise of the retained sample's mean loss, None without retained rows."""
    rises = after.retained.loss - before.retained.loss
    return float(rises.mean() / before.retained.loss.mean()) if len(rises) else None


def guard_of(work: Undertaking, before: State, after: State) -> Guard:
    """What the retained rows lost, against the limit.

    Warns where this edit is within it, and all since the fit together are not.
    """
    damage, since_the_fit = damage_of(before, after), work.since_the_fit(after)
    if (
        since_the_fit is not None
        and damage is not None
        and distributed.rank() == 0
        and since_the_fit > work.max_damage >= damage
    ):
        say(
            f"warning: this edit raises the retained rows' loss by {damage:.1%}, and "
            f"{work.version.edits + 1} edits together by {since_the_fit:.1%} since the adapter "
            "that was "
            "fitted: each is judged by itself"
        )
    passed = None
    if work.max_damage != float("inf"):
        passed = damage is None or damage <= work.max_damage
    return Guard(
        max_damage=work.max_damage,
        damage=damage,
        since_the_fit=since_the_fit,
        passed=passed,
        forced=False,
    )
