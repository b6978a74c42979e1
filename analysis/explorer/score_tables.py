"""Scores as the page asks for them, read from their file when they are asked for.

A score file has a number for every query and training row, or the strongest rows of each query
alone (`influence score --top`). Both answer the same questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import h5py
import numpy as np

from analysis.group_sums import group_sums
from influence.errors import InputError, MismatchError, StoreError
from influence.store import open_file, read, read_strings

if TYPE_CHECKING:  # a page on scores alone does not wait for torch
    from influence.strongest import Strongest

#: How a score file names its scores by token, and what they are of (`influence.scorefile`).
TOKEN_NAMES = ("per_token", "token_offsets", "token_ids")
#: Scores that are looked at for a query to begin with: more would keep a large run waiting.
LOOKED_AT = 5_000_000
#: Of these, how many are read at once.
AT_ONCE = 500_000


@dataclass(frozen=True)
class Detail:
    """One score split: `tokens` are (token id, part of the score) by position of the training row,
    `modules` are (layer, part of the score); None where the file does not split it so.
    """

    tokens: list[tuple[int, float]] | None = None
    modules: list[tuple[str, float]] | None = None


@dataclass(frozen=True)
class ScoreTable:
    """A file with a score for every query and row: `path`, its ids and its attributes."""

    path: Path
    query_ids: list[str] = field(repr=False)
    train_ids: list[str] = field(repr=False)
    attributes: Mapping[str, Any] = field(repr=False)
    splits: frozenset[str] = frozenset()

    #: How many rows of either end are kept of a query; None: all rows are.
    kept: int | None = None

    @property
    def rises(self) -> bool:
        """Whether the measurement rises when the model gets worse, as a loss does."""
        return bool(self.attributes.get("rises", True))

    @property
    def unit(self) -> str:
        """The unit of a score."""
        return str(self.attributes.get("unit", ""))

    @property
    def measurement(self) -> str:
        """What is explained of a query."""
        return str(self.attributes.get("measurement", "loss"))

    def query(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows kept of a query and their scores, `[k]` each: proponents first."""
        with open_file(self.path) as file:
            values = cast("h5py.Dataset", file["scores"])[query]
        return self._ordered(np.arange(len(values)), values)

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """The queries that a row has a score for, and the scores, `[k]` each: highest first."""
        with open_file(self.path) as file:
            values = cast("h5py.Dataset", file["scores"])[:, row]
        return self._ordered(np.arange(len(values)), values)

    def matrix(self) -> np.ndarray:
        """All scores, float32 [query, train]."""
        with open_file(self.path) as file:
            return read(file, "scores")

    def group_sums(self, members: np.ndarray, groups: int) -> np.ndarray:
        """Sums of the scores over the rows of each group, float64 [query, groups], for the group
        number of every row, `members` [train] (-1: none).
        """
        with open_file(self.path) as file:
            return group_sums(file["scores"], members, groups)

    def detail(self, query: int, row: int) -> Detail:
        """One score by token and module, as far as the file splits it."""
        tokens, modules = None, None
        with open_file(self.path) as file:
            if "tokens" in self.splits:
                first, end = self._offsets[row : row + 2].tolist()
                values, ids = (
                    cast("h5py.Dataset", file[TOKEN_NAMES[0]])[query, first:end],
                    cast("h5py.Dataset", file[TOKEN_NAMES[2]])[first:end],
                )
                tokens = list(zip(ids.tolist(), values.tolist(), strict=True))
            if "modules" in self.splits:
                values = cast("h5py.Dataset", file["per_module"])[query, :, row]
                modules = list(zip(self.module_names, values.tolist(), strict=True))
        return Detail(tokens, modules)

    @cached_property
    def looked_at(self) -> int:
        """Of how many queries, the first ones, the one to begin with is chosen."""
        return min(max(1, LOOKED_AT // max(1, len(self.train_ids))), len(self.query_ids))

    @cached_property
    def first_shown(self) -> int | None:
        """The query to begin with: the one that a single row helps most, of those `looked_at`; None
        where no row helps.
        """
        helped = np.zeros(self.looked_at)
        with open_file(self.path) as file:
            scores = cast("h5py.Dataset", file["scores"])
            step = max(1, AT_ONCE // max(1, len(self.train_ids)))
            for start in range(0, self.looked_at, step):
                some = slice(start, min(start + step, self.looked_at))
                helped[some] = self._most_helped(scores[some])
        return self._first_of(helped)

    @cached_property
    def module_names(self) -> list[str]:
        """The layers that scores are split over."""
        with open_file(self.path) as file:
            return read_strings(file, "modules") if "modules" in file else []

    @cached_property
    def _offsets(self) -> np.ndarray:
        with open_file(self.path) as file:
            return read(file, TOKEN_NAMES[1])

    def _most_helped(self, scores: np.ndarray) -> np.ndarray:
        """How much the best row helps each query, of scores [k, rows]; 0 where none does."""
        known = np.isfinite(scores)
        helped = scores if self.rises else -scores
        return helped.max(1, initial=0, where=known)

    def _first_of(self, helped: np.ndarray) -> int | None:
        """The query that is helped most, if any is."""
        return int(helped.argmax()) if len(helped) and helped.max() > 0 else None

    def _ordered(self, places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places with a score, by what removing the row would harm: proponents first."""
        known = np.isfinite(values)
        places, values = places[known], values[known]
        order = np.argsort(-values if self.rises else values, kind="stable")
        return places[order], values[order]


@dataclass(frozen=True)
class StrongestTable(ScoreTable):
    """A file with the strongest rows of each query alone."""

    strongest: Strongest = field(default=None, repr=False)  # pyright: ignore[reportAssignmentType]

    @cached_property
    def looked_at(self) -> int:
        """As `ScoreTable`'s: all queries, whose kept rows are in memory."""
        return len(self.query_ids)

    @cached_property
    def first_shown(self) -> int | None:
        """As `ScoreTable`'s."""
        found = self.strongest
        kept = found.highest_scores if self.rises else found.lowest_scores
        return self._first_of(self._most_helped(np.asarray(kept)))

    def query(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """As `ScoreTable.query`, of the rows that were kept."""
        found = self.strongest
        places = np.concatenate([found.highest[query], found.lowest[query]])
        values = np.concatenate([found.highest_scores[query], found.lowest_scores[query]])
        places, first = np.unique(places, return_index=True)
        return self._ordered(places, values[first])

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """As `ScoreTable.row`, of the queries that kept the row."""
        queries, values = [], []
        for query in self._queries_of.get(row, []):
            places, scores = self.query(query)
            queries.append(query)
            values.append(scores[places == row][0])
        return self._ordered(np.array(queries, np.int64), np.array(values, np.float32))

    def matrix(self) -> np.ndarray:
        """All scores, float32 [query, train], NaN where none was kept."""
        shape = (len(self.query_ids), len(self.train_ids))
        values = np.full(shape, np.nan, np.float32)
        for query in range(shape[0]):
            places, scores = self.query(query)
            values[query, places] = scores
        return values

    def group_sums(self, members: np.ndarray, groups: int) -> np.ndarray:
        """As `ScoreTable.group_sums`, of the rows that were kept."""
        sums = np.zeros((len(self.query_ids), groups))
        for query in range(len(sums)):
            places, scores = self.query(query)
            sums[query] = group_sums(scores[None], members[places], groups)[0]
        return sums

    @cached_property
    def _queries_of(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for query in range(len(self.query_ids)):
            for row in self.query(query)[0].tolist():
                found.setdefault(row, []).append(query)
        return found


def open_scores(path: Path, run_digest: str, train_ids: Sequence[str] | None) -> ScoreTable:
    """The scores in a file, of either kind.

    Raises `InputError` where there is no file, `StoreError` where it holds no finished scores, and
    `MismatchError` where they are of another run.
    """
    if not path.exists():
        raise InputError(
            f"{path} does not exist: make it with influence score --run RUN --queries QUERIES"
        )
    with open_file(path) as file:
        names, attributes = set(file), dict(file.attrs)
        if not {"query_ids", "train_ids"} <= names or not {"scores", "highest"} & names:
            raise StoreError(
                f"{path} holds no scores of queries: give a file that influence score wrote"
            )
        if not attributes.get("complete", True):
            raise StoreError(
                f"{path} is unfinished: run the same influence score command again to complete it"
            )
        ids = [read_strings(file, name) for name in ("query_ids", "train_ids")]
    other = train_ids is not None and ids[1] != list(train_ids)
    if attributes.get("run_digest") != run_digest or other:
        raise MismatchError(f"{path} belongs to another run: give a file that this run made")
    splits = {"tokens": TOKEN_NAMES[0] in names, "modules": "per_module" in names}
    known = frozenset(name for name in splits if splits[name])
    if "highest" not in names:
        return ScoreTable(path, ids[0], ids[1], attributes, known)
    from influence.strongest import Strongest

    found = Strongest.load(path)
    return StrongestTable(
        path, ids[0], ids[1], attributes, known, kept=found.highest.shape[1], strongest=found
    )


def self_influences(path: Path, run_digest: str) -> tuple[np.ndarray, str] | None:
    """The self-influences `[train]` in a score file with their unit; None where it has none."""
    if not path.exists():
        return None
    with open_file(path) as file:
        values = file.get("self_influence")
        if not isinstance(values, h5py.Dataset):
            return None
        digest = values.attrs.get("run_digest", file.attrs.get("run_digest"))
        found = (values[()], str(values.attrs.get("unit", "nats per token")))
        return found if digest == run_digest else None
