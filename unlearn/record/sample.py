"""Rows that are measured beside the changed ones: a fixed sample of the untouched rows, and held-out rows."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from influence.errors import InputError
from influence.rows import Examples
from influence.tokens import TokenizedExamples
from unlearn.record.version import Version

#: Untouched rows whose loss is measured before and after.
GUARD_ROWS = 64


def guard_sample(
    rows: Examples, rest: np.ndarray, seed: int, gone: Collection[str] = ()
) -> np.ndarray:
    """The untouched rows whose loss is measured before and after an edit: `GUARD_ROWS` of `rest`, positions in `rows`.

    Those whose ids have the smallest digests with the seed, so that edits of the same rows share them as far as they can; none
    with a content in `gone`: a copy of a changed row changes with it, which is no damage.
    """
    own = [row for row in rest.tolist() if rows[row].content_hash not in gone]
    return drawn(rows, own, GUARD_ROWS, seed)


def drawn(rows: Examples, among: Sequence[int], count: int, seed: int) -> np.ndarray:
    """At most `count` of the positions `among` in `rows`, in order: those whose ids have the smallest digests with the seed."""
    order = sorted(
        among, key=lambda row: hashlib.sha256(f"{seed} {rows[row].id}".encode()).digest()
    )
    return np.sort(np.array(order[:count], dtype=int))


def unseen_rows(
    start: Version, after: Examples, holdout: Examples | None
) -> TokenizedExamples | None:
    """The held-out rows' tokens; `InputError` where there are none, or where some are training rows word for word."""
    if holdout is None:
        return None
    if len(holdout) == 0:
        raise InputError("the held-out file has no rows: give some, or leave it out")
    run = start.run
    known = {row.content_hash for rows in (run.train, start.rows, after) for row in rows}
    seen = known & {row.content_hash for row in holdout}
    if seen:
        raise InputError(
            f"{len(seen)} held-out rows are training rows (or new contents) word for word: they cannot tell what an unseen "
            "row's loss is; give rows that the adapter never saw"
        )
    return run.tokenized(holdout)
