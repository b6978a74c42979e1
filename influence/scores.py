"""Influence scores, their sign and their unit.

The convention, said once:

* `l_i(theta)` is the **sum** over the supervised tokens of example i of the cross-entropy, in nats; the training
  objective is `J = sum_i w_i l_i`, with `w_i = 1/N_tok` (reduction `token`) or `1/(n T_i)` (`example`).
* `score[q, i] = w_i grad m(q)^T (C + lambda I)^-1 grad l_i` is the **predicted change of measurement m(q) when
  example i is removed** from training. With m = loss (mean cross-entropy over the query's completion tokens, in
  nats): positive, removing i raises the query's loss, it helped: a *proponent*; negative: an *opponent*.
* `self_influence[i]` is the predicted rise of example i's own mean loss if it is removed, in nats per token.
* Scores of several rows add up: the predicted change for a removed set is the sum over it.
* A run that looks at several points of the path (`influence.path`) averages what each of them predicts,
  `score = kappa sum_p a_p score_p` with `a_p = share_p mean(Z) / Z_p`. Z_p is the mean self-influence of the training rows
  at p, a number of the training rows alone, so no point outweighs the others by its gradients' size and a score
  never depends on which other queries were asked; the averaged score keeps the unit. `kappa` calibrates its size by
  measured edits or by retraining (`influence.calibration`); it is 1 until measured.

First-order in the weight of the removed row (Koh & Liang 2017, arXiv 1703.04730; with a proximal reading of the
adapter as the optimum, Bae et al. 2022, arXiv 2209.05364).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import torch
from torch import Tensor

from influence.adapter import ParamSpace
from influence.curvature.base import Damped
from influence.damping import Damping
from influence.data import Examples, TokenizedExamples, tokenize
from influence.errors import InputError, MismatchError, NumericalError, StoreError
from influence.loss import MEASUREMENTS, Contrast, MeanLoss, Measurement, SumLoss, TokenLoss, check_rows
from influence.progress import say
from influence.run import AtPoint, Run
from influence.solvers import ASTRA, CG, SGD, DataInf, Direct, LiSSA, Solution, Solver
from influence.store import only_writer, open_file, open_rows, read, read_strings, write_file
from influence.tokenwise import Tokenwise

CONVENTION = (
    "score[q, i] = w_i * grad m(q)^T (C + lambda I)^-1 grad l_i: predicted change of measurement m(q) when training "
    "row i is removed; with m = loss, positive = proponent (removing it raises the query's loss), negative = opponent. At "
    "several points of the path: the sum of the points' scores times `factors` = kappa share_p mean(Z) / Z_p, with Z_p the "
    "mean self-influence of the training rows at p and kappa the calibration of the size, 1 if `calibration` is none"
)
SELF_CONVENTION = (
    "self_influence[i] = w_i / T_i * grad l_i^T (C + lambda I)^-1 grad l_i: predicted rise of row i's own mean loss, in "
    "nats per token, if it is removed"
)
SOLVERS = ("direct", "cg", "pcg", "lissa", "astra", "sgd", "datainf")
#: How per-token scores are named in a score file: values, offsets, token ids.
TOKEN_NAMES = ("per_token", "token_offsets", "token_ids")
#: Vectors [K, P] that a solver holds beside the right-hand sides, counted in its code; of any other solver the most.
COPIES = {"direct": 4, "cg": 8, "pcg": 8, "datainf": 10, "lissa": 12, "sgd": 12, "astra": 12}
#: Share of the free memory that the gradients of one chunk of queries, with all that solving holds beside them, may take.
QUERY_SHARE = 0.8


@dataclass(frozen=True)
class Entry:
    """One training row in a ranking: its id, its position in the training set, and its score."""

    id: str
    index: int
    score: float


@dataclass(frozen=True)
class Scores:
    """Influence of every training row on every query: `values` float32 [query, train]; see the module's convention.

    Where they were asked for: `modules` float32 [query, module, train] and `tokens`, which sum to `values`.
    """

    values: np.ndarray = field(repr=False)
    query_ids: list[str] = field(repr=False)
    train_ids: list[str] = field(repr=False)
    residuals: np.ndarray = field(repr=False)
    converged: np.ndarray = field(repr=False)
    attributes: dict[str, Any] = field(default_factory=dict)
    modules: np.ndarray | None = field(default=None, repr=False)
    module_names: list[str] = field(default_factory=list, repr=False)
    tokens: Tokenwise | None = field(default=None, repr=False)

    def query_index(self, query: int | str) -> int:
        """Position of a query given by position or id; an unknown one is an `InputError`."""
        if isinstance(query, str) and query in self.query_ids:
            return self.query_ids.index(query)
        try:
            index = int(query)
        except ValueError:
            index = -1
        if not 0 <= index < len(self.query_ids):
            shown = ", ".join(self.query_ids[:5]) + (", ..." if len(self.query_ids) > 5 else "")
            raise InputError(
                f"query {query!r} was given; there are {len(self.query_ids)} scored queries: give a position "
                f"0..{len(self.query_ids) - 1} or one of the ids {shown}"
            )
        return index

    def top(self, query: int | str, k: int = 10) -> tuple[list[Entry], list[Entry]]:
        """The k strongest proponents and the k strongest opponents, strongest first.

        Proponents have positive scores, but for a measurement that falls when the model gets worse (margin): negative.
        """
        row = self.values[self.query_index(query)]
        harm = row if self.attributes.get("rises", True) else -row
        order = np.argsort(-harm, kind="stable")
        entry = lambda i: Entry(self.train_ids[i], int(i), float(row[i]))  # noqa: E731
        proponents = [entry(i) for i in order[:k] if harm[i] > 0]
        opponents = [entry(i) for i in order[::-1][:k] if harm[i] < 0]
        return proponents, opponents

    @classmethod
    def load(cls, path: str | Path, *, detail: bool = True) -> Scores:
        """Read a score file, with the scores by token and module if it has them and `detail`; plain h5py reads it too."""
        path = Path(path)
        with open_file(path) as file:
            missing = [key for key in ("scores", "query_ids", "train_ids") if key not in file]
            if missing:
                raise StoreError(f"{path} is no score file: it lacks {', '.join(missing)}")
            if not file.attrs.get("complete", True):
                raise StoreError(f"{path} is unfinished: run the same influence score command again to complete it")
            return cls(
                read(file, "scores"),
                read_strings(file, "query_ids"),
                read_strings(file, "train_ids"),
                read(file, "residuals") if "residuals" in file else np.array([]),
                read(file, "converged").astype(bool) if "converged" in file else np.array([]),
                dict(file.attrs),
                read(file, "per_module") if detail and "per_module" in file else None,
                read_strings(file, "modules") if "modules" in file else [],
                Tokenwise(*(read(file, name) for name in TOKEN_NAMES)) if detail and TOKEN_NAMES[0] in file else None,
            )


@dataclass(frozen=True)
class SelfInfluence:
    """Predicted rise of every training row's own mean loss if it is removed: `values` float32 [train], nats per token."""

    values: np.ndarray
    train_ids: list[str]
    worst_residual: float
    attributes: dict[str, Any] = field(default_factory=dict)


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
    at: str | None = None,
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
        Write a score file here, row block by row block; killed and called again, it goes on where it was. Without
        it the scores stay in memory. A file with the very same scores is returned at once; one of anything
        else is an error unless `overwrite`.
    solver
        `direct`, `cg`, `pcg` (CG preconditioned by the run's EK-FAC), `lissa`, `astra`, `sgd`, `datainf`, or a solver
        object.
    tolerance, max_iterations
        Of an iterative solver given by name: the relative residual to reach, and the most products.
    curvature, damping
        Another curvature of this run (see `AtPoint.curvature`) or another damping rule than the one that `analysis
        tune` chose, or the fit's.
    measurement
        `loss` (mean cross-entropy, nats), `sum` (of the whole completion), `margin` (mean log-odds of the right token),
        `token:K` (loss of completion token K), or a measurement object: `Contrast`, `Custom` ...
    at
        `all` points of the run (default; `identity` looks at the `end`), the `end` of the path, or one point's label.
    per_token
        Also split every score over the positions of its training row (`Scores.tokens`): a pass over the training rows.
    per_module
        Also split every score over the adapted modules (`Scores.modules` [query, module, train]).

    With stored gradients no training row is run again, but for `per_token` and for plain gradient products at the end of a
    path that the run has no point at. Columns that did not converge are flagged in `converged`
    and said on standard error.
    """
    if len(queries) == 0:
        raise InputError("no queries were given; give at least one row")
    explained = _measurement(measurement)
    if isinstance(explained, Contrast):
        explained.check(queries)
    setting = Setting.of(run, curvature, damping, at)
    solvers = [make_solver(point, solver, operator) for point, operator in setting.each()]
    limits = {"tolerance": tolerance, "max_iterations": max_iterations}
    solvers = [_limited(one, {key: value for key, value in limits.items() if value is not None}) for one in solvers]
    max_length = run.manifest["objective"]["max_length"]
    tokens = tokenize(queries, run.model.tokenizer, max_length=max_length)
    check_rows(run.model, tokens)
    if isinstance(explained, TokenLoss):
        explained.check(tokens)
    asked = _Asked(queries, tokens, explained)
    attributes = {
        "convention": CONVENTION,
        "measurement": explained.name,
        "unit": explained.unit,
        "rises": explained.rises,
        **setting.provenance(solvers[0]),
        "options": f"{_measurement_options(explained)} {_options(solvers[0])}",
        "query_digest": queries.digest,
        "queries": queries.source or "",
        "detail": " ".join(name for name, wanted in (("per_token", per_token), ("per_module", per_module)) if wanted),
        "complete": False,
    }
    if isinstance(explained, Contrast):
        against = tokenize(explained.against, run.model.tokenizer, max_length=max_length)
        check_rows(run.model, against)
        asked = replace(asked, against=against)
        attributes["contrast_digest"] = explained.against.digest
    target = None if out is None else Path(out)
    found = _existing(target, attributes) if target is not None and target.exists() and not overwrite else None
    if found is not None and target is not None:
        _parts(target).unlink(missing_ok=True)  # a call that was killed after its last step
        return found
    with nullcontext() if target is None else only_writer(target):
        return _score(setting, asked, solvers, attributes, target, per_token, per_module)


@dataclass(frozen=True)
class _Asked:
    """The queries of one request: rows, tokens, what is measured of them, and what they are contrasted with."""

    queries: Examples
    tokens: TokenizedExamples
    measurement: Measurement | Contrast
    against: TokenizedExamples | None = None

    def gradients(self, point: AtPoint, rows: np.ndarray) -> Tensor:
        """Gradients of m(q) at a point, `[len(rows), P]`."""
        tokens = self.tokens.select(rows)
        if isinstance(self.measurement, Contrast):
            assert self.against is not None
            found = point.query_gradients(tokens, SumLoss())
            return found - point.query_gradients(self.against.select(rows), SumLoss())
        return point.query_gradients(tokens, self.measurement)


@dataclass(frozen=True)
class Setting:
    """With what scores are made: the points that are looked at, and the damped curvature at each of them.

    `run` holds the factors and `owner` is the run that was asked, which may be one above it (`analysis tune`).
    `factors` [points]: what the points' scores are multiplied by before they are added (`kappa a_p` in the module's
    convention); `rule` is the damping as it was asked for, None for the identity.
    """

    owner: Run
    run: Run
    points: tuple[AtPoint, ...]
    operators: tuple[Damped, ...]
    factors: np.ndarray
    rule: str | None
    calibration: str

    @classmethod
    def of(
        cls,
        run: Run,
        curvature: str | None = None,
        damping: str | Damping | None = None,
        at: str | None = None,
        *,
        tuned: bool = True,
        calibrated: bool = True,
    ) -> Setting:
        """Option by option, what is typed wins over what `analysis tune` chose, which wins over the fit's.

        A point that only the run itself has (`at`) is looked at there.
        """
        if damping is not None and curvature == "identity":
            raise InputError(
                f"damping {damping} was given with the curvature identity, which means C + lambda I := I and has none: leave "
                "it out, or give another curvature"
            )
        owner, chosen = run, run.tuned if tuned else None
        if chosen is not None:
            there = {"all", "end", *(point.place.label for point in chosen.run.points)}
            if at is None or at in there:
                run = chosen.run
            plain = "identity" in (curvature, chosen.curvature)  # whose damping and points are no other curvature's
            at = at or (None if plain and curvature not in (None, chosen.curvature) else chosen.at)
            damping = damping or (None if plain else chosen.damping)
            curvature = curvature or chosen.curvature
        points = _places(run, curvature, at)
        operators = tuple(point.operator(curvature, damping) for point in points)
        shares = np.array([point.place.share for point in points])
        scales = np.ones(len(points))
        if len(points) > 1:
            scales = np.array([point.scale(operator) for point, operator in zip(points, operators, strict=True)])
            if not (np.isfinite(scales).all() and (scales > 0).all()):
                raise NumericalError(
                    f"the mean self-influence at the points {', '.join(p.place.label for p in points)} is {scales}: points "
                    "without gradients cannot be averaged; give --at one of the others"
                )
        shares = shares / shares.sum()
        factors = shares * (shares @ scales) / scales
        identity = operators[0].curvature.name == "identity"
        rule = None if identity else str(Damping.parse(damping or run.manifest["damping"]))
        setting = cls(owner, run, points, operators, factors, rule, "none")
        return setting.calibrated() if calibrated else setting

    def calibrated(self) -> Setting:
        """The same with the manifest's calibration, where that was measured for this very setting."""
        found = self.run.manifest.get("calibration", {}).get(self.name)
        if not found:
            return self
        return replace(self, factors=self.factors * found["factor"], calibration=found["source"])

    @property
    def name(self) -> str:
        """The setting in one line: geometry, curvature, damping, points."""
        return setting_name(self.run, self.operators[0].curvature.name, self.rule, self.points)

    def each(self) -> Iterator[tuple[AtPoint, Damped]]:
        """The points with their operators."""
        return zip(self.points, self.operators, strict=True)

    def provenance(self, solver: Solver) -> dict[str, Any]:
        """What a score file records of the setting."""
        run = self.run
        return {
            "curvature": self.operators[0].curvature.name,
            "geometry": run.manifest["geometry"],
            "solver": solver.name,
            "damping": self.rule or "none",
            "lambda": _short(np.squeeze(np.stack([operator.lam.numpy() for operator in self.operators]))),
            "points": [point.place.label for point in self.points],
            "factors": self.factors,
            "calibration": self.calibration,
            "run_digest": self.owner.digest,
            "factors_digest": run.digest,
            "base_digest": run.manifest["base"]["digest"],
            "adapter_digest": run.manifest["adapter"]["digest"],
            "data_digest": run.manifest["data"]["digest"],
            "version": run.manifest["versions"]["lora-influence"],
        }


def setting_name(run: Run, curvature: str, rule: str | None, points: Sequence[AtPoint]) -> str:
    """What a setting's calibration is kept under in the manifest."""
    labels = ",".join(point.place.label for point in points)
    return f"{run.manifest['geometry']} {curvature} {rule or 'undamped'} at {labels}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _short(lam: np.ndarray) -> np.ndarray:
    """Every lambda, or, where an HDF5 attribute (64 KB) cannot hold them, the smallest and the largest of each point."""
    return lam if lam.size <= 4096 else np.stack([lam.min(-1), lam.max(-1)], -1)


def _places(run: Run, curvature: str | None, at: str | None) -> tuple[AtPoint, ...]:
    """The points that a request looks at."""
    identity = (curvature or run.fitted_name) == "identity"
    at = at or ("end" if identity else "all")
    if at == "all":
        return tuple(run.points)
    if at == "end":
        if run.end.number is None and not identity:
            labels = ", ".join(point.place.label for point in run.points)
            raise InputError(
                f"--at end was given, and this run has factors at {labels} only: give one of these, or fit another run with "
                "--path 1.0"
            )
        return (run.end,)
    for point in run.points:
        if at == point.place.label or _number(at) == point.place.scale is not None:
            return (point,)
    labels = ", ".join(point.place.label for point in run.points)
    raise InputError(f"--at {at!r} was given; expected all, end, or one of the run's points: {labels}")


def _score(
    setting: Setting,
    asked: _Asked,
    solvers: Sequence[Solver],
    attributes: dict[str, Any],
    target: Path | None,
    per_token: bool,
    per_module: bool,
) -> Scores:
    """Solve a chunk of queries, then pass over the training gradients once for it; into a file if there is one."""
    run, queries, points = setting.run, asked.queries, setting.points
    modules = module_slices(run.model.space) if per_module else {}
    _refuse_large_detail(setting, len(queries), len(modules), per_token, target is not None)
    at_once = queries_at_once(run, COPIES.get(solvers[0].name, max(COPIES.values())))
    work = _Work.begin(target, setting, queries, -(-len(queries) // at_once), list(modules), attributes)
    passes = work.chunks * len(points)
    if work.chunks > 1:
        what = "the stored gradients" if run.gradients_stored else "the training rows, forward and backward"
        say(f"{len(queries)} queries do not fit in memory at once: {passes} passes over {what}")
    message, tokenwise = "", Tokenwise.empty(run, len(queries)) if per_token else None
    for chunk, rows in enumerate(np.array_split(np.arange(len(queries)), work.chunks)):
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
                tokenwise.add(point, rows, solution.values, setting.factors[number])
    if message:
        say(f"{'note' if solvers[0].approximate else 'warning'}: {message}")
    result = work.finish(setting, tokenwise, attributes)
    if not np.isfinite(result.values).all():
        raise NumericalError("scores hold NaN or infinity: raise the damping, or run with --dtype float32 or float64")
    return work.seal(result, setting.owner)


def queries_at_once(run: Run, copies: int) -> int:
    """Queries whose gradients, with the `copies` [K, P] that solving holds beside them, fit into the free memory."""
    if run.model.device.type == "cuda":
        free = torch.cuda.mem_get_info(run.model.device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, int(QUERY_SHARE * free / ((1 + copies) * run.model.space.size * run.model.dtype.itemsize)))


def _refuse_large_detail(setting: Setting, queries: int, modules: int, per_token: bool, filed: bool) -> None:
    """Scores by token, and by module where there is no file, are held in memory: say so before the work."""
    n, points = len(setting.run.train), len(setting.points)
    needed = 4 * queries * int(setting.run.tokens.lengths.sum()) if per_token else 0
    needed += 4 * queries * modules * n * (1 if filed else points + 2)
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if needed > 0.7 * free:
        raise InputError(
            f"scores of {queries} queries by {'token' if per_token else 'module'} need {needed / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free: score fewer queries at a time, each into a file of its own"
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
    overwrite: bool = False,
) -> SelfInfluence:
    """Predicted rise of every training row's own mean loss if it is removed, `[train]`, nats per token.

    Solved directly where the curvature has a closed form, else by CG (preconditioned where the run has EK-FAC
    factors). `out` may be a score file of the same run; the values are added to it.
    """
    setting = Setting.of(run, curvature, damping, at)
    run, name = setting.run, "direct"
    if setting.operators[0].curvature.name in ("ggn", "hessian"):
        name = "pcg" if run.fitted_name in ("ekfac", "kfac") else "cg"
    solvers = [make_solver(point, name, operator) for point, operator in setting.each()]
    attributes = {"convention": SELF_CONVENTION, "unit": MeanLoss().unit, **setting.provenance(solvers[0])}
    target = None if out is None else Path(out)
    if target is not None and (found := _existing_self(target, setting.owner, attributes, overwrite)) is not None:
        return found
    values = np.zeros(len(run.train))
    worst = 0.0
    for solver, factor, (point, operator) in zip(solvers, setting.factors, setting.each(), strict=True):
        for indices, gradients in point.gradient_blocks():
            parts = np.array_split(indices, range(256, len(indices), 256))
            for part, rows in zip(gradients.split(256), parts, strict=True):
                solution = solver.solve(operator, part)
                worst = max(worst, float(solution.residuals.max()))
                products = (part * solution.values).double().sum(1).cpu().numpy()
                values[rows] += factor * products * run.weights[rows] / run.tokens.counts[rows]
    attributes["residuals"] = worst
    if not np.isfinite(values).all():
        raise NumericalError("self-influences hold NaN or infinity: raise the damping, or run in float32 or float64")
    result = SelfInfluence(values.astype(np.float32), run.train.ids, worst, attributes)
    if target is not None:
        with only_writer(target):
            _write_self(target, setting.owner, result)
    return result


def make_solver(point: AtPoint | Run, solver: str | Solver, operator: Damped) -> Solver:
    """A solver by name, with the preconditioner or the gradients it needs; a solver object as it is."""
    if not isinstance(solver, str):
        return solver
    point = point.points[-1] if isinstance(point, Run) else point
    if solver == "pcg":
        return CG(preconditioner=point.preconditioner(operator), name="pcg")
    if solver == "astra":
        return ASTRA(preconditioner=point.preconditioner(operator))
    if solver == "datainf" and operator.curvature.name == "identity":
        raise InputError("solver datainf inverts the empirical Fisher, and the curvature identity asks for no inverse")
    if solver == "datainf":
        leaves = tuple(leaf.slice for leaf in point.model.space.leaves)
        return DataInf(lambda: (block for _, block in point.gradient_blocks()), point.stream_weights, leaves)
    solvers: dict[str, Solver] = {"direct": Direct(), "cg": CG(), "lissa": LiSSA(), "sgd": SGD()}
    if solver not in solvers:
        raise InputError(f"solver {solver!r} was given; expected one of {', '.join(SOLVERS)}")
    return solvers[solver]


def _limited(solver: Solver, limits: dict[str, Any]) -> Solver:
    """An iterative solver with other limits."""
    if not limits:
        return solver
    if not (hasattr(solver, "max_iterations") and is_dataclass(solver) and not isinstance(solver, type)):
        raise InputError(
            f"{' and '.join(limits)} were given, and the solver {solver.name} does not iterate: leave them out, or give cg, "
            "pcg, astra, lissa or sgd"
        )
    for key, value in limits.items():
        if not value > 0:
            raise InputError(f"{key} {value} was given; expected a positive number")
    return cast(Solver, replace(solver, **limits))


def _measurement(value: str | Measurement | Contrast) -> Measurement | Contrast:
    """A measurement by name; an object as it is."""
    if not isinstance(value, str):
        return value
    kind, _, position = value.partition(":")
    if kind == "token" and re.fullmatch(r"-?[0-9]+", position):
        return TokenLoss(int(position))
    if value not in MEASUREMENTS:
        raise InputError(
            f"measurement {value!r} was given; expected one of {', '.join(MEASUREMENTS)}, token:K for completion token K, or "
            "contrast (on the command line, with --contrast FILE)"
        )
    return MEASUREMENTS[value]


def _measurement_options(measurement: Measurement | Contrast) -> str:
    """A measurement for the record, without the memory addresses of functions or the rows of a contrast."""
    return f"{type(measurement).__name__}({measurement.name})"


def _options(solver: Solver) -> str:
    """A solver's own numbers, for the record (its preconditioner is told by its name)."""
    return ", ".join(f"{key}={value}" for key, value in vars(solver).items() if isinstance(value, int | float | str))


# ---- the score file ------------------------------------------------------------------------------------------


def _different(found: Mapping[str, Any], attributes: dict[str, Any]) -> list[str]:
    """Names of the attributes in which what is stored differs from what is asked now."""

    def same(one: Any, other: Any) -> bool:
        one, other = np.asarray(one), np.asarray(other)
        if one.dtype.kind == "f" and one.shape == other.shape:
            return np.allclose(one, other, rtol=1e-6, atol=0)  # a device's sums may differ in their last bits
        return np.array_equal(one, other)

    keys = [key for key in attributes if key not in ("residuals", "complete", "version", "queries")]
    different = [key for key in keys if key not in found or not same(found[key], attributes[key])]
    short = lambda key: isinstance(attributes[key], str) and len(attributes[key]) < 40 and key in found  # noqa: E731
    return [
        f"{key} {found[key]!s} there, {attributes[key]} now" if short(key) else f"another {key}" for key in different
    ]


def _existing(target: Path, attributes: dict[str, Any]) -> Scores | None:
    """The scores of the very same request; None where the file holds a self-influence of this run only."""
    with open_file(target) as file:
        only_self = set(file) == {"self_influence", "train_ids"}
        if only_self and file.attrs.get("run_digest") == attributes["run_digest"]:
            return None
        different = _different(file.attrs, attributes) if "scores" in file else ["it is no score file"]
    if different:
        raise MismatchError(
            f"{target} holds other scores ({'; '.join(different)}): give another --out, or --overwrite to replace them"
        )
    return Scores.load(target)


@dataclass
class _Work:
    """Scores in the making, in memory or in files that a killed call leaves to go on with.

    `parts` [points, query, train] are the points' own scores before they are added, `module_parts` [points, query,
    module, train] the same by module; with one point of factor 1 they are the final arrays themselves. `done` [chunks *
    points, train]. On disk: `F.partial`, which becomes the score file, and beside it where they are apart `F.parts`.
    """

    chunks: int
    done: np.ndarray
    residuals: np.ndarray
    converged: np.ndarray
    parts: np.ndarray
    module_parts: np.ndarray
    values: np.ndarray
    modules: np.ndarray
    module_names: list[str]
    queries: Examples
    target: Path | None

    @classmethod
    def begin(
        cls,
        target: Path | None,
        setting: Setting,
        queries: Examples,
        chunks: int,
        modules: list[str],
        attributes: dict[str, Any],
    ) -> _Work:
        """Zeros, or what a killed call with the very same request left."""
        run, points = setting.run, len(setting.points)
        Q, n, M = len(queries), len(run.train), len(modules)
        apart = points > 1 or setting.factors[0] != 1  # added up or multiplied at the end, once
        if target is None:
            values, split = np.zeros((Q, n), np.float32), np.zeros((Q, M, n), np.float32)
            parts = np.zeros((points, Q, n), np.float32) if apart else values[None]
            module_parts = np.zeros((points, Q, M, n), np.float32) if apart else split[None]
            done = np.zeros((chunks * points, n), np.uint8)
            return cls(
                chunks,
                done,
                np.zeros(Q),
                np.ones(Q, np.uint8),
                parts,
                module_parts,
                values,
                split,
                modules,
                queries,
                None,
            )
        partial, beside = _partial(target), _parts(target)
        begun = _begun(partial, attributes)
        if begun and (not apart or beside.exists()):
            say(f"resuming {partial}")
            chunks = begun // points
        else:
            partial.unlink(missing_ok=True)  # first: parts are trusted by the file beside them
            if apart:
                rows = {"parts": ((points, Q, n), np.float32), "module_parts": ((points, Q, M, n), np.float32)}
                write_file(beside, rows=rows)
            _lay_out(partial, run, queries, chunks * points, modules, attributes)
        names = ("scores", "done", "residuals", "converged", "per_module")
        values, done, residuals, converged, split = (
            open_rows(partial, name, write=True) if M or name != "per_module" else np.zeros((Q, 0, n), np.float32)
            for name in names
        )
        parts, module_parts = values[None], split[None]
        if apart:
            parts, module_parts = (open_rows(beside, name, write=True) for name in ("parts", "module_parts"))
        return cls(chunks, done, residuals, converged, parts, module_parts, values, split, modules, queries, target)

    def note(self, rows: np.ndarray, solution: Solution) -> None:
        """A query's residual is the worst of its points'; it has converged where it has at all of them."""
        self.residuals[rows] = np.maximum(self.residuals[rows], solution.residuals.numpy())
        self.converged[rows] = self.converged[rows] & solution.converged.cpu().numpy()

    def finish(self, setting: Setting, tokenwise: Tokenwise | None, attributes: dict[str, Any]) -> Scores:
        """Add the points' scores up."""
        for total, parts in ((self.values, self.parts), (self.modules, self.module_parts)):
            if len(parts) > 1 or setting.factors[0] != 1:  # then `parts` are not `total` itself
                for query in range(len(total)):
                    total[query] = np.tensordot(setting.factors, parts[:, query].astype(np.float64), axes=1)
        attributes["residuals"], attributes["complete"] = float(self.residuals.max()), True
        return Scores(
            np.array(self.values),
            self.queries.ids,
            setting.run.train.ids,
            np.array(self.residuals),
            self.converged.astype(bool),
            attributes,
            np.array(self.modules) if self.module_names else None,
            self.module_names,
            tokenwise,
        )

    def seal(self, result: Scores, run: Run) -> Scores:
        """Complete the file, keep a self-influence that it held, and move it into place."""
        if self.target is None:
            return result
        partial, none = _partial(self.target), np.zeros(0)
        self.done = self.residuals = self.converged = self.parts = self.module_parts = none  # unmap the files
        self.values = self.modules = none
        with h5py.File(partial, "r+") as file:
            if result.tokens is not None:
                for name, array in zip(TOKEN_NAMES, vars(result.tokens).values(), strict=True):
                    if name in file:
                        del file[name]
                    file.create_dataset(name, data=array)
            file.attrs.update(result.attributes)
            with suppress(StoreError), open_file(self.target) as old:  # a missing or damaged target has nothing to keep
                kept = cast("h5py.Dataset | None", old.get("self_influence"))
                if kept is not None and kept.attrs.get("run_digest") == run.digest and "self_influence" not in file:
                    old.copy("self_influence", file)
        os.replace(partial, self.target)
        _parts(self.target).unlink(missing_ok=True)
        return result


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _parts(target: Path) -> Path:
    return target.with_name(target.name + ".parts")


def _begun(partial: Path, attributes: dict[str, Any]) -> int:
    """Rows of `/done` of an unfinished file of the very same request; 0 where there is none to go on with."""
    if not partial.exists():
        return 0
    try:
        with open_file(partial) as file:
            ours, same = "convention" in file.attrs, not _different(file.attrs, attributes)
            begun = read(file, "done").shape[0]
    except (StoreError, MismatchError):
        ours, same, begun = False, False, 0
    if not ours:
        raise MismatchError(f"{partial} is in the way and is no unfinished score file: move it away")
    return begun if same else 0


def _lay_out(
    partial: Path, run: Run, queries: Examples, passes: int, modules: list[str], attributes: dict[str, Any]
) -> None:
    """Create the partial file at full size."""
    Q, n = len(queries), len(run.train)
    rows: dict[str, tuple[tuple[int, ...], Any]] = {
        "scores": ((Q, n), np.float32),
        "residuals": ((Q,), np.float64),
        "converged": ((Q,), np.uint8),
        "done": ((passes, n), np.uint8),
    }
    strings = {"query_ids": queries.ids, "train_ids": run.train.ids}
    if modules:
        rows["per_module"], strings["modules"] = ((Q, len(modules), n), np.float32), modules
    write_file(partial, attrs=attributes, strings=strings, rows=rows)
    open_rows(partial, "converged", write=True)[:] = 1


def _existing_self(target: Path, run: Run, attributes: dict[str, Any], overwrite: bool) -> SelfInfluence | None:
    """The stored self-influence of the very same request; None where there is none; anything else is refused."""
    if not target.exists():
        return None
    with open_file(target, run_digest=run.digest) as file:
        if not set(file) & {"scores", "self_influence"}:
            raise MismatchError(f"{target} is no score file: give another --out")
        dataset = cast("h5py.Dataset | None", file.get("self_influence"))
        if dataset is None or overwrite:
            return None
        different = _different(dataset.attrs, attributes)
        values, found = dataset[()], dict(dataset.attrs)
    if different:
        raise MismatchError(
            f"{target} holds another self-influence ({'; '.join(different)}): give another --out, or --overwrite"
        )
    return SelfInfluence(values, run.train.ids, float(np.asarray(found["residuals"])), found)


def _write_self(target: Path, run: Run, result: SelfInfluence) -> None:
    partial = target.with_name(target.name + ".self.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.copyfile(target, partial)
    else:
        write_file(partial, attrs={"run_digest": run.digest}, strings={"train_ids": run.train.ids})
    with h5py.File(partial, "r+") as file:
        if "self_influence" in file:
            del file["self_influence"]
        file.create_dataset("self_influence", data=result.values).attrs.update(result.attributes)
    os.replace(partial, target)
