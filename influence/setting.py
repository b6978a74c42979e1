"""What scores are made with: points of a run, and the damped curvature at each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from influence.at_point import AtPoint
from influence.curvature.base import Damped
from influence.damping import Damping
from influence.errors import InputError, NumericalError
from influence.run import Run

#: How a row's score counts the other rows that teach the same (`influence.credit`).
ADDITIVE, SHARED = "additive", "shared"
CREDITS = (SHARED, ADDITIVE)


@dataclass(frozen=True)
class Setting:
    """The points that scores look at, and the damped curvature at each of them.

    `run` holds the factors and `owner` is the run that was asked, which may be one above it
    (`analysis tune`). `scales` [points] are the points' mean self-influences, 1 of a single point;
    `factors` [points] what their scores are multiplied by before they are added (`kappa a_p` in the
    module's convention), `kappa` among it; `rule` is the damping as it was asked for, None for the
    identity; `credit` how rows share what they teach (`influence.credit`), where scales do not
    count.
    """

    owner: Run
    run: Run
    points: tuple[AtPoint, ...]
    operators: tuple[Damped, ...]
    scales: np.ndarray
    factors: np.ndarray
    rule: str | None
    calibration: str
    credit: str = ADDITIVE
    kappa: float = 1.0

    @classmethod
    def of(
        cls,
        run: Run,
        curvature: str | None = None,
        damping: str | Damping | None = None,
        at: str | None = None,
        *,
        tuned: bool = True,
        calibrated: bool = True,
        credit: str = ADDITIVE,
    ) -> Setting:
        """Option by option, what is typed wins over what `analysis tune` chose, which wins over the
        fit's.

        A point that only the run itself has (`at`) is looked at there.
        """
        if damping is not None and curvature is not None and run.is_plain(curvature):
            raise InputError(
                f"damping {damping} was given with the curvature {curvature}, which means C + "
                "lambda I := I and has none: leave "
                "it out, or give another curvature"
            )
        owner, chosen = run, run.tuned if tuned else None
        if chosen is not None:
            there = {"all", "end", *(point.place.label for point in chosen.run.points)}
            if at is None or at in there:
                run = chosen.run
            # the damping and points of plain products are no other curvature's
            asked_plain = curvature is not None and run.is_plain(curvature)
            plain = asked_plain or run.is_plain(chosen.curvature)
            at = at or (None if plain and curvature not in (None, chosen.curvature) else chosen.at)
            damping = damping or (None if plain else chosen.damping)
            curvature = curvature or chosen.curvature
        points = points_of(run, curvature, at)
        operators = tuple(point.operator(curvature, damping) for point in points)
        rule = (
            None
            if operators[0].curvature.undamped
            else str(Damping.parse(damping or run.manifest.damping))
        )
        shares = np.array([point.place.share for point in points])
        scales = np.ones(len(points))
        if len(points) > 1 and credit == ADDITIVE:
            name = setting_name(run, operators[0].curvature.name, rule, points)
            known = run.manifest.calibration.get(name)
            kept = () if known is None else known.scales
            each = zip(points, operators, strict=True)
            scales = np.array(kept or [point.scale(operator) for point, operator in each])
            if not (np.isfinite(scales).all() and (scales > 0).all()):
                labels = ", ".join(point.place.label for point in points)
                raise NumericalError(
                    f"the mean self-influence at the points {labels} is {scales}: points "
                    "without gradients cannot be averaged; give --at one of the others"
                )
        shares = shares / shares.sum()
        factors = shares * (shares @ scales) / scales
        setting = cls(owner, run, points, operators, scales, factors, rule, "none", credit)
        return setting.calibrated() if calibrated else setting

    def calibrated(self) -> Setting:
        """The same with the manifest's calibration, where that was measured for this very
        setting.
        """
        known = self.run.manifest.calibration.get(self.name)
        if known is None:
            return self
        factors = self.factors * known.factor
        return replace(self, factors=factors, kappa=known.factor, calibration=known.source)

    @property
    def name(self) -> str:
        """The setting in one line: geometry, curvature, damping, points, and shared credit."""
        name = setting_name(self.run, self.operators[0].curvature.name, self.rule, self.points)
        return name if self.credit == ADDITIVE else f"{name}, {self.credit} credit"

    def each(self) -> Iterator[tuple[AtPoint, Damped]]:
        """The points with their operators."""
        return zip(self.points, self.operators, strict=True)

    def combined(self, parts: np.ndarray) -> np.ndarray:
        """The points' own scores `[points, K, n]` added up, `[K, n]`: additive credit."""
        return np.tensordot(self.factors, parts, axes=1)

    def provenance(self, solver: str) -> dict[str, Any]:
        """What a score file records of the setting, and of the solver by its name."""
        run = self.run
        return {
            "curvature": self.operators[0].curvature.name,
            "geometry": run.manifest.geometry,
            "solver": solver,
            "damping": self.rule or "none",
            "lambda": _short(
                np.squeeze(np.stack([operator.lam.numpy() for operator in self.operators]))
            ),
            "points": [point.place.label for point in self.points],
            "factors": self.factors,
            "calibration": self.calibration,
            "credit": self.credit,
            "run_digest": self.owner.digest,
            "factors_digest": run.digest,
            "base_digest": run.manifest.base.digest,
            "adapter_digest": run.manifest.adapter.digest,
            "data_digest": run.manifest.data.digest,
            "version": run.manifest.versions["lora-influence"],
        }


def setting_name(run: Run, curvature: str, rule: str | None, points: Sequence[AtPoint]) -> str:
    """What a setting's calibration is kept under in the manifest."""
    labels = ",".join(point.place.label for point in points)
    return f"{run.manifest.geometry} {curvature} {rule or 'undamped'} at {labels}"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _short(lam: np.ndarray) -> np.ndarray:
    """Every lambda, or, where an HDF5 attribute (64 KB) cannot hold them, the smallest and the
    largest of each point.
    """
    return lam if lam.size <= 4096 else np.stack([lam.min(-1), lam.max(-1)], -1)


def points_of(run: Run, curvature: str | None, at: str | None) -> tuple[AtPoint, ...]:
    """The points that a request looks at."""
    identity = run.is_plain(curvature)
    at = at or ("end" if identity else "all")
    if at == "all":
        return tuple(run.points)
    if at == "end":
        if run.end.number is None and not identity:
            labels = ", ".join(point.place.label for point in run.points)
            raise InputError(
                f"--at end was given, and this run has factors at {labels} only: give one of "
                "these, or fit another run with "
                "--path 1.0"
            )
        return (run.end,)
    for point in run.points:
        if at == point.place.label or _number(at) == point.place.scale is not None:
            return (point,)
    labels = ", ".join(point.place.label for point in run.points)
    raise InputError(
        f"--at {at!r} was given; expected all, end, or one of the run's points: {labels}"
    )
