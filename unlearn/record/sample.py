"""Rows that are measured beside the changed ones: a sample of untouched rows, and held-out rows."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np

from influence.errors import InputError
from influence.rows import Examples
from influence.run import Run
from influence.tokens import TokenizedExamples

#: Untouched rows whose loss is measured before and after.
GUARD_ROWS = 64


def guard_sample(
    rows: Examples, rest: np.ndarray, seed: int, gone: Collection[str] = ()
) -> np.ndarray:
    """Draw the untouched rows whose loss is measured before and after an edit: positions in `rows`.

    `GUARD_ROWS` of `rest`, those whose ids have the smallest digests with the seed, so that edits
    of the same rows share them as far as they can. None has a content in `gone`: a copy of a
    changed row changes with it, which is no damage.
    """
    untouched = [row for row in rest.tolist() if rows[row].content_hash not in gone]
    return drawn(rows, untouched, GUARD_ROWS, seed)


def drawn(rows: Examples, among: Sequence[int], count: int, seed: int) -> np.ndarray:
    """Draw at most `count` of the positions `among` in `rows`, in order.

    They are those whose ids have the smallest digests with the seed.
    """
    order = sorted(
        among, key=lambda row: hashlib.sha256(f"{seed} {rows[row].id}".encode()).digest()
    )
    return np.sort(np.array(order[:count], dtype=int))


def unseen_rows(run: Run, holdout: Examples | None, *others: Examples) -> TokenizedExamples | None:
    """Tokens of held-out rows, which no training row may equal word for word.

    None where `holdout` is None. `others` are further rows that the adapter knows, such as the new
    contents of an edit. Rows are compared by the hashes of their contents alone. Raises
    `InputError` where `holdout` is empty, or where some of it are training rows.
    """
    if holdout is None:
        return None
    if len(holdout) == 0:
        raise InputError("the held-out file has no rows: give some, or leave it out")
    seen = _trained_on(run, holdout, *others)
    if seen:
        raise InputError(
            f"{len(seen)} held-out rows are training rows (or new contents) word for word: they "
            "cannot tell what an unseen row's loss is; give rows that the adapter never saw"
        )
    return run.tokenized(holdout)


def probe_rows(run: Run, probes: Examples | None, *others: Examples) -> TokenizedExamples | None:
    """Tokens of probe rows: other words for what changed rows taught.

    As `unseen_rows`: None where `probes` is None, `InputError` where it is empty, or where some of
    it are training rows, whose loss the edit or its guard looks at.
    """
    if probes is None:
        return None
    if len(probes) == 0:
        raise InputError("the file of probe rows has no rows: give some, or leave it out")
    seen = _trained_on(run, probes, *others)
    if seen:
        named = ", ".join(map(repr, seen[:3])) + (", ..." if len(seen) > 3 else "")
        raise InputError(
            f"{len(seen)} probe rows are training rows (or new contents) word for word ({named}): "
            "the edit looks at those itself; give other words for what they say, such as "
            "paraphrases or questions"
        )
    return run.tokenized(probes)


def _trained_on(run: Run, given: Examples, *others: Examples) -> list[str]:
    """Ids of the given rows that are training rows, or among `others`, word for word."""
    trained = {row.content_hash for rows in (run.train, *others) for row in rows}
    return [row.id for row in given if row.content_hash in trained]
