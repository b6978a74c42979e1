"""How hard a row is to unlearn by gradient ascent: measured by doing it, and forecast without.

`measure` climbs from the adapter, for every row (or group) alone, by the steps of `unlearn.difficulty.ascent` until the row's mean loss
reaches its target. What it finds of each, at quarters of the way (`LEVELS`, shares of the gap between the loss now and the
target):

    steps      fractional: where the loss crosses the target between two steps, by linear interpolation
    damage     rise of the mean loss of a fixed sample of training rows at the crossing, nats per token
    area       under the curve of damage against share of the gap, nats per token: low where forgetting costs late
    heldout    loss of held-out rows at every level, from which `analysis.studies.ood.exposures` reads relative exposure

`predict` answers before any of it (`unlearn.difficulty.forecast`): a few gradients and forward passes a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from influence.errors import InputError, MismatchError, StoreError
from influence.progress import track
from influence.rows import Examples
from influence.run import Run
from influence.store import RowFile, only_writer, open_file, read, read_strings, write_file
from unlearn.difficulty.ascent import Climb
from unlearn.difficulty.forecast import Forecast, predict
from unlearn.difficulty.protocol import Protocol
from unlearn.difficulty.units import SAMPLE_ROWS, Units, units

__all__ = ["LEVELS", "Forecast", "Measured", "Protocol", "measure", "predict", "read_measured"]

#: Shares of the way from the loss now to the target at which damage is measured; the last one is the target.
LEVELS = (0.25, 0.5, 0.75, 1.0)
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Measured:
    """What ascent cost each of n units. NaN where a level was not reached; a unit at its target from the start costs nothing.

    Attributes
    ----------
    names : n strings
    start, target : arrays [n]
        Mean loss before and at the end, nats per token.
    steps : array [n]
        Fractional steps to the target; infinite where `protocol.steps` did not reach it.
    losses : array [n, steps + 1]
        Mean loss before every step; NaN once the target was crossed.
    levels : array [c]
    retained : array [n, c, m]
        Rise of every sampled training row's mean loss at every level; NaN for the unit's own rows and copies of them.
    heldout : array [n, c, h]
        Mean loss of every held-out row at every level.
    retained_before, heldout_before : arrays [m], [h]
    sample : m strings
        Ids of the sampled training rows.
    protocol : dict
    """

    names: tuple[str, ...]
    start: np.ndarray = field(repr=False)
    target: np.ndarray = field(repr=False)
    steps: np.ndarray = field(repr=False)
    losses: np.ndarray = field(repr=False)
    levels: np.ndarray = field(repr=False)
    retained: np.ndarray = field(repr=False)
    heldout: np.ndarray = field(repr=False)
    retained_before: np.ndarray = field(repr=False)
    heldout_before: np.ndarray = field(repr=False)
    sample: tuple[str, ...] = field(repr=False)
    protocol: dict[str, Any]

    @property
    def curve(self) -> np.ndarray:
        """Mean rise of the sampled training rows' loss at every level, [n, c], nats per token."""
        counted = np.isfinite(self.retained).sum(2)
        total = np.nansum(self.retained, axis=2)
        return np.asarray(np.where(counted > 0, total / np.maximum(counted, 1), np.nan))

    @property
    def damage(self) -> np.ndarray:
        """Rise of the sampled training rows' mean loss at the target, [n], nats per token."""
        return self.curve[:, -1]

    @property
    def heldout_damage(self) -> np.ndarray:
        """Rise of the held-out rows' mean loss at the target, [n], nats per token; NaN without held-out rows."""
        if self.heldout.shape[2] == 0:
            return np.full(len(self.names), np.nan)
        return (self.heldout[:, -1] - self.heldout_before).mean(1)

    @property
    def area(self) -> np.ndarray:
        """Area under damage against share of the gap from 0 to 1, trapezoids, [n], nats per token."""
        x, y = (
            np.concatenate([[0], self.levels]),
            np.concatenate([np.zeros((len(self.names), 1)), self.curve], axis=1),
        )
        return np.asarray(np.trapezoid(y, x, axis=1))


def measure(
    run: Run,
    ids: Sequence[str] | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    protocol: Protocol | None = None,
    heldout: Examples | None = None,
    out: str | Path | None = None,
    sample_rows: int = SAMPLE_ROWS,
    seed: int = 0,
    overwrite: bool = False,
    asked: Units | None = None,
) -> Measured:
    """Unlearn every row, or group of rows, alone by gradient ascent and measure what it took.

    Many at a time, each with a copy of the adapter. The run's own adapter is where all of them start; nothing is saved but
    the measurements.

    Parameters
    ----------
    ids
        Training rows (default: all).
    groups
        In their place, groups of rows that are unlearned together, name: ids.
    protocol
        Optimizer, rate, target and most steps (`unlearn.difficulty.protocol.Protocol`).
    heldout
        Rows that the adapter never saw; evenly spaced ones of them are measured too.
    out
        HDF5 file, written unit by unit: the same call goes on where a killed one stopped, and reads a finished one.
    sample_rows, seed
        Size and choice of the sample of training rows whose loss tells the damage.
    overwrite
        Replace what is in `out`, if it is of another request; a file that has no measurements is never replaced.
    asked
        What `unlearn.difficulty.units.units` found for the same arguments, where it was called before.

    Raises `InputError` for rows that cannot be asked for, `MismatchError` where `out` is of another request.
    """
    protocol = protocol or Protocol()
    out = None if out is None else Path(out)
    if out is not None and out.suffix not in (".h5", ".hdf5"):
        raise InputError(
            f"{out} was given for measurements; they are written as HDF5: name a file that ends in .h5"
        )
    asked = asked or units(run, ids, groups, protocol, heldout, sample_rows, seed)
    if out is None:
        kept = {
            name: np.zeros(shape, kind) for name, (shape, kind) in _layout(asked, protocol).items()
        }
        for rows in track(_chunks(asked), "ascent"):
            for name, values in _climb(asked, rows, protocol).items():
                kept[name][rows] = values
        return _measured(asked, protocol, kept)
    with only_writer(out):
        _claim(out, asked, protocol, _request(asked, protocol, heldout), overwrite)
        _fill(out, asked, protocol)
    return read_measured(out)


def _chunks(asked: Units) -> list[np.ndarray]:
    return asked.chunks(
        copies=12
    )  # parameters, two moments, gradient, the step before, rows that are run, ends that wait


def _layout(asked: Units, protocol: Protocol) -> dict[str, tuple[tuple[int, ...], Any]]:
    n, held = len(asked), 0 if asked.heldout is None else len(asked.heldout)
    return {
        "steps": ((n,), np.float64),
        "losses": ((n, protocol.steps + 1), np.float64),
        "retained": ((n, len(LEVELS), len(asked.sample)), np.float64),
        "heldout": ((n, len(LEVELS), held), np.float64),
    }


def _climb(asked: Units, rows: np.ndarray, protocol: Protocol) -> dict[str, np.ndarray]:
    """Trajectories of the units `rows`, all of `_layout` for them."""
    shapes = _layout(asked, protocol)
    found = {name: np.full((len(rows), *shape[1:]), np.nan) for name, (shape, _) in shapes.items()}
    found["steps"][:] = np.inf
    most = len(rows)
    climb = Climb(asked.start, len(rows), protocol)
    live, before, last = np.arange(len(rows)), climb.theta, np.full(len(rows), np.nan)
    reached = np.zeros(len(rows), dtype=int)  # levels passed so far
    start, target = np.zeros(len(rows)), asked.target[rows]
    waiting: list[tuple[int, int, Tensor]] = []
    for number in range(protocol.steps + 1):
        now, gradient = asked.gradients(climb.theta, rows[live])
        found["losses"][live, number] = now
        if number == 0:
            start[live] = now
        for place, unit in enumerate(live):
            while reached[unit] < len(LEVELS):
                wanted = start[unit] + LEVELS[reached[unit]] * (target[unit] - start[unit])
                if not now[place] >= wanted:
                    break
                share = 1.0 if number == 0 else (wanted - last[unit]) / (now[place] - last[unit])
                there = before[place] + share * (climb.theta[place] - before[place])
                waiting.append((int(unit), int(reached[unit]), there))
                reached[unit] += 1
                if reached[unit] == len(LEVELS):
                    found["steps"][unit] = 0.0 if number == 0 else number - 1 + share
        while len(waiting) >= most:
            _look(asked, rows, waiting[:most], found)
            waiting = waiting[most:]
        last[live] = now
        going = np.flatnonzero((reached[live] < len(LEVELS)) & np.isfinite(now))
        if len(going) == 0 or number == protocol.steps:
            break
        if len(going) < len(live):
            climb.keep(going)
            gradient, live = gradient[torch.from_numpy(going).to(gradient.device)], live[going]
        before = climb.theta.clone()
        climb.step(gradient)
    if waiting:
        _look(asked, rows, waiting, found)
    return found


def _look(
    asked: Units,
    rows: np.ndarray,
    waiting: Sequence[tuple[int, int, Tensor]],
    found: dict[str, np.ndarray],
) -> None:
    """Measure the samples under some adapters, each of one unit at one level."""
    thetas = torch.stack([theta for _, _, theta in waiting])
    places, levels = (np.array([entry[k] for entry in waiting]) for k in (0, 1))
    rise = asked.sampled_losses(thetas) - asked.sampled_now
    found["retained"][places, levels] = np.where(asked.own[rows[places]], np.nan, rise)
    found["heldout"][places, levels] = asked.heldout_losses(thetas)


def _measured(asked: Units, protocol: Protocol, kept: Mapping[str, np.ndarray]) -> Measured:
    return Measured(
        asked.names,
        asked.now,
        asked.target,
        kept["steps"],
        kept["losses"],
        np.array(LEVELS),
        kept["retained"],
        kept["heldout"],
        asked.sampled_now,
        asked.heldout_losses(asked.start[None])[0],
        tuple(asked.run.train.ids[i] for i in asked.sample),
        protocol.record(),
    )


# ------------------------------------------------------------------------------------------------------ the file


def _request(asked: Units, protocol: Protocol, heldout: Examples | None) -> str:
    """Digest of what was asked: run, units, protocol, samples."""
    said = {
        "format": FORMAT,
        "run": asked.run.digest,
        "names": asked.names,
        "members": [rows.tolist() for rows in asked.members],
        "protocol": protocol.record(),
        "sample": asked.sample.tolist(),
        "heldout": None if heldout is None else heldout.digest,
        "levels": LEVELS,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _claim(out: Path, asked: Units, protocol: Protocol, request: str, overwrite: bool) -> None:
    """Lay the file out, or accept one of the same request; another one is refused."""
    if out.exists():
        with open_file(out) as file:
            known = file.attrs.get("request")
        if known == request:
            return
        if known is None:
            raise InputError(
                f"{out} is no file of measurements and is not replaced: name another one, or move it away"
            )
        if not overwrite:
            raise MismatchError(
                f"{out} has measurements of another request (other rows, protocol, samples or run): name another file, or "
                "give --overwrite to replace it"
            )
    empty = {
        name: np.zeros(shape, kind) for name, (shape, kind) in _layout(asked, protocol).items()
    }
    constant = _measured(asked, protocol, empty)
    write_file(
        out,
        {
            name: getattr(constant, name)
            for name in ("start", "target", "levels", "retained_before", "heldout_before")
        },
        attrs={
            "request": request,
            "run_digest": asked.run.digest,
            "protocol": json.dumps(protocol.record()),
        },
        rows={**_layout(asked, protocol), "done": ((len(asked),), np.uint8)},
        strings={"names": asked.names, "sample": constant.sample},
    )


def _fill(out: Path, asked: Units, protocol: Protocol) -> None:
    """Measure the units that are not done, and write each part as it is."""
    with open_file(out) as file:
        done = read(file, "done").astype(bool)
    left = [rows[~done[rows]] for rows in _chunks(asked)]
    for rows in track([rows for rows in left if len(rows)], "ascent"):
        for name, values in _climb(asked, rows, protocol).items():
            if values[0].size:
                with RowFile(out, name, write=True) as file:
                    file.write(rows, values)
                    file.flush()
        with RowFile(out, "done", write=True) as file:
            file.write(rows, np.ones(len(rows), np.uint8))
            file.flush()


def read_measured(path: str | Path) -> Measured:
    """Read the measurements of `measure`; `StoreError` for a file that is unfinished or none of them."""
    path = Path(path)
    with open_file(path) as file:
        if "request" not in file.attrs or not isinstance(file.get("done"), h5py.Dataset):
            raise StoreError(
                f"{path} has no measurements of unlearning difficulty: give a file of unlearn.difficulty.measure"
            )
        left = int((read(file, "done") == 0).sum())
        if left:
            raise StoreError(
                f"{path} is unfinished: {left} units are left; run the same measurement again to go on"
            )
        arrays = (
            "start",
            "target",
            "steps",
            "losses",
            "levels",
            "retained",
            "heldout",
            "retained_before",
            "heldout_before",
        )
        values = {name: read(file, name) for name in arrays}
        names, sample = (tuple(read_strings(file, name)) for name in ("names", "sample"))
        try:
            protocol = json.loads(str(file.attrs["protocol"]))
        except (KeyError, ValueError):
            raise StoreError(
                f"{path} does not say by which protocol it was measured: it is damaged; measure again"
            ) from None
        return Measured(names, sample=sample, protocol=protocol, **values)
