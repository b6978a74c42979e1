"""Memorization of every training row: measured, forecast from the adapter alone, and compared.

*Measured*, from retrained adapters: counterfactual memorization and C-score
(`analysis.studies.counterfactual`).

*Forecast*, from the adapter and its base: self-influence, the first-order forecast of the rise of
x's own mean loss if x is removed (`influence.scores`), hence of counterfactual memorization in its
very unit; the loss, the base's and their difference (`gap`: base less adapter); extraction strength
and exact memorization (`analysis.metrics.extraction`); the number of completion tokens.

*Exposure* is measured on the adapter itself, of canaries (`analysis.studies.canaries`).

*Agreement* is Spearman's rho over the rows. It has two sources of error, and an interval for each:
other rows might have been trained on (`low`, `high`: rows are resampled, one by one, also where
they share a group), and other subsets drawn (`adapters_low`, `adapters_high`: the K adapters are
resampled and the measurement taken again). Adapters drawn twice add their noise a second time,
which pulls every resampled rho towards zero; the second interval is therefore moved, at its length,
to where its middle is the rho of the data. Noise of the K adapters also caps rho: a perfect
forecast of what infinitely many adapters would measure reaches `sqrt(reliability)`
(`counterfactual.reliability`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.metrics.exposure import relative_exposure
from analysis.metrics.extraction import exact_memorization, extraction_strength
from analysis.metrics.lds import Truth, read_truth
from analysis.metrics.likelihood import checked
from analysis.metrics.outputs import outputs
from analysis.stats import bootstrap_interval
from analysis.studies.canaries import Canaries
from analysis.studies.counterfactual import (
    Reliability,
    c_score,
    consistency,
    counterfactual_memorization,
    difference,
    rank_correlation,
    reliability,
)
from influence.curvature import PLAIN
from influence.damping import Damping
from influence.errors import InputError, MismatchError
from influence.loss import mean_losses
from influence.path import scaled
from influence.rows import Examples
from influence.run import Run
from influence.tables import write_table
from influence.tokens import TokenizedExamples

#: Dampings of the self-influences that are made beside the run's own setting: a choice.
DAMPINGS = ("mean:0.01", "mean:0.1", "mean:1")
#: The column that is measured by retraining.
MEMORIZATION = "counterfactual_memorization"


@dataclass(frozen=True, eq=False)
class Memorization:
    """Memorization of every training row of a run.

    Attributes
    ----------
    table : DataFrame
        One line per training row, in their order: `id`, `tokens` (of the completion), `loss`,
        `base_loss`, `gap` (nats per token), `extraction_strength`, `exact_memorization`,
        `self_influence` (of the run's own setting, nats per token) and `self_influence D` for every
        further damping D. With a truth: `counterfactual_memorization` and its
        `counterfactual_error` (nats per token), `models_without`, `models_with`, `c_score`. With
        canaries: `exposure` (bits). With held-out rows: `relative_exposure` (bits per token). NaN
        where a row has none.
    agreement : list of dict
        `forecast`, `measure` (names of columns), `spearman`, `low`, `high`, `adapters_low`,
        `adapters_high`, `rows`; see the module. The ends over adapters are NaN for `exposure`,
        which no retrained adapter measures.
    reliability : Reliability or None
        Of the counterfactual memorization.
    setting : str
        What `self_influence` was made with.
    notes : list of str
        What else to know of the figures.
    level, resamples, seed
        Of the intervals.
    """

    table: pd.DataFrame = field(repr=False)
    agreement: list[dict[str, Any]]
    reliability: Reliability | None
    setting: str
    notes: list[str]
    level: float
    resamples: int
    seed: int

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the table as CSV or Parquet, by the suffix.

        Raises `InputError` for another suffix, or a file that is there.
        """
        return write_table(self.table, path, overwrite=overwrite)

    def most(self, k: int) -> pd.DataFrame:
        """The k most memorized rows: as measured where there is a truth, else by self-influence."""
        by = MEMORIZATION if MEMORIZATION in self.table else "self_influence"
        ordered = self.table.sort_values(by, ascending=False, kind="stable", na_position="last")
        return ordered.head(k)

    def lines(self) -> list[str]:
        """Setting, reliability and notes, for a person."""
        text = [
            f"self-influence is with {self.setting}; losses and influences in nats per token; read "
            "the influences' order before their size"
        ]
        if self.reliability is not None:
            r = self.reliability
            text.append(
                f"reliability of the counterfactual memorization: {r.value:.2f} (halves of the "
                f"{r.models} adapters agree to {r.half:.2f}); a perfect forecast would reach about "
                f"{r.ceiling:.2f}"
            )
        return [*text, *(f"note: {note}" for note in self.notes)]

    def record(self) -> dict[str, Any]:
        """Everything, ready for `influence.console.emit`."""
        return {
            "setting": self.setting,
            "agreement": self.agreement,
            "reliability": None if self.reliability is None else asdict(self.reliability),
            "level": self.level,
            "resamples": self.resamples,
            "seed": self.seed,
            "notes": self.notes,
            "rows": self.table.to_dict("records"),
        }


def memorization(
    run: Run,
    truth: Truth | str | Path | None = None,
    *,
    dampings: Sequence[str | Damping] | None = None,
    canaries: Mapping[str, Sequence[str]] | None = None,
    holdout: Examples | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Memorization:
    """Measure and forecast the memorization of every training row of a run, and compare.

    Costs two forwards per row, one per candidate and held-out row, and for every damping a pass
    over the run's gradients, which are computed again where the run does not store them.

    Parameters
    ----------
    run
        A finished run.
    truth
        Losses of the training rows under retrained adapters: a file of `unlearn.retrain_subsets`,
        or its content.
    dampings
        Of the self-influences beside the run's own; `DAMPINGS` by default, () for none. An
        `identity` run has none.
    canaries
        For ids of training rows, what else their completion could have been, as
        `analysis.studies.canaries.read_canaries` reads them. They are ranked by the sum of their
        losses over all their tokens, so candidates of one form make the clearest canaries.
    holdout
        Rows like the training rows that were never trained on, for the relative exposure.
    level, resamples, seed
        Of the intervals; the seed also splits the adapters for the reliability.

    Raises
    ------
    InputError
        For a truth without losses of the training rows, for canaries or dampings that make no
        sense, for held-out rows that were trained on.
    MismatchError
        For a truth of other rows.
    """
    rules = None if dampings is None else [Damping.parse(rule) for rule in dampings]
    losses_known = None if truth is None else _truth_of(run, truth)
    unseen = None if holdout is None else _unseen(run, holdout)
    secrets = None if canaries is None else Canaries.of(run, canaries)
    budget = run.token_budget

    out = outputs(run.model, run.tokens, token_budget=budget)
    with run.model.at(scaled(run.model, 0.0)):
        base = mean_losses(run.model, run.tokens, token_budget=budget)
    influences, setting = _self_influences(run, rules)
    forecasts = {
        "tokens": out.counts,
        "loss": out.loss,
        "base_loss": base,
        "gap": base - out.loss,
        "extraction_strength": extraction_strength(out.right),
        "exact_memorization": exact_memorization(out.right),
        **influences,
    }
    retrained = _retrained(run.train.ids, losses_known, seed)
    columns = dict(retrained.columns)
    if secrets is not None:
        columns["exposure"] = secrets.exposures(run)
    table = pd.DataFrame({"id": run.train.ids, **forecasts, **columns})
    if unseen is not None:
        unseen_losses = mean_losses(run.model, unseen, token_budget=budget)
        table["relative_exposure"] = relative_exposure(out.loss, unseen_losses).values
    bootstrap = {"level": level, "resamples": resamples, "seed": seed}
    agreement = [
        _agreement(
            (forecast, values), (name, columns[name]), retrained.again.get(name), **bootstrap
        )
        for name in (MEMORIZATION, "c_score", "exposure")
        if name in columns
        for forecast, values in forecasts.items()
    ]
    return Memorization(
        table,
        agreement,
        retrained.reliability,
        setting,
        retrained.notes,
        level,
        resamples,
        seed,
    )


# ---- what retraining measured --------------------------------------------------------------------


@dataclass(frozen=True)
class _Models:
    """A measurement by K retrained adapters, which `of(indices)`, [n], takes with some of them."""

    count: int
    of: Callable[[NDArray[np.intp]], NDArray[np.float64]]


@dataclass(frozen=True)
class _Retrained:
    """What retrained adapters say of the rows.

    `columns` are arrays [n] by name, `again` the measurements that other sets of adapters can take.
    """

    columns: dict[str, NDArray]
    again: dict[str, _Models]
    reliability: Reliability | None
    notes: list[str]


def _retrained(ids: Sequence[str], truth: Truth | None, seed: int) -> _Retrained:
    """Measure memorization by retrained adapters. Nothing but a note without a truth."""
    if truth is None:
        note = "nothing was measured by retraining (unlearn retrain --subsets makes a truth)"
        return _Retrained({}, {}, None, [note])
    losses, masks, notes = truth.train_loss, truth.masks, []
    assert losses is not None
    counterfactual = counterfactual_memorization(losses, masks)
    columns: dict[str, NDArray] = {
        MEMORIZATION: counterfactual.values,
        "counterfactual_error": counterfactual.errors,
        "models_without": counterfactual.without,
        "models_with": counterfactual.trained,
        "c_score": c_score(losses, masks),
    }
    again = {
        MEMORIZATION: _Models(len(masks), lambda some: difference(losses[some], masks[some])),
        "c_score": _Models(len(masks), lambda some: consistency(losses[some], masks[some])),
    }
    for where, counts, lost in (
        ("all", counterfactual.without, "counterfactual memorization and no C-score"),
        ("none", counterfactual.trained, "counterfactual memorization"),
    ):
        rows = np.flatnonzero(counts == 0)
        if len(rows):
            notes.append(
                f"{len(rows)} of {len(ids)} rows were trained on by {where} of the {len(masks)} "
                f"retrained adapters and have no {lost} (the first is {ids[rows[0]]!r}): retrain "
                "on more random subsets"
            )
    if "train_ids" not in truth.extra:
        notes.append(
            "the truth has no train_ids: its columns are taken for the run's rows, in their order"
        )
    return _Retrained(columns, again, reliability(losses, masks, seed), notes)


def _truth_of(run: Run, truth: Truth | str | Path) -> Truth:
    """Read the truth, and see that it is of the run's rows."""
    source = "the truth" if isinstance(truth, Truth) else str(truth)
    losses = truth if isinstance(truth, Truth) else read_truth(truth)
    ids = np.array(run.train.ids, dtype=np.str_).tolist()  # as a file holds them
    truth_ids = losses.extra["train_ids"].tolist() if "train_ids" in losses.extra else None
    if truth_ids is not None and truth_ids != ids:
        reordered = sorted(map(str, truth_ids)) == sorted(ids)
        how = "the same ones in another order" if reordered else "others"
        raise MismatchError(
            f"{source} is not of the training rows of {run.directory}, but of {how}: give the "
            "truth that was made from this run"
        )
    if losses.masks.shape[1] != len(ids):
        raise MismatchError(
            f"{source} is of {losses.masks.shape[1]} training rows and {run.directory} has "
            f"{len(ids)}: give the truth that was made from this run"
        )
    if losses.train_loss is None:
        raise InputError(
            f"{source} has no train_loss, the training rows' losses under every retrained adapter, "
            "which memorization is measured by: make one with unlearn retrain --subsets"
        )
    try:
        checked(losses.train_loss, "train_loss", ndim=2)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return losses


# ---- what the adapter says -----------------------------------------------------------------------


def _unseen(run: Run, holdout: Examples) -> TokenizedExamples:
    """The tokens of held-out rows, none of which was trained on."""
    if not len(holdout):
        raise InputError("no held-out rows were given; give at least one, or leave them out")
    contents = {example.content_hash for example in run.train}
    shared = [example.id for example in holdout if example.content_hash in contents]
    if shared:
        raise InputError(
            f"{len(shared)} of {len(holdout)} held-out rows have the content of training rows (the "
            f"first is {shared[0]!r}): give rows that the adapter never saw"
        )
    return run.tokenized(holdout)


def _self_influences(run: Run, rules: Sequence[Damping] | None) -> tuple[dict[str, NDArray], str]:
    """Self-influence by column, of the run's setting and of other dampings.

    The setting in words.
    """
    first = run.self_influence()
    about = {key: str(first.attributes[key]) for key in ("geometry", "curvature", "damping")}
    columns = {"self_influence": first.values.astype(np.float64)}
    plain = about["curvature"] == PLAIN
    if plain and rules:
        raise InputError(
            f"damping {rules[0]} was given, and {run.directory} compares plain gradients "
            f"({PLAIN}), which have none: leave it out, or fit another run with a curvature"
        )
    if rules is None:
        rules = [] if plain else [Damping.parse(rule) for rule in DAMPINGS]
    for rule in rules:
        if str(rule) != about["damping"]:
            influence = run.self_influence(damping=rule)
            columns[f"self_influence {rule}"] = influence.values.astype(np.float64)
    labels = ",".join(str(label) for label in first.attributes["points"])
    return columns, f"{' '.join(about.values())} at {labels}"


def _agreement(
    forecast: tuple[str, NDArray],
    measure: tuple[str, NDArray],
    models: _Models | None,
    **bootstrap: Any,
) -> dict[str, Any]:
    """Spearman's rho of a forecast and a measurement, with intervals over rows and adapters."""
    (name, predicted), (measure_name, values) = forecast, measure
    predicted = np.asarray(predicted, dtype=np.float64)
    both = ~(np.isnan(predicted) | np.isnan(values))
    x, y = predicted[both], values[both]
    rho, rows = rank_correlation(x, y), len(x)
    low = high = adapters_low = adapters_high = float("nan")
    if not np.isnan(rho):
        over_rows = bootstrap_interval(
            lambda some: rank_correlation(x[some], y[some]), rows, **bootstrap
        )
        low, high = over_rows.low, over_rows.high
    if not np.isnan(rho) and models is not None:
        over_adapters = bootstrap_interval(
            lambda some: rank_correlation(predicted, models.of(some)), models.count, **bootstrap
        )
        reach = (over_adapters.high - over_adapters.low) / 2
        adapters_low, adapters_high = max(rho - reach, -1.0), min(rho + reach, 1.0)
    return {
        "forecast": name,
        "measure": measure_name,
        "spearman": rho,
        "low": low,
        "high": high,
        "adapters_low": adapters_low,
        "adapters_high": adapters_high,
        "rows": rows,
    }
