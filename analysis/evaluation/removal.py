"""Removal: is the model worse at some queries once the rows that a method names are gone?

Every method names the rows that help a set of queries most. The adapter is trained again without
them, and the better the method, the more the queries' mean loss rises. No prediction enters, so
methods of any unit can be compared, and a method that reads text alone.

Sources: the *query loss difference* (QLD) of bergson's leaderboard, the rise of a query's loss when
the top 1 % of the rows is removed and the model retrained, compared with random removal (there for
one query at a time, here for a set of queries, whose scores are added up); the *brittleness tests*
of Ilyas et al. 2022, Datamodels, arXiv 2202.00622, and Singla et al. 2023, arXiv 2311.03386, which
ask how few removed rows change a prediction.

**Intervals** are over the queries: they say how much another choice of queries would change, and
nothing of another seed of the training. `by_seed` and the draws of random rows show how much these
matter. Of a single query there is no interval.

**Limits.** Rows are removed as one set. Where two rows teach the same, a method that gives each the
whole credit names both, and one that shares it may name neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.evaluation.named_rows import (
    RANDOM,
    Ranking,
    counts_of,
    own_ranking,
    parted,
    random_rows,
    rankings_of_others,
)
from analysis.evaluation.options import RemovalOptions, refuse_place
from analysis.stats import Interval, bootstrap_interval
from influence.console import finite
from influence.errors import InputError, MismatchError, StoreError
from influence.progress import say
from influence.rows import Examples
from influence.run import Run
from influence.store import only_writer, read_json, write_json
from unlearn.retraining.recipe import Recipe, recipe_of
from unlearn.retraining.retrain import refuse_unrepeatable
from unlearn.retraining.subsets import retrain_subsets

#: Called so in a record, which is told from other JSON by it.
KIND = "removal"
#: Coverage that the intervals aim at.
LEVEL = 0.95


def removal(
    run: Run,
    queries: Examples,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    share: Sequence[float] = (0.01, 0.05),
    scores: Sequence[str | Path] = (),
    draws: int = 5,
    seeds: int = 1,
    seed: int = 0,
    resamples: int = 1000,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train again without the rows that each method names, and measure the queries' losses.

    Methods are the run's own scores (as `run.score` makes them by default), every file of `scores`,
    BM25 over the texts, and random rows. Each names `share * n` of the n training rows, rounded and
    at least one: those whose scores, added up over the queries, are largest; ties are broken by the
    rows' order. The reference is the training on all rows. Killed and called again with the same
    request, it goes on with the first training that is not done. A finished one returns at once.

    Parameters
    ----------
    run, queries
        The run, and the rows whose mean losses are measured.
    out
        The record to write, `NAME.json`. Beside it are `NAME.scores.h5`, the run's own scores, and
        `NAME.losses.npz`, the losses so far, as `unlearn.retrain_subsets` writes them.
    recipe
        How to train; without one as it is recorded beside the adapter.
    share
        Shares of the training rows, each between 0 and 1.
    scores
        Files of scores `[query, train]`: HDF5 of this project, or `.npy` and `.npz` arrays of other
        tools, positive where a row helped (`analysis.evaluation.score_files`).
    draws
        Random sets of rows for every share.
    seeds
        How often every set is trained: under the recipe's seed, the next one and so on. The
        reference too, and losses are compared under the same seed.
    seed
        Of the random rows and of the bootstrap.
    resamples
        Of the bootstrap over the queries.
    overwrite
        Replace the record of another removal, and the files beside it.

    Returns
    -------
    dict
        The record, as it is written. `reference` has the queries' losses [Q] when nothing is
        removed, nats per token, and their mean. `removals` has an entry for every method and share:
        `rows` (how many), `sets` (their ids and the rise of the mean loss without them; of random
        rows one for each draw), `rises` (of every query, a mean over seeds and draws), `rise` (the
        mean over the queries, with its interval), `over_random` (the same less the random rows'),
        `by_seed` (the mean rise under each seed) and `positive` (how many of the rows helped by the
        method's own scores). `left_out` says which methods name no rows, and why.

    Raises
    ------
    InputError
        Before anything is computed: for options out of range, no queries, an adapter that cannot be
        trained again, score files that cannot be used (see `helpfulness_in`).
    MismatchError
        For a record of another removal, or files of one beside it.
    NumericalError
        When all others are done and kept, where a training diverged.
    """
    options = RemovalOptions(
        share=tuple(share),
        scores=tuple(map(Path, scores)),
        draws=draws,
        seeds=seeds,
        seed=seed,
        resamples=resamples,
    )
    out = Path(out)
    refuse_place(out)
    if not len(queries):
        raise InputError("no queries were given; expected rows whose losses are measured")
    counts = counts_of(options.share, len(run.train))
    refuse_unrepeatable(run.model)
    run.query_tokens(queries)  # rows that the model cannot take are refused here
    others, left_out = rankings_of_others(run, queries, options.scores)
    recipe = recipe or recipe_of(run)
    request = _request(run, queries, options, recipe, others)
    with only_writer(out):
        kept = _kept_record(out, request, overwrite)
        if kept is not None and not overwrite:
            return kept
        own = own_ranking(run, queries, _beside(out, "scores.h5"), overwrite=overwrite)
        found, silent = parted([own])
        left_out = silent | left_out
        for method, reason in left_out.items():
            say(f"note: {method} is left out: {reason}")
        if not found and not others:
            raise InputError("no method names any rows: there is nothing to compare")
        removals = _removals([*found, *others], options, counts, len(run.train))
        losses = _trained(run, queries, removals, recipe, options, out, overwrite)
        record = _record(run, queries, request, removals, losses, left_out, options)
        write_json(out, record)
    return record


def _beside(out: Path, end: str) -> Path:
    """A file that a removal keeps beside its record."""
    return out.with_name(f"{out.stem}.{end}")


# ---- the request -----------------------------------------------------------------------------


def _request(
    run: Run,
    queries: Examples,
    options: RemovalOptions,
    recipe: Recipe,
    others: Sequence[Ranking],
) -> dict[str, Any]:
    """All that the record depends on, in JSON's own types."""
    tuned = run.manifest.tuned
    request = {
        "run": run.digest,
        "tuned": None if tuned is None else asdict(tuned),
        "queries": queries.digest,
        "recipe": recipe.as_json(),
        "scores": {
            ranking.method: hashlib.sha256(ranking.helpfulness.tobytes()).hexdigest()
            for ranking in others
        },
        **{
            name: getattr(options, name)
            for name in ("share", "draws", "seeds", "seed", "resamples")
        },
    }
    return json.loads(json.dumps(request))


def _kept_record(out: Path, request: Mapping[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The record of the very same request, where there is one.

    Raises `InputError` for what is no record of a removal, and `MismatchError` for that of another
    one without `overwrite`.
    """
    if not out.exists():
        return None
    try:
        record = read_json(out)
    except StoreError:
        record = {}
    if record.get("kind") != KIND or not isinstance(record.get("request"), dict):
        raise InputError(f"{out} is no record of a removal and stays: give another --out")
    different = [key for key in request if record["request"].get(key, ...) != request[key]]
    if different and not overwrite:
        raise MismatchError(
            f"{out} is of another removal: {', '.join(different)} differ. Ask for the same again, "
            "give another --out, or --overwrite"
        )
    return None if different else record


# ---- sets of rows, trained -------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Removal:
    """What a method removes: `sets` of positions [k], one, or of random rows one for each draw."""

    method: str
    share: float
    sets: tuple[np.ndarray, ...]
    positive: int | None


def _removals(
    rankings: Sequence[Ranking], options: RemovalOptions, counts: Sequence[int], n: int
) -> list[_Removal]:
    """What every method removes, share by share, random rows last."""
    drawn = [random_rows(n, draw, options.seed) for draw in range(options.draws)]
    removals: list[_Removal] = []
    for share, k in zip(options.share, counts, strict=True):
        for ranking in rankings:
            named = ranking.first(k)
            positive = int((ranking.helpfulness[named] > 0).sum())
            removals.append(_Removal(ranking.method, share, (named,), positive))
        removals.append(_Removal(RANDOM, share, tuple(order[:k] for order in drawn), None))
    return removals


def _trained(
    run: Run,
    queries: Examples,
    removals: Sequence[_Removal],
    recipe: Recipe,
    options: RemovalOptions,
    out: Path,
    overwrite: bool,
) -> dict[bytes, np.ndarray]:
    """Losses of the queries without each set, `[seeds, Q]`, by `_key`. Without none: by `_key([])`.

    A set that several methods name, or that two shares make, is trained once.
    """
    n, seeds = len(run.train), options.seeds
    positions = {_key(np.array([], int), n): np.array([], int)}
    for rows in (rows for removed in removals for rows in removed.sets):
        positions.setdefault(_key(rows, n), rows)
    masks = np.ones((len(positions), n), bool)
    for mask, rows in zip(masks, positions.values(), strict=True):
        mask[rows] = False
    say(
        f"{len(positions) - 1} sets of rows are left out one by one, beside a training on all "
        f"{n}: {len(positions) * seeds} trainings"
    )
    done = retrain_subsets(
        run,
        np.repeat(masks, seeds, axis=0),
        queries,
        out=_beside(out, "losses.npz"),
        recipe=recipe,
        seeds=[recipe.seed + s for s in range(seeds)] * len(positions),
        overwrite=overwrite,
    )
    losses = done.query_loss.reshape(len(positions), seeds, len(queries))
    return dict(zip(positions, losses, strict=True))


def _key(rows: np.ndarray, n: int) -> bytes:
    """What a set of rows is known by, in whatever order they were named."""
    return np.isin(np.arange(n), rows).tobytes()


# ---- the record ------------------------------------------------------------------------------


def _record(
    run: Run,
    queries: Examples,
    request: Mapping[str, Any],
    removals: Sequence[_Removal],
    losses: Mapping[bytes, np.ndarray],
    left_out: Mapping[str, str],
    options: RemovalOptions,
) -> dict[str, Any]:
    """The record, ready for JSON."""
    n, ids = len(run.train), run.train.ids
    reference = losses[_key(np.array([], int), n)]
    # rises [sets, seeds, Q] of every removal, each under the seed of its reference
    rises = [
        np.stack([losses[_key(rows, n)] - reference for rows in removed.sets])
        for removed in removals
    ]
    at_random = {
        removed.share: rise.mean(axis=(0, 1))
        for removed, rise in zip(removals, rises, strict=True)
        if removed.method == RANDOM
    }
    entries = []
    for removed, rise in zip(removals, rises, strict=True):
        per_query = rise.mean(axis=(0, 1))
        over_random = None
        if removed.method != RANDOM:
            over_random = _mean(per_query - at_random[removed.share], options)
        entries.append(
            {
                "method": removed.method,
                "share": removed.share,
                "rows": len(removed.sets[0]),
                "positive": removed.positive,
                "rise": _mean(per_query, options),
                "over_random": over_random,
                "by_seed": rise.mean(axis=(0, 2)).tolist(),
                "rises": per_query.tolist(),
                "sets": [
                    {
                        "ids": [ids[row] for row in rows.tolist()],
                        "rise": float(of_set.mean()),
                    }
                    for rows, of_set in zip(removed.sets, rise, strict=True)
                ],
            }
        )
    record = {
        "kind": KIND,
        "run": str(run.directory),
        "request": dict(request),
        "rows": n,
        "query_ids": queries.ids,
        "unit": "nats per token",
        "level": LEVEL,
        "reference": {"loss": float(reference.mean()), "losses": reference.mean(0).tolist()},
        "removals": entries,
        "left_out": dict(left_out),
    }
    return finite(record)


def _mean(values: np.ndarray, options: RemovalOptions) -> dict[str, float | None]:
    """The mean over queries of `values` [Q], with its bootstrap interval where there are several."""
    interval: Interval | None = None
    if len(values) > 1:
        interval = bootstrap_interval(
            lambda chosen: float(values[chosen].mean()),
            len(values),
            level=LEVEL,
            resamples=options.resamples,
            seed=options.seed,
        )
    return {
        "mean": float(values.mean()),
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
    }
