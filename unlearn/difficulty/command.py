"""What `unlearn difficulty` does of a run and its options: which units, in which order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from influence.errors import InputError
from influence.rows import Examples
from influence.run import Run
from unlearn.difficulty.calibration import FEWEST
from unlearn.difficulty.forecast import Forecast, predict
from unlearn.difficulty.measured import measure
from unlearn.difficulty.options import Difficulty
from unlearn.difficulty.protocol import Protocol
from unlearn.difficulty.screening import screening_of
from unlearn.difficulty.units import Units


def forecast_of(
    options: Difficulty, protocol: Protocol, run: Run, units: Units, holdout: Examples | None
) -> Forecast:
    """The forecast of all units: measured or corrected where asked, then screened."""
    screening = screening_of(units, protocol.rule, options.close_looks, options.seed)
    close = units if screening is None else screening.close
    protocol = close.paced(protocol)  # once: `measure` below takes some of the units
    forecast = predict(
        run,
        protocol=protocol,
        looks=options.looks,
        max_damage=options.max_damage,
        screen=0,
        units=close,
    )
    if options.measure or options.calibrate is not None:
        forecast = _measured(forecast, options, protocol, run, close, holdout)
    return forecast if screening is None else screening.extended(forecast)


def refuse_calibration(rows: int | None, count: int) -> None:
    """Refuse to calibrate on too few rows, or on more than were asked for."""
    if rows is not None and not FEWEST <= rows <= count:
        raise InputError(
            f"--calibrate {rows} was given with {count} rows (or groups) asked for closely; "
            f"a calibration takes {FEWEST} of them or more: ask for more rows, "
            "or leave --calibrate out"
        )


def _measured(
    forecast: Forecast,
    options: Difficulty,
    protocol: Protocol,
    run: Run,
    units: Units,
    holdout: Examples | None,
) -> Forecast:
    """The forecast with what all units took, or corrected by what the units of --calibrate took."""
    count, out = len(units), Path(options.out)
    drawn = np.sort(np.random.default_rng(options.seed).permutation(count)[: options.calibrate])
    measured = measure(
        run,
        protocol=protocol,
        holdout=holdout,
        out=out.with_name(out.stem + ".difficulty.h5"),
        overwrite=options.overwrite,
        units=units.select(drawn),
    )
    steps, damage = np.full((2, count), np.nan)
    steps[drawn], damage[drawn] = measured.steps, measured.damage
    if options.calibrate is not None:
        labels = None
        if not options.by_group:
            labels = [run.train[rows[0]].group for rows in units.members]
        named = [label for label in labels or () if label is not None]
        groups = named if len(named) == count else None
        forecast = forecast.calibrated(steps, damage, groups, options.seed)
    return forecast.with_measured(steps, damage)


def by_group(run: Run, ids: list[str] | None) -> dict[str, list[str]]:
    """All rows of every group that a row of `ids` is in, by the group.

    A row without a group is a unit of its own, by its id.
    """
    rows = run.train if ids is None else [run.train[run.train.index(id)] for id in ids]
    chosen = {row.id for row in rows}
    groups = {row.group for row in rows if row.group is not None}
    members: dict[str, list[str]] = {}
    for row in run.train:
        if row.group is not None and row.group in groups:
            members.setdefault(row.group, []).append(row.id)
        elif row.id in chosen:
            members.setdefault(row.id, []).append(row.id)
    return members
