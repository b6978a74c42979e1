"""Unlearning difficulty told before anything is unlearned: steps, damage, their intervals, and what to do instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from influence.errors import InputError
from influence.progress import track
from influence.rows import Examples
from influence.run import Run
from influence.tables import write_table
from unlearn.difficulty.advice import MAX_DAMAGE, recommended
from unlearn.difficulty.calibration import Calibration, calibrate
from unlearn.difficulty.coarse_ascent import LOOKS, combined, joined, walk
from unlearn.difficulty.protocol import Protocol
from unlearn.difficulty.units import SAMPLE_ROWS, Units, units

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
#: How many times longer the coarse walk is than the ascent, by optimizer and number of looks; found on 50 of the testbed's rows.
LAG = {
    ("adam", 1): 1.8,
    ("adam", 2): 1.27,
    ("adam", 3): 1.16,
    ("sgd", 1): 5.0,
    ("sgd", 2): 1.5,
    ("sgd", 3): 1.15,
}
#: Ends of the interval: of steps as factors; of damage d, with the retained loss R, d - (a |d| + c R) and d + (b |d| + c R).
STEPS_SPREAD = {
    "adam": {1: (0.5, 1.6), 2: (0.75, 1.25), 3: (0.83, 1.17)},
    "sgd": {1: (0.4, 2.0), 2: (0.6, 1.5), 3: (0.75, 1.35)},
}
DAMAGE_SPREAD = (0.6, 1.0, 0.004)


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
    calibration : Calibration or None
    max_damage : float
        Share of `retained_loss` beyond which a method is not recommended.
    """

    table: pd.DataFrame = field(repr=False)
    protocol: dict[str, Any]
    looks: int
    retained_loss: float
    max_damage: float = MAX_DAMAGE
    calibration: Calibration | None = None

    def __len__(self) -> int:
        return len(self.table)

    def calibrated(
        self,
        steps: np.ndarray,
        damage: np.ndarray,
        groups: Sequence[str] | None = None,
        seed: int = 0,
    ) -> Forecast:
        """The forecast corrected by measurements of some of its rows; see `unlearn.difficulty.calibration.calibrate`."""
        if self.calibration is not None:
            raise InputError(
                "this forecast is calibrated already: calibrate the one that `predict` returned"
            )
        found = calibrate(self.table, steps, damage, groups, seed)
        table = found.applied(self.table)
        beyond = table["steps"] > self.protocol["steps"]
        table.loc[beyond, ["steps", "steps_low", "steps_high"]] = np.inf
        table.loc[beyond, ["damage", "damage_low", "damage_high"]] = np.nan
        table = recommended(table, self.retained_loss, self.max_damage, self.protocol["steps"])
        return replace(self, table=table, calibration=found)

    def with_measured(self, steps: np.ndarray, damage: np.ndarray) -> Forecast:
        """The table with `measured_steps` and `measured_damage` [n], NaN where nothing was measured; where it was, they decide
        what is recommended.
        """
        seen = ~np.isnan(steps)
        table = self.table.assign(
            steps=np.where(seen, steps, self.table["steps"]),
            damage=np.where(seen, damage, self.table["damage"]),
        )
        told = recommended(table, self.retained_loss, self.max_damage, self.protocol["steps"])
        out = self.table.assign(recommended=told["recommended"], reason=told["reason"])
        out.insert(len(COLUMNS), "measured_steps", steps)
        out.insert(len(COLUMNS) + 1, "measured_damage", damage)
        return replace(self, table=out)

    def record(self) -> dict[str, Any]:
        """As JSON holds it: what the table was made with."""
        return {
            "protocol": self.protocol,
            "looks": self.looks,
            "retained_loss": self.retained_loss,
            "max_damage": self.max_damage,
            "calibration": None if self.calibration is None else self.calibration.record(),
        }

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the table as CSV or Parquet, by the suffix; an existing file is refused without `overwrite`."""
        return write_table(self.table, path, overwrite=overwrite)


def lag(optimizer: str, looks: int) -> float:
    """How many times longer the coarse walk is than the ascent; beyond three looks what is above 1 falls as their number."""
    return LAG[optimizer, looks] if looks <= 3 else 1 + (LAG[optimizer, 3] - 1) * 3 / looks


def predict(
    run: Run,
    ids: Sequence[str] | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    protocol: Protocol | None = None,
    heldout: Examples | None = None,
    looks: int = LOOKS,
    max_damage: float = MAX_DAMAGE,
    sample_rows: int = SAMPLE_ROWS,
    seed: int = 0,
    asked: Units | None = None,
) -> Forecast:
    """Forecast how hard training rows are to unlearn by gradient ascent, and what to do with each.

    Nothing is unlearned: of every unit its two losses, `looks` gradients, at most four forward passes, and six of
    sampled rows (`unlearn.difficulty.coarse_ascent`). What is a pass of one row for a row is one of every member for a group.

    Parameters
    ----------
    ids, groups, protocol, heldout, sample_rows, seed
        As in `unlearn.difficulty.measured.measure`, whose steps and damage are forecast.
    looks
        Gradients a unit. One: a line scan along the first step's direction.
    max_damage
        Share of the retained rows' mean loss that ascent may cost where it is recommended.
    asked
        What `unlearn.difficulty.units.units` found for the same arguments, where it was called before.

    Returns
    -------
    Forecast
        Its table has the columns

        id                          the row's id, or the group's name
        steps, steps_low, _high     until the target; infinite where `protocol.steps` would not do. The ends are those that
                                    held about nine rows of ten of two small models, at the default rates; calibrated,
                                    of the rows that were measured
        damage, damage_low, _high   rise of the sampled training rows' mean loss by then, nats per token
        recommended, reason         edit, ascent, retrain or none (`unlearn.difficulty.advice`)

        and the features: loss, base_loss and gap (target - loss), nats per token; tokens of the completion; share of
        all training rows; gradient_norm and gradient_l1 of the mean loss; curvature, g^T C g / g^T g under the run's;
        self_influence, nats per token (at the adapter itself, first order); alignment, the cosine of the gradient
        with that of the sampled rows; first_order_steps, gap over the first step's rise; moved, the length of the
        walk's end |d|; closed_damage and read_damage, what the closed form and the rises read off tell alone.

    The closed form's two weights fit the rises of all units asked for together, so damage depends a little on who
    else is asked for.
    """
    if type(looks) is not int or looks < 1:
        raise InputError(f"looks {looks!r} was given; expected a whole number of at least 1")
    if not max_damage >= 0:
        raise InputError(
            f"max_damage {max_damage!r} was given; expected 0 or more, as in 0.1 for 10 %"
        )
    protocol = protocol or Protocol()
    asked = asked or units(run, ids, groups, protocol, heldout, sample_rows, seed)
    parts = [walk(asked, rows, protocol, looks) for rows in track(asked.chunks(copies=9), "looks")]
    found = joined(parts)
    features = found.features
    at_target = asked.now >= asked.target
    steps = np.where(found.steps > looks, found.steps / lag(protocol.optimizer, looks), found.steps)
    steps = np.where(steps <= protocol.steps, steps, np.inf)
    damage, closed_damage, read_damage = combined(found, asked.own)
    short, long = STEPS_SPREAD[protocol.optimizer][min(looks, 3)]
    below, above, always = DAMAGE_SPREAD
    retained = float(asked.sampled_now.mean())
    damage = np.where(at_target, 0.0, np.where(np.isfinite(steps), damage, np.nan))
    table = pd.DataFrame(
        {
            "id": list(asked.names),
            "steps": steps,
            "steps_low": steps * short,
            "steps_high": steps * long,
            "damage": damage,
            "damage_low": np.where(
                at_target, 0.0, damage - below * np.abs(damage) - always * retained
            ),
            "damage_high": np.where(
                at_target, 0.0, damage + above * np.abs(damage) + always * retained
            ),
            **features,
            "closed_damage": closed_damage,
            "read_damage": read_damage,
        }
    )
    return Forecast(
        recommended(table, retained, max_damage, protocol.steps),
        protocol.record(),
        looks,
        retained,
        max_damage,
    )
