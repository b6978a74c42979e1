"""A forecast of difficulty corrected by what was measured of a few rows.

Ridge regression (scikit-learn) of the measured steps and damage on the logarithms of the forecast and its features,
standardised, with the penalty chosen by leave-one-out. What is fitted is the correction, so few rows suffice: of
steps `log(measured / forecast)`; of damage, which may be below 0, `arcsinh(measured / s) - arcsinh(forecast / s)`, s
the median of the measured sizes: linear in small values, logarithmic in large ones. Features beyond the measured
rows' range count as its ends.

Rows that were measured are told what the fits without them say (cross-validation, by the rows' groups where these are
known and enough: rows of one author teach about each other). The same out-of-fold errors give the intervals, as
quantiles with the correction for their number that split conformal prediction has (Lei et al. 2018, arXiv
1604.04173), and the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
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
#: Rows that must have been measured; folds of the cross-validation; coverage of the intervals.
FEWEST, FOLDS, LEVEL = 20, 10, 0.9
PENALTIES = 10.0 ** np.arange(-2, 4)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was learnt, from n measured units.

    Attributes
    ----------
    features : k strings
    importances : dict
        For the corrections of `steps` and `damage`: fall of R^2 on the measured rows when a feature is shuffled, by
        name, the largest first.
    steps, damage : arrays [n]
        Out-of-fold forecasts of the measured units, in the order of `rows`.
    spearman : dict
        Of `steps` and `damage` out of fold with what was measured.
    before : dict
        The same of the forecast as it was.
    error : float
        Median relative error of the steps, out of fold.
    measured, left_out : int
        Rows that taught something, and measured ones that did not: at their target from the start, or not found to
        reach it. What is said out of fold is of the former.
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
    _fits: dict[str, Any] = field(repr=False)
    _errors: dict[str, np.ndarray] = field(repr=False)
    _unit: float = field(repr=False)
    _range: tuple[np.ndarray, np.ndarray] = field(repr=False)

    def applied(self, table: pd.DataFrame) -> pd.DataFrame:
        """The forecasts of all rows, corrected: those of the measured rows are out of fold. Rows without a finite forecast stay."""
        out, x = table.copy(), np.clip(inputs(table, self.features), *self._range)
        usable = np.isfinite(table["steps"]) & (table["steps"] > 0)
        log = np.log(table["steps"].where(usable, 1.0).to_numpy()) + self._fits["steps"].predict(x)
        raw = np.arcsinh(table["damage"].fillna(0.0).to_numpy() / self._unit) + self._fits[
            "damage"
        ].predict(x)
        log[self.rows], raw[self.rows] = np.log(self.steps), np.arcsinh(self.damage / self._unit)
        low, high = _ends(self._errors["steps"])
        down, up = _ends(self._errors["damage"])
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
        """As JSON holds it."""
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
        What was measured; NaN where nothing was. Rows whose target was not reached (infinite steps) teach nothing.
    groups
        Group of every row, for the folds.
    seed
        Of the folds and of the shuffles that tell importances.

    Raises `InputError` where fewer than `FEWEST` rows teach something.
    """
    from sklearn.inspection import permutation_importance
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not len(steps) == len(damage) == len(table) or (
        groups is not None and len(groups) != len(table)
    ):
        raise InputError(
            f"{len(steps)} steps and {len(damage)} damages were given for a forecast of {len(table)} rows; expected one of each a "
            "row (and of groups), NaN where nothing was measured"
        )
    rows = np.flatnonzero(
        np.isfinite(steps)
        & np.isfinite(damage)
        & (steps > 0)
        & np.isfinite(table["steps"])
        & (table["steps"] > 0)
    )
    if len(rows) < FEWEST:
        raise InputError(
            f"{len(rows)} measured rows reached their targets and were not there from the start; a calibration needs at least "
            f"{FEWEST}: measure more rows (--calibrate N), or do without"
        )
    part = table.iloc[rows]
    names = tuple(name for name in FEATURES if name in part and np.isfinite(part[name]).all())
    x, forecast = inputs(part, names), part["steps"].to_numpy()
    unit = max(float(np.median(np.abs(damage[rows]))), 1e-12)
    ahead = np.arcsinh(part["damage"].to_numpy() / unit)
    wanted = {
        "steps": np.log(steps[rows] / forecast),
        "damage": np.arcsinh(damage[rows] / unit) - ahead,
    }
    known = None if groups is None else np.asarray(groups)[rows]
    count = min(FOLDS, len(set(known.tolist()))) if known is not None else 0
    enough = count >= 3
    folds = (
        GroupKFold(count, shuffle=True, random_state=seed)
        if enough
        else KFold(FOLDS, shuffle=True, random_state=seed)
    )
    fits, errors, importances, told = {}, {}, {}, {}
    for name, y in wanted.items():
        model = make_pipeline(StandardScaler(), RidgeCV(PENALTIES))
        told[name] = cross_val_predict(model, x, y, cv=folds, groups=known if enough else None)
        errors[name] = y - told[name]
        fits[name] = model.fit(x, y)
        falls = np.asarray(
            permutation_importance(model, x, y, n_repeats=10, random_state=seed)["importances_mean"]
        )
        importances[name] = {names[k]: float(falls[k]) for k in np.argsort(-falls)}
    found = {
        "steps": forecast * np.exp(told["steps"]),
        "damage": unit * np.sinh(told["damage"] + ahead),
    }
    rank = lambda told, real: float(pd.Series(told).corr(pd.Series(real[rows]), method="spearman"))  # noqa: E731
    both = (("steps", steps), ("damage", damage))
    ranks = {name: rank(found[name], real) for name, real in both}
    before = {name: rank(part[name].to_numpy(), real) for name, real in both}
    error = float(np.median(np.abs(found["steps"] - steps[rows]) / steps[rows]))
    return Calibration(
        names,
        importances,
        rows,
        found["steps"],
        found["damage"],
        ranks,
        before,
        error,
        measured=len(rows),
        left_out=int((~np.isnan(steps)).sum()) - len(rows),
        _fits=fits,
        _errors=errors,
        _unit=unit,
        _range=(x.min(0), x.max(0)),
    )


def inputs(table: pd.DataFrame, names: Sequence[str]) -> np.ndarray:
    """Features [n, k]: logarithms of what is positive by nature, signed roots of damages."""
    columns = []
    for name in names:
        values = table[name].to_numpy(dtype=float)
        values = np.where(np.isfinite(values), values, 0.0)
        if name in ("damage", "closed_damage", "read_damage", "self_influence"):
            columns.append(np.sign(values) * np.sqrt(np.abs(values)))
        else:
            columns.append(np.log(np.maximum(values, 1e-9)))
    return np.stack(columns, axis=1)


def _ends(errors: np.ndarray) -> tuple[float, float]:
    """Quantiles of the errors between which a new one falls with probability `LEVEL`, at least where there are enough."""
    n = len(errors)
    outer = min(1.0, (1 + LEVEL) / 2 * (n + 1) / n)
    return float(np.quantile(errors, 1 - outer)), float(np.quantile(errors, outer))
