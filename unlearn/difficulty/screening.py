"""Screening: forecasts of many rows from a close look at some of them.

A close look takes five gradients and at most ten forwards a row. Where more rows are asked for than
are looked at closely, all get their two losses, and a sample of them the close look: one row of
each of as many equal strata, by the gap between loss and target. What was forecast for these is
learnt from what is known of all rows (`FEATURES`, `GRADIENT_FEATURES`) by ridge regression, steps
on a logarithmic scale and damage on that of `arcsinh(damage / s)`, s the median size in the sample,
as in `unlearn.difficulty.calibration`.

The others get what the regression says, with an interval from the errors that it makes on rows of
the sample that it did not see (cross-validation). Its ends are the order statistics of split
conformal prediction (Lei et al. 2018, arXiv 1604.04173). They should hold what a close look would
forecast with probability `LEVEL`; the proof is for rows set apart, and folds stand for those here.
From the ascent itself a close look is off by its own error, which comes to it.

The target of every row is known, so rows that are at theirs need no look: they take no step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from influence import distributed
from influence.cost import Cost
from influence.errors import InputError
from influence.progress import say
from influence.run import Run
from unlearn.difficulty.advice import recommended
from unlearn.difficulty.calibration import FOLDS, LEVEL, PENALTIES, inputs
from unlearn.difficulty.coarse_ascent import READ, SCANS, mean_of
from unlearn.difficulty.optimizers import Optimizer
from unlearn.difficulty.units import SAMPLE_ROWS, Units

if TYPE_CHECKING:
    from unlearn.difficulty.forecast import Forecast

#: Rows that are looked at closely where more are asked for, if nobody says how many. A choice: a
#: few thousand row-gradients.
SCREEN = 400
#: The fewest, of which the intervals have finite ends. A choice that `LEVEL` bounds from below.
FEWEST = 20
#: What is known of every unit; and where the run has stored its rows' gradients, of these at its
#: last point: their length; the rise of the loss in a first step, to first order; how much a first
#: move of length 1 meets the sampled rows, the mean of (g_j^T d)^2 T_j. Ranks of the steps rose by at
#: most 0.01 with the self-influence beside them (benchmarks/README.md, "Many rows").
FEATURES = ("loss", "base_loss", "gap", "tokens", "share")
GRADIENT_FEATURES = ("gradient_norm", "first_rise", "cross")


@dataclass(frozen=True, eq=False)
class Screening:
    """n units of which k are looked at closely.

    Attributes
    ----------
    units : Units
        All n.
    chosen : int array [k]
        Places of those that are looked at closely, in order.
    features : DataFrame
        Of all n units, columns of `FEATURES`.
    seed : int
        Of the sample and the folds.
    """

    units: Units = field(repr=False)
    chosen: np.ndarray = field(repr=False)
    features: pd.DataFrame = field(repr=False)
    seed: int

    @property
    def close(self) -> Units:
        """The units that are looked at closely."""
        return self.units.select(self.chosen)

    def extended(self, forecast: Forecast) -> Forecast:
        """The forecast of the closely looked at units, with those of all others."""
        limit, others = forecast.protocol["steps"], self._others
        known = forecast.table.set_index(pd.Index(self.chosen))
        learnt = {
            "steps": _learnt(self.features, known, Logarithm(limit), self.seed),
            "damage": _learnt(self.features, known, Arcsinh.of(known), self.seed),
        }
        table = pd.concat([known, self._table(others, learnt, forecast)]).sort_index()
        return replace(forecast, table=table, screening=self._record(learnt))

    @property
    def _others(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self.units)), self.chosen)

    def _table(
        self, places: np.ndarray, learnt: dict[str, Learnt], forecast: Forecast
    ) -> pd.DataFrame:
        """Forecasts of the units at `places`, with the columns of the close ones."""
        features, limit = self.features.loc[places], forecast.protocol["steps"]
        columns: dict[str, Any] = {"id": [self.units.names[place] for place in places]}
        for name, each in learnt.items():
            columns[name], columns[f"{name}_low"], columns[f"{name}_high"] = each.told(features)
        table = pd.DataFrame(columns, index=pd.Index(places))
        for name in ("steps", "steps_low", "steps_high"):
            table[name] = table[name].where(table[name] <= limit, np.inf)
        damages = ["damage", "damage_low", "damage_high"]
        table.loc[np.isinf(table["steps"]), damages] = np.nan
        table.loc[features["gap"] <= 0, ["steps", "steps_low", "steps_high", *damages]] = 0.0
        table = pd.concat([table, features[list(FEATURES)]], axis=1).assign(how=SCREENED)
        table = recommended(table, forecast.retained_loss, forecast.max_damage, limit)
        return table.reindex(columns=list(forecast.table.columns))

    def _record(self, learnt: dict[str, Learnt]) -> dict[str, Any]:
        return {
            "close": len(self.chosen),
            "screened": len(self._others),
            "features": list(self.features),
            "level": LEVEL,
            **{name: each.record() for name, each in learnt.items()},
        }


#: What the column `how` says of a row.
CLOSE, SCREENED = "close", "screened"


def screening_of(
    units: Units, rule: Optimizer, screen: int = SCREEN, seed: int = 0
) -> Screening | None:
    """Choose which units are looked at closely; None: all, where they are no more than `screen`.

    `rule` climbs. `screen` 0: all. Units at their targets are never chosen. Raises `InputError` for other numbers
    below `FEWEST`.
    """
    check_screen(screen)
    if screen == 0 or len(units) <= screen:
        return None
    features = _features(units, rule)
    gap = features["gap"].to_numpy()
    order = np.argsort(gap, kind="stable")
    moving = order[gap[order] > 0]
    if len(moving) <= screen:
        chosen = order[-screen:]  # the others are all at their targets
    else:
        random = np.random.default_rng(seed)
        chosen = np.array([random.choice(part) for part in np.array_split(moving, screen)])
    return Screening(units, np.sort(chosen), features, seed)


def check_screen(screen: int) -> None:
    """Refuse a number of closely looked at rows of which nothing can be learnt."""
    if type(screen) is not int or screen < 0 or 0 < screen < FEWEST:
        raise InputError(
            f"screen {screen!r} was given (--screen); expected how many rows are looked at "
            f"closely, at least {FEWEST}, or 0 for all of them"
        )


def say_cost(
    run: Run,
    ids: Sequence[str] | None,
    groups: Mapping[str, Sequence[str]] | None,
    *,
    looks: int,
    screen: int,
    sample_rows: int = SAMPLE_ROWS,
) -> None:
    """Say what a forecast of rows or groups costs, before any of it."""
    rows = len(run.train if ids is None else ids)
    units = rows
    if groups is not None:
        units, rows = len(groups), sum(len(group) for group in groups.values())
    close = units if screen == 0 else min(units, screen)
    look = Cost(gradients=looks, forwards=SCANS).total * rows / max(units, 1) + READ / 3
    sampled = min(sample_rows, len(run.train))
    losses = Cost(gradients=sampled, forwards=2 * (rows + sampled)).total
    kind = "rows" if groups is None else "groups"
    text = f"{units} {kind}, all looked at closely"
    if close < units:
        text = f"{units} {kind}: {close} looked at closely, the others screened by them"
    say(
        f"{text}; cost: {losses:.0f} row-gradients for losses and retained rows, at most "
        f"{close * look:.0f} for the close looks"
    )


def _features(units: Units, rule: Optimizer) -> pd.DataFrame:
    """What is known of all units: `FEATURES`, and `GRADIENT_FEATURES` where they are."""
    counts, members = units.run.tokens.counts, units.members
    features = pd.DataFrame(
        {
            "loss": units.loss,
            "base_loss": units.base_loss,
            "gap": units.target - units.loss,
            "tokens": np.array([counts[rows].sum() for rows in members], dtype=float),
            "share": np.array([len(rows) / len(counts) for rows in members]),
        }
    )
    if units.run.gradients_stored and units.run.manifest.geometry == "raw":
        for name, values in _gradient_features(units, rule).items():
            features[name] = np.array([values[rows].mean() for rows in members])
    return features


def _gradient_features(units: Units, rule: Optimizer) -> dict[str, np.ndarray]:
    """`GRADIENT_FEATURES` [N] of the training rows that are asked for, 0 of some others.

    Several processes share the rows out.
    """
    run, sample = units.run, units.sample
    values = {name: np.zeros(len(run.tokens)) for name in GRADIENT_FEATURES}
    skip = np.ones(len(run.tokens), dtype=bool)
    skip[np.concatenate(units.members)] = False
    at_once = units.at_once  # which all processes ask for together
    blocks = run.points[-1].gradient_blocks(skip, shared=True)
    parts = (
        (some, part)
        for rows, block in blocks
        for some, part in zip(
            np.split(rows, range(at_once, len(rows), at_once)),
            block.split(at_once),
            strict=True,
        )
    )
    for rows, gradients in parts:
        gradients = gradients / torch.from_numpy(run.tokens.counts[rows]).to(gradients)[:, None]
        first = torch.ones(len(rows), 1).to(gradients)
        moves, _ = rule.step(gradients, rule.begin(gradients), first, 1.0)
        lengths = moves.norm(dim=1).double().cpu().numpy()
        cross = units.sample_gradients.products(moves) ** 2 * run.tokens.counts[sample]
        cross /= np.maximum(lengths, 1e-300)[:, None] ** 2
        values["gradient_norm"][rows] = gradients.norm(dim=1).double().cpu().numpy()
        values["first_rise"][rows] = rule.first_rate(gradients, 1.0)
        values["cross"][rows] = mean_of(cross, rows[:, None] != sample)
    for each in values.values():
        distributed.add_up(torch.from_numpy(each))
    return values


# ---- what is learnt from the sample ------------------------------------------------------------


@dataclass(frozen=True)
class Logarithm:
    """The scale of steps, of which more than `limit` are infinite."""

    limit: int
    name: str = "steps"

    def to(self, values: np.ndarray) -> np.ndarray:
        """Logarithms."""
        return np.log(values)

    def back(self, values: np.ndarray) -> np.ndarray:
        """Steps."""
        return np.exp(values)


@dataclass(frozen=True)
class Arcsinh:
    """The scale of damages, linear in those far below `unit` and logarithmic beyond."""

    unit: float
    name: str = "damage"
    limit: float = np.inf

    @classmethod
    def of(cls, table: pd.DataFrame) -> Arcsinh:
        """With the median size of a table's damages."""
        sizes = np.abs(table["damage"].to_numpy(dtype=float))
        sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
        return cls(float(np.median(sizes)) if len(sizes) else 1.0)

    def to(self, values: np.ndarray) -> np.ndarray:
        """Logarithms, about."""
        return np.arcsinh(values / self.unit)

    def back(self, values: np.ndarray) -> np.ndarray:
        """Damages, nats per token."""
        return self.unit * np.sinh(values)


@dataclass(frozen=True, eq=False)
class Learnt:
    """What a sample teaches of one column.

    Attributes
    ----------
    scale : Logarithm or Arcsinh
    fit
        The regression; None where fewer than `FEWEST` rows taught anything.
    range : arrays [k], [k]
        Least and largest inputs in the sample: those beyond count as these.
    ends : floats
        Errors between which a new one falls with probability `LEVEL` at least.
    taught : int
        Rows that taught.
    spearman, error : floats
        Of what is said out of fold with what the close looks say; median relative error.
    """

    scale: Logarithm | Arcsinh
    fit: Any = None
    range: tuple[np.ndarray, np.ndarray] = (np.zeros(0), np.zeros(0))
    ends: tuple[float, float] = (-np.inf, np.inf)
    taught: int = 0
    spearman: float = np.nan
    error: float = np.nan

    def told(self, features: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Forecasts of units and the ends of their intervals, three arrays [units]."""
        if self.fit is None:
            unknown = np.full(len(features), np.inf if self.scale.name == "steps" else np.nan)
            return unknown, np.zeros(len(features)), unknown
        told = self.fit.predict(np.clip(inputs(features, tuple(features)), *self.range))
        low, high = (self.scale.back(told + end) for end in self.ends)
        return self.scale.back(told), low, high

    def record(self) -> dict[str, Any]:
        """How good it is, as JSON holds it; None for what is not known."""
        numbers = {"spearman": self.spearman, "median_relative_error": self.error}
        known = {key: value if np.isfinite(value) else None for key, value in numbers.items()}
        return {"taught": self.taught, **known}


def _learnt(
    features: pd.DataFrame, known: pd.DataFrame, scale: Logarithm | Arcsinh, seed: int
) -> Learnt:
    """Learn the column `scale.name` of the close looks `known` [k] from `features` [n]."""
    from sklearn.model_selection import KFold

    values = known[scale.name].to_numpy(dtype=float)
    teaching = (known["gap"].to_numpy(dtype=float) > 0) & ~np.isnan(values)
    values, y = values[teaching], scale.to(values[teaching])
    finite = np.isfinite(y)
    if finite.sum() < FEWEST:
        return Learnt(scale, taught=int(finite.sum()))
    x = inputs(features.loc[known.index[teaching]], tuple(features))
    told = np.empty(len(y))
    for rest, fold in KFold(FOLDS, shuffle=True, random_state=seed).split(x):
        rest = rest[finite[rest]]
        seen = np.clip(x[fold], x[rest].min(0), x[rest].max(0))
        told[fold] = _regression(x[rest], y[rest]).predict(seen)
    # A row beyond the limit that is told to be there is no error, whatever its distance.
    agreed = ~finite & (told > scale.to(np.array(float(scale.limit))))
    errors = np.where(agreed, 0.0, y - told)
    back = pd.Series(scale.back(told[finite]))
    return Learnt(
        scale,
        fit=_regression(x[finite], y[finite]),
        range=(x[finite].min(0), x[finite].max(0)),
        ends=conformal_ends(errors),
        taught=int(finite.sum()),
        spearman=float(back.corr(pd.Series(values[finite]), method="spearman")),
        error=float(np.median(np.abs(back / values[finite] - 1))),
    )


def _regression(x: np.ndarray, y: np.ndarray) -> Any:
    """Ridge regression of y [n] on standardised x [n, k], the penalty by leave-one-out."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(x, y)


def conformal_ends(errors: np.ndarray) -> tuple[float, float]:
    """Ends between which one more error falls with probability `LEVEL` or more.

    Each end is left out with half of what remains: the ceil((n + 1) (1 + LEVEL) / 2)-th smallest of
    the n errors, and the same from above; infinite where there are not so many.
    """
    n, errors = len(errors), np.sort(errors)
    place = int(np.ceil((n + 1) * (1 + LEVEL) / 2 - 1e-9))
    if place > n:
        return -np.inf, np.inf
    return float(errors[n - place]), float(errors[place - 1])
