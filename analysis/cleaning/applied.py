"""What a cleaning changed: the adapter trained again without the decided rows, and measured.

The reference is the same training on all rows, under the same recipe and seeds, so that what differs
is the rows and not the recipe. One training's noise remains: `seeds` repeats both. The gain is the
fall of a set's mean loss, reference less cleaned, with a bootstrap interval over its rows, which
says how much another choice of rows would change and nothing of another seed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.cleaning.cleaning import KIND, gain_without
from analysis.cleaning.files import APPLIED, SUMMARY, Decided, read_decisions
from analysis.stats import bootstrap_interval
from influence.adapter import AdaptedModel
from influence.console import at_least, finite
from influence.errors import InputError, MismatchError
from influence.loss import mean_losses
from influence.path import read_parameters
from influence.progress import say
from influence.row_files import read_again
from influence.rows import Examples
from influence.run import Run
from influence.store import only_writer, read_json, write_json
from influence.tokens import TokenizedExamples
from unlearn.record.outputs import refuse_out
from unlearn.retraining.recipe import Recipe, recipe_of
from unlearn.retraining.retrain import (
    digests_of,
    fresh_adapter,
    own_randomness,
    refuse_unrepeatable,
    retrain,
    save_adapter,
    train,
)

#: Coverage that the intervals aim at.
LEVEL = 0.95
#: Where adapters are put in a cleaning's folder: the cleaned one, and those trained on all rows.
ADAPTER, REFERENCE = "adapter", "reference"


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a cleaning's folder, or an `InputError` where there is none."""
    path = folder / SUMMARY
    record = read_json(path) if path.is_file() else {}
    if record.get("kind") != KIND:
        raise InputError(f"{folder} holds no list of analysis clean: make one with --run and --out")
    return record


def good_rows(summary: dict[str, Any]) -> Examples | None:
    """The good rows that a list was made with, read again; None where there were none.

    Raises `MismatchError` where they have changed, `InputError` where they came from no file.
    """
    source = summary["queries"]
    if source is None:
        return None
    if source["path"] is None:
        raise InputError("the list was made with good rows that came from no file: pass queries=")
    rows = read_again(source["path"], source["columns"])
    if rows.digest != source["digest"]:
        raise MismatchError(
            f"{source['path']} has changed since the list was made: restore it, or make the list "
            "again"
        )
    return rows


def changed_rows(rows: Examples, decided: Decided) -> Examples:
    """The training rows as they were decided to be, in their order.

    Raises `InputError` where nothing would be left, `DataError` for a row without an answer that
    could be another.
    """
    gone = set(decided.removed)
    if len(gone) == len(rows):
        raise InputError("every row is to be removed: nothing is left to train on")
    return Examples(
        row.answering(decided.relabelled[row.id]) if row.id in decided.relabelled else row
        for row in rows
        if row.id not in gone
    )


def apply(
    folder: str | Path,
    run: Run | None = None,
    *,
    queries: Examples | None = None,
    holdout: Examples | None = None,
    recipe: Recipe | None = None,
    adapter_out: str | Path | None = None,
    take_suggested: bool = False,
    seeds: int = 1,
    seed: int = 0,
    resamples: int = 1000,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train again on the rows as they were decided to be, and measure what that changed.

    Parameters
    ----------
    folder
        What `clean` wrote, with decisions in the column `decision` of `rows.csv`.
    run, queries
        The run and the good rows. Default: those that the list was made with.
    holdout
        Other rows that are measured: best, questions with right answers that the list was not made
        with.
    recipe
        How to train; without one as it is recorded beside the adapter.
    adapter_out
        Where the cleaned adapter goes. Default: `adapter` in the folder.
    take_suggested
        Take what is suggested where nothing was decided.
    seeds
        How often both trainings are done: under the recipe's seed, the next one and so on. The first
        adapter is kept.
    seed, resamples
        Of the bootstrap.
    overwrite
        Replace an adapter and an `applied.json` that are there.

    Returns
    -------
    dict
        What `applied.json` holds. `sets` has the good rows and the held-out ones by name: `before`
        (mean loss under the reference), `after`, `gain` with `low` and `high`, `by_seed`, and
        `predicted`, what the influence of the rows says if all of them go (null where it says
        nothing). Nats per token.

    Raises
    ------
    InputError
        Before anything is trained: for no decisions or wrong ones, a folder that is none, an adapter
        that cannot be trained again, a place that is taken.
    MismatchError
        For a run or rows other than the list was made of.
    """
    folder = Path(folder)
    summary = read_summary(folder)
    run = run or Run.open(summary["run"])
    if run.digest != summary["run_digest"]:
        raise MismatchError(
            f"{run.directory} is not the run that the list in {folder} is of: give that one, which was "
            f"in {summary['run']}, or make a list of this one"
        )
    for name, number, least in (
        ("seeds", seeds, 1),
        ("seed", seed, 0),
        ("resamples", resamples, 1),
    ):
        at_least(name, number, least)
    queries = queries or good_rows(summary)
    sets = {"good": queries, "heldout": holdout}
    measured = {name: rows for name, rows in sets.items() if rows is not None and len(rows)}
    if not measured:
        raise InputError(
            "there are no rows to measure the gain on: the list was made without good rows, so give "
            "some with --holdout FILE"
        )
    tokens = {name: run.query_tokens(rows) for name, rows in measured.items()}
    decided = read_decisions(folder, run.train, suggested=take_suggested)
    rows = changed_rows(run.train, decided)
    new_tokens = run.tokenized(rows)
    refuse_unrepeatable(run.model)
    out = Path(adapter_out) if adapter_out is not None else folder / ADAPTER
    refuse_out(run, out, overwrite)
    if (folder / APPLIED).exists() and not overwrite:
        raise InputError(
            f"{folder / APPLIED} says what was applied before and would be replaced: keep a copy of "
            "it, and give --overwrite"
        )
    recipe = recipe or recipe_of(run)
    with only_writer(folder):
        losses = {name: np.zeros((seeds, 2, len(part))) for name, part in tokens.items()}
        seeded_recipes = [replace(recipe, seed=recipe.seed + number) for number in range(seeds)]
        missing = [not _has_reference(run, folder, seeded) for seeded in seeded_recipes]
        _say_cost(recipe, len(run.train), len(rows), references=sum(missing), seeds=seeds)
        to_come = seeds + sum(missing)
        for number, seeded in enumerate(seeded_recipes):
            place = _reference_folder(folder, seeded)
            if missing[number]:
                to_come -= 1
                say(f"training on all {len(run.train)} rows, to compare with")
                retrain(run, out=place, recipe=seeded, overwrite=True, to_come=to_come)
            reference = read_parameters(run.model, place)
            to_come -= 1
            say(f"training on {len(rows)} rows, {len(run.train) - len(rows)} fewer")
            with own_randomness(run.model):
                cleaned = fresh_adapter(run.model, seeded.seed)
                train(cleaned, new_tokens, seeded, to_come=to_come)
            for name, part in tokens.items():
                with run.model.at(reference):
                    losses[name][number, 0] = _losses(run, run.model, part)
                losses[name][number, 1] = _losses(run, cleaned, part)
            if number == 0:
                _save(run, cleaned, out, rows, decided, seeded)
        gone = [*decided.removed, *decided.relabelled]
        record = {
            "kind": f"{KIND}, applied",
            "run": str(run.directory.resolve()),
            "run_digest": run.digest,
            "rows_digest": rows.digest,
            "adapter": str(out.resolve()),
            "removed": list(decided.removed),
            "relabelled": {
                id: hashlib.sha256(answer.encode()).hexdigest()[:16]
                for id, answer in decided.relabelled.items()
            },
            "kept": list(decided.kept),
            "rows": len(rows),
            "recipe": recipe.as_json(),
            "seeds": seeds,
            "seed": seed,
            "resamples": resamples,
            "level": LEVEL,
            "unit": "nats per token",
            "sets": {
                name: _gain(part.ids, losses[name], seed, resamples)
                | {"predicted": _predicted(run, gone, part)}
                for name, part in measured.items()
            },
        }
        record = finite(record)
        write_json(folder / APPLIED, record)
    return record


def _say_cost(recipe: Recipe, all_rows: int, rows: int, *, references: int, seeds: int) -> None:
    """Say how much is trained, before any of it."""
    steps = references * recipe.steps(all_rows) + seeds * recipe.steps(rows)
    read = references * recipe.rows_read(all_rows) + seeds * recipe.rows_read(rows)
    count, there = references + seeds, seeds - references
    kept = f"; {there} more on all rows {'is' if there == 1 else 'are'} there already" * (there > 0)
    later = "; their time is said after a tenth of the first" * (count > 1)
    say(
        f"cost: {count} training{'s' * (count > 1)}, {steps} steps, {read} row-gradients in all"
        f"{kept}{later}"
    )


def _reference_folder(folder: Path, recipe: Recipe) -> Path:
    """Where the adapter that is trained on all rows by this recipe is kept, to be used again."""
    return folder / f"{REFERENCE}-{recipe.seed}"


def _has_reference(run: Run, folder: Path, recipe: Recipe) -> bool:
    """Whether the adapter of all rows that lies there was trained so."""
    place = _reference_folder(folder, recipe)
    wanted = {
        "recipe": recipe.as_json(),
        "removed": [],
        "rows": len(run.train),
        "base_digest": run.manifest.base.digest,
        "data_digest": run.manifest.data.digest,
    }
    kept = read_json(place / "retrain.json") if (place / "retrain.json").is_file() else {}
    return all(kept.get(key) == json.loads(json.dumps(value)) for key, value in wanted.items())


def _losses(run: Run, model: AdaptedModel, tokens: TokenizedExamples) -> np.ndarray:
    return mean_losses(model, tokens, token_budget=run.token_budget)


def _save(
    run: Run, model: AdaptedModel, out: Path, rows: Examples, decided: Decided, recipe: Recipe
) -> None:
    """Save the cleaned adapter as PEFT reads it, with what it was trained on beside it."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    about = {
        "removed": list(decided.removed),
        "relabelled": list(decided.relabelled),
        "rows": len(rows),
        "rows_digest": rows.digest,
        "recipe": recipe.as_json(),
    }
    save_adapter(model, partial, {**about, **digests_of(run, model)})
    if out.exists():
        shutil.rmtree(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(out)


def _gain(ids: Sequence[str], losses: np.ndarray, seed: int, resamples: int) -> dict[str, Any]:
    """The mean fall of losses `[seeds, (reference, cleaned), Q]`, and its interval over rows."""
    gains = (losses[:, 0] - losses[:, 1]).mean(axis=0)
    low = high = None
    if len(gains) > 1:
        interval = bootstrap_interval(
            lambda chosen: float(gains[chosen].mean()),
            len(gains),
            level=LEVEL,
            resamples=resamples,
            seed=seed,
        )
        low, high = interval.low, interval.high
    return {
        "rows": len(ids),
        "before": float(losses[:, 0].mean()),
        "after": float(losses[:, 1].mean()),
        "gain": float(gains.mean()),
        "low": low,
        "high": high,
        "by_seed": (losses[:, 0] - losses[:, 1]).mean(axis=1).tolist(),
        "ids": list(ids),
        "gains": gains.tolist(),
    }


def _predicted(run: Run, ids: Sequence[str], rows: Examples) -> dict[str, float] | None:
    try:
        return gain_without(run, ids, rows)
    except InputError as error:
        say(f"note: nothing is predicted: {error}")
        return None
