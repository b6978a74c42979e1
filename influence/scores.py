"""Influence scores, their sign and their unit.

The convention, said once:

* `l_i(theta)` is the **sum** over the supervised tokens of example i of the cross-entropy, in nats;
  the training objective is `J = sum_i w_i l_i`, with `w_i = 1/N_tok` (reduction `token`), `1/(n
  T_i)` (`example`), or what a trainer's batches of M rows make of it (`batch:M`,
  `influence.row_weights`).
* `score[q, i] = w_i grad m(q)^T (C + lambda I)^-1 grad l_i` is the **predicted change of
  measurement m(q) when example i is removed** from training. With m = loss (mean cross-entropy over
  the query's completion tokens, in nats): positive, removing i raises the query's loss, it helped:
  a *proponent*; negative: an *opponent*.
* `self_influence[i]` is the predicted rise of example i's own mean loss if it is removed, in nats
  per token.
* Credit is **shared** by default: `C + lambda I` also holds the training rows' own second moments,
  so that rows which teach the same stand in for each other, and the size is told from the losses
  along the path (`influence.credit`). A score is then the effect of removing that row alone; the
  effect of a set is no sum (`influence.without`).
* **Additive** credit (`credit="additive"`) gives each row the whole of it, and scores of several
  rows add up. A run that looks at several points of the path (`influence.path`) then averages what
  each of them predicts, `score = kappa sum_p a_p score_p` with `a_p = share_p mean(Z) / Z_p`. Z_p is
  the mean self-influence of the training rows at p, a number of the training rows alone, so no
  point outweighs the others by its gradients' size and a score never depends on which other queries
  were asked; the averaged score keeps the unit. `kappa` is the factor by which small measured edits
  or retraining correct its size (`influence.calibration`); it is 1 until measured.

First-order in the weight of the removed row (Koh & Liang 2017, arXiv 1703.04730; with a proximal
reading of the adapter as the optimum, Bae et al. 2022, arXiv 2209.05364).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence.adapter import ParamSpace
from influence.asked import Asked
from influence.at_point import AtPoint, free_memory, queries_at_once
from influence.credit import Credit, credited
from influence.curvature import Damped, Invertible
from influence.damping import Damping
from influence.errors import InputError, NumericalError
from influence.measurements import MEASUREMENTS, Contrast, MeanLoss, Measurement, TokenLoss
from influence.progress import say
from influence.rows import Examples, canonical_json
from influence.run import Run
from influence.scorefile import (
    Scores,
    ScoresInTheMaking,
    SelfInfluence,
    existing_scores,
    existing_self_influence,
    parts_file,
    write_self_influence,
)
from influence.setting import ADDITIVE, Setting
from influence.solvers import Solver
from influence.solvers.base import MOST_COPIES
from influence.solvers.named import approximates, make_solver, solver_options, with_limits
from influence.store import only_writer
from influence.tokens import TokenizedExamples
from influence.tokenwise import Tokenwise

CONVENTION = (
    "score[q, i] = w_i * grad m(q)^T (C + lambda I)^-1 grad l_i: predicted change of measurement "
    "m(q) when training "
    "row i is removed; with m = loss, positive = proponent (removing it raises the query's loss), "
    "negative = opponent. At "
    "several points of the path: the sum of the points' scores times `factors` = kappa share_p "
    "mean(Z) / Z_p, with Z_p the "
    "mean self-influence of the training rows at p and kappa the calibration of the size, 1 if "
    "`calibration` is none"
)


SHARED_CONVENTION = (
    "score[q, i] = sum_p factors_p sqrt(w_i) (P u)_i / P_ii at the points p of the path, with "
    "M = (C + lambda I)^-1, f_i = sqrt(w_i) grad l_i, P = (I + strength F M F^T)^-1, u = F M grad "
    "m(q): predicted change of measurement m(q) when training row i alone is removed, where rows "
    "that teach the same share the credit; with m = loss, positive = proponent (removing it raises "
    "the query's loss), negative = opponent. `factors` = path_time times each point's share of it, "
    "times the calibration by retraining if `calibration` is not none"
)

SHARED_SELF_CONVENTION = (
    "self_influence[i] = sum_p factors_p (1 / P_ii - 1) / (strength T_i) with P as for shared "
    "scores: predicted rise of row i's own mean loss, in nats per token, if it alone is removed"
)

SELF_CONVENTION = (
    "self_influence[i] = w_i / T_i * grad l_i^T (C + lambda I)^-1 grad l_i: predicted rise of row "
    "i's own mean loss, in "
    "nats per token, if it is removed"
)


#: Share of the free memory that scores by token or module, which are held whole, may take.
DETAIL_SHARE = 0.7


def score(
    run: Run,
    queries: Examples,
    *,
    out: str | Path | None = None,
    solver: str | Solver = "direct",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    curvature: str | None = None,
    damping: str | Damping | None = None,
    measurement: str | Measurement | Contrast = "loss",
    explain: str = "last",
    aggregate: str | None = None,
    at: str | None = None,
    credit: str | None = None,
    per_token: bool = False,
    per_module: bool = False,
    overwrite: bool = False,
) -> Scores:
    """Influence of every training row of a run on every query.

    Parameters
    ----------
    run, queries
        A finished run and the rows whose measurement is explained.
    out
        Write a score file here, row block by row block; killed and called again, it goes on where
        it was. Without it the scores stay in memory. A file with the very same scores is returned
        at once; one of anything else is an error unless `overwrite`.
    solver
        `direct`, `cg`, `pcg` (CG preconditioned by the run's EK-FAC), `lissa`, `astra`, `sgd`,
        `datainf`, or a solver object.
    tolerance, max_iterations
        Of an iterative solver given by name: the relative residual to reach, and the most products.
    curvature, damping
        Another curvature of this run (see `AtPoint.curvature`) or another damping rule than the one
        that `analysis tune` chose, or the fit's.
    measurement
        `loss` (mean cross-entropy, nats), `sum` (of the whole completion), `margin` (mean log-odds
        of the right token), `token:K` (loss of completion token K), or a measurement object:
        `Contrast`, `Custom` ...
    explain
        Which tokens of a conversation are explained: those of its `last` answer, of every answer
        (`assistant`), or `all`. Queries that are token ids say it by their labels.
    aggregate
        Take queries together, for the price of one: the `mean` or `sum` of all, or the mean of each
        `group`. Which rows help or harm a whole validation set?
    at
        `all` points of the run (default; `identity` looks at the `end`), the `end` of the path, or
        one point's label.
    credit
        `shared`: rows that teach the same share the credit, and the score has the size of a single
        row's removal (`influence.credit`); `additive`: each row gets it whole. None: shared where
        that can be.
    per_token
        Also split every score over the positions of its training row (`Scores.tokens`): a pass over
        the training rows.
    per_module
        Also split every score over the adapted modules (`Scores.modules` [query, module, train]).

    With stored gradients no training row is run again, but for `per_token` and for plain gradient
    products at the end of a path that the run has no point at. Columns that did not converge are
    flagged in `converged` and said on standard error.
    """
    if len(queries) == 0:
        raise InputError("no queries were given; give at least one row")
    explained = _measurement(measurement)
    if isinstance(explained, Contrast):
        explained.check(queries)
    if credit is None and approximates(solver):
        credit = ADDITIVE  # such answers are no (C + lambda I)^-1 v, which sharing is derived of
    setting, shared = credited(run, curvature, damping, at, credit=credit)
    solvers = [make_solver(point, solver, operator) for point, operator in setting.each()]
    limits = {"tolerance": tolerance, "max_iterations": max_iterations}
    solvers = [
        with_limits(one, {key: value for key, value in limits.items() if value is not None})
        for one in solvers
    ]
    tokens = run.query_tokens(queries, explain)
    if isinstance(explained, TokenLoss):
        explained.check(tokens)
    against = None
    if isinstance(explained, Contrast):
        against = run.query_tokens(explained.against, explain)
    asked = Asked.of(queries, tokens, explained, aggregate, against)
    attributes = {
        "convention": CONVENTION if shared is None else SHARED_CONVENTION,
        "measurement": explained.name,
        "unit": explained.unit,
        "rises": explained.rises,
        **setting.provenance(solvers[0].name),
        **({} if shared is None else shared.record()),
        "options": f"{_measurement_options(explained)} {solver_options(solvers[0])}",
        "query_digest": queries.digest,
        "queries": queries.source or "",
        **({"query_columns": canonical_json(queries.columns)} if queries.columns else {}),
        "detail": " ".join(
            name
            for name, wanted in (("per_token", per_token), ("per_module", per_module))
            if wanted
        ),
        "complete": False,
    }
    if explain != "last":
        attributes["explain"] = explain
    if aggregate is not None:
        attributes["aggregate"] = aggregate
    if isinstance(explained, Contrast):
        attributes["contrast_digest"] = explained.against.digest
    target = None if out is None else Path(out)
    found = (
        existing_scores(target, attributes)
        if target is not None and target.exists() and not overwrite
        else None
    )
    if found is not None and target is not None:
        parts_file(target).unlink(missing_ok=True)  # a call that was killed after its last step
        return found
    with nullcontext() if target is None else only_writer(target):
        return _score(setting, shared, asked, solvers, attributes, target, per_token, per_module)


def _score(
    setting: Setting,
    credit: Credit | None,
    asked: Asked,
    solvers: Sequence[Solver],
    attributes: dict[str, Any],
    target: Path | None,
    per_token: bool,
    per_module: bool,
) -> Scores:
    """Solve a chunk of queries, then pass over the training gradients once for it.

    Into a file if there is one.
    """
    run, points = setting.run, setting.points
    modules = module_slices(run.model.space) if per_module else {}
    _refuse_large_detail(setting, len(asked), len(modules), per_token, target is not None)
    at_once = queries_at_once(run, getattr(solvers[0], "copies", MOST_COPIES))
    work = ScoresInTheMaking.begin(
        target,
        setting,
        asked.ids,
        -(-len(asked) // at_once),
        list(modules),
        attributes,
        apart=credit is not None or len(points) > 1 or setting.factors[0] != 1,
    )
    passes = work.chunks * len(points)
    if work.chunks > 1:
        what = (
            "the stored gradients"
            if run.gradients_stored
            else "the training rows, forward and backward"
        )
        say(f"{len(asked)} queries do not fit in memory at once: {passes} passes over {what}")
    elif not run.gradients_stored:
        say(f"score: {passes} pass{'es' * (passes > 1)} over {len(run.train):,} training rows")
    message, tokenwise = "", Tokenwise.empty(run, len(asked)) if per_token else None
    for chunk, rows in enumerate(np.array_split(np.arange(len(asked)), work.chunks)):
        for number, (point, operator) in enumerate(setting.each()):
            done = work.done[chunk * len(points) + number]
            if done.all() and tokenwise is None:
                continue
            solution = solvers[number].solve(operator, asked.gradients(point, rows))
            work.note(rows, solution)
            message = solution.message or message
            for indices, gradients in point.gradient_blocks(skip=done.astype(bool)):
                share = torch.from_numpy(run.weights[indices]).to(gradients)
                place = np.ix_(rows, indices)
                work.parts[number][place] = (solution.values @ gradients.T * share).cpu().numpy()
                for module, columns in enumerate(modules.values()):
                    own = solution.values[:, columns] @ gradients[:, columns].T * share
                    work.module_parts[number][:, module][place] = own.cpu().numpy()
                done[indices] = 1
            if tokenwise is not None:
                values, factors = solution.values, np.full(len(run.train), setting.factors[number])
                if credit is not None:
                    taken = credit.taken(work.parts[number][rows], number)
                    values = _shared(point, operator, values, taken)
                    factors = credit.row_factors[number]
                tokenwise.add(point, rows, values, factors)
    if message:
        say(f"{'note' if solvers[0].approximate else 'warning'}: {message}")
    combine = setting.combined if credit is None else credit.singles
    result = work.finish(setting, combine, tokenwise, attributes)
    if not np.isfinite(result.values).all():
        raise NumericalError(
            "scores hold NaN or infinity: raise the damping, or run with --dtype float32 or float64"
        )
    return work.seal(result, setting.owner)


def raw_parts(setting: Setting, tokens: TokenizedExamples, measurement: Measurement) -> np.ndarray:
    """`w_i grad m(q)^T M grad l_i` at each point of a setting, `[points, Q, n]` float64, of closed
    inverses: what credit is shared of.
    """
    run = setting.run
    found = np.zeros((len(setting.points), len(tokens), len(run.train)))
    at_once = queries_at_once(run, 2)
    for number, (point, operator) in enumerate(setting.each()):
        assert isinstance(operator.curvature, Invertible)
        for rows in np.array_split(np.arange(len(tokens)), -(-len(tokens) // at_once)):
            gradients = point.query_gradients(tokens.select(rows), measurement)
            solved = operator.curvature.solve(gradients, operator.lam)
            found[number, rows] = point.row_products(solved) * run.weights
    return found


def _shared(point: AtPoint, operator: Damped, solved: Tensor, taken: np.ndarray) -> Tensor:
    """The shared inverse's answers `[K, P]` at a point, of the damped curvature's `solved` [K, P]
    and what the rows take off each query's gradient, `taken` [K, n].
    """
    assert isinstance(operator.curvature, Invertible)
    total = torch.zeros_like(solved)
    for indices, gradients in point.gradient_blocks():
        total += torch.from_numpy(taken[:, indices]).to(gradients) @ gradients
    return solved - operator.curvature.solve(total, operator.lam)


def _refuse_large_detail(
    setting: Setting, queries: int, modules: int, per_token: bool, filed: bool
) -> None:
    """Scores by token, and by module where there is no file, are held in memory: say so before
    the work.
    """
    n, points = len(setting.run.train), len(setting.points)
    needed = 4 * queries * int(setting.run.tokens.lengths.sum()) if per_token else 0
    needed += 4 * queries * modules * n * (1 if filed else points + 2)
    free = free_memory()
    if needed > DETAIL_SHARE * free:
        split = "token" if per_token else "module"
        raise InputError(
            f"scores of {queries} queries by {split} need {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free: score fewer queries at a time, each into a file of its "
            "own"
        )


def module_slices(space: ParamSpace) -> dict[str, slice]:
    """Coordinates of each adapted module, A and B together, by its name."""
    return {
        A.name.removesuffix(".lora_A"): slice(A.start, B.stop)
        for A, B in zip(space.leaves[::2], space.leaves[1::2], strict=True)
    }


def self_influence(
    run: Run,
    *,
    out: str | Path | None = None,
    curvature: str | None = None,
    damping: str | Damping | None = None,
    at: str | None = None,
    credit: str | None = None,
    overwrite: bool = False,
) -> SelfInfluence:
    """Predicted rise of every training row's own mean loss if it is removed, `[train]`, nats per
    token.

    Solved directly where the curvature has a closed form, else by CG (preconditioned where the run
    has EK-FAC factors). `out` may be a score file of the same run; the values are added to it.
    `credit` as for `score`.
    """
    setting, shared = credited(run, curvature, damping, at, credit=credit)
    run, name = setting.run, "direct"
    if not isinstance(setting.operators[0].curvature, Invertible):
        name = "pcg" if setting.points[-1].preconditions else "cg"
    solvers = [make_solver(point, name, operator) for point, operator in setting.each()]
    attributes = {
        "convention": SELF_CONVENTION if shared is None else SHARED_SELF_CONVENTION,
        "unit": MeanLoss().unit,
        **setting.provenance(solvers[0].name),
        **({} if shared is None else shared.record()),
    }
    target = None if out is None else Path(out)
    if (
        target is not None
        and (found := existing_self_influence(target, setting.owner, attributes, overwrite))
        is not None
    ):
        return found
    if shared is not None:
        values, worst = shared.self_influence(run.tokens.counts), 0.0
    else:
        values, worst = _additive_self_influence(setting, solvers)
    attributes["residuals"] = worst
    if not np.isfinite(values).all():
        raise NumericalError(
            "self-influences hold NaN or infinity: raise the damping, or run in float32 or float64"
        )
    result = SelfInfluence(values.astype(np.float32), run.train.ids, worst, attributes)
    if target is not None:
        with only_writer(target):
            write_self_influence(target, setting.owner, result)
    return result


def _additive_self_influence(
    setting: Setting, solvers: Sequence[Solver]
) -> tuple[np.ndarray, float]:
    """Self-influences `[n]` with the whole of each row's credit, and the worst residual."""
    run, worst = setting.run, 0.0
    values = np.zeros(len(run.train))
    for solver, factor, (point, operator) in zip(
        solvers, setting.factors, setting.each(), strict=True
    ):
        for indices, gradients in point.gradient_blocks():
            parts = np.array_split(indices, range(256, len(indices), 256))
            for part, rows in zip(gradients.split(256), parts, strict=True):
                solution = solver.solve(operator, part)
                worst = max(worst, float(solution.residuals.max()))
                products = (part * solution.values).double().sum(1).cpu().numpy()
                values[rows] += factor * products * run.weights[rows] / run.tokens.counts[rows]
    return values, worst


def _measurement(value: str | Measurement | Contrast) -> Measurement | Contrast:
    """A measurement by name.

    An object as it is.
    """
    if not isinstance(value, str):
        return value
    kind, _, position = value.partition(":")
    if kind == "token" and re.fullmatch(r"-?[0-9]+", position):
        return TokenLoss(int(position))
    if value not in MEASUREMENTS:
        raise InputError(
            f"measurement {value!r} was given; expected one of {', '.join(MEASUREMENTS)}, token:K "
            "for completion token K, or "
            "contrast (on the command line, with --contrast FILE)"
        )
    return MEASUREMENTS[value]


def _measurement_options(measurement: Measurement | Contrast) -> str:
    """A measurement for the record, without the memory addresses of functions or the rows of a
    contrast.
    """
    return f"{type(measurement).__name__}({measurement.name})"
