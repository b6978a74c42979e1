"""The record of an evaluation, ready for JSON: aggregates of each set, an entry for each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis.evaluation.answers import completion
from analysis.evaluation.comparison import AttackScores, Exposures, Measurements
from analysis.evaluation.measured import Measurement, Subject, defined
from analysis.evaluation.sets import PreparedSet
from analysis.metrics import likelihood, tofu


def adapter_entry(
    subject: Subject, where: str, reference: str | Path | None
) -> dict[str, Any] | None:
    """Path and digest of the adapter or the reference. None for a reference that was not given."""
    if where not in subject.thetas:
        return None
    path = subject.model.adapter or None
    if where == "reference":
        folder = Path(str(reference))
        path = str(folder.resolve()) if folder.exists() else str(reference)
    with subject.model.at(subject.thetas[where]):
        return {"path": path, "digest": subject.model.adapter_digest}


def set_entry(
    name: str,
    sets: Mapping[str, PreparedSet],
    measurements: Measurements,
    base: Mapping[str, np.ndarray],
    notes: dict[str, str],
) -> dict[str, Any] | None:
    """The numbers of one set. None with a note where it was not given. `base`: its losses `[n]`."""
    if name not in sets:
        notes[f"sets.{name}"] = f"no {name} rows were given"
        return None
    rows = sets[name]
    return {
        "source": rows.rows.examples.source,
        "digest": rows.rows.examples.digest,
        "rows": len(rows.tokens),
        "tokens": int(rows.tokens.counts.sum()),
        "generated": len(rows.continued),
        "base": {"loss": float(base[name].mean())},
        **{
            where: _aggregate(measurements[where][name]) if where in measurements else None
            for where in ("adapter", "reference")
        },
    }


def row_entries(
    rows: PreparedSet,
    measurements: Measurements,
    base: np.ndarray,
    scores: Mapping[str, Mapping[str, AttackScores]],
    exposed: Exposures,
    *,
    texts: bool,
) -> Iterator[dict[str, Any]]:
    """One entry for each row of a set. `base`: its losses `[n]`, `scores`: by adapter and set."""
    name, generalized = rows.name, exposed.generalized
    for i, example in enumerate(rows.rows.examples):
        entry: dict[str, Any] = {
            "id": example.id,
            "set": name,
            "tokens": int(rows.tokens.counts[i]),
            "base": {"loss": float(base[i])},
        }
        for where in ("adapter", "reference"):
            entry[where] = None
            if where not in measurements:
                continue
            entry[where] = _of_row(measurements[where][name], i)
            attacks = scores.get(where, {}).get(name)
            entry[where]["membership"] = (
                None if attacks is None else {key: float(attacks[key][i]) for key in attacks}
            )
            if name == "forget":
                relative = exposed.relative.get(where)
                entry[where]["relative_exposure"] = (
                    None if relative is None else float(relative.values[i])
                )
        if name == "forget":
            entry["generalized_exposure"] = (
                None if generalized is None else float(generalized.values[i])
            )
        if texts:
            entry["prompt"], entry["completion"] = example.prompt, completion(example)
            entry["generated"] = {
                where: sets[name].generated.get(i) for where, sets in measurements.items()
            }
        yield entry


def _aggregate(measurement: Measurement) -> dict[str, Any]:
    out, ratios = measurement.outputs, defined(measurement.truth_ratios)
    entry: dict[str, Any] = {
        "loss": float(out.loss.mean()),
        "probability": float(tofu.answer_probability(out.loss).mean()),
        "perplexity": likelihood.perplexity(out.loss, out.counts).value,
        "accuracy": likelihood.accuracy(out.right).value,
        "exact_memorization": float(measurement.exact_memorization.mean()),
        "extraction_strength": float(measurement.extraction_strength.mean()),
        "extracted": int((measurement.extraction_strength == 1).sum()),
        "rouge1": _mean(measurement.rouge1),
        "rougeL": _mean(measurement.rougeL),
        "truth_ratio": None,
    }
    if ratios is not None:
        entry["truth_ratio"] = {
            "rows": len(ratios),
            "median": float(np.median(ratios)),
            "truthful": float(np.maximum(0, 1 - ratios).mean()),
        }
    if measurement.metrics:
        entry["metrics"] = {key: _number(each.value) for key, each in measurement.metrics.items()}
    return entry


def _of_row(measurement: Measurement, i: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "loss": float(measurement.outputs.loss[i]),
        "exact_memorization": float(measurement.exact_memorization[i]),
        "extraction_strength": float(measurement.extraction_strength[i]),
        "rouge1": _number(measurement.rouge1[i]),
        "rougeL": _number(measurement.rougeL[i]),
        "truth_ratio": _number(measurement.truth_ratios[i]),
    }
    if measurement.metrics:
        entry["metrics"] = {
            key: _number(each.values[i]) for key, each in measurement.metrics.items()
        }
    return entry


def _mean(values: np.ndarray) -> float | None:
    """Mean of the values that are not NaN. None where there is none."""
    numbers = defined(values)
    return None if numbers is None else float(numbers.mean())


def _number(value: float) -> float | None:
    """The value, or None in place of NaN and infinity, which JSON does not have."""
    return float(value) if np.isfinite(value) else None
