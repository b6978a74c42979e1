"""The truth that scores are judged by: ready losses of retrained models, or retraining them.

Scores and truth speak of the same queries and the same training rows, in the same order, or their
comparison is noise that looks like a result. Where the truth says which they were (`query_ids`,
`train_ids`), that is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from analysis.metrics.lds import Truth, read_truth
from influence.errors import InputError, MismatchError
from influence.rows import Examples
from influence.run import Run
from influence.scorefile import Scores
from unlearn.retraining.recipe import Recipe
from unlearn.retraining.subsets import random_halves, retrain_subsets


def ready_truth(scores: Scores, path: Path) -> Truth:
    """Read the truth from an `.npz` file.

    `MismatchError` if it is of other queries or rows than the scores.
    """
    truth = read_truth(path)
    check_belongs(truth, scores.query_ids, scores.train_ids, str(path))
    return truth


def check_belongs(
    truth: Truth, query_ids: Sequence[str], train_ids: Sequence[str], source: str
) -> None:
    """Refuse a truth of other queries or rows, or of the same ones in another order.

    A truth that does not say of which is accepted.
    """
    for what, ids in (("query", query_ids), ("train", train_ids)):
        if f"{what}_ids" in truth.extra:
            check_same_ids(ids, truth.extra[f"{what}_ids"].tolist(), what, source)


def retrained_truth(
    scores: Scores,
    run: Run,
    queries: Examples,
    *,
    subsets: int = 40,
    subset_seed: int = 0,
    recipe: Recipe | None = None,
    out: Path,
) -> Truth:
    """Retrain the run's adapter on random halves of its rows and read the losses.

    See `unlearn.retrain_subsets`.

    `out` is resumed and reused. Raises `MismatchError` before any training if the scores are of
    other queries or rows.
    """
    if subsets < 3:
        raise InputError(
            f"{subsets} subsets were asked for; expected at least 3, and some dozens for a useful "
            "interval"
        )
    check_same_ids(scores.query_ids, queries.ids, "query", "the file of queries")
    check_same_ids(scores.train_ids, run.train.ids, "train", f"the run {run.directory}")
    masks = random_halves(len(run.train), subsets, subset_seed)
    return read_truth(retrain_subsets(run, masks, queries, out=out, recipe=recipe).path)


def check_same_ids(scored: Sequence[str], expected: Sequence[str], what: str, source: str) -> None:
    """Refuse ids in another order, or others, than those of the scores.

    `what` is query or train.
    """
    scored, expected = (
        np.array(ids, dtype=np.str_).tolist() for ids in (scored, expected)
    )  # both as a file holds them
    if scored == expected:
        return
    if sorted(scored) == sorted(expected):
        how = "the same ones in another order"
    else:
        how = (
            "others"
            if len(scored) == len(expected)
            else f"{len(expected)} of them, and the scores {len(scored)}"
        )
    at = next(
        (i for i, (a, b) in enumerate(zip(scored, expected, strict=False)) if a != b),
        min(len(scored), len(expected)),
    )
    here, there = (repr(ids[at]) if at < len(ids) else "nothing" for ids in (scored, expected))
    raise MismatchError(
        f"{what} ids differ: {source} has {how}; the first difference is at position {at}, {there} "
        f"there and {here} in the scores. Score the same rows in the same order, or give what "
        "belongs to these scores"
    )
