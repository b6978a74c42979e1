"""Are rows from outside the training distribution harder to unlearn, at a better trade-off?

Baluta et al. 2024, arXiv 2411.04388, report (abstract) that out-of-distribution examples need more
ascent steps but have a better trade-off, and that in-distribution ones wreck the model quickly.
Here both are tested, on an adapter of one's own. Rows that neither base nor adapter saw are planted
among its training rows: rows of the same domain (`in`) and, of the same lengths, rows of another
one, shuffled rows and random tokens (`analysis.studies.planting`). The adapter is trained again
with the planted rows, each once or `repeats` times, and again without them: reference adapters,
which never saw one. Every planted row is then unlearned alone by gradient ascent
(`unlearn.difficulty.measured`) until it has the base model's loss, and compared with its partner
(`analysis.studies.ood_statistics`). Planted rows never count as damage.

Single rows say little of what a set costs, so whole kinds are unlearned at once too (`whole_sets`),
and groups of one difficulty beside mixed ones (`apart`).

Exposure (`analysis.metrics.exposure`) is measured along the way: generalized, against the reference
adapters; relative, against other held-out rows. At the target a row has the base's loss, not the
references', so its generalized exposure need not be 0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.studies.difficulty_groups import by_difficulty, mixtures
from analysis.studies.ood_measures import (
    exposures,
    leverage,
    matched_damage,
    original_alone,
    steps_to_levels,
)
from analysis.studies.ood_parts import claim, planted_run, reference_losses
from analysis.studies.ood_statistics import (
    EQUAL,
    apart,
    compare,
    correlations,
    verdict,
    whole_sets,
)
from analysis.studies.planting import KINDS, Planted, plant
from influence.console import finite
from influence.errors import InputError
from influence.loss import mean_losses
from influence.path import scaled
from influence.rows import Examples
from influence.run import Run
from influence.store import only_writer, write_json
from unlearn.difficulty.measured import Measured, Protocol, measure
from unlearn.difficulty.units import SAMPLE_ROWS
from unlearn.retraining.recipe import Recipe, recipe_of

#: Labels of the axes of both pictures: steps against exposure, exposure against damage.
STEPS_LABELS = ("ascent steps", "generalized exposure, bits per token")
TRADE_LABELS = ("generalized exposure, bits per token", "rise of other training rows' loss, nats")


@dataclass(frozen=True, eq=False)
class Study:
    """What became of the planted rows.

    Attributes
    ----------
    table : DataFrame
        One line per planted row: `id`, `kind`, `partner`, `tokens` (of the completion), `start`,
        `target`, `gap` (nats per token), `steps`, `damage`, `area`, `matched`, `matched_partner`,
        `base_loss`, `leverage`, `genex_start`, `genex_end`, `relex_start`, `relex_end` (bits per
        token).
    steps, exposure, damage : arrays [n, c + 1]
        Of every row at every level of its way, 0 first: fractional steps, GenEx, rise of the
        original training rows' loss.
    comparisons, correlations : list of dict
        As of `ood_statistics.compare` and `ood_statistics.correlations`.
    sets : DataFrame
        As of `ood_statistics.whole_sets`.
    apart : dict
        As of `ood_statistics.apart`.
    verdicts : dict of str to str
        `steps`, `damage` (the two claims), `area`, `per_nat` and `matched`: yes, no or undecided.
    protocol, recipe : dict
    notes : list of str
    """

    table: pd.DataFrame = field(repr=False)
    steps: NDArray[np.float64] = field(repr=False)
    exposure: NDArray[np.float64] = field(repr=False)
    damage: NDArray[np.float64] = field(repr=False)
    comparisons: list[dict[str, Any]]
    correlations: list[dict[str, Any]]
    sets: pd.DataFrame = field(repr=False)
    apart: dict[str, Any]
    verdicts: dict[str, str]
    protocol: dict[str, Any]
    recipe: dict[str, Any]
    notes: list[str]
    level: float = 0.95

    def paths(
        self, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> dict[str, tuple[NDArray, NDArray]]:
        """Two of the arrays `[n, c + 1]`, kind by kind, as `pictures.paths_plot` takes them."""
        kinds = self.table["kind"].to_numpy()
        return {kind: (x[kinds == kind], y[kinds == kind]) for kind in KINDS}

    def compared(self, kind: str, quantity: str) -> dict[str, Any]:
        """One of the comparisons."""
        return next(
            entry
            for entry in self.comparisons
            if (entry["kind"], entry["measure"]) == (kind, quantity)
        )

    def means(self) -> pd.DataFrame:
        """Means by kind. Steps and what follows from them without rows that missed their target."""
        numbers = self.table.drop(columns=["id", "kind", "partner"]).replace([np.inf], np.nan)
        return pd.DataFrame({kind: numbers[self.table["kind"] == kind].mean() for kind in KINDS}).T

    def record(self) -> dict[str, Any]:
        """Everything but the rows, ready for `influence.console.emit`."""
        return {
            "verdicts": self.verdicts,
            "comparisons": self.comparisons,
            "correlations": self.correlations,
            "kinds": {str(kind): values.to_dict() for kind, values in self.means().iterrows()},
            "sets": self.sets.to_dict("records"),
            "apart": self.apart,
            "level": self.level,
            "protocol": self.protocol,
            "recipe": self.recipe,
            "notes": self.notes,
        }


def study(
    run: Run,
    holdout: Examples,
    other: Examples,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    per_kind: int = 8,
    repeats: int = 1,
    references: int = 2,
    protocol: Protocol | None = None,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = 1000,
    overwrite: bool = False,
) -> Study:
    """Plant rows, train, unlearn each, and compare the kinds.

    Trains `references + 1` adapters, one less where the run's adapter is recorded to be the
    recipe's result, and measures `4 per_kind` rows. What is finished in `out` is used again by the
    same request; another optimizer needs new measurements, but no new adapters.

    Parameters
    ----------
    run
        A finished run; its curvature gives the leverage.
    holdout, other, per_kind, repeats
        As in `plant`.
    out
        Folder for train.jsonl, kinds.json, adapter, reference-1 ..., run, difficulty.h5, groups.h5,
        ood.csv, ood.json and ood.png.
    recipe
        How to train; by default as `unlearn.retraining.recipe.recipe_of` finds it recorded.
    references
        Adapters trained without the planted rows, with seeds of their own.
    protocol
        Of the ascent.
    level, resamples, seed
        Of the intervals; the seed also draws the planted rows and the sample that gives the damage.
    overwrite
        Replace what is in `out`, if it is of another request.

    Raises
    ------
    InputError
        For rows that cannot be planted, fewer than one reference, and an `out` that holds other
        things.
    MismatchError
        For an `out` of another study, without `overwrite`.
    """
    if references < 1:
        raise InputError(f"references {references} was given; expected at least 1")
    out, protocol = Path(out), protocol or Protocol()
    planted = plant(
        run.train,
        holdout,
        other,
        run.model.tokenizer,
        per_kind=per_kind,
        repeats=repeats,
        max_length=run.manifest.objective.max_length,
        seed=seed,
    )
    recipe = recipe or recipe_of(run)
    out.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        claim(out, run, planted, recipe, overwrite)
        with_planted = planted_run(out, run, planted, recipe)
        reference = reference_losses(out, run, planted, recipe, references)
        single, whole = _measured(out, planted, with_planted, protocol, seed, overwrite)
        table, exposure, damage = _rows(run, planted, single, reference)
        intervals = {"level": level, "resamples": resamples, "seed": seed}
        comparisons = compare(table, protocol.steps, **intervals)
        counts = {kind: len(planted.of(kind)) for kind in KINDS}
        made = Study(
            table,
            steps_to_levels(single),
            exposure,
            damage,
            comparisons,
            correlations(table, **intervals),
            whole_sets(whole, counts, **intervals),
            apart(whole, **intervals),
            {name: verdict(comparisons, name) for name in EQUAL},
            single.protocol,
            recipe.as_json(),
            _notes(table, protocol, single, references),
            level,
        )
        _write(out, made)
    return made


def _measured(
    out: Path, planted: Planted, run: Run, protocol: Protocol, seed: int, overwrite: bool
) -> tuple[Measured, Measured]:
    """Ascents of planted rows: each alone, whole kinds, groups of one difficulty and mixed ones.

    Of whole kinds, and of groups of one difficulty and mixed.
    """
    original = planted.original
    options: dict[str, Any] = {
        "protocol": protocol,
        "holdout": planted.holdout,
        # so many of all rows that about SAMPLE_ROWS of the original ones are among them
        "sample_rows": -(-SAMPLE_ROWS * len(planted.rows) // len(original)),
        "seed": seed,
        "overwrite": overwrite,
    }
    single = original_alone(
        measure(run, planted.ids, out=out / "difficulty.h5", **options), original
    )
    parts = by_difficulty(planted.ids, single.steps)
    kinds = {f"kind {kind}": planted.of(kind) for kind in KINDS}
    groups = kinds | parts | mixtures(parts, seed=seed) | {"together": planted.ids}
    whole = measure(run, groups=groups, out=out / "groups.h5", **options)
    return single, original_alone(whole, original)


def _rows(
    run: Run, planted: Planted, single: Measured, reference: NDArray[np.float64]
) -> tuple[pd.DataFrame, NDArray[np.float64], NDArray[np.float64]]:
    """The table of the planted rows, and their generalized exposure and damage, [n, c + 1] each."""
    rows = planted.planted_rows
    with run.model.at(scaled(run.model, 0.0)):
        base = mean_losses(run.model, run.tokenized(rows), token_budget=run.token_budget)
    exposed = exposures(single, reference)
    damage = np.concatenate([np.zeros((len(base), 1)), single.curve], axis=1)
    gap = single.target - single.start
    partners = np.array([planted.ids.index(id) for id in planted.partners.values()])
    matched, matched_partner = matched_damage(exposed.levels, gap, damage, partners)
    columns: Mapping[str, Any] = {
        "id": planted.ids,
        "kind": list(planted.kinds.values()),
        "partner": list(planted.partners.values()),
        "tokens": list(planted.tokens.values()),
        "start": single.start,
        "target": single.target,
        "gap": gap,
        "steps": single.steps,
        "damage": single.damage,
        "area": single.area,
        "matched": matched,
        "matched_partner": matched_partner,
        "base_loss": base,
        "leverage": leverage(run, rows),
        "genex_start": exposed.generalized[:, 0],
        "genex_end": exposed.generalized[:, -1],
        "relex_start": exposed.relative[:, 0],
        "relex_end": exposed.relative[:, -1],
    }
    return pd.DataFrame(columns), exposed.generalized, damage


def _notes(table: pd.DataFrame, protocol: Protocol, single: Measured, references: int) -> list[str]:
    """What else to know of the figures."""
    notes = [
        f"damage: of {len(single.sample)} original training rows; relative exposure: against "
        f"{len(single.heldout_before)} held-out rows; generalized exposure: against {references} "
        f"adapter{'s' * (references > 1)} that never saw the planted rows"
    ]
    late = table[np.isinf(table["steps"])]
    if len(late):
        notes.append(
            f"{len(late)} of {len(table)} rows did not reach their target within {protocol.steps} "
            f"steps ({', '.join(sorted(set(late['kind'])))}): they count with that many steps, and "
            "are left out of the damage"
        )
    done = table[table["gap"] <= 0]
    if len(done):
        notes.append(
            f"{len(done)} rows were not learned (their loss is the base's or more) and cost "
            "nothing to unlearn"
        )
    return notes


def _write(out: Path, made: Study) -> None:
    """Write ood.csv, ood.json and ood.png, each whole."""
    from analysis.studies.pictures import paths_plot

    made.table.to_csv(out / "ood.csv.partial", index=False)
    os.replace(out / "ood.csv.partial", out / "ood.csv")
    write_json(out / "ood.json", finite(made.record()))
    panels = {
        "Steps": made.paths(made.steps, made.exposure),
        "Trade-off": made.paths(made.exposure, made.damage),
    }
    figure = paths_plot(panels, "Unlearning planted rows", labels=(STEPS_LABELS, TRADE_LABELS))
    figure.savefig(out / "ood.partial.png")
    os.replace(out / "ood.partial.png", out / "ood.png")
