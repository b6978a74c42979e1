"""Correction of a forecast of difficulty by what was measured of some of its rows.

Ridge regression (scikit-learn) of the measured steps and damage on the logarithms of the forecast
and its features, standardised, with the penalty chosen by leave-one-out. What is fitted is the
correction, so few rows suffice: of steps `log(measured / forecast)`; of damage, which may be below
0, `arcsinh(measured / s) - arcsinh(forecast / s)`, s the median of the measured sizes: linear in
small values, logarithmic in large ones. Features beyond the measured rows' range count as its ends.

Rows that were measured are told what the fits without them say (cross-validation, by the rows'
groups where these are known and enough: rows of one author teach about each other). The same
out-of-fold errors give the intervals, as quantiles with the correction for their number that split
conformal prediction has (Lei et al. 2018, arXiv 1604.04173), and the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from influence.errors import InputError

#: Columns that are learnt from.
FEATURES = (
    "steps",
    "damage",
    "loss",
    "base_loss",
    "gap",
    "tokens",
    "gradient_norm",
    "gradient_l1",
    "curvature",
    "self_influence",
    "first_order_steps",
    "moved",
    "closed_damage",
    "read_damage",
)
#: Features that may be below 0: they have roots in the place of logarithms.
SIGNED = ("damage", "closed_damage", "read_damage", "self_influence")
#: Rows that must have been measured; folds of the cross-validation, and the fewest groups that make
#: them; coverage of the intervals. Choices.
FEWEST, FOLDS, FEWEST_GROUPS, LEVEL = 20, 10, 3, 0.9
#: Penalties of the ridge regression, of which leave-one-out chooses.
PENALTIES = 10.0 ** np.arange(-2, 4)


@dataclass(frozen=True, eq=False)
class Correction:
    """Correction of one column, learnt from n measured rows.

    `fit` is the regression; `out_of_fold` [n] what the fits without a row say of its correction;
    `errors` [n] what they miss; `importances` as in `Calibration`.
    """

    fit: Any
    out_of_fold: np.ndarray
    errors: np.ndarray
    importances: dict[str, float]

    @property
    def ends(self) -> tuple[float, float]:
        """Errors between which a new one falls with probability `LEVEL`, given enough of them."""
        n = len(self.errors)
        outer = min(1.0, (1 + LEVEL) / 2 * (n + 1) / n)
        return float(np.quantile(self.errors, 1 - outer)), float(np.quantile(self.errors, outer))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Corrections of a forecast, learnt from n measured units.

    Attributes
    ----------
    features : k strings
    importances : dict
        For the corrections of `steps` and `damage`: fall of R^2 on the measured rows when a feature
        is shuffled, by name, the largest first.
    rows : int array [n]
        Places of the measured units in the table.
    steps, damage : arrays [n]
        Out-of-fold forecasts of the measured units, in the order of `rows`.
    spearman : dict
        Of `steps` and `damage` out of fold with what was measured.
    before : dict
        The same of the forecast as it was.
    error : float
        Median relative error of the steps, out of fold.
    measured, left_out : int
        Rows that taught something, and measured ones that did not: at their target from the start,
        or not found to reach it. What is said out of fold is of the former.
    """

    features: tuple[str, ...]
    importances: dict[str, dict[str, float]]
    rows: np.ndarray = field(repr=False)
    steps: np.ndarray = field(repr=False)
    damage: np.ndarray = field(repr=False)
    spearman: dict[str, float]
    before: dict[str, float]
    error: float
    measured: int
    left_out: int
    _corrections: Mapping[str, Correction] = field(repr=False)
    _unit: float = field(repr=False)
    _range: tuple[np.ndarray, np.ndarray] = field(repr=False)

    def applied(self, table: pd.DataFrame) -> pd.DataFrame:
        """The forecasts of all rows, corrected.

        Those of the measured rows are out of fold; rows without a finite forecast stay.
        """
        out, x = table.copy(), np.clip(inputs(table, self.features), *self._range)
        usable = np.isfinite(table["steps"]) & (table["steps"] > 0)
        of_steps, of_damage = (self._corrections[name] for name in ("steps", "damage"))
        log = np.log(table["steps"].where(usable, 1.0).to_numpy()) + of_steps.fit.predict(x)
        raw = _scaled(table["damage"].fillna(0.0), self._unit) + of_damage.fit.predict(x)
        log[self.rows], raw[self.rows] = np.log(self.steps), _scaled(self.damage, self._unit)
        (low, high), (down, up) = of_steps.ends, of_damage.ends
        columns = {
            "steps": np.exp(log),
            "steps_low": np.exp(log + low),
            "steps_high": np.exp(log + high),
            "damage": self._unit * np.sinh(raw),
            "damage_low": self._unit * np.sinh(raw + down),
            "damage_high": self._unit * np.sinh(raw + up),
        }
        for name, values in columns.items():
            out.loc[usable, name] = values[usable]
        return out

    def record(self) -> dict[str, Any]:
        """The calibration as JSON holds it."""
        return {
            "measured": self.measured,
            "left_out": self.left_out,
            "features": list(self.features),
            "importances": self.importances,
            "spearman": self.spearman,
            "spearman_before": self.before,
            "median_relative_error_of_steps": self.error,
            "level": LEVEL,
        }


def calibrate(
    table: pd.DataFrame,
    steps: np.ndarray,
    damage: np.ndarray,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Calibration:
    """Learn from the rows of a forecast that were measured.

    Parameters
    ----------
    table
        The forecast's rows, uncalibrated.
    steps, damage : arrays [rows of the table]
        What was measured; NaN where nothing was. Rows whose target was not reached (infinite steps)
        teach nothing.
    groups
        Group of every row, for the folds.
    seed
        Of the folds and of the shuffles that tell importances.

    Raises `InputError` where fewer than `FEWEST` rows teach something, or the lengths differ.
    """
    rows = _teaching_rows(table, steps, damage, groups)
    part, measured = table.iloc[rows], {"steps": steps[rows], "damage": damage[rows]}
    names = tuple(name for name in FEATURES if name in part and np.isfinite(part[name]).all())
    x, forecast = inputs(part, names), part["steps"].to_numpy()
    unit = max(float(np.median(np.abs(measured["damage"]))), 1e-12)
    scaled_forecast = _scaled(part["damage"], unit)
    wanted = {
        "steps": np.log(measured["steps"] / forecast),
        "damage": _scaled(measured["damage"], unit) - scaled_forecast,
    }
    folds, labels = _folds(None if groups is None else np.asarray(groups)[rows], seed)
    corrections = {name: _learnt(x, y, names, folds, labels, seed) for name, y in wanted.items()}
    corrected = {
        "steps": forecast * np.exp(corrections["steps"].out_of_fold),
        "damage": unit * np.sinh(corrections["damage"].out_of_fold + scaled_forecast),
    }
    missed = np.abs(corrected["steps"] - measured["steps"])
    return Calibration(
        features=names,
        importances={name: learnt.importances for name, learnt in corrections.items()},
        rows=rows,
        steps=corrected["steps"],
        damage=corrected["damage"],
        spearman={name: _rank(corrected[name], measured[name]) for name in corrected},
        before={name: _rank(part[name].to_numpy(), measured[name]) for name in corrected},
        error=float(np.median(missed / measured["steps"])),
        measured=len(rows),
        left_out=int((~np.isnan(steps)).sum()) - len(rows),
        _corrections=corrections,
        _unit=unit,
        _range=(x.min(0), x.max(0)),
    )


def _teaching_rows(
    table: pd.DataFrame, steps: np.ndarray, damage: np.ndarray, groups: Sequence[str] | None
) -> np.ndarray:
    """Places of the rows whose steps were forecast and measured as finite and above 0."""
    lengths = {len(steps), len(damage)} | (set() if groups is None else {len(groups)})
    if lengths != {len(table)}:
        raise InputError(
            f"{len(steps)} steps and {len(damage)} damages were given for a forecast of "
            f"{len(table)} rows; expected one of each a row (and of groups), NaN where nothing was "
            "measured"
        )
    measured = np.isfinite(steps) & np.isfinite(damage) & (steps > 0)
    rows = np.flatnonzero(measured & np.isfinite(table["steps"]) & (table["steps"] > 0))
    if len(rows) < FEWEST:
        raise InputError(
            f"{len(rows)} measured rows reached their targets and were not there from the start; a "
            f"calibration needs at least {FEWEST}: measure more rows (--calibrate N), or do without"
        )
    return rows


def _folds(labels: np.ndarray | None, seed: int) -> tuple[Any, np.ndarray | None]:
    """Folds of the measured rows, by their groups' `labels` [n] where there are enough of these."""
    from sklearn.model_selection import GroupKFold, KFold

    count = 0 if labels is None else min(FOLDS, len(set(labels.tolist())))
    if count < FEWEST_GROUPS:
        return KFold(FOLDS, shuffle=True, random_state=seed), None
    return GroupKFold(count, shuffle=True, random_state=seed), labels


def _learnt(
    x: np.ndarray,
    y: np.ndarray,
    names: Sequence[str],
    folds: Any,
    labels: np.ndarray | None,
    seed: int,
) -> Correction:
    """Regression of the corrections `y` [n] on the features `x` [n, k]."""
    from sklearn.inspection import permutation_importance
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
    out_of_fold = np.asarray(cross_val_predict(model, x, y, cv=folds, groups=labels))
    model.fit(x, y)
    shuffled = permutation_importance(model, x, y, n_repeats=10, random_state=seed)
    falls = np.asarray(shuffled["importances_mean"])
    importances = {names[int(k)]: float(falls[k]) for k in np.argsort(-falls)}
    return Correction(model, out_of_fold, y - out_of_fold, importances)


def _scaled(damage: Any, unit: float) -> np.ndarray:
    return np.arcsinh(np.asarray(damage) / unit)


def _rank(forecast: np.ndarray, measured: np.ndarray) -> float:
    return float(pd.Series(forecast).corr(pd.Series(measured), method="spearman"))


def inputs(table: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Features [n, k]: logarithms of what is positive by nature, signed roots of damages."""
    columns = []
    for name in names:
        values = table[name].to_numpy(dtype=float)
        values = np.where(np.isfinite(values), values, 0.0)
        if name in SIGNED:
            columns.append(np.sign(values) * np.sqrt(np.abs(values)))
        else:
            columns.append(np.log(np.maximum(values, 1e-9)))
    return np.stack(columns, axis=1)
