"""Measured difficulty: gradient ascent on every row alone, and what it cost.

`measure` climbs from the adapter, for every row (or group) alone, by the steps of
`unlearn.difficulty.ascent` until the row's mean loss reaches its target. What it finds of each, at
quarters of the way (`LEVELS`, shares of the gap between the loss now and the target):

    steps      fractional: where the loss crosses the target between two steps, by linear
               interpolation
    damage     rise of the mean loss of a fixed sample of training rows at the crossing, nats per
               token
    area       under the curve of damage against share of the gap, nats per token: low where
               forgetting costs late
    heldout    loss of held-out rows at every level, from which `analysis.studies.ood.exposures`
               reads relative exposure

`predict` answers before any of it (`unlearn.difficulty.forecast`): a few gradients and forward
passes a row.
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

from influence import distributed
from influence.errors import InputError, MismatchError, StoreError
from influence.progress import track
from influence.rows import Examples
from influence.run import Run
from influence.store import RowFile, only_writer, open_file, read, read_strings, write_file
from unlearn.difficulty.ascent import Climb
from unlearn.difficulty.protocol import Protocol
from unlearn.difficulty.units import SAMPLE_ROWS, Units, find_units

#: Shares of the way from the loss now to the target at which damage is measured; the last one is
#: the target.
LEVELS = (0.25, 0.5, 0.75, 1.0)
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Measured:
    """Cost of the ascents of n units.

    NaN where a level was not reached; a unit at its target from the start costs nothing.

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
        Rise of every sampled training row's mean loss at every level; NaN for the unit's own rows
        and copies of them.
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
        """Rise of the held-out rows' mean loss at the target, [n], nats per token, or NaN."""
        if self.heldout.shape[2] == 0:
            return np.full(len(self.names), np.nan)
        return (self.heldout[:, -1] - self.heldout_before).mean(1)

    @property
    def area(self) -> np.ndarray:
        """Area under damage against share of the gap from 0 to 1, trapezoids, [n], nats a token."""
        shares = np.concatenate([[0], self.levels])
        curve = np.concatenate([np.zeros((len(self.names), 1)), self.curve], axis=1)
        return np.asarray(np.trapezoid(curve, shares, axis=1))


def measure(
    run: Run,
    ids: Sequence[str] | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    protocol: Protocol | None = None,
    holdout: Examples | None = None,
    out: str | Path | None = None,
    sample_rows: int = SAMPLE_ROWS,
    seed: int = 0,
    memory: int | None = None,
    overwrite: bool = False,
    units: Units | None = None,
) -> Measured:
    """Unlearn every row, or group of rows, alone by gradient ascent and measure what it took.

    Many at a time, each with a copy of the adapter. The run's own adapter is where all of them
    start; nothing is saved but the measurements.

    Parameters
    ----------
    ids
        Training rows (default: all).
    groups
        In their place, groups of rows that are unlearned together, name: ids.
    protocol
        Optimizer, rate, target and most steps (`unlearn.difficulty.protocol.Protocol`).
    holdout
        Rows that the adapter never saw; evenly spaced ones of them are measured too.
    out
        HDF5 file, written unit by unit: the same call goes on where a killed one stopped, with any
        number of processes, and reads a finished one.
    sample_rows, seed
        Size and choice of the sample of training rows whose loss tells the damage.
    memory
        Bytes that copies of the adapter's parameters may take. None: half of what is free. It
        decides how many rows run at a time, and no result.
    overwrite
        Replace what is in `out`, if it is of another request; a file that has no measurements is
        never replaced.
    units
        What `unlearn.difficulty.units.find_units` found for the same arguments, where it was called
        before.

    Raises `InputError` for rows that cannot be asked for and for `memory` for less than one copy,
    `MismatchError` where `out` is of another
    request.
    """
    protocol = protocol or Protocol()
    out = None if out is None else Path(out)
    if out is not None and out.suffix not in (".h5", ".hdf5"):
        raise InputError(
            f"{out} was given for measurements; they are written as HDF5: name a file that ends in "
            ".h5"
        )
    units = units or find_units(run, ids, groups, protocol, holdout, sample_rows, seed, memory)
    protocol = units.paced(protocol)
    if out is None:
        arrays, mine = _empty(units, protocol), units.own_chunks()
        with distributed.alone():
            parts = {
                number: (rows, climb_units(units, rows, protocol))
                for number, rows in zip(mine, track(list(mine.values()), "ascent"), strict=True)
            }
        for rows, found in distributed.told_by_all(parts).values():
            for name, values in found.items():
                arrays[name][rows] = values
        return _measured(units, protocol, arrays)
    request = _request(units, protocol, holdout)
    with distributed.held_by_first(only_writer(out)):
        distributed.at_first(lambda: _claim(out, units, protocol, request, overwrite))
        _fill(out, units, protocol)
        distributed.wait()  # the units of all processes are in the file
    return read_measured(out)


def _layout(units: Units, protocol: Protocol) -> dict[str, tuple[tuple[int, ...], Any]]:
    n, held_out = len(units), 0 if units.holdout is None else len(units.holdout)
    return {
        "steps": ((n,), np.float64),
        "losses": ((n, protocol.steps + 1), np.float64),
        "retained": ((n, len(LEVELS), len(units.sample)), np.float64),
        "heldout": ((n, len(LEVELS), held_out), np.float64),
    }


def _empty(units: Units, protocol: Protocol) -> dict[str, np.ndarray]:
    layout = _layout(units, protocol)
    return {name: np.zeros(shape, kind) for name, (shape, kind) in layout.items()}


# ---- the ascents ----------------------------------------------------------------------


def climb_units(units: Units, rows: np.ndarray, protocol: Protocol) -> dict[str, np.ndarray]:
    """Climb the units `rows` to their targets, and return all of `_layout` for them."""
    climb = Climb(units.start, len(rows), protocol)
    crossings = Crossings(units, rows, protocol)
    live, before = np.arange(len(rows)), climb.theta
    for number in range(protocol.steps + 1):
        losses, gradient = units.gradients(climb.theta, rows[live])
        crossings.note(number, live, losses, before, climb.theta)
        going = np.flatnonzero(crossings.remain(live) & np.isfinite(losses))
        if len(going) == 0 or number == protocol.steps:
            break
        if len(going) < len(live):
            climb.keep(going)
            gradient = gradient[torch.from_numpy(going).to(gradient.device)]
            live = live[going]
        before = climb.theta.clone()
        climb.step(gradient)
    return crossings.arrays()


class Crossings:
    """Levels that the units `rows` [c] of a chunk cross, and the samples' losses where they do.

    A crossing is an adapter between two steps. Crossings wait until there are as many as the chunk
    has units, and are measured in one batch then.
    """

    def __init__(self, units: Units, rows: np.ndarray, protocol: Protocol) -> None:
        self.units, self.rows = units, rows
        self._arrays = {
            name: np.full((len(rows), *shape[1:]), np.nan)
            for name, (shape, _) in _layout(units, protocol).items()
        }
        self._arrays["steps"][:] = np.inf
        self._passed = np.zeros(len(rows), dtype=int)  # levels of every unit so far
        self._waiting: list[tuple[int, int, Tensor]] = []  # unit, level, adapter

    def note(
        self, number: int, live: np.ndarray, losses: np.ndarray, before: Tensor, after: Tensor
    ) -> None:
        """Note the `losses` [live] of the units `live` after `number` steps.

        `before`, `after` [live, P]: their adapters around the last step.
        """
        self._arrays["losses"][live, number] = losses
        for place, unit in enumerate(live):
            while (share := self._share_of_step(number, unit)) is not None:
                theta = before[place] + share * (after[place] - before[place])
                self._waiting.append((int(unit), int(self._passed[unit]), theta))
                self._passed[unit] += 1
                if self._passed[unit] == len(LEVELS):
                    self._arrays["steps"][unit] = 0.0 if number == 0 else number - 1 + share
        # No more wait than the chunk has units: the memory has room for so many.
        while len(self._waiting) >= len(self.rows):
            self._measure(self._waiting[: len(self.rows)])
            self._waiting = self._waiting[len(self.rows) :]

    def _share_of_step(self, number: int, unit: int) -> float | None:
        """Share of the last step at which a unit crossed its next level, or None."""
        if self._passed[unit] == len(LEVELS):
            return None
        losses, target = self._arrays["losses"][unit], self.units.target[self.rows[unit]]
        level = losses[0] + LEVELS[self._passed[unit]] * (target - losses[0])
        if not losses[number] >= level:  # also where the loss is NaN
            return None
        if number == 0:
            return 1.0
        return (level - losses[number - 1]) / (losses[number] - losses[number - 1])

    def remain(self, live: np.ndarray) -> np.ndarray:
        """Whether the units `live` have levels before them, bool [live]."""
        return self._passed[live] < len(LEVELS)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of `_layout`, once the crossings that still wait are measured."""
        if self._waiting:
            self._measure(self._waiting)
            self._waiting = []
        return self._arrays

    def _measure(self, crossings: Sequence[tuple[int, int, Tensor]]) -> None:
        thetas = torch.stack([theta for _, _, theta in crossings])
        places, levels = (np.array([crossing[k] for crossing in crossings]) for k in (0, 1))
        rises = self.units.sample_losses(thetas) - self.units.sample_loss
        excluded = self.units.excluded[self.rows[places]]
        self._arrays["retained"][places, levels] = np.where(excluded, np.nan, rises)
        self._arrays["heldout"][places, levels] = self.units.holdout_losses(thetas)


def _measured(units: Units, protocol: Protocol, arrays: Mapping[str, np.ndarray]) -> Measured:
    return Measured(
        names=units.names,
        start=units.loss,
        target=units.target,
        steps=arrays["steps"],
        losses=arrays["losses"],
        levels=np.array(LEVELS),
        retained=arrays["retained"],
        heldout=arrays["heldout"],
        retained_before=units.sample_loss,
        heldout_before=units.holdout_losses(units.start[None])[0],
        sample=tuple(units.run.train.ids[row] for row in units.sample),
        protocol=protocol.record(),
    )


# ---- the file -------------------------------------------------------------------------


def _request(units: Units, protocol: Protocol, holdout: Examples | None) -> str:
    """Digest of what is measured: run, units, protocol, samples."""
    request = {
        "format": FORMAT,
        "run": units.run.digest,
        "names": units.names,
        "members": [rows.tolist() for rows in units.members],
        "protocol": protocol.record(),
        "sample": units.sample.tolist(),
        "heldout": None if holdout is None else holdout.digest,
        "levels": LEVELS,
    }
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _claim(out: Path, units: Units, protocol: Protocol, request: str, overwrite: bool) -> None:
    """Lay the file out, or accept one of the same request, and refuse any other."""
    if out.exists():
        with open_file(out) as file:
            stored = file.attrs.get("request")
        if stored == request:
            return
        if stored is None:
            raise InputError(
                f"{out} is no file of measurements and is not replaced: name another one, or move "
                "it away"
            )
        if not overwrite:
            raise MismatchError(
                f"{out} has measurements of another request (other rows, protocol, samples or "
                "run): name another file, or give --overwrite to replace it"
            )
    constant = _measured(units, protocol, _empty(units, protocol))
    names = ("start", "target", "levels", "retained_before", "heldout_before")
    write_file(
        out,
        {name: getattr(constant, name) for name in names},
        attrs={
            "request": request,
            "run_digest": units.run.digest,
            "protocol": json.dumps(protocol.record()),
        },
        rows={**_layout(units, protocol), "done": ((len(units),), np.uint8)},
        strings={"names": units.names, "sample": constant.sample},
    )


def _fill(out: Path, units: Units, protocol: Protocol) -> None:
    """Measure the units that are not done, and write each part as it is.

    Several processes deal them out, and each writes its own: rows are written at their places.
    """

    def left() -> np.ndarray:
        """The units that are not done."""
        with open_file(out) as file:
            return np.flatnonzero(read(file, "done") == 0)

    mine = list(units.own_chunks(distributed.at_first(left)).values())
    for rows in track(mine, "ascent"):
        with distributed.alone():
            measured = climb_units(units, rows, protocol)
        for name, values in measured.items():
            if values[0].size:
                with RowFile(out, name, write=True) as file:
                    file.write(rows, values)
                    file.flush()
        # The mark comes last: a kill before it leaves rows that are measured again, never half of
        # one.
        with RowFile(out, "done", write=True) as file:
            file.write(rows, np.ones(len(rows), np.uint8))
            file.flush()


def read_measured(path: str | Path) -> Measured:
    """Read the measurements of `measure`.

    Raises `StoreError` for a file that is unfinished, damaged, or none of them.
    """
    path = Path(path)
    with open_file(path) as file:
        if "request" not in file.attrs or not isinstance(file.get("done"), h5py.Dataset):
            raise StoreError(
                f"{path} has no measurements of unlearning difficulty: give a file of "
                "unlearn.difficulty.measure"
            )
        remaining = int((read(file, "done") == 0).sum())
        if remaining:
            raise StoreError(
                f"{path} is unfinished: {remaining} units are left; run the same measurement again "
                "to go on"
            )
        arrays = ["start", "target", "steps", "losses", "levels", "retained", "heldout"]
        arrays += ["retained_before", "heldout_before"]
        values = {name: read(file, name) for name in arrays}
        names, sample = (tuple(read_strings(file, name)) for name in ("names", "sample"))
        try:
            protocol = json.loads(str(file.attrs["protocol"]))
        except (KeyError, ValueError):
            raise StoreError(
                f"{path} does not say by which protocol it was measured: it is damaged; measure "
                "again"
            ) from None
        return Measured(names, sample=sample, protocol=protocol, **values)
