"""The probes of an evaluation: relearning curves, and losses with rounded layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from analysis.evaluation.comparison import Measurements
from analysis.evaluation.measured import Subject
from analysis.evaluation.sets import PreparedSet
from analysis.evaluation.table import UNASKED
from analysis.metrics.probes import Relearned, crossing, quantise, relearn
from influence.errors import InputError, NumericalError
from influence.loss import mean_losses
from influence.progress import track

#: Bits that layers are rounded to.
BITS = (8, 4)


def probes(
    subject: Subject,
    sets: Mapping[str, PreparedSet],
    measurements: Measurements,
    notes: dict[str, str],
) -> dict[str, Any]:
    """Results of the probes that were asked for, by name. None with a note for the others.

    A probe that cannot be made of these rows or this base is None too, and its note says why.
    """
    results: dict[str, Any] = {"relearn": None, "quantise": None}
    make: dict[str, Callable[[], dict[str, Any]]] = {
        "relearn": lambda: relearned(subject, sets, measurements, notes),
        "quantise": lambda: quantised(subject, sets),
    }
    for name, probe in make.items():
        if name not in subject.options.probes:
            notes[f"probes.{name}"] = f"{UNASKED} (--probe {name})"
            continue
        try:
            results[name] = probe()
        except (InputError, NumericalError) as error:
            notes[f"probes.{name}"] = str(error)
    return results


def relearned(
    subject: Subject,
    sets: Mapping[str, PreparedSet],
    measurements: Measurements,
    notes: dict[str, str],
) -> dict[str, Any]:
    """Relearning curves of every adapter, on the same rows, and when the other rows are back."""
    tokens, budget = sets["forget"].tokens, subject.token_budget
    curves: dict[str, Relearned] = {}
    for where in subject.adapters:
        with subject.model.at(subject.thetas[where]):
            curves[where] = relearn(
                subject.model, tokens, seed=subject.options.seed, token_budget=budget
            )
    start = {where: float(curve.held_back[0]) for where, curve in curves.items()}
    level, source = _level(measurements, start, notes)
    first = curves["adapter"]
    return {
        "steps": first.steps.tolist(),
        "trained_ids": first.trained_ids,
        "level": level,
        "level_source": source,
        **{
            where: _curve(curves[where], level) if where in curves else None
            for where in ("adapter", "reference")
        },
    }


def _level(
    measurements: Measurements, start: Mapping[str, float], notes: dict[str, str]
) -> tuple[float | None, str | None]:
    """The loss at which forgotten rows count as back, and whose it is.

    That of a reference that knows them better, else the retained rows'.
    """
    if "reference" in start and start["reference"] < start["adapter"]:
        return start["reference"], "the reference's loss on them"
    adapter = measurements["adapter"]
    if "retain" in adapter:
        loss = float(adapter["retain"].outputs.loss.mean())
        return loss, "the adapter's loss on the retained rows"
    notes["probes.relearn.level"] = (
        "it needs retain rows, or a reference that knows the forget rows better"
    )
    return None, None


def _curve(curve: Relearned, level: float | None) -> dict[str, Any]:
    back = None if level is None else crossing(curve.steps, curve.held_back, level)
    return {
        "trained": curve.trained.tolist(),
        "held_back": curve.held_back.tolist(),
        "back_after": back,
    }


def quantised(subject: Subject, sets: Mapping[str, PreparedSet]) -> dict[str, Any]:
    """Mean losses of every set under every adapter with its layers rounded, by bits."""
    losses: dict[str, Any] = {}
    for bits in track(BITS, "rounding"):
        losses[str(bits)] = {name: {} for name in sets}
        for where in subject.adapters:
            with subject.model.at(subject.thetas[where]), quantise(subject.model, bits=bits):
                for name, rows in sets.items():
                    each = mean_losses(
                        subject.model, rows.tokens, token_budget=subject.token_budget
                    )
                    losses[str(bits)][name][where] = float(each.mean())
    return losses
