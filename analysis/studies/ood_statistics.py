"""Statistics of planted rows: against their partners, over all rows, of whole kinds.

And the verdicts.

Against the partners, by bootstrap over them:

    steps       ratio of the mean steps to the target; a row that did not reach it counts with the
                most steps allowed
    damage      difference of the rise of the loss of original training rows at the target, nats
                per token
    area        difference of the area under that rise against the share of the gap
    per_nat     difference of damage per nat forgotten, both summed over the rows
    matched     difference of damage where both have forgotten as many nats as the one with the
                smaller gap; the rise is taken as straight between levels, which, as it bends
                upwards, overstates the damage of the one with the larger gap

A claim is answered `yes` or `no` where the interval over all kinds excludes equality and no single
kind's interval says the contrary, else `undecided`. **Steps**: more are needed. **Trade-off**: the
damage at the target is smaller. `per_nat` and `matched` are said beside it: the base gives an
unlikely row a high loss, so its target is far away, and who goes further pays more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.stats import bootstrap_interval, spearman
from analysis.studies.planting import KINDS, OUTSIDE
from unlearn.difficulty.measured import Measured

#: What equality is, for each comparison with the partners.
EQUAL = {"steps": 1.0, "damage": 0.0, "area": 0.0, "per_nat": 0.0, "matched": 0.0}

Row = Mapping[str, Any]


def compare(
    table: pd.DataFrame, most: int, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Every kind, and all of them together, against their partners.

    See the module for the measures.

    Parameters
    ----------
    table
        A line per planted row: `id`, `kind`, `partner`, `steps` (infinite: not reached within
        `most`), `damage`, `area`, `gap` (nats from the adapter to the target), `matched` and
        `matched_partner` (as `ood_measures.matched_damage` gives them).
    most
        The most steps allowed.
    level, resamples, seed
        Of the intervals; partners are resampled.

    Returns
    -------
    list of dict
        `kind` (one of them, or `all`), `measure`, `value`, `low`, `high`, `pairs` and `equal`. A
        pair of which one side's damage is unknown is left out of it.
    """
    rows = {row["id"]: row for row in table.to_dict("records")}
    options = {"level": level, "resamples": resamples, "seed": seed}
    kinds = [kind for kind in OUTSIDE if kind in set(table["kind"])]
    comparisons = []
    for kind in [*kinds, "all"]:
        pairs: dict[str, list[dict[str, Any]]] = {}
        for row in rows.values():
            if row["kind"] == kind or (kind == "all" and row["kind"] in kinds):
                pairs.setdefault(row["partner"], []).append(row)
        for quantity, equal in EQUAL.items():
            outside, inside = _pairs(pairs, rows, quantity, most)
            ends = _interval(outside, inside, quantity, **options)
            comparisons.append(
                {"kind": kind, "measure": quantity, **ends, "pairs": len(outside), "equal": equal}
            )
    return comparisons


def _pairs(
    pairs: Mapping[str, Sequence[Row]], rows: Mapping[str, Row], quantity: str, most: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Numerators and denominators [m, 2] of planted rows and of their partners.

    A pair of which one side is unknown is left out.

    Rows that share a partner are averaged.
    """
    outside = np.array(
        [[_part(row, quantity, most) for row in group] for group in pairs.values()]
    ).mean(1)
    if quantity == "matched":
        inside = np.array(
            [[(row["matched_partner"], 1.0) for row in group] for group in pairs.values()]
        ).mean(1)
    else:
        inside = np.array([_part(rows[partner], quantity, most) for partner in pairs])
    defined = np.isfinite(outside).all(1) & np.isfinite(inside).all(1)
    return outside[defined], inside[defined]


def _interval(
    outside: NDArray[np.float64], inside: NDArray[np.float64], quantity: str, **options: Any
) -> dict[str, float]:
    """`value`, `low` and `high` of one comparison. NaN without pairs."""
    if not len(outside):
        return dict.fromkeys(("value", "low", "high"), float("nan"))

    def statistic(some: NDArray[np.intp]) -> float:
        return _versus(outside[some], inside[some], quantity)

    interval = bootstrap_interval(statistic, len(outside), **options)
    return {
        "value": statistic(np.arange(len(outside))),
        "low": interval.low,
        "high": interval.high,
    }


def _part(row: Row, quantity: str, most: int) -> tuple[float, float]:
    """Numerator and denominator of one row, for `_versus`."""
    if quantity == "steps":
        return min(row["steps"], most), 1.0
    if quantity == "per_nat":
        return row["damage"], max(row["gap"], 0)
    return row[quantity], 1.0


def _versus(outside: NDArray[np.float64], inside: NDArray[np.float64], quantity: str) -> float:
    """Ratio of mean steps, or difference of the other measures, of pairs [m, 2]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (values[:, 0].sum() / values[:, 1].sum() for values in (outside, inside))
        value = first / second if quantity == "steps" else first - second
    return float(value) if np.isfinite(value) else float("nan")


def verdict(comparisons: Sequence[Row], quantity: str) -> str:
    """`yes`, `no` or `undecided`: do rows from outside need more `steps`, or cost less?

    By the interval of all kinds; where that of a single kind says the contrary, `undecided`.
    """
    answers = {
        entry["kind"]: _answer(entry) for entry in comparisons if entry["measure"] == quantity
    }
    contrary = {"yes": "no", "no": "yes"}.get(answers["all"])
    return "undecided" if contrary in answers.values() else answers["all"]


def _answer(entry: Row) -> str:
    above, below = entry["low"] > entry["equal"], entry["high"] < entry["equal"]  # NaN is neither
    if entry["measure"] != "steps":
        above, below = below, above
    return "yes" if above else "no" if below else "undecided"


def correlations(
    table: pd.DataFrame, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Spearman's rho of a row's distance from the training rows with its steps, damage and area.

    Each result has `forecast` (`base_loss`, `leverage`), `measure`, `spearman`, `low`, `high` (over
    rows), `rows`, and `within`: the mean rho over the kinds taken one by one, where the kinds' own
    differences play no part.
    """
    options = {"level": level, "resamples": resamples, "seed": seed}
    return [
        {"forecast": forecast, "measure": name, **_correlation(table, forecast, name, **options)}
        for forecast in ("base_loss", "leverage")
        for name in ("steps", "damage", "area")
    ]


def _correlation(table: pd.DataFrame, forecast: str, name: str, **options: Any) -> dict[str, float]:
    x, y = table[forecast].to_numpy(float), table[name].to_numpy(float)
    defined = np.isfinite(x) & ~np.isnan(y)  # infinite steps are the last rank
    x, y, kinds = x[defined], y[defined], table["kind"].to_numpy()[defined]
    rho = float(spearman(x, y)) if len(x) > 2 else float("nan")
    low = high = float("nan")
    if not np.isnan(rho):
        interval = bootstrap_interval(
            lambda some: float(spearman(x[some], y[some])), len(x), **options
        )
        low, high = interval.low, interval.high
    each = [float(spearman(x[kinds == k], y[kinds == k])) for k in KINDS if (kinds == k).sum() > 2]
    within = float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")
    return {"spearman": rho, "low": low, "high": high, "within": within, "rows": len(x)}


def whole_sets(
    whole: Measured,
    counts: Mapping[str, int],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Whole kinds unlearned at once, from measured groups `kind K`.

    Columns: `kind`, `rows` (as in `counts`), `start`, `target`, `steps`, `damage`, `area`, and
    `more`, `low`, `high`: the damage less that of `in`, with an interval over the training rows
    that tell it. There is one set of each kind: what another draw of its rows would cost is not in
    the interval.
    """
    at = [whole.names.index(f"kind {kind}") for kind in counts]
    columns = {
        name: getattr(whole, name)[at] for name in ("start", "target", "steps", "damage", "area")
    }
    more = whole.retained[at, -1] - whole.retained[whole.names.index("kind in"), -1]
    ends = np.full((len(at), 2), np.nan)
    for place in np.flatnonzero(np.isfinite(more).all(1)):
        interval = _mean_interval(more[place], level=level, resamples=resamples, seed=seed)
        ends[place] = interval
    table = {"kind": list(counts), "rows": list(counts.values()), **columns, "more": more.mean(1)}
    return pd.DataFrame({**table, "low": ends[:, 0], "high": ends[:, 1]})


def apart(
    measured: Measured, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Do groups of one difficulty cost less than mixed ones?

    From measured groups named as `difficulty_groups` names them. RUM (Zhao et al. 2024, arXiv
    2406.01257) unlearns homogeneous groups one after the other; what is compared here is the sum of
    the damages of groups that are each unlearned from the same adapter, of one difficulty against
    mixed ones of the same sizes. The interval is over the training rows that tell the damage.
    `together`: all rows as one group, once.
    """
    last = dict(zip(measured.names, measured.retained[:, -1], strict=True))
    homogeneous = np.sum([rise for name, rise in last.items() if name.startswith("part ")], axis=0)
    mixed = [rise for name, rise in last.items() if name.startswith("mixture ")]
    draws = len({name.partition(",")[0] for name in last if name.startswith("mixture ")})
    average = np.sum(mixed, axis=0) / draws
    difference = homogeneous - average
    low = high = float("nan")
    if np.isfinite(difference).all():
        low, high = _mean_interval(difference, level=level, resamples=resamples, seed=seed)
    return {
        "homogeneous": float(homogeneous.mean()),
        "mixed": float(average.mean()),
        "together": float(last["together"].mean()) if "together" in last else float("nan"),
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "helps": "yes" if high < 0 else "no" if low > 0 else "undecided",
        "parts": sum(name.startswith("part ") for name in last),
        "mixtures": draws,
    }


def _mean_interval(values: NDArray[np.float64], **options: Any) -> tuple[float, float]:
    """Ends of the bootstrap interval of a mean."""
    interval = bootstrap_interval(lambda some: float(values[some].mean()), len(values), **options)
    return interval.low, interval.high
