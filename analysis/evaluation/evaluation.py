"""Everything that is measured of an adapter on forget, retained and held-out rows, in one record.

`forget` are the rows that should be gone, `retain` rows that should still be there, `holdout` rows
of the same kind that no adapter ever saw. A `reference`, where there is one, is another adapter of
the same configuration on the same base: best one that was trained without the forget rows, since
what it scores is what "never seen" looks like here.

**Two cautions.** A membership attack compares forget with held-out rows, so it also answers whether
these are different kinds of rows: read its AUC beside the reference's, which never saw either. And
forgetting that is measured from outside may be hiding: the probes (`analysis.metrics.probes`) try
to undo it.

The formulas are in `analysis.metrics`. Losses are mean cross-entropies per completion token, nats;
the loss of a set is the mean over its rows. What cannot be computed is null in the record, with the
reason under the same name in its `notes`; notes whose name begins with `remark` say what else to
know of the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from analysis.evaluation.answers import Rows, without_answers
from analysis.evaluation.comparison import (
    attack_scores,
    divergences,
    exposures,
    forget_quality,
    membership,
    note_reference,
    utility,
)
from analysis.evaluation.measured import Measurement, Metric, Subject, measured
from analysis.evaluation.options import Options
from analysis.evaluation.probes import probes
from analysis.evaluation.record import adapter_entry, row_entries, set_entry
from analysis.evaluation.sets import SETS, PreparedSet, parted, prepared
from influence.adapter import AdaptedModel
from influence.adapter_files import adapter_folder
from influence.errors import AdapterError
from influence.loss import mean_losses
from influence.path import read_parameters, scaled
from influence.prepared import versions
from influence.progress import track
from influence.rows import Examples


def evaluate(
    model: AdaptedModel,
    forget: Rows | Examples,
    retain: Rows | Examples | None = None,
    holdout: Rows | Examples | None = None,
    *,
    reference: str | Path | None = None,
    options: Options | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> dict[str, Any]:
    """Measure an adapter, and a reference adapter beside it. The model is left as it was.

    Parameters
    ----------
    model
        Base and adapter, from `influence.load`.
    forget, retain, holdout
        Rows that should be forgotten, that should not, and that were never seen; see the module.
    reference
        Folder or hub id of another adapter with the same configuration.
    options
        See `Options`.
    metrics
        Further metrics by name: functions of a set's `analysis.metrics.outputs.Outputs`, plain
        arrays, that return `analysis.metrics.PerRow`. Their aggregates and values are `metrics` of
        each set and of each row in the record.

    Returns
    -------
    dict
        Ready for JSON: `adapter`, `reference`, `base`, `settings`, `sets` (aggregates of each set),
        `kl`, `membership`, `forget_quality`, `generalized_exposure`, `relative_exposure`,
        `utility`, `probes`, `notes`, and `rows`, one per row. `analysis.evaluation.table.table`
        shows it.

    Raises
    ------
    InputError
        Where two sets share a row, or a row does not fit the model.
    AdapterError
        For a reference of another configuration.
    """
    options = options or Options()
    budget = options.token_budget or (1024 if model.device.type == "cpu" else 4096)
    thetas = {"adapter": model.snapshot(), "base": scaled(model, 0.0)}
    if reference is not None:
        thetas["reference"] = _reference(model, reference)
    subject = Subject(model, thetas, options, budget, dict(metrics or {}))
    given = {"forget": forget, "retain": retain, "holdout": holdout}
    disjoint, notes = parted(
        {
            name: rows if isinstance(rows, Rows) else without_answers(rows)
            for name, rows in given.items()
            if rows is not None
        }
    )
    sets = {name: prepared(model, name, rows, options, notes) for name, rows in disjoint.items()}
    return _record(subject, sets, reference, notes)


def _reference(model: AdaptedModel, folder: str | Path) -> Tensor:
    """Parameters [P] of the reference adapter."""
    try:
        return read_parameters(model, adapter_folder(folder))
    except AdapterError as error:
        raise AdapterError(
            "the reference must be an adapter of the same rank and layers, on the same base: "
            f"{error}"
        ) from error


def _record(
    subject: Subject,
    sets: Mapping[str, PreparedSet],
    reference: str | Path | None,
    notes: dict[str, str],
) -> dict[str, Any]:
    """Measure every set under every adapter, compare, and write it down."""
    measurements, base = _measured(subject, sets)
    note_reference(measurements, base, notes)
    scores = {}
    if "holdout" in sets:
        scores = {
            where: attack_scores(subject, sets, measurements[where], base)
            for where in subject.adapters
        }
    exposed = exposures(measurements, notes)
    options, generalized = subject.options, exposed.generalized
    return {
        "format": 1,
        "versions": versions(),
        "adapter": adapter_entry(subject, "adapter", reference),
        "reference": adapter_entry(subject, "reference", reference),
        "base": {"path": subject.model.base or None, "digest": subject.model.base_digest},
        "settings": {
            "max_length": options.max_length,
            "token_budget": subject.token_budget,
            "generate": options.generate,
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
        },
        "sets": {name: set_entry(name, sets, measurements, base, notes) for name in SETS},
        "kl": divergences(subject, sets, notes),
        "membership": membership(scores, options.seed, notes),
        "forget_quality": forget_quality(measurements, notes),
        "generalized_exposure": None if generalized is None else generalized.value,
        "relative_exposure": {where: each.value for where, each in exposed.relative.items()}
        or None,
        "utility": utility(measurements, notes),
        "probes": probes(subject, sets, measurements, notes),
        "notes": notes,
        "rows": [
            entry
            for name, rows in sets.items()
            for entry in row_entries(
                rows, measurements, base[name], scores, exposed, texts=options.texts
            )
        ],
    }


def _measured(
    subject: Subject, sets: Mapping[str, PreparedSet]
) -> tuple[dict[str, dict[str, Measurement]], dict[str, np.ndarray]]:
    """Measurements by adapter and set, and losses `[n]` of each set under the base alone."""
    measurements: dict[str, dict[str, Measurement]] = {where: {} for where in subject.adapters}
    base: dict[str, np.ndarray] = {}
    jobs = [(where, name) for where in subject.thetas for name in sets]
    for where, name in track(jobs, "evaluating, sets"):
        rows = sets[name]
        with subject.model.at(subject.thetas[where]):
            if where == "base":
                base[name] = mean_losses(
                    subject.model, rows.tokens, token_budget=subject.token_budget
                )
            else:
                attacked = "holdout" in sets and name != "retain"
                measurements[where][name] = measured(subject, rows, norms=attacked)
    return measurements, base
