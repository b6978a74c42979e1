"""Memorization of every training row: measured from retrained adapters, forecast from the adapter alone, and how far they agree.

*Measured*, from K adapters that were each trained on a random subset of the rows (`unlearn.retrain_subsets`), with
`l_k(x)` the mean loss of row x under adapter k:

    counterfactual memorization    mem(x) = mean_{k: x not in S_k} l_k(x) - mean_{k: x in S_k} l_k(x)
    C-score                        C(x)   = mean_{k: x not in S_k} exp(-l_k(x))

The first is Zhang et al. 2023, arXiv 2112.12938 (there of next-token accuracies, here of losses): what having seen x is worth on x
itself, nats per token. The second says how well x is known to those who never saw it, from 0 to 1, a typical row being
near 1: Jiang et al. 2021, arXiv 2002.03206. **Differences**: the original averages the *accuracy* on x over training sets of
many sizes; this is the per-token likelihood (the geometric mean over tokens, then the mean over adapters) at the one size
that the subsets have.

*Forecast*, from the adapter and its base: self-influence, the first-order forecast of the rise of x's own mean loss if x is
removed (`influence.scores`), hence of mem(x) in its very unit; the loss, the base's and their difference (`gap`: base less
adapter); extraction strength and exact memorization (`analysis.metrics.extraction`); the number of completion tokens.

*Exposure* (`analysis.metrics.exposure`) is measured on the adapter itself, of canaries: rows that come with the other
things they could have said.

*Agreement* is Spearman's rho over the rows. It has two sources of error, and an interval for each: other rows might have been
trained on (`low`, `high`: rows are resampled, one by one, also where they share a group), and other subsets drawn
(`adapters_low`, `adapters_high`: the K adapters are resampled and the measurement taken again). Adapters drawn twice add their
noise a second time, which pulls every resampled rho towards zero; the second interval is therefore moved, at its length, to where
its middle is the rho that was found. Noise of the K adapters also caps rho: a perfect forecast of what infinitely many adapters
would measure reaches `sqrt(reliability)` (`reliability`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from analysis.evaluation.answers import answering, completion
from analysis.metrics.exposure import exposure_of, relative_exposure
from analysis.metrics.extraction import exact_memorization, extraction_strength
from analysis.metrics.lds import Truth, read_truth
from analysis.metrics.likelihood import checked
from analysis.metrics.outputs import outputs
from analysis.stats import bootstrap_interval, spearman
from influence.console import printable
from influence.damping import Damping
from influence.errors import BadRow, DataError, InputError, MismatchError
from influence.loss import mean_losses
from influence.path import scaled
from influence.rows import Example, Examples
from influence.run import Run
from influence.tables import write_table
from influence.tokens import TokenizedExamples

#: Dampings of the self-influences that are made beside the run's own setting.
DAMPINGS = ("mean:0.01", "mean:0.1", "mean:1")
#: Fewer rows than this have no rank correlation to speak of.
FEWEST = 3
#: Sums of losses, nats, that are this close are ties: batches of other shapes round differently.
TIE = 1e-4
_MEMORIZATION = "counterfactual_memorization"


# ---- arrays --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Counterfactual memorization of n rows.

    Attributes
    ----------
    values : array [n]
        Mean loss without the row less mean loss with it, nats per token; NaN where no model had it, or all did.
    errors : array [n]
        Standard error of `values`, `sqrt(s^2_without / k_without + s^2_trained / k_trained)` with s^2 the sample variances over
        models; NaN where a side has fewer than two.
    without, trained : int array [n]
        Models k that were trained without the row, and with it.
    """

    values: NDArray[np.float64]
    errors: NDArray[np.float64]
    without: NDArray[np.int64]
    trained: NDArray[np.int64]


@dataclass(frozen=True)
class Reliability:
    """How far two measurements of the same rows by other models would agree.

    Attributes
    ----------
    half : float
        Mean Spearman correlation of two halves of the models; NaN where no split gives one.
    value : float
        The same for two sets of all K models, `2 half / (1 + half)` (Spearman 1910, Brown 1910), 0 where the halves do not agree.
    ceiling : float
        `sqrt(value)`: about what a perfect forecast of the noise-free measurement would reach.
    models, splits : int
        K, and the random splits that `half` is the mean of.
    """

    half: float
    value: float
    ceiling: float
    models: int
    splits: int


def counterfactual_memorization(losses: ArrayLike, masks: ArrayLike) -> Counterfactual:
    """`mean loss of x over the models trained without x - mean loss over those trained with it`, nats per token.

    `losses` [K, n] are the rows' mean losses under K models, `masks` [K, n] of bool is True where a model was trained on a
    row. Zhang et al. 2023, arXiv 2112.12938, for losses. Raises `InputError` for arrays that do not belong together.
    """
    losses, masks = _checked(losses, masks)
    without, trained = (~masks).sum(axis=0), masks.sum(axis=0)
    errors = np.sqrt(
        _variance(losses, ~masks) / np.maximum(without, 1)
        + _variance(losses, masks) / np.maximum(trained, 1)
    )
    return Counterfactual(_difference(losses, masks), errors, without, trained)


def c_score(losses: ArrayLike, masks: ArrayLike) -> NDArray[np.float64]:
    """`mean over the models trained without x of exp(-loss of x)`, [n], from 0 to 1; NaN where all were trained with it.

    Arrays as in `counterfactual_memorization`. Jiang et al. 2021, arXiv 2002.03206, averages the accuracy on x over training
    sets of many sizes instead.
    """
    return _consistency(*_checked(losses, masks))


def reliability(
    losses: ArrayLike, masks: ArrayLike, seed: int = 0, *, splits: int = 100
) -> Reliability:
    """Split-half reliability of counterfactual memorization over K models, stepped up to all of them.

    The models are split at random into K // 2 and the others, each half measures every row, and the Spearman correlation of
    both (over the rows that both can measure) is averaged over `splits` splits. The formula of Spearman and Brown is exact for
    Pearson's correlation of halves of equal size. Models of one seed share what that seed does: it is not in the noise.
    """
    losses, masks = _checked(losses, masks)
    if splits < 1:
        raise InputError(f"splits {splits} was given; expected at least 1")
    rng, models = np.random.default_rng(seed), len(losses)
    found = np.empty(splits)
    for split in range(splits):
        order = rng.permutation(models)
        one, other = (
            _difference(losses[half], masks[half]) for half in np.split(order, [models // 2])
        )
        found[split] = _rho(one, other)
    known = found[~np.isnan(found)]
    half = float(known.mean()) if len(known) else float("nan")
    value = 0.0 if half <= 0 else 2 * half / (1 + half)
    return Reliability(half, value, float(np.sqrt(value)), models, splits)


def _checked(losses: ArrayLike, masks: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    losses, masks = checked(losses, "losses", ndim=2), np.asarray(masks)
    if masks.dtype != np.bool_ or masks.shape != losses.shape:
        raise InputError(
            f"masks has shape {masks.shape} and type {masks.dtype}; expected {losses.shape} of bool as losses has, True where a "
            "model was trained on a row: give both one line per model"
        )
    return losses, masks


def _mean(values: NDArray[np.float64], which: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Means [n] of the values [K, n] that are marked; NaN where none is."""
    counts = which.sum(axis=0)
    sums = np.where(which, values, 0).sum(axis=0)
    return np.divide(sums, counts, out=np.full(len(counts), np.nan), where=counts > 0)


def _variance(values: NDArray[np.float64], which: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Sample variances [n] of the values [K, n] that are marked; NaN for fewer than two."""
    counts = which.sum(axis=0)
    squares = np.where(which, (values - _mean(values, which)) ** 2, 0).sum(axis=0)
    return np.divide(squares, counts - 1, out=np.full(len(counts), np.nan), where=counts > 1)


def _difference(losses: NDArray[np.float64], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    return _mean(losses, ~masks) - _mean(losses, masks)


def _consistency(losses: NDArray[np.float64], masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    return _mean(np.exp(-losses), ~masks)


def _rho(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Spearman's rho over the rows that both know; NaN for fewer than `FEWEST`."""
    both = ~(np.isnan(one) | np.isnan(other))
    return float(spearman(one[both], other[both])) if both.sum() >= FEWEST else float("nan")


# ---- a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Memorization:
    """Memorization of every training row of a run.

    Attributes
    ----------
    table : DataFrame
        One line per training row, in their order: `id`, `tokens` (of the completion), `loss`, `base_loss`, `gap` (nats per token),
        `extraction_strength`, `exact_memorization`, `self_influence` (of the run's own setting, nats per token) and
        `self_influence D` for every further damping D. With a truth: `counterfactual_memorization` and its
        `counterfactual_error` (nats per token), `models_without`, `models_with`, `c_score`. With canaries: `exposure` (bits).
        With held-out rows: `relative_exposure` (bits per token). NaN where a row has none.
    agreement : list of dict
        `forecast`, `measure` (names of columns), `spearman`, `low`, `high`, `adapters_low`, `adapters_high`, `rows`; see the
        module. The last ends are NaN for `exposure`, which no retrained adapter measures.
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
        """Write the table as CSV or Parquet, by the suffix; `InputError` for another one, or a file that is there."""
        return write_table(self.table, path, overwrite=overwrite)

    def most(self, k: int) -> pd.DataFrame:
        """The k most memorized rows: by what was measured where there is a truth, else by self-influence."""
        by = _MEMORIZATION if _MEMORIZATION in self.table else "self_influence"
        return self.table.sort_values(by, ascending=False, kind="stable", na_position="last").head(
            k
        )

    def lines(self) -> list[str]:
        """Setting, reliability and notes, for a person."""
        found = [
            f"self-influence is with {self.setting}; losses and influences in nats per token; read the influences' order before their size"
        ]
        if self.reliability is not None:
            one = self.reliability
            found.append(
                f"reliability of the counterfactual memorization: {one.value:.2f} (halves of the {one.models} adapters agree to "
                f"{one.half:.2f}); a perfect forecast would reach about {one.ceiling:.2f}"
            )
        return [*found, *(f"note: {note}" for note in self.notes)]

    def record(self) -> dict[str, Any]:
        """Everything, ready for `influence.console.emit`."""
        reliability = None if self.reliability is None else asdict(self.reliability)
        return {
            "setting": self.setting,
            "agreement": self.agreement,
            "reliability": reliability,
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
    heldout: Examples | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Memorization:
    """Measure and forecast the memorization of every training row of a run, and compare; see the module.

    Costs two forwards per row, one per candidate and held-out row, and for every damping a pass over the run's gradients, which
    are computed again where the run does not store them.

    Parameters
    ----------
    run
        A finished run.
    truth
        Losses of the training rows under retrained adapters: a file of `unlearn.retrain_subsets`, or its content.
    dampings
        Of the self-influences beside the run's own; `DAMPINGS` by default, () for none. An `identity` run has none.
    canaries
        For ids of training rows, what else their completion could have been, as `read_canaries` reads them. They are
        ranked by the sum of their losses over all their tokens, so candidates of one form make the clearest canaries.
    heldout
        Rows like the training rows that were never trained on, for the relative exposure.
    level, resamples, seed
        Of the intervals; the seed also splits the adapters for the reliability.

    Raises
    ------
    InputError
        For a truth without losses of the training rows, for canaries or dampings that make no sense, for held-out rows that were
        trained on; `MismatchError` for a truth of other rows.
    """
    rules = None if dampings is None else [Damping.parse(rule) for rule in dampings]
    known = None if truth is None else _truth_of(run, truth)
    unseen = None if heldout is None else _unseen(run, heldout)
    secrets = None if canaries is None else _Canaries.of(run, canaries)
    budget = run.manifest["token_budget"]

    found = outputs(run.model, run.tokens, token_budget=budget)
    with run.model.at(scaled(run.model, 0.0)):
        base = mean_losses(run.model, run.tokens, token_budget=budget)
    influences, setting = _self_influences(run, rules)
    forecasts = {
        "tokens": found.counts,
        "loss": found.loss,
        "base_loss": base,
        "gap": base - found.loss,
        "extraction_strength": extraction_strength(found.right),
        "exact_memorization": exact_memorization(found.right),
        **influences,
    }
    measured, models, stable, notes = _measured(run.train.ids, known, seed)
    if secrets is not None:
        measured["exposure"] = secrets.exposures(run)
    table = pd.DataFrame({"id": run.train.ids, **forecasts, **measured})
    if unseen is not None:
        beside = mean_losses(run.model, unseen, token_budget=budget)
        table["relative_exposure"] = relative_exposure(found.loss, beside).values
    agreement = [
        _agreement(
            (forecast, values), (name, measured[name]), models.get(name), level, resamples, seed
        )
        for name in (_MEMORIZATION, "c_score", "exposure")
        if name in measured
        for forecast, values in forecasts.items()
    ]
    return Memorization(table, agreement, stable, setting, notes, level, resamples, seed)


@dataclass(frozen=True)
class _Models:
    """A measurement by K retrained adapters, which can be taken again with some of them: `of(indices)` is [n]."""

    count: int
    of: Callable[[NDArray[np.intp]], NDArray[np.float64]]


def _measured(
    ids: Sequence[str], truth: Truth | None, seed: int
) -> tuple[dict[str, NDArray], dict[str, _Models], Reliability | None, list[str]]:
    """Columns of what retraining measured, how to take them again, the reliability, and notes."""
    if truth is None:
        return (
            {},
            {},
            None,
            ["nothing was measured by retraining (unlearn retrain --subsets makes a truth)"],
        )
    losses, masks, notes = truth.train_loss, truth.masks, []
    assert losses is not None
    counterfactual = counterfactual_memorization(losses, masks)
    columns: dict[str, NDArray] = {
        _MEMORIZATION: counterfactual.values,
        "counterfactual_error": counterfactual.errors,
        "models_without": counterfactual.without,
        "models_with": counterfactual.trained,
        "c_score": c_score(losses, masks),
    }
    models = {
        _MEMORIZATION: _Models(len(masks), lambda some: _difference(losses[some], masks[some])),
        "c_score": _Models(len(masks), lambda some: _consistency(losses[some], masks[some])),
    }
    for where, counts, lost in (
        ("all", counterfactual.without, "counterfactual memorization and no C-score"),
        ("none", counterfactual.trained, "counterfactual memorization"),
    ):
        rows = np.flatnonzero(counts == 0)
        if len(rows):
            notes.append(
                f"{len(rows)} of {len(ids)} rows were trained on by {where} of the {len(masks)} retrained adapters and have no "
                f"{lost} (the first is {ids[rows[0]]!r}): retrain on more random subsets"
            )
    if "train_ids" not in truth.extra:
        notes.append(
            "the truth has no train_ids: its columns are taken for the run's rows, in their order"
        )
    return columns, models, reliability(losses, masks, seed), notes


def _truth_of(run: Run, truth: Truth | str | Path) -> Truth:
    """Read the truth, and see that it is of the run's rows."""
    source = "the truth" if isinstance(truth, Truth) else str(truth)
    found = truth if isinstance(truth, Truth) else read_truth(truth)
    ids = np.array(run.train.ids, dtype=np.str_).tolist()  # as a file holds them
    theirs = found.extra["train_ids"].tolist() if "train_ids" in found.extra else None
    if theirs is not None and theirs != ids:
        how = (
            "the same ones in another order"
            if sorted(map(str, theirs)) == sorted(ids)
            else "others"
        )
        raise MismatchError(
            f"{source} is not of the training rows of {run.directory}, but of {how}: give the truth that was made from this run"
        )
    if found.masks.shape[1] != len(ids):
        raise MismatchError(
            f"{source} is of {found.masks.shape[1]} training rows and {run.directory} has {len(ids)}: give the truth that was "
            "made from this run"
        )
    if found.train_loss is None:
        raise InputError(
            f"{source} has no train_loss, the training rows' losses under every retrained adapter, which memorization is measured "
            "by: make one with unlearn retrain --subsets"
        )
    try:
        checked(found.train_loss, "train_loss", ndim=2)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return found


def _unseen(run: Run, heldout: Examples) -> TokenizedExamples:
    """The tokens of held-out rows, none of which was trained on."""
    if not len(heldout):
        raise InputError("no held-out rows were given; give at least one, or leave them out")
    contents = {example.content_hash for example in run.train}
    shared = [example.id for example in heldout if example.content_hash in contents]
    if shared:
        raise InputError(
            f"{len(shared)} of {len(heldout)} held-out rows have the content of training rows (the first is {shared[0]!r}): give "
            "rows that the adapter never saw"
        )
    return run.tokenized(heldout)


def _self_influences(run: Run, rules: Sequence[Damping] | None) -> tuple[dict[str, NDArray], str]:
    """Self-influence of the run's own setting and of other dampings, by column, and the own setting in words."""
    own = run.self_influence()
    about = {key: str(own.attributes[key]) for key in ("geometry", "curvature", "damping")}
    columns = {"self_influence": own.values.astype(np.float64)}
    plain = about["curvature"] == "identity"
    if plain and rules:
        raise InputError(
            f"damping {rules[0]} was given, and {run.directory} compares plain gradients (identity), which have none: leave it out, "
            "or fit another run with a curvature"
        )
    if rules is None:
        rules = [] if plain else [Damping.parse(rule) for rule in DAMPINGS]
    for rule in rules:
        if str(rule) != about["damping"]:
            found = run.self_influence(damping=rule)
            columns[f"self_influence {rule}"] = found.values.astype(np.float64)
    labels = ",".join(str(label) for label in own.attributes["points"])
    return columns, f"{' '.join(about.values())} at {labels}"


def _agreement(
    forecast: tuple[str, NDArray],
    measure: tuple[str, NDArray],
    models: _Models | None,
    level: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Spearman's rho of a forecast and a measurement, with the interval over rows and the one over retrained adapters."""
    (name, predicted), (measure_name, values) = forecast, measure
    predicted = np.asarray(predicted, dtype=np.float64)
    both = ~(np.isnan(predicted) | np.isnan(values))
    x, y = predicted[both], values[both]
    rho, rows = _rho(x, y), len(x)
    options = {"level": level, "resamples": resamples, "seed": seed}
    low = high = adapters_low = adapters_high = float("nan")
    if not np.isnan(rho):
        over_rows = bootstrap_interval(lambda some: _rho(x[some], y[some]), rows, **options)
        low, high = over_rows.low, over_rows.high
    if not np.isnan(rho) and models is not None:
        over = bootstrap_interval(
            lambda some: _rho(predicted, models.of(some)), models.count, **options
        )
        reach = (over.high - over.low) / 2
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


# ---- canaries ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Canaries:
    """Training rows with the other things they could have said, ready for a model.

    `rows` are their positions; of `tokens`, canary c has the first one as its own completion and the others as candidates, from
    `starts[c]` to `starts[c + 1]`.
    """

    rows: list[int]
    starts: list[int]
    tokens: TokenizedExamples

    @classmethod
    def of(cls, run: Run, canaries: Mapping[str, Sequence[str]]) -> _Canaries:
        """Check the canaries; `InputError` that lists every unusable one."""
        if not canaries:
            raise InputError(
                "no canaries were given; name at least one training row with its candidates, or leave them out"
            )
        examples: list[Example] = []
        rows, starts, bad = [], [0], []
        for number, (id, candidates) in enumerate(canaries.items(), start=1):
            if id not in run.train:
                bad.append(BadRow(number, id, "no training row has this id"))
                continue
            own = run.train[run.train.index(id)]
            if reason := _unusable(own, candidates):
                bad.append(BadRow(number, id, reason))
                continue
            rows.append(run.train.index(id))
            examples += [
                own,
                *(
                    replace(answering(own, text), id=f"{id}, candidate {i}")
                    for i, text in enumerate(candidates, 1)
                ),
            ]
            starts.append(len(examples))
        if bad:
            raise DataError(f"{len(bad)} of {len(canaries)} canaries cannot be used:", bad)
        tokens = run.tokenized(Examples(examples))
        if tokens.truncated:
            raise InputError(
                f"{tokens.truncated} of the canaries' completions and candidates are longer than the run's max_length "
                f"({run.manifest['objective']['max_length']}), and sums of losses over cut ones do not compare: give shorter ones"
            )
        return cls(rows, starts, tokens)

    def exposures(self, run: Run) -> NDArray[np.float64]:
        """Exposure of every training row, [n] bits, NaN for rows that are no canaries.

        Completions are ranked by the sum of their losses over all their tokens, the end included: by the probability that the
        model says just this after the prompt. That favours short ones, as the model does; candidates of one form (names, numbers
        of as many digits) make the clearest canaries. Sums closer than `TIE` share their average rank.
        """
        budget = run.manifest["token_budget"]
        sums = mean_losses(run.model, self.tokens, token_budget=budget) * self.tokens.counts
        values = np.full(len(run.train), np.nan)
        for row, (start, stop) in zip(self.rows, pairwise(self.starts), strict=True):
            own, others = sums[start], sums[start + 1 : stop]
            tied = np.where(np.abs(others - own) <= TIE, own, others)
            values[row] = exposure_of([own], [tied]).value
        return values


def _unusable(own: Example, candidates: Sequence[str]) -> str | None:
    """Why a row with these candidates is no canary."""
    if own.text is not None:
        return "it is a text, without a completion that candidates could replace"
    if isinstance(candidates, str) or not all(
        isinstance(text, str) and text for text in candidates
    ):
        return "its candidates are not a list of non-empty strings"
    if any("\ud800" <= c <= "\udfff" for text in candidates for c in text):
        return "a candidate holds a lone surrogate, which is not text"
    if not candidates:
        return "it has no candidates; give at least one other thing it could have said"
    if completion(own) in candidates:
        return (
            "its own completion is among its candidates: leave it out there, it is counted anyway"
        )
    if len(set(candidates)) < len(candidates):
        return "it has the same candidate twice"
    return None


def read_canaries(path: str | Path) -> dict[str, list[str]]:
    """Read canaries from JSON lines, `{"id", "candidates": [completions]}` each; `DataError` that lists every unusable line."""
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give JSON lines with an id and candidates each"
        ) from None
    found: dict[str, list[str]] = {}
    bad: list[BadRow] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            bad.append(BadRow(number, None, f"not JSON that can be read ({error})"))
            continue
        id = row.get("id") if isinstance(row, dict) else None
        if (
            isinstance(id, bool)
            or not isinstance(id, str | int)
            or not isinstance(row.get("candidates"), list)
        ):
            bad.append(
                BadRow(
                    number,
                    None,
                    'expected an object with "id" (of a training row) and "candidates" (a list of strings)',
                )
            )
        elif str(id) in found:
            bad.append(BadRow(number, str(id), "its id is already that of another canary"))
        else:
            found[str(id)] = row["candidates"]
    if bad:
        raise DataError(f"{len(bad)} lines of {path} cannot be used:", bad)
    if not found:
        raise DataError(f"{path} has no canaries; give JSON lines with an id and candidates each")
    return found


# ---- tables --------------------------------------------------------------------------------------------------

_HEADS = {
    _MEMORIZATION: ("mem", "counterfactual memorization"),
    "counterfactual_error": ("+-", "its standard error"),
    "c_score": ("C", "C-score"),
    "self_influence": ("self", "self-influence"),
    "loss": ("loss", "of the adapter"),
    "base_loss": ("base", "loss of the base"),
    "extraction_strength": ("extr", "extraction strength"),
    "exposure": ("bits", "exposure of the canary"),
    "relative_exposure": ("rel", "relative exposure, bits per token"),
}


def tables(result: Memorization, k: int = 10) -> list[Table]:
    """The k most memorized rows, and the agreement with every measurement, for a person; 80 columns wide at most."""
    most = result.most(k)
    heads = {name: head for name, head in _HEADS.items() if name in most}
    by = heads[next(iter(heads))][1]
    rows = _table(f"highest {by}: {len(most)} of {len(result.table)} rows", "id", 16)
    rows.caption = Text("; ".join(f"{short}: {what}" for short, what in heads.values()))
    rows.caption_justify = "left"
    for short, _ in heads.values():
        rows.add_column(short, justify="right", no_wrap=True)
    for id, values in zip(most["id"], most[list(heads)].to_numpy(), strict=True):
        rows.add_row(Text(printable(id).replace("\n", " ")), *map(_cell, values))
    made = [rows]
    for measure in dict.fromkeys(one["measure"] for one in result.agreement):
        found = [
            one
            for one in result.agreement
            if one["measure"] == measure and not np.isnan(one["spearman"])
        ]
        if not found:
            continue
        title = f"Spearman with the {_HEADS[measure][1]} ({found[0]['rows']} rows)"
        table = _table(title, "forecast", 32)
        for head in ("rho", f"{result.level:.0%}, over rows", "over adapters"):
            table.add_column(head, justify="right", no_wrap=True)
        for one in found:
            ends = ((one["low"], one["high"]), (one["adapters_low"], one["adapters_high"]))
            intervals = ("" if np.isnan(low) else f"{low:.2f} to {high:.2f}" for low, high in ends)
            table.add_row(Text(one["forecast"]), f"{one['spearman']:.2f}", *intervals)
        made.append(table)
    return made


def _table(title: str, first: str, width: int) -> Table:
    table = Table(
        title=Text(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.add_column(first, max_width=width, no_wrap=True, overflow="ellipsis")
    return table


def _cell(value: float) -> str:
    """A number in five or six characters."""
    return "" if np.isnan(value) else f"{value:.{3 if 0 <= value < 10 else 2}f}"
