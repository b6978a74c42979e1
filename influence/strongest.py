"""The strongest rows of every query alone, where the whole matrix of scores would be too large.

Queries are scored in slices, and of each the K highest and the K lowest scores are kept: 2 K Q
numbers instead of Q n, in memory and on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from influence import distributed
from influence.errors import InputError, MismatchError, StoreError
from influence.measurements import Contrast
from influence.memory import free_memory
from influence.rows import Examples, canonical_json
from influence.run import Run
from influence.scorefile import Entry, Scores, different_attributes, position_of
from influence.scores import score
from influence.store import only_writer, open_file, read, read_strings, write_file

#: Share of the free memory that the scores of one slice of queries may take.
MEMORY_SHARE = 0.2
#: Names in the file.
NAMES = ("highest", "highest_scores", "lowest", "lowest_scores", "residuals", "converged")


@dataclass(frozen=True)
class Strongest:
    """The K strongest rows of every query: `highest` int64 [Q, K] and their scores, the largest
    first, and `lowest`, the smallest first.
    """

    highest: np.ndarray = field(repr=False)
    highest_scores: np.ndarray = field(repr=False)
    lowest: np.ndarray = field(repr=False)
    lowest_scores: np.ndarray = field(repr=False)
    residuals: np.ndarray = field(repr=False)
    converged: np.ndarray = field(repr=False)
    query_ids: list[str] = field(repr=False)
    train_ids: list[str] = field(repr=False)
    attributes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Scores, count: int) -> Strongest:
        """Those of whole scores."""
        order = np.argsort(-scores.values, 1, kind="stable")
        highest, lowest = order[:, :count], order[:, ::-1][:, :count]
        each = (np.take_along_axis(scores.values, part, 1) for part in (highest, lowest))
        high, low = each
        return cls(
            highest,
            high,
            lowest,
            low,
            scores.residuals,
            scores.converged,
            scores.query_ids,
            scores.train_ids,
            scores.attributes,
        )

    def query_index(self, query: int | str) -> int:
        """Position of a query given by position or id.

        An unknown one is an `InputError`.
        """
        return position_of(query, self.query_ids)

    def top(self, query: int | str, k: int = 10) -> tuple[list[Entry], list[Entry]]:
        """The k strongest proponents and opponents, as `Scores.top` gives them.

        Raises `InputError` for more than were kept.
        """
        kept = self.highest.shape[1]
        if k > min(kept, len(self.train_ids)):
            raise InputError(
                f"{k} rows were asked for, and the file keeps {kept} of each query: give a smaller "
                "k, or score again with a larger --top"
            )
        row, rises = self.query_index(query), self.attributes.get("rises", True)

        def entries(places: np.ndarray, values: np.ndarray, sign: int) -> list[Entry]:
            pairs = zip(places[row, :k].tolist(), values[row, :k].tolist(), strict=True)
            return [Entry(self.train_ids[i], i, v) for i, v in pairs if sign * v > 0]

        ends = (
            entries(self.highest, self.highest_scores, 1),
            entries(self.lowest, self.lowest_scores, -1),
        )
        return ends if rises else (ends[1], ends[0])

    @classmethod
    def load(cls, path: str | Path) -> Strongest:
        """Read a file that `strongest` wrote.

        Raises `StoreError` for any other.
        """
        path = Path(path)
        with open_file(path) as file:
            if missing := [name for name in NAMES if name not in file]:
                raise StoreError(f"{path} holds no strongest rows: it lacks {', '.join(missing)}")
            arrays = [read(file, name) for name in NAMES]
            arrays[-1] = arrays[-1].astype(bool)
            ids = [read_strings(file, name) for name in ("query_ids", "train_ids")]
            values: dict[str, Any] = dict(zip(NAMES, arrays, strict=True))
            return cls(**values, query_ids=ids[0], train_ids=ids[1], attributes=dict(file.attrs))


def strongest(
    run: Run,
    queries: Examples,
    count: int,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Strongest:
    """The `count` strongest rows of every query, without the matrix of all scores.

    Parameters
    ----------
    run, queries
        As for `influence.scores.score`.
    count
        Rows kept of either end, K.
    out
        Write them here. A file with the very same is returned at once; one of anything else is an
        error unless `overwrite`.
    options
        The other keywords of `influence.scores.score`, but for those that split scores or take
        queries together.
    """
    if count < 1:
        raise InputError(f"{count} rows of each query were asked for; expected at least 1")
    if len(queries) == 0:
        raise InputError("no queries were given; give at least one row")
    if others := [name for name in ("per_token", "per_module", "aggregate") if options.get(name)]:
        raise InputError(
            f"{', '.join(others)} was given with the strongest rows alone (top): give one or the "
            "other"
        )
    n, target = len(run.train), None if out is None else Path(out)
    count, slices = min(count, n), _slices(run, len(queries))
    with nullcontext() if target is None else distributed.held_by_first(only_writer(target)):

        def scored(some: slice) -> Strongest:
            return Strongest.of(score(run, queries[some], **_of_slice(options, some)), count)

        parts = [scored(slices[0])]  # its attributes tell what is asked
        asked = _attributes(parts[0], queries, count, options)
        kept = distributed.at_first(partial(_existing, target, asked, overwrite))
        if kept is not None:
            return kept
        parts += [scored(some) for some in slices[1:]]
        found = _joined(parts, queries, asked)
        if target is not None:
            distributed.at_first(partial(_write, target, found))
    return found


def _slices(run: Run, queries: int) -> list[slice]:
    """The queries in slices whose scores take a share of the free memory."""
    free = float(distributed.first(np.array([free_memory()]))[0])
    each = 4 * len(run.train) * (len(run.points) + 4)
    step = max(1, int(MEMORY_SHARE * free / each))
    return [slice(start, start + step) for start in range(0, queries, step)]


def _of_slice(options: dict[str, Any], some: slice) -> dict[str, Any]:
    """The options for some of the queries: a contrast is of the same ones."""
    measurement = options.get("measurement", "loss")
    if isinstance(measurement, Contrast):
        measurement = replace(measurement, against=measurement.against[some])
    return {**options, "measurement": measurement}


def _attributes(
    first: Strongest, queries: Examples, count: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What the file says: what the first slice says, of all queries."""
    found = {**first.attributes, "query_digest": queries.digest, "top": count}
    found["queries"] = queries.source or ""
    if queries.columns:
        found["query_columns"] = canonical_json(queries.columns)
    if isinstance(contrast := options.get("measurement"), Contrast):
        found["contrast_digest"] = contrast.against.digest
    return found


def _existing(target: Path | None, asked: dict[str, Any], overwrite: bool) -> Strongest | None:
    """What a file holds of the very same request.

    None where there is none; anything else is refused.
    """
    if target is None or overwrite or not target.exists():
        return None
    with open_file(target) as file:
        different = different_attributes(file.attrs, asked)
    if different:
        raise MismatchError(
            f"{target} holds something else ({'; '.join(different)}): give another --out, or "
            "--overwrite to replace it"
        )
    return Strongest.load(target)


def _joined(parts: Sequence[Strongest], queries: Examples, attributes: dict[str, Any]) -> Strongest:
    """The slices one after the other."""
    worst = max(float(np.asarray(part.attributes["residuals"])) for part in parts)
    attributes = {**attributes, "residuals": worst}
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in NAMES
    }
    return Strongest(
        **arrays,
        query_ids=list(queries.ids),
        train_ids=parts[0].train_ids,
        attributes=attributes,
    )


def _write(target: Path, found: Strongest) -> None:
    """Write the file."""
    write_file(
        target,
        {name: np.asarray(getattr(found, name)) for name in NAMES},
        attrs=found.attributes,
        strings={"query_ids": found.query_ids, "train_ids": found.train_ids},
    )
