"""How large a score is: predicted changes against measured ones, after small real edits.

The edit that a setting predicts for the removal of training row i moves the LoRA parameters by

    delta_i = sum_p kappa_p T_p^T (C_p + lambda_p I)^-1 w_i T_p grad l_i(theta_p)

(the points p of the path with their factors, T the geometry's map; `influence.scores`). Moving the
adapter itself by `t delta_i` and running some rows forward measures what it does. Through the
origin, measured against predicted gives the factor that scores are multiplied by; as good as the
edit is as a stand-in for retraining, and no better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence.at_point import memory_chunks
from influence.curvature.base import Invertible
from influence.errors import InputError, NumericalError
from influence.loss import mean_losses
from influence.manifest import CalibrationRecord
from influence.progress import say
from influence.run import Run, update_manifest
from influence.setting import ADDITIVE, Setting, setting_name

#: Largest predicted rise of the edited row's own mean loss, nats: edits are scaled down to it.
EDIT_SIZE = 0.5
#: Rows that are edited, at most.
EDITED_ROWS = 8


@dataclass(frozen=True)
class Edits:
    """Changes of the mean loss (nats) of probe rows by edits that remove a little of some training
    rows.

    `rows` [m] are the edited training rows and `probes` [k] the measured ones, the edited first;
    `predicted` and `measured` are `[k, m]`, of edits of the share `sizes` [m] of a removal.
    """

    rows: np.ndarray
    probes: np.ndarray
    sizes: np.ndarray
    predicted: np.ndarray
    measured: np.ndarray

    @property
    def factor(self) -> float:
        """Measured over predicted rise of the edited rows' own losses, least squares through the
        origin.
        """
        own = np.arange(len(self.rows))
        return through_origin(self.predicted[own, own], self.measured[own, own])

    @property
    def selectivity(self) -> float:
        """Mean rise of the edited row's own loss over the mean absolute change of all other
        probes: measured only.
        """
        own = np.eye(*self.measured.shape, dtype=bool)
        return float(self.measured[own].mean() / max(np.abs(self.measured[~own]).mean(), 1e-12))


def some_rows(run: Run, count: int, seed: int = 0) -> np.ndarray:
    """Positions of `count` training rows drawn without replacement, or of all where there are
    fewer.
    """
    n = len(run.tokens)
    return np.random.default_rng(seed).permutation(n)[:count]


def losses_of_probes(run: Run, rows: np.ndarray, probes: np.ndarray) -> np.ndarray:
    """Mean losses of `rows` and then of the other `probes` before any edit, `[k]`, nats."""
    measured = np.concatenate([rows, np.setdiff1d(probes, rows)])
    return mean_losses(run.model, run.tokens.select(measured), token_budget=run.token_budget)


def measured_edits(
    setting: Setting, rows: np.ndarray, probes: np.ndarray, before: np.ndarray | None = None
) -> Edits:
    """Edit the adapter by a setting's own direction for each of `rows`, and measure `probes` (other
    rows) too.

    Runs the probes forward once for each edited row, and once before where `before`
    (`losses_of_probes`) is not given. Raises `InputError` where the curvature has no
    closed-form inverse.
    """
    run, model = setting.run, setting.run.model
    before = losses_of_probes(run, rows, probes) if before is None else before
    probes = np.concatenate([rows, np.setdiff1d(probes, rows)])
    deltas, predicted, sizes = small_edits(setting, rows, probes)
    tokens, budget = run.tokens.select(probes), run.token_budget
    measured = np.empty_like(predicted)
    for number, delta in enumerate(deltas):
        with model.moved(delta):
            measured[:, number] = mean_losses(model, tokens, token_budget=budget) - before
    return Edits(rows, probes, sizes, predicted, measured)


def small_edits(
    setting: Setting, rows: np.ndarray, probes: np.ndarray
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Edits that remove a little of each of `rows`, and what they are predicted to do.

    Moves of the parameters `[m, P]`, predicted changes of the probes' mean losses `[k, m]`, nats,
    and the shares `[m]` of a removal. The first m of the training rows `probes` are `rows`.
    """
    run, model = setting.run, setting.run.model
    if not all(isinstance(operator.curvature, Invertible) for operator in setting.operators):
        raise InputError(
            f"edits were to be measured for {setting.name}, which has no closed-form inverse: use "
            "ekfac"
        )
    deltas = torch.zeros(len(rows), model.space.size, dtype=model.dtype, device=model.device)
    predicted = np.zeros((len(probes), len(rows)))
    for factor, (point, operator) in zip(setting.factors, setting.each(), strict=True):
        assert isinstance(operator.curvature, Invertible)
        weights = torch.from_numpy(run.weights[rows] * factor).to(deltas)
        moves = torch.empty_like(deltas)
        for some in memory_chunks(run, len(rows)):
            solved = operator.curvature.solve(
                point.gradients_of(rows[some]) * weights[some, None], operator.lam
            )
            moves[torch.from_numpy(some)] = solved
            deltas[torch.from_numpy(some)] += point.geometry.adjoint(solved)
        for some in memory_chunks(run, len(probes)):
            # a training row's gradient of its mean loss: that of its summed loss over its tokens
            summed = point.gradients_of(probes[some]) @ moves.T
            means = summed.double().cpu().numpy() / run.tokens.counts[probes[some], None]
            predicted[some] += means
    own = predicted[np.arange(len(rows)), np.arange(len(rows))]
    sizes = np.minimum(1.0, EDIT_SIZE / np.maximum(np.abs(own), 1e-12))
    return deltas * torch.from_numpy(sizes).to(deltas)[:, None], predicted * sizes, sizes


def measured_factor(setting: Setting, rows: np.ndarray) -> float:
    """`Edits.factor` of `rows`: after each edit the edited row alone runs forward."""
    run, model = setting.run, setting.run.model
    deltas, predicted, _ = small_edits(setting, rows, rows)
    before = mean_losses(model, run.tokens.select(rows), token_budget=run.token_budget)
    measured = np.empty(len(rows))
    for number, delta in enumerate(deltas):
        with model.moved(delta):
            after = mean_losses(model, run.tokens.select(rows[number : number + 1]))
        measured[number] = after[0] - before[number]
    return through_origin(np.diagonal(predicted), measured)


def through_origin(predicted: np.ndarray, measured: np.ndarray) -> float:
    """The factor by which `predicted` [m] is best multiplied to be `measured` [m]: least
    squares.
    """
    return float((predicted * measured).sum() / (predicted**2).sum())


def calibrate(run: Run, seed: int = 0) -> dict[str, CalibrationRecord]:
    """The calibration of the fit's own setting by a few measured edits, for its manifest.

    Empty where there is none.

    At the adapter itself there is nothing to measure: scores are the edit's own first-order effect
    there. Matrix-free curvatures are not calibrated, and a setting that the manifest has a
    calibration for is not measured again.
    """
    specification = run.specification
    if specification.undamped or specification.matrix_free:
        return {}
    if [point.place.scale for point in run.points] == [1.0]:
        return {}
    name = setting_name(run, run.fitted_name, run.manifest.damping, run.points)
    if name in run.manifest.calibration or not isinstance(run.curvature(), Invertible):
        return {}
    setting = Setting.of(run, tuned=False, calibrated=False)
    rows = some_rows(run, EDITED_ROWS, seed)
    factor = measured_factor(setting, rows)
    if not (np.isfinite(factor) and factor > 0):
        say(
            f"note: small edits of {len(rows)} rows did not raise their losses (factor "
            f"{factor:.2g}): not calibrated"
        )
        return {}
    return record(setting, factor, f"measured edits of {len(rows)} rows")


def calibrate_once(run: Run) -> None:
    """Measure how large the additive scores of the fit's own setting are, unless that is known.

    A failure is told, not raised.
    """
    try:
        found = calibrate(run)
    except (NumericalError, MemoryError, torch.OutOfMemoryError) as error:
        say(f"note: the size of the scores could not be measured ({error}); they stay uncalibrated")
        return
    if found:
        try:
            update_manifest(run, calibration={**run.manifest.calibration, **found})
        except OSError as error:
            say(f"note: the size of the scores could not be kept in {run.directory} ({error})")


def record(setting: Setting, factor: float, source: str) -> dict[str, CalibrationRecord]:
    """What the manifest keeps of a calibration."""
    counted = len(setting.points) > 1 and setting.credit == ADDITIVE
    scales = tuple(setting.scales.tolist()) if counted else ()
    return {setting.name: CalibrationRecord(factor, source, scales)}
