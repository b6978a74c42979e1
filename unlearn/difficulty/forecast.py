"""Forecast of the steps and damage of unlearning rows, with intervals, and what to do with each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from influence import distributed
from influence.errors import InputError
from influence.progress import track
from influence.rows import Examples
from influence.run import Run
from influence.tables import write_table
from unlearn import cards
from unlearn.difficulty.advice import MAX_DAMAGE, recommended
from unlearn.difficulty.calibration import Calibration, calibrate
from unlearn.difficulty.coarse_ascent import LOOKS, Walked, combined, joined, walk
from unlearn.difficulty.protocol import Protocol
from unlearn.difficulty.screening import CLOSE, SCREEN, check_screen, say_cost, screening_of
from unlearn.difficulty.units import SAMPLE_ROWS, Units, find_units

#: Columns that every forecast begins with; one for each feature follows.
COLUMNS = (
    "id",
    "steps",
    "steps_low",
    "steps_high",
    "damage",
    "damage_low",
    "damage_high",
    "recommended",
    "reason",
)
#: Ends (a, b, c) of the interval of damage d: with the retained loss R, d - (a |d| + c R) and d +
#: (b |d| + c R). Set on 60 rows each of the testbed, its two other regimes and the demo, under both
#: optimizers, and 20 of SmolLM2, where they hold 88 to 100 % (benchmarks/README.md, "Difficulty of
#: unlearning").
DAMAGE_SPREAD = (0.55, 0.8, 0.008)


@dataclass(frozen=True, eq=False)
class Forecast:
    """Forecasts of n units.

    Attributes
    ----------
    table : DataFrame
        A row for each unit, columns as in `predict`.
    protocol : dict
        Optimizer, rate, target and most steps of the ascent that is forecast.
    looks : int
        Gradients that were taken of a unit.
    retained_loss : float
        Mean loss of the sampled training rows now, nats per token: what damage is compared with.
    max_damage : float
        Share of `retained_loss` beyond which a method is not recommended.
    calibration : Calibration or None
    screening : dict or None
        Where not all units were looked at closely: how many were, and how good the forecasts of the
        others are (`unlearn.difficulty.screening`).
    """

    table: pd.DataFrame = field(repr=False)
    protocol: dict[str, Any]
    looks: int
    retained_loss: float
    max_damage: float = MAX_DAMAGE
    calibration: Calibration | None = None
    screening: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return cards.forecast_line(self)

    def _repr_html_(self) -> str:
        return cards.forecast_card(self)

    def calibrated(
        self,
        steps: np.ndarray,
        damage: np.ndarray,
        groups: Sequence[str] | None = None,
        seed: int = 0,
    ) -> Forecast:
        """The forecast corrected by measurements of some of its rows.

        Arguments and errors are those of `unlearn.difficulty.calibration.calibrate`.
        """
        if self.calibration is not None:
            raise InputError(
                "this forecast is calibrated already: calibrate the one that `predict` returned"
            )
        calibration = calibrate(self.table, steps, damage, groups, seed)
        table = calibration.applied(self.table)
        beyond = table["steps"] > self.protocol["steps"]
        table.loc[beyond, ["steps", "steps_low", "steps_high"]] = np.inf
        table.loc[beyond, ["damage", "damage_low", "damage_high"]] = np.nan
        return replace(self, table=self._recommended(table), calibration=calibration)

    def with_measured(self, steps: np.ndarray, damage: np.ndarray) -> Forecast:
        """The forecast with measured `steps` and `damage` [n] beside it, NaN where none was.

        They are the columns `measured_steps` and `measured_damage`, and decide what is recommended
        where they are known.
        """
        measured = ~np.isnan(steps)
        decisive = self.table.assign(
            steps=np.where(measured, steps, self.table["steps"]),
            damage=np.where(measured, damage, self.table["damage"]),
        )
        advice = self._recommended(decisive)
        table = self.table.assign(recommended=advice["recommended"], reason=advice["reason"])
        table.insert(len(COLUMNS), "measured_steps", steps)
        table.insert(len(COLUMNS) + 1, "measured_damage", damage)
        return replace(self, table=table)

    def _recommended(self, table: pd.DataFrame) -> pd.DataFrame:
        return recommended(table, self.retained_loss, self.max_damage, self.protocol["steps"])

    def record(self) -> dict[str, Any]:
        """What the table was made with, as JSON holds it."""
        return {
            "protocol": self.protocol,
            "looks": self.looks,
            "retained_loss": self.retained_loss,
            "max_damage": self.max_damage,
            "calibration": None if self.calibration is None else self.calibration.record(),
            "screening": self.screening,
        }

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the table as CSV or Parquet, by the suffix.

        An existing file is refused without `overwrite`. Of several processes the first writes.
        """
        return distributed.at_first(lambda: write_table(self.table, path, overwrite=overwrite))


def predict(
    run: Run,
    ids: Sequence[str] | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    protocol: Protocol | None = None,
    holdout: Examples | None = None,
    looks: int = LOOKS,
    max_damage: float = MAX_DAMAGE,
    sample_rows: int = SAMPLE_ROWS,
    seed: int = 0,
    screen: int = SCREEN,
    memory: int | None = None,
    units: Units | None = None,
) -> Forecast:
    """Forecast how hard training rows are to unlearn by gradient ascent, and what to do with each.

    Nothing is unlearned: of every unit its two losses, `looks` gradients, at most four forward
    passes, and six of sampled rows (`unlearn.difficulty.coarse_ascent`). What is a pass of one row
    for a row is one of every member for a group.

    Parameters
    ----------
    ids, groups, protocol, holdout, sample_rows, seed, memory
        As in `unlearn.difficulty.measured.measure`, whose steps and damage are forecast.
    looks
        Gradients a unit. One: a line scan along the first step's direction.
    max_damage
        Share of the retained rows' mean loss that ascent may cost where it is recommended.
    screen
        Units that are looked at closely where more are asked for; the others are screened by them
        (`unlearn.difficulty.screening`). 0: all are looked at closely.
    units
        What `unlearn.difficulty.units.find_units` found for the same arguments, where it was called
        before.

    Returns
    -------
    Forecast
        Its table has the columns

        id                          the row's id, or the group's name
        steps, steps_low, _high     until the target; infinite where `protocol.steps` would not do.
                                    The ends should hold nine rows of ten: they did on four small
                                    worlds, at the default strides; calibrated, they are those of
                                    the rows that were measured
        damage, damage_low, _high   rise of the sampled training rows' mean loss by then, nats per
                                    token
        recommended, reason         edit, ascent, retrain or none (`unlearn.difficulty.advice`)

        and the features: loss, base_loss and gap (target - loss), nats per token; tokens of the
        completion; share of all training rows; gradient_norm and gradient_l1 of the mean loss;
        curvature, g^T C g / g^T g under the run's; self_influence, nats per token (at the adapter
        itself, first order); alignment, the cosine of the gradient with that of the sampled rows;
        first_order_steps, gap over the first step's rise; moved, the length of the walk's end |d|;
        closed_damage and read_damage, what the closed form and the rises read off tell alone. Then how:
    close, or screened, of which only loss, base_loss, gap, tokens and share are known.

    The closed form's two weights fit the rises of all units asked for together, so damage depends a
    little on who else is asked for. Raises `InputError` for `looks`, `max_damage` or `screen` out of
    range, and what `find_units` raises.
    """
    if type(looks) is not int or looks < 1:
        raise InputError(f"looks {looks!r} was given; expected a whole number of at least 1")
    if not max_damage >= 0:
        raise InputError(
            f"max_damage {max_damage!r} was given; expected 0 or more, as in 0.1 for 10 %"
        )
    check_screen(screen)
    protocol = protocol or Protocol()
    if units is None:
        say_cost(run, ids, groups, looks=looks, screen=screen, sample_rows=sample_rows)
        units = find_units(run, ids, groups, protocol, holdout, sample_rows, seed, memory)
    screening = screening_of(units, protocol.rule, screen, seed)
    if screening is not None:
        units = screening.close
    protocol = units.paced(protocol)
    for point in run.points:  # by all processes together: some add up sums while they load it
        point.curvature()
    mine = units.own_chunks()
    with distributed.alone():
        parts = {
            number: walk(units, rows, protocol, looks)
            for number, rows in zip(mine, track(list(mine.values()), "looks"), strict=True)
        }
    walked = joined(list(distributed.told_by_all(parts).values()))
    retained_loss = float(units.sample_loss.mean())
    table = _table(units, walked, protocol, looks, retained_loss)
    table = recommended(table, retained_loss, max_damage, protocol.steps)
    forecast = Forecast(table, protocol.record(), looks, retained_loss, max_damage)
    return forecast if screening is None else screening.extended(forecast)


def _table(
    units: Units, walked: Walked, protocol: Protocol, looks: int, retained_loss: float
) -> pd.DataFrame:
    """The forecasts and their features, without advice: coarse ascents corrected for their lag."""
    rule, first_order = protocol.rule, walked.features["first_order_steps"]
    moving = np.isfinite(walked.steps) & (walked.steps > 0)
    acceleration = np.where(moving, first_order / np.where(moving, walked.steps, 1.0), 1.0)
    # A walk of no more steps than looks took a gradient at every one of them: it is the ascent.
    log_lag = np.where(walked.steps > looks, rule.log_lag(looks, acceleration), 0.0)
    steps = walked.steps * np.exp(-log_lag)
    steps = np.where(steps <= protocol.steps, steps, np.inf)
    factor = np.exp(rule.log_width(looks, log_lag))
    at_target = units.loss >= units.target
    damage, closed_damage, read_damage = combined(walked, units.excluded)
    damage = damage * np.exp(-log_lag)  # it grows with the way, which is longer by the lag
    damage = np.where(at_target, 0.0, np.where(np.isfinite(steps), damage, np.nan))
    below, above, floor = DAMAGE_SPREAD
    low = damage - below * np.abs(damage) - floor * retained_loss
    high = damage + above * np.abs(damage) + floor * retained_loss
    return pd.DataFrame(
        {
            "id": list(units.names),
            "steps": steps,
            "steps_low": steps / factor,
            "steps_high": steps * factor,
            "damage": damage,
            "damage_low": np.where(at_target, 0.0, low),
            "damage_high": np.where(at_target, 0.0, high),
            **walked.features,
            "closed_damage": closed_damage,
            "read_damage": read_damage,
            "how": CLOSE,
        }
    )
