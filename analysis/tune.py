"""Choice of curvature, damping, geometry and points of the path, kept in the run's manifest.

Three ways to judge a setting, from the best to the cheapest:

* *retraining*: the linear datamodeling score against losses of adapters retrained on random
  subsets. The subsets are split in two halves: the setting is chosen on one and its score reported
  on the other.
* *measured edits*: some training rows are taken out of the adapter by the setting's own edit, a
  little of each, and the loss of these and of other rows is measured by forward passes: how much
  the edited row's loss rises against how much all others move (*selectivity*).
* *concentration*: the share of its sum of absolute scores that a row's strongest score has, mean
  over probe rows. What is mere noise spreads over all rows alike.

Either of the two alone is misled: selectivity, which is measured at the adapter, favours points
near it; concentration favours points near the base. Without retraining the setting with the best
sum of both ranks is chosen, a rule found on two models and tried on a third
(benchmarks/defaults.py, LOG.md, 2026-11-21).

Settings are compared with additive credit; what retraining says of the size is kept for both, and
the score that is reported is that of shared credit where the setting has it.

One set of stored gradients serves every curvature, damping and point of a run, and a curvature's
dampings share what does not depend on lambda (`influence.curvature.several`). Another geometry or
path needs factors of its own: those are fitted below the run, in `tune/`, and said so.

Several processes (`influence.distributed`) share the rows of the sweep, and deal out the settings
whose edits are measured. All of them have the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr

from analysis.metrics.lds import LDS, Truth, lds
from analysis.stats import spearman
from analysis.truth import check_belongs
from influence import distributed
from influence.answers import scored_queries
from influence.at_point import AtPoint
from influence.calibration import (
    EDITED_ROWS,
    Edits,
    losses_of_probes,
    measured_edits,
    record,
    some_rows,
)
from influence.credit import Credit, shared_credit
from influence.curvature import EXACT, Damped, Invertible
from influence.curvature.several import solve_all
from influence.errors import InputError, MismatchError, NumericalError
from influence.fitting import fit
from influence.geometry import GEOMETRIES
from influence.manifest import CalibrationRecord, TunedRecord
from influence.measurements import MeanLoss
from influence.path import DEFAULT_PATH, check_path
from influence.progress import say, track
from influence.rows import Examples
from influence.run import Run, update_manifest
from influence.scorefile import Scores
from influence.scores import queries_at_once, raw_parts
from influence.setting import ADDITIVE, SHARED, Setting
from influence.solvers import CG, Direct
from influence.tokens import TokenizedExamples

#: The dampings that are swept unless told otherwise.
DAMPINGS = ("mean:1", "mean:0.1", "mean:0.01", "mean:0.001")
#: Fewer retrained adapters than this are warned of: a choice.
FEW = 20
#: Residual to which the exact GGN is solved where a setting is compared with it: a choice.
EXACT_TOLERANCE = 1e-2
#: Rows whose losses are measured beside the edited ones, at most: a choice.
PROBES = 32


@dataclass(frozen=True)
class Judged:
    """One setting of the grid with what was found of it. `lds` where it was judged by retraining.

    `run` is the folder of its factors below the run, None for the run's own. `agreement` is
    Spearman's rho of predicted and measured changes of the rows that were not edited; `selectivity`
    and `factor` as in `influence.calibration.Edits`.
    """

    run: str | None
    geometry: str
    curvature: str
    damping: str
    at: str
    concentration: float
    agreement: float | None = None
    selectivity: float | None = None
    factor: float | None = None
    lds: LDS | None = None
    scores: np.ndarray | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The setting in one line."""
        return f"{self.geometry} {self.curvature} {self.damping} at {self.at}"


@dataclass(frozen=True)
class Tuning:
    """The table, best first, and the setting that was chosen.

    `exact`, where it was asked for: Spearman's rho, mean over some probe rows, of the chosen
    setting's scores with those of the exact GGN at the same points and lambda, solved by
    preconditioned CG to the residual `exact_residual`.
    """

    judged: list[Judged]
    chosen: Judged
    held_out: LDS | None
    by: str
    exact: float | None = None
    exact_residual: float | None = None


def tune(
    run: Run,
    *,
    truth: Truth | None = None,
    queries: Examples | None = None,
    curvatures: Sequence[str] | None = None,
    dampings: Sequence[str] = DAMPINGS,
    geometries: Sequence[str] = (),
    paths: Sequence[Sequence[float]] = (),
    columns: int = 0,
    seed: int = 0,
    keep: bool = True,
) -> Tuning:
    """Judge a grid of settings on one adapter, and keep the best in the run's manifest.

    Parameters
    ----------
    run
        A finished run with a closed-form curvature.
    truth, queries
        Losses of retrained adapters and the rows they were measured on; without them the local
        checks decide.
    curvatures, dampings
        The grid; by default every closed form that the run holds, and `DAMPINGS`.
    geometries, paths
        Further factors to fit below the run (`tune/`): each geometry at the run's own points, each
        path in the run's geometry. A run at the adapter alone always gets the default path too.
    columns
        Compare the chosen setting with the exact GGN on so many probe rows; each product of the
        solver is a pass over the training rows, and there may be hundreds.
    seed
        Draws the halves of the truth, the edited rows and the probes.
    keep
        Record the choice (and its calibration) in the manifest: later scores use it unless told
        otherwise.
    """
    if (truth is None) != (queries is None):
        raise InputError("give the truth and the queries it was measured on together, or neither")
    if not isinstance(run.curvature(), Invertible):
        raise InputError(
            f"tune sweeps closed-form curvatures and this run was fitted with {run.fitted_name!r}: "
            "fit one with ekfac"
        )
    if truth is not None and queries is not None:
        shape = (len(queries), len(run.train))
        if (truth.query_loss.shape[1], truth.masks.shape[1]) != shape:
            raise InputError(
                f"the truth is of {truth.query_loss.shape[1]} queries and {truth.masks.shape[1]} "
                f"rows; the queries and the run have {shape[0]} and {shape[1]}: give the files "
                "that belong together"
            )
        check_belongs(truth, queries.ids, run.train.ids, "the truth")
        if len(truth.masks) < FEW:
            say(
                f"warning: {len(truth.masks)} retrained adapters order settings by chance; some "
                "dozens are needed"
            )
    for geometry in geometries:
        if geometry not in GEOMETRIES:
            raise InputError(
                f"geometry {geometry!r} was given; expected one of {', '.join(GEOMETRIES)}"
            )
    paths = [check_path(path) for path in paths]
    runs = {None: run, **_fitted_below(run, geometries, paths)}
    probes = some_rows(run, PROBES, seed)
    rows = None
    if queries is not None:
        rows = run.query_tokens(queries)
    judged = [
        row
        for folder, holder in runs.items()
        for row in _sweep(holder, folder, curvatures, dampings, probes, rows)
    ]
    if truth is not None and rows is not None:
        tuning = _by_truth(run, runs, judged, truth, rows, seed, keep)
    else:
        tuning = _by_checks(run, runs, judged, probes, seed, keep)
    holder = runs[tuning.chosen.run]
    exact_is_held = EXACT in holder.points[-1].held and not holder.is_plain(tuning.chosen.curvature)
    if columns < 1 or not exact_is_held:
        if columns > 0:
            say(
                f"note: {tuning.chosen.name} was chosen, which stands for no exact GGN: nothing to "
                "compare with"
            )
        return tuning
    exact, residual = exact_agreement(runs[tuning.chosen.run], tuning.chosen, probes[:columns])
    return replace(tuning, exact=exact, exact_residual=residual)


def _setting(run: Run, row: Judged, credit: str = ADDITIVE) -> Setting:
    """The setting that a row of the table stands for."""
    damping = None if row.damping == "none" else row.damping
    return Setting.of(
        run, row.curvature, damping, row.at, tuned=False, calibrated=False, credit=credit
    )


def exact_agreement(run: Run, row: Judged, rows: np.ndarray) -> tuple[float, float]:
    """Agreement of a setting's scores with those of the exact curvature, and the residual.

    Spearman's rho, mean over some training rows as queries.

    The GGN has the setting's lambda, block by block, and is solved by CG preconditioned with the
    run's EK-FAC.
    """
    setting = _setting(run, row)
    places, own = np.arange(len(rows)), slice(*distributed.span(len(rows)))
    tokens, worst = run.tokens.select(rows[own]), 0.0  # each process solves for some
    ours, exact = (np.zeros((len(rows), len(run.train))) for _ in range(2))
    for factor, (point, operator) in zip(setting.factors, setting.each(), strict=True):
        query_gradients = point.query_gradients(tokens, MeanLoss())
        curvature = operator.curvature
        assert isinstance(curvature, Invertible)
        ggn, answers = Damped(point.curvature(EXACT), operator.lam), query_gradients
        if len(query_gradients):
            solution = CG(tolerance=EXACT_TOLERANCE, preconditioner=operator, name="pcg").solve(
                ggn, query_gradients
            )
            worst, answers = max(worst, float(solution.residuals.max())), solution.values
        ours_solved = curvature.solve(query_gradients, operator.lam)
        both = [
            (values, distributed.assembled(solved, places[own], len(rows)))
            for values, solved in ((ours, ours_solved), (exact, answers))
        ]
        for indices, gradients in point.gradient_blocks(shared=True):
            for values, solved in both:
                products = (solved @ gradients.T).double().cpu().numpy()
                values[:, indices] += factor * products * run.weights[indices]
    for values in (ours, exact):
        distributed.add_up(torch.from_numpy(values))
    return float(np.mean(spearman(ours, exact))), distributed.largest(worst)


def _fitted_below(
    run: Run, geometries: Sequence[str], paths: Sequence[Sequence[float]]
) -> dict[str | None, Run]:
    """Runs with other factors, fitted or found in `tune/`."""
    places = [point.place for point in run.points]
    scales = tuple(place.scale for place in places)
    wanted: dict[str, dict[str, Any]] = {}
    if scales == (1.0,) and not paths:
        paths = (DEFAULT_PATH,)
    for path in paths:
        if tuple(path) != scales:
            label = ",".join(f"{c:g}" for c in path)
            wanted[f"path-{label}"] = {"path": tuple(path), "geometry": run.manifest.geometry}
    for geometry in geometries:
        if geometry == run.manifest.geometry:
            continue
        if None in scales:
            raise InputError(
                "geometries can be swept along --path only, and this run looks at checkpoints: fit "
                "one for each"
            )
        wanted[f"geometry-{geometry}"] = {"path": scales, "geometry": geometry}
    runs: dict[str | None, Run] = {}
    manifest = run.manifest
    for name, options in wanted.items():
        say(f"fitting {name} below {run.directory}, in tune/{name}")
        runs[f"tune/{name}"] = fit(
            run.model,
            run.train,
            directory=run.directory / "tune" / name,
            curvature=run.specification,
            damping=manifest.damping,
            reduction=manifest.objective.reduction,
            max_length=manifest.objective.max_length,
            supervise=manifest.objective.supervise,
            token_budget=run.token_budget,
            store=manifest.store,
            disk_budget=manifest.disk_budget,
            seed=manifest.seed,
            optimizer=manifest.optimizer if options["geometry"] == "adam" else None,
            **options,
        )
    return runs


def _sweep(
    run: Run,
    folder: str | None,
    curvatures: Sequence[str] | None,
    dampings: Sequence[str],
    probes: np.ndarray,
    queries: TokenizedExamples | None,
) -> list[Judged]:
    """Every setting of one run, with its scores and its concentration on the probe rows."""
    if curvatures is None:
        curvatures = run.closed_forms
    grid = [
        (name, damping)
        for name in curvatures
        for damping in ((None,) if run.is_plain(name) else dampings)
    ]
    of_probes = [_scores(point, grid, run.tokens.select(probes)) for point in run.points]
    of_queries = [
        None if queries is None else _scores(point, grid, queries) for point in run.points
    ]
    labels = [point.place.label for point in run.points]
    for point in run.points if len(labels) > 1 else []:
        point.scales([point.operator(*key) for key in grid])  # all at once, and kept
    judged = []
    for name, damping in grid:
        for at in ("all", *labels) if len(labels) > 1 else labels:
            setting = Setting.of(run, name, damping, at, tuned=False, calibrated=False)
            weights = np.zeros(len(labels))
            for factor, point in zip(setting.factors, setting.points, strict=True):
                weights[labels.index(point.place.label)] = factor

            def mixed(
                parts: list[Any], key: Any = (name, damping), weights: np.ndarray = weights
            ) -> Any:
                return (
                    None
                    if parts[0] is None
                    else np.tensordot(weights, [part[key] for part in parts], axes=1)
                )

            share = concentration(mixed(of_probes), probes)
            judged.append(
                Judged(
                    folder,
                    run.manifest.geometry,
                    name,
                    damping or "none",
                    at,
                    share,
                    scores=mixed(of_queries),
                )
            )
    return judged


def _scores(
    point: AtPoint, grid: Sequence[tuple[str, str | None]], tokens: TokenizedExamples
) -> dict[tuple[str, str | None], np.ndarray]:
    """Scores `[q, n]` at one point of every setting: one pass over the training gradients.

    All settings' solutions are held beside one another; queries that do not fit so are taken in
    chunks, a pass for each.
    """
    run, curvatures = point.run, {key: point.operator(*key) for key in grid}
    for (name, _), operator in curvatures.items():
        if not isinstance(operator.curvature, Invertible):
            raise InputError(
                f"tune sweeps closed-form curvatures; {name} has no closed-form inverse: leave it out"
            )
    scores = {key: np.zeros((len(tokens), len(run.train))) for key in grid}
    chunks = -(-len(tokens) // queries_at_once(run, Direct.copies + len(grid)))
    for rows in np.array_split(np.arange(len(tokens)), chunks):
        places, own = np.arange(len(rows)), slice(*distributed.span(len(rows)))
        # each process solves for some
        query_gradients = point.query_gradients(tokens.select(rows[own]), MeanLoss())
        answers = solve_all(list(curvatures.values()), query_gradients)
        solved = {
            key: distributed.assembled(mine, places[own], len(rows))
            for key, mine in zip(curvatures, answers, strict=True)
        }
        for indices, gradients in point.gradient_blocks(shared=True):
            for key, v in solved.items():
                products = (v @ gradients.T).double().cpu().numpy()
                scores[key][np.ix_(rows, indices)] = products * run.weights[indices]
    for values in scores.values():
        distributed.add_up(torch.from_numpy(values))
    return scores


def concentration(scores: np.ndarray, places: np.ndarray) -> float:
    """Largest share of another training row in the sum of absolute scores, mean over probe rows.

    `scores` [k, n]; `places` [k] are the probes' own positions, which are left out: every method
    finds those.
    """
    size = np.abs(scores)
    size[np.arange(len(places)), places] = 0
    return float((size.max(1) / np.maximum(size.sum(1), 1e-300)).mean())


def _by_truth(
    run: Run,
    runs: dict[str | None, Run],
    judged: list[Judged],
    truth: Truth,
    queries: TokenizedExamples,
    seed: int,
    keep: bool,
) -> Tuning:
    """Choose by the LDS on one half of the subsets, report that of the scores that follow from the
    choice on the other.
    """
    S = len(truth.masks)
    if S < 8:
        raise InputError(
            f"the truth has {S} retrained adapters; tune chooses on half of them: give at least 8"
        )
    order = np.random.default_rng(seed).permutation(S)
    choose, report = order[: S // 2], order[S // 2 :]
    table = [
        replace(row, lds=lds(row.scores, truth.masks[choose], truth.query_loss[choose], seed=seed))
        for row in judged
        if row.scores is not None
    ]
    table.sort(key=lambda row: -(row.lds.mean if row.lds is not None else -np.inf))
    best = table[0]
    assert best.scores is not None
    settings = [(_setting(runs[best.run], best), best.scores)]
    if (shared := _shared_scores(runs[best.run], best, queries)) is not None:
        settings.append(shared)
    held_out = lds(settings[-1][1], truth.masks[report], truth.query_loss[report], seed=seed)
    source, calibration = f"retraining on {len(choose)} subsets", {}
    for setting, scores in settings:
        factor = retrained_factor(scores, truth.masks[choose], truth.query_loss[choose])
        calibration |= _calibration(setting, factor, source)
    if keep:
        found = f"LDS {best.lds.mean:.3f}" if best.lds else ""
        _keep(run, runs[best.run], best, calibration, found)
    return Tuning(table, best, held_out, f"LDS on {len(choose)} of {S} subsets (seed {seed})")


def _shared_scores(
    run: Run, best: Judged, queries: TokenizedExamples
) -> tuple[Setting, np.ndarray] | None:
    """The chosen setting with shared credit, and its scores `[Q, n]`; None where it has none."""
    setting = _setting(run, best, SHARED)
    credit = shared_credit(setting)
    if not isinstance(credit, Credit):
        return None
    return setting, credit.singles(raw_parts(setting, queries, MeanLoss()))


def retrained_factor(scores: np.ndarray, masks: np.ndarray, losses: np.ndarray) -> float:
    """Ratio of measured to predicted changes of the queries' losses from subset to subset.

    By least squares through the origin.

    `scores` [Q, n], `masks` [S, n], `losses` [S, Q]; each query's mean over the subsets is taken
    out of both.
    """
    predicted = -(masks.astype(np.float64) @ scores.T)
    predicted -= predicted.mean(0)
    return float((predicted * (losses - losses.mean(0))).sum() / (predicted**2).sum())


def _by_checks(
    run: Run,
    runs: dict[str | None, Run],
    judged: list[Judged],
    probes: np.ndarray,
    seed: int,
    keep: bool,
) -> Tuning:
    """Choose without retraining."""
    rows = some_rows(run, EDITED_ROWS, seed)
    before = losses_of_probes(run, rows, probes)  # every setting starts at the same adapter
    # whose points may be compared by all processes together; then each measures some
    settings = [_setting(runs[row.run], row) for row in judged]
    measured: dict[int, tuple[float, float, float] | str] = {}
    for number in track(
        distributed.shard(np.arange(len(judged))).tolist(), "settings, edits made and measured"
    ):
        try:
            with distributed.alone():
                edits = measured_edits(settings[number], rows, probes, before)
        except NumericalError as error:
            measured[number] = str(error)
        else:
            measured[number] = agreement(edits), edits.selectivity, edits.factor
    measured = distributed.told_by_all(measured)
    table = []
    for number, row in enumerate(judged):
        if isinstance(found := measured[number], str):
            say(f"note: {row.name} is left out, its edits could not be measured: {found}")
            continue
        table.append(replace(row, agreement=found[0], selectivity=found[1], factor=found[2]))
    if not table:
        raise NumericalError(
            "no setting's edits could be measured: run with --dtype float32 or float64"
        )
    checks = np.array([[row.concentration, row.selectivity or 0.0] for row in table])
    ranks = rankdata(np.where(np.isfinite(checks), checks, -np.inf), axis=0).sum(1)
    table = [table[number] for number in np.argsort(-ranks, kind="stable")]
    best = table[0]
    if keep:
        found = f"concentration {best.concentration:.3f}, selectivity {best.selectivity:.1f}"
        setting, source = _setting(runs[best.run], best), f"measured edits of {len(rows)} rows"
        _keep(run, runs[best.run], best, _calibration(setting, best.factor or 1.0, source), found)
    return Tuning(table, best, None, "concentration and selectivity, without retraining")


def agreement(edits: Edits) -> float:
    """Spearman's rho of predicted and measured changes of the rows that were not the edited one."""
    others = ~np.eye(*edits.measured.shape, dtype=bool)
    result: Any = spearmanr(edits.predicted[others], edits.measured[others])
    return float(result.statistic)


def _calibration(setting: Setting, factor: float, source: str) -> dict[str, CalibrationRecord]:
    """What the manifest keeps of a factor, nothing of one that says nothing."""
    return record(setting, factor, source) if np.isfinite(factor) and factor > 0 else {}


def _keep(
    run: Run,
    holder: Run,
    best: Judged,
    calibration: Mapping[str, CalibrationRecord],
    figures: str,
) -> None:
    """Record the choice in the run's manifest, its calibration where the factors are."""
    damping = None if best.damping == "none" else best.damping
    tuned = TunedRecord(best.run, best.curvature, damping, best.at, figures)
    if calibration:
        update_manifest(holder, calibration={**holder.manifest.calibration, **calibration})
    update_manifest(run, tuned=tuned)


def forget(run: Run) -> None:
    """Drop what `tune` chose: later scores use what the run was fitted with."""
    update_manifest(run, tuned=None)


def table_rows(tuning: Tuning, count: int | None = None) -> Iterator[dict[str, Any]]:
    """The table for a program or a printer: one mapping per setting, best first."""
    for judged in tuning.judged[:count]:
        row: dict[str, Any] = {
            "setting": judged.name,
            "factors": judged.run or "the run's",
            "concentration": judged.concentration,
        }
        if judged.lds is not None:
            row |= {
                "lds": judged.lds.mean,
                "low": judged.lds.interval.low,
                "high": judged.lds.interval.high,
            }
        else:
            row |= {
                "agreement": judged.agreement,
                "selectivity": judged.selectivity,
                "calibration": judged.factor,
            }
        yield row


def default_queries(run: Run) -> Examples:
    """The queries of the run's own scores, from where `influence score` recorded that they are."""
    path = run.directory / "scores.h5"
    if not path.exists():
        raise InputError(
            "tune against a truth needs the queries it was measured on: give --queries, or make "
            f"{path} first"
        )
    attributes = Scores.load(path, detail=False).attributes
    if not attributes.get("queries"):
        raise InputError(f"{path} does not say where its queries are: give --queries")
    queries = scored_queries(attributes)
    if queries is None:
        raise MismatchError(
            f"{attributes['queries']} has changed since {path} was made: give --queries, or score "
            "again"
        )
    return queries
