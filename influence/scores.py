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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence import distributed
from influence.adapter import module_columns, module_names
from influence.asked import Asked
from influence.at_point import AtPoint, memory_chunks, queries_at_once
from influence.credit import Credit, credited
from influence.curvature import Damped, Invertible
from influence.damping import Damping
from influence.errors import InputError, NumericalError
from influence.features import StoredFeatures
from influence.measurements import MEASUREMENTS, Contrast, MeanLoss, Measurement, TokenLoss
from influence.memory import free_memory
from influence.progress import say
from influence.reranking import exact_parts, first_rows
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
from influence.solvers import Solution, Solver
from influence.solvers.base import MOST_COPIES
from influence.solvers.direct import Direct
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
    rerank: int | None = None,
    overwrite: bool = False,
) -> Scores:
    """Influence of every training row of a run on every query.

    With stored gradients no training row is run again, but for `per_token` and for plain gradient
    products at the end of a path that the run has no point at. Columns that did not converge are
    flagged in `converged` and said on standard error.

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
    rerank
        Where rows are stored in few bytes: compute the raw scores of the first so many rows of
        either end of every query again, with whole gradients (`influence.reranking`).
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
    stored = None if per_token else features_of(setting, solvers[0])
    if stored is not None:
        attributes["store"] = f"features of {stored[0].kept.size} coordinates"
    if rerank is not None:
        if rerank < 1 or per_module:
            raise InputError(
                f"rerank {rerank} was given{' with per_module' * per_module}; expected at least 1"
                f"{', of scores that are not split by module' * per_module}"
            )
        if stored is None:
            say("note: rerank changes nothing: these scores are of whole gradients")
            rerank = None
        else:
            attributes["rerank"] = rerank
    target = None if out is None else Path(out)

    def before() -> Scores | None:
        if target is None or overwrite or not target.exists():
            return None
        if (found := existing_scores(target, attributes)) is not None:
            parts_file(target).unlink(missing_ok=True)  # of a call that was killed after its end
        return found

    if (found := distributed.at_first(before)) is not None:
        return found
    with nullcontext() if target is None else distributed.held_by_first(only_writer(target)):
        return _score(
            setting,
            shared,
            asked,
            solvers,
            stored,
            attributes,
            target,
            per_token,
            per_module,
            rerank,
        )


def _score(
    setting: Setting,
    credit: Credit | None,
    asked: Asked,
    solvers: Sequence[Solver],
    stored: Sequence[StoredFeatures] | None,
    attributes: dict[str, Any],
    target: Path | None,
    per_token: bool,
    per_module: bool,
    rerank: int | None,
) -> Scores:
    """Solve a chunk of queries, then pass over the training gradients once for it.

    Into a file if there is one. Of several processes each solves for some of the queries and reads
    some of the gradients; the first holds what is made, and hands the result out.
    """
    run, points = setting.run, setting.points
    modules = module_names(run.model.space) if per_module else []
    if stored is None:
        at_once = queries_at_once(run, getattr(solvers[0], "copies", MOST_COPIES))
    else:
        at_once = min(each.rows_at_once for each in stored)
    begun: list[ScoresInTheMaking] = []

    def begin() -> tuple[int, np.ndarray]:
        _refuse_large_detail(setting, len(asked), len(modules), per_token, target is not None)
        one = credit is None and len(points) == 1 and setting.factors[0] == 1
        apart = not one or rerank is not None
        chunks, ids = -(-len(asked) // at_once), asked.ids
        work = ScoresInTheMaking.begin(
            target, setting, ids, chunks, modules, attributes, apart=apart
        )
        begun.append(work)
        return work.chunks, np.array(work.done)

    chunks, finished = distributed.at_first(begin)
    passes = chunks * len(points)
    if chunks > 1:
        what = (
            "the stored rows"
            if run.gradients_stored or stored is not None
            else "the training rows, forward and backward"
        )
        say(f"{len(asked)} queries do not fit in memory at once: {passes} passes over {what}")
    elif stored is None and not run.gradients_stored:
        why = f": rows in few bytes answer for {run.manifest.damping}" * run.features_stored
        say(f"score: {passes} pass{'es' * (passes > 1)} over {len(run.train):,} training rows{why}")
    message, tokenwise = "", Tokenwise.empty(run, len(asked)) if per_token else None
    for chunk, rows in enumerate(np.array_split(np.arange(len(asked)), chunks)):
        for number, (point, operator) in enumerate(setting.each()):
            done = finished[chunk * len(points) + number].astype(bool)
            if done.all() and tokenwise is None:
                continue
            if stored is not None:  # the root of a closed inverse: nothing is left to converge
                values = _features(stored[number], asked, rows)
                leaves = stored[number].kept.slices
                blocks = stored[number].blocks(done, "stored rows", shared=True)
            else:
                solution = _solved(solvers[number], operator, asked, point, rows)
                message, values = solution.message or message, solution.values
                for work in begun:
                    work.note(rows, solution)
                leaves = [leaf.slice for leaf in run.model.space.leaves]
                blocks = point.gradient_blocks(skip=done, shared=True)
            columns = module_columns(leaves) if modules else []
            parts = _row_scores(run.weights, blocks, values, columns)
            for pieces in distributed.rounds(parts):
                for work, piece in product(begun, distributed.gathered(pieces)):
                    work.put(chunk, number, rows, *piece)
            if tokenwise is not None:
                factors = np.full(len(run.train), setting.factors[number])
                if credit is not None:
                    taken = distributed.at_first(
                        lambda number=number, rows=rows: credit.taken(
                            begun[0].parts[number][rows], number
                        )
                    )
                    values = _shared(point, operator, values, taken)
                    factors = credit.row_factors[number]
                tokenwise.add(point, rows, values, factors)
    if message:
        say(f"{'note' if solvers[0].approximate else 'warning'}: {message}")
    combine = setting.combined if credit is None else credit.singles
    if rerank is not None:
        again = distributed.at_first(lambda: first_rows(begun[0].parts, combine, rerank))
        exact = exact_parts(setting, asked, again)
        for work in begun:  # in memory: a killed call finds the parts as they were
            work.parts = np.array(work.parts)
            work.parts[:, :, again] = exact

    def end() -> Scores:
        result = begun[0].finish(setting, combine, tokenwise, attributes)
        if not np.isfinite(result.values).all():
            raise NumericalError(
                "scores hold NaN or infinity: raise the damping, or run with --dtype float32 or "
                "float64"
            )
        return begun[0].seal(result, setting.owner)

    return distributed.at_first(end)


def _solved(
    solver: Solver, operator: Damped, asked: Asked, point: AtPoint, rows: np.ndarray
) -> Solution:
    """The answers `[K, P]` for `rows` [K] of a request: each process solves for some of them."""
    first, end = distributed.span(len(rows))
    if distributed.world() == 1 or not len(rows):
        return _solved_here(solver, operator, asked, point, rows)
    own, model = np.arange(first, end), point.model
    values = torch.zeros(len(own), model.space.size, dtype=model.dtype, device=model.device)
    judged, message = torch.zeros(len(own), 3, dtype=torch.float64), ""
    if len(own):
        mine = _solved_here(solver, operator, asked, point, rows[own])
        values, message = mine.values, mine.message
        for column, each in enumerate((mine.residuals, mine.converged, mine.iterations)):
            judged[:, column] = each.double().cpu()
    values = distributed.assembled(values, own, len(rows))
    residuals, converged, iterations = distributed.assembled(judged, own, len(rows)).T
    messages = distributed.gathered([message] if message else [])
    return Solution(
        values, residuals, converged.bool(), iterations.long(), messages[0] if messages else ""
    )


def _solved_here(
    solver: Solver, operator: Damped, asked: Asked, point: AtPoint, rows: np.ndarray
) -> Solution:
    """The same in this process; by a closed inverse a few at a time, without copies of all."""
    parts = memory_chunks(point.run, len(rows)) if isinstance(solver, Direct) else []
    if len(parts) < 2:
        return solver.solve(operator, asked.gradients(point, rows))
    model = point.model
    values = torch.empty(len(rows), model.space.size, dtype=model.dtype, device=model.device)
    found, message = [], ""
    for part in parts:
        solution = solver.solve(operator, asked.gradients(point, rows[part]))
        values[torch.from_numpy(part)] = solution.values
        found.append((solution.residuals, solution.converged, solution.iterations))
        message = solution.message or message
    residuals, converged, iterations = (torch.cat(each) for each in zip(*found, strict=True))
    return Solution(values, residuals, converged, iterations, message)


def _features(stored: StoredFeatures, asked: Asked, rows: np.ndarray) -> Tensor:
    """What `rows` [K] of a request ask as features `[K, P']`: each process makes some of them."""
    own, count = slice(*distributed.span(len(rows))), len(rows)
    mine = stored.none if own.start == own.stop else asked.features(stored, rows[own])
    return distributed.assembled(mine, np.arange(count)[own], count)


def _row_scores(
    weights: np.ndarray,
    blocks: Iterable[tuple[np.ndarray, Tensor]],
    left: Tensor,
    modules: Sequence[slice],
) -> Iterator[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
    """`(indices [b], scores [K, b], the same by module)` of blocks of rows `[b, P]`, of the answers
    `left` [K, P], in the coordinates of either store.
    """
    for indices, rows in blocks:
        shares = torch.from_numpy(weights[indices]).to(rows)
        whole = (left @ rows.T * shares).double().cpu().numpy()
        split = [left[:, part] @ rows[:, part].T * shares for part in modules]
        yield indices, whole, [each.double().cpu().numpy() for each in split]


def raw_parts(setting: Setting, tokens: TokenizedExamples, measurement: Measurement) -> np.ndarray:
    """`w_i grad m(q)^T M grad l_i` at each point of a setting, `[points, Q, n]` float64, of closed
    inverses: what credit is shared of.
    """
    run = setting.run
    found = np.zeros((len(setting.points), len(tokens), len(run.train)))
    at_once, every = queries_at_once(run, 2), np.arange(len(tokens))
    for number, (point, operator) in enumerate(setting.each()):
        assert isinstance(operator.curvature, Invertible)
        if (stored := point.features(operator)) is not None:
            for rows in np.array_split(every, -(-len(tokens) // stored.rows_at_once)):
                asked = Asked.each(tokens.select(rows), measurement)
                left = _features(stored, asked, np.arange(len(rows)))
                found[number, rows] = stored.products(left, shared=True) * run.weights
            continue
        for rows in np.array_split(every, -(-len(tokens) // at_once)):
            own = slice(*distributed.span(len(rows)))  # each process solves for some
            gradients = point.query_gradients(tokens.select(rows[own]), measurement)
            solved = operator.curvature.solve(gradients, operator.lam)
            solved = distributed.assembled(solved, np.arange(len(rows))[own], len(rows))
            found[number, rows] = point.row_products(solved, shared=True) * run.weights
    return found


def _shared(point: AtPoint, operator: Damped, solved: Tensor, taken: np.ndarray) -> Tensor:
    """The shared inverse's answers `[K, P]` at a point, of the damped curvature's `solved` [K, P]
    and what the rows take off each query's gradient, `taken` [K, n].
    """
    assert isinstance(operator.curvature, Invertible)
    total = torch.zeros_like(solved)
    for indices, gradients in point.gradient_blocks(shared=True):
        total += torch.from_numpy(taken[:, indices]).to(gradients) @ gradients
    return solved - operator.curvature.solve(distributed.add_up(total), operator.lam)


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


def features_of(setting: Setting, solver: Solver) -> list[StoredFeatures] | None:
    """The rows in few bytes at every point of a setting; None where they do not answer for it."""
    if not isinstance(solver, Direct):
        return None
    found = [point.features(operator) for point, operator in setting.each()]
    kept = [each for each in found if each is not None]
    return kept if len(kept) == len(found) else None


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

    def before() -> SelfInfluence | None:
        if target is None:
            return None
        return existing_self_influence(target, setting.owner, attributes, overwrite)

    if (found := distributed.at_first(before)) is not None:
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
        with distributed.held_by_first(only_writer(target)):
            distributed.at_first(lambda: write_self_influence(target, setting.owner, result))
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
        if (stored := point.features(operator)) is not None:
            own = stored.squares * run.weights / run.tokens.counts
            first, end = distributed.span(len(own))
            values[first:end] += factor * own[first:end]
            continue
        for indices, gradients in point.gradient_blocks(shared=True):
            parts = np.array_split(indices, range(256, len(indices), 256))
            for part, rows in zip(gradients.split(256), parts, strict=True):
                solution = solver.solve(operator, part)
                worst = max(worst, float(solution.residuals.max()))
                products = (part * solution.values).double().sum(1).cpu().numpy()
                values[rows] += factor * products * run.weights[rows] / run.tokens.counts[rows]
    values = distributed.add_up(torch.from_numpy(values)).numpy()
    return values, distributed.largest(worst)


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
