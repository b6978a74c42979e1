"""Edits by influence: remove, relabel, correct. One formula, three names.

Replacing the training rows S by S' moves the adapter by

    delta = (C' + lambda I)^-1 ( sum_S w grad l - sum_S' w grad l )

with C' the curvature after the edit (`unlearn.edits.moved`) and the objective's weights w, whose
N_tok is kept (`influence.scores` has the convention). `remove` (LLMEraser's *instance removal*; S'
is empty), `relabel` (*response correction*: another completion) and `correct` (*query
modification*: another prompt, completion, or both) are this one edit for different S' (Ding et al.
2024, arXiv 2412.00383), and may be mixed.

* `steps=1`: delta as it stands, the linear answer. On an adapter that memorises it is of no use:
  forecast 0.94 nats, measured 7.02 (LOG.md, 2026-11-21, "Closed-form edits").
* `steps=N`, the default: bounded steps with the gradient taken again after each, until the stopping
  rule holds.
* `until="converged"`: the optimum of the edited proximal objective over all rows.

`unlearn.edits.prepared` has the three ways. What an edit did is measured, not assumed: losses of
the edited rows, of a sample of the retained ones and of held-out rows, before and after. An edit
that raises the retained loss by more than `max_damage` is not saved without `force`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence.damping import Damping
from influence.errors import NumericalError
from influence.recipe import Recipe
from influence.rows import Examples
from influence.run import Run
from influence.solvers import Solver
from unlearn.edits.options import REST, STEPS, USUAL_STEPS, Options
from unlearn.edits.prepared import PreparedEdit, prepare
from unlearn.evidence import forwards_ahead, gather
from unlearn.options import GENERATED
from unlearn.record.before_after import report, rows_of
from unlearn.record.numbers import mean_or_none, sum_or_none
from unlearn.record.sample import GUARD_ROWS
from unlearn.record.save import Edit
from unlearn.retraining.estimate import MOST_GRADIENTS
from unlearn.retraining.local import REPEATS
from unlearn.retraining.recipe import given_or_recorded
from unlearn.stopping import EditRule


def remove(
    run: Run,
    ids: Sequence[str],
    *,
    holdout: Examples | None = None,
    probes: Examples | None = None,
    steps: int = STEPS,
    until: str | EditRule = "expected",
    max_damage: float = 0.1,
    recipe: str | Path | Recipe | None = None,
    rest: int = REST,
    curvature: str | None = None,
    damping: str | Damping | None = None,
    at: str | None = None,
    solver: str | Solver = "direct",
    start: str | Path | None = None,
    seed: int = 0,
    generate: int = GENERATED,
) -> Edit:
    """Take training rows out of the adapter (LLMEraser's instance removal).

    `ids` names the rows; `Options` says what the keywords from `steps` on mean, `edit` the others.
    """
    options = Options(
        steps=steps,
        until=until,
        max_damage=max_damage,
        recipe=recipe,
        rest=rest,
        curvature=curvature,
        damping=damping,
        at=at,
        solver=solver,
        start=start,
        seed=seed,
        generate=generate,
    )
    return _edit(run, ids, None, None, holdout, probes, options)


def relabel(
    run: Run,
    changes: Mapping[str, str],
    *,
    holdout: Examples | None = None,
    probes: Examples | None = None,
    steps: int = STEPS,
    until: str | EditRule = "expected",
    max_damage: float = 0.1,
    recipe: str | Path | Recipe | None = None,
    rest: int = REST,
    curvature: str | None = None,
    damping: str | Damping | None = None,
    at: str | None = None,
    solver: str | Solver = "direct",
    start: str | Path | None = None,
    seed: int = 0,
    generate: int = GENERATED,
) -> Edit:
    """Give training rows another completion (LLMEraser's response correction).

    `changes` is `{id: completion}`; `Options` says what the keywords from `steps` on mean, `edit`
    the others.
    """
    options = Options(
        steps=steps,
        until=until,
        max_damage=max_damage,
        recipe=recipe,
        rest=rest,
        curvature=curvature,
        damping=damping,
        at=at,
        solver=solver,
        start=start,
        seed=seed,
        generate=generate,
    )
    return _edit(run, (), changes, None, holdout, probes, options)


def correct(
    run: Run,
    changes: Mapping[str, Mapping[str, Any]],
    *,
    holdout: Examples | None = None,
    probes: Examples | None = None,
    steps: int = STEPS,
    until: str | EditRule = "expected",
    max_damage: float = 0.1,
    recipe: str | Path | Recipe | None = None,
    rest: int = REST,
    curvature: str | None = None,
    damping: str | Damping | None = None,
    at: str | None = None,
    solver: str | Solver = "direct",
    start: str | Path | None = None,
    seed: int = 0,
    generate: int = GENERATED,
) -> Edit:
    """Give training rows another prompt or completion (LLMEraser's query modification).

    `changes` is `{id: {"prompt": ..., "completion": ...}}` with what changes of it; `Options` says
    what the keywords from `steps` on mean, `edit` the others.
    """
    options = Options(
        steps=steps,
        until=until,
        max_damage=max_damage,
        recipe=recipe,
        rest=rest,
        curvature=curvature,
        damping=damping,
        at=at,
        solver=solver,
        start=start,
        seed=seed,
        generate=generate,
    )
    return _edit(run, (), None, changes, holdout, probes, options)


def edit(
    run: Run,
    *,
    remove: Sequence[str] = (),
    relabel: Mapping[str, str] | None = None,
    correct: Mapping[str, Mapping[str, Any]] | None = None,
    holdout: Examples | None = None,
    probes: Examples | None = None,
    steps: int = STEPS,
    until: str | EditRule = "expected",
    max_damage: float = 0.1,
    recipe: str | Path | Recipe | None = None,
    rest: int = REST,
    curvature: str | None = None,
    damping: str | Damping | None = None,
    at: str | None = None,
    solver: str | Solver = "direct",
    start: str | Path | None = None,
    seed: int = 0,
    generate: int = GENERATED,
) -> Edit:
    """Change the adapter as if training rows had been absent or different.

    Several kinds of change go into one edit. Nothing is written: the result's `save` does that.

    Parameters
    ----------
    run
        The run whose adapter is edited.
    remove, relabel, correct
        Ids that go, `{id: completion}`, and `{id: {"prompt": ..., "completion": ...}}`.
    holdout
        Rows that the adapter never saw, measured before and after.
    probes
        Other words for what the changed rows taught, such as paraphrases of them and questions
        about them: is it still known (`unlearn.evidence`)?
    steps, until, max_damage, recipe, rest, curvature, damping, at, solver, start, seed, generate
        As in `Options`.

    Raises
    ------
    InputError
        For unknown, repeated or removed ids, a change that changes nothing, nothing left to train
        on (`unlearn.record.change`), or wrong options.
    NumericalError
        If a loss or step is NaN or infinite, or a linear solve does not reach its tolerance.
    """
    options = Options(
        steps=steps,
        until=until,
        max_damage=max_damage,
        recipe=recipe,
        rest=rest,
        curvature=curvature,
        damping=damping,
        at=at,
        solver=solver,
        start=start,
        seed=seed,
        generate=generate,
    )
    return _edit(run, remove, relabel, correct, holdout, probes, options)


def forecast(
    run: Run,
    *,
    remove: Sequence[str] = (),
    relabel: Mapping[str, str] | None = None,
    correct: Mapping[str, Mapping[str, Any]] | None = None,
    holdout: Examples | None = None,
    probes: Examples | None = None,
    steps: int = STEPS,
    until: str | EditRule = "expected",
    max_damage: float = 0.1,
    recipe: str | Path | Recipe | None = None,
    rest: int = REST,
    curvature: str | None = None,
    damping: str | Damping | None = None,
    at: str | None = None,
    solver: str | Solver = "direct",
    start: str | Path | None = None,
    seed: int = 0,
    generate: int = GENERATED,
) -> dict[str, Any]:
    """Forecast of what an edit would do and cost, before it is made.

    Losses now, targets, the linear answer's effect, work and time; the keywords are those of
    `edit`. It costs the changed rows' influence, one linear step and some forwards.
    """
    options = Options(
        steps=steps,
        until=until,
        max_damage=max_damage,
        recipe=recipe,
        rest=rest,
        curvature=curvature,
        damping=damping,
        at=at,
        solver=solver,
        start=start,
        seed=seed,
        generate=generate,
    )
    return _forecast(prepare(run, remove, relabel, correct, holdout, probes, options))


def _edit(
    run: Run,
    remove: Sequence[str],
    relabel: Mapping[str, str] | None,
    correct: Mapping[str, Mapping[str, Any]] | None,
    holdout: Examples | None,
    probes: Examples | None,
    options: Options,
) -> Edit:
    """Make an edit and measure what it did."""
    begun = time.monotonic()
    work = prepare(run, remove, relabel, correct, holdout, probes, options)
    before = work.measure(work.version.theta)
    expected = work.expected(before)
    targets = work.targets(expected)
    if options.one_shot:
        ending = work.one_shot()
    elif options.rule.kind == "converged":
        ending = work.converged()
    else:
        ending = work.relinearised(targets, before, expected)
    base = work.base_losses(work.change.contents) if expected is None else expected.base
    delta = ending.theta - work.version.theta
    # The saved move is delta: what is measured is what a reader of it will get, bit for bit.
    theta = work.version.theta + delta
    if not bool(torch.isfinite(theta).all()):
        raise NumericalError(
            "the edited adapter holds NaN or infinity: nothing is written. Raise the damping"
        )
    after = work.measure(theta)
    linear = work.forecast(delta, theta)
    evidence = gather(work, theta, before, after, expected)
    residual = {"solver": work.residual, "tolerance": work.tolerance}
    record = report(
        work,
        work.method(),
        residual,
        ending,
        delta,
        before,
        after,
        base,
        expected,
        targets,
        linear,
        evidence,
        time.monotonic() - begun,
    )
    return Edit(work.change, delta, record)


# ---- the dry run ---------------------------------------------------------------------------------


def _forecast(work: PreparedEdit) -> dict[str, Any]:
    """The dry run of an edit, as the command prints it."""
    before = work.measure(work.version.theta)
    forwards, spent, begun = work.cost.forwards, work.cost.total, time.monotonic()
    delta = work.one_shot().theta - work.version.theta
    linear = work.forecast(delta, None)
    seconds_each = max(time.monotonic() - begun, 1e-3) / max(work.cost.total - spent, 1.0)
    base, targets = work.base_losses(work.change.contents), work.targets(None)
    local = work.local_plan()
    goal = 0 if local is None else local.row_gradients
    if local is not None and given_or_recorded(work.run, work.given_recipe) is None:
        goal += MOST_GRADIENTS
    ahead = _work_ahead(work, forwards) + goal
    edited, retained, heldout = before.edited, before.retained, before.heldout
    return {
        "kind": work.change.kind,
        "requests": [request.record() for request in work.change.requests],
        "rows": [row.as_json() for row in rows_of(work, before, None, base, None, targets)],
        "losses": {
            "edited": {
                "rows": len(work.change.rows),
                "before": mean_or_none(edited),
                "target": mean_or_none(targets.edited),
                "linear": sum_or_none(mean_or_none(edited), linear.edited),
            },
            "retained": _foreseen(retained.loss, linear.retained),
            "heldout": None if heldout is None else _foreseen(heldout.loss, linear.heldout),
        },
        "residual": work.residual,
        "cost": {
            "row_gradients": round(ahead),
            "local_retraining": goal,
            "seconds": round(ahead * seconds_each, 1),
            **work.retraining(ahead),
        },
        "method": work.method(),
    }


def _foreseen(losses: np.ndarray, change: float | None) -> dict[str, Any]:
    """Mean loss of a set of rows before the edit and after the linear answer."""
    before = mean_or_none(losses)
    return {"rows": len(losses), "before": before, "linear": sum_or_none(before, change)}


def _work_ahead(work: PreparedEdit, forwards: int) -> float:
    """Row-gradients that the edit will cost besides its local retraining, its dry run among them.

    `forwards`: rows that a measurement runs.
    """
    options, change, ahead = work.options, work.change, work.cost.total
    steps = min(options.steps, USUAL_STEPS)
    if options.rule.kind == "steps":
        steps = int(options.rule.value or 0)
    if options.rule.kind == "converged":
        ahead += USUAL_STEPS * (len(change.after) + work.solving)
    elif not options.one_shot:
        # A step runs the goals, the drawn retained rows (once more forward where they are new), and
        # solves for both parts.
        retained = min(options.rest, len(change.rest))
        goals = len(change.rows) + len(change.new)
        ahead += steps * (goals + 4 / 3 * retained + 2 * work.solving)
    ahead += (GUARD_ROWS + 2 * len(change.rows) + forwards) / 3
    ahead += forwards_ahead(work, REPEATS if work.retrains_locally else 0) / 3
    return ahead
