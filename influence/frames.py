"""Scores as labelled tables: a pandas frame, an xarray data set.

A frame is **long**: a line for each query and training row, as `groupby`, `merge`, `sort_values`
and plotting libraries want it, and with room for texts. The wide one is a line away,
`frame.pivot(index="query_id", columns="train_id", values="score")`. Ids, groups and texts are
categories, so that each text is held once and a line takes a few bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from influence.errors import InputError, MismatchError
from influence.manifest import NAME, read_manifest
from influence.rows import Examples
from influence.text_search import text_of

if TYPE_CHECKING:
    import xarray

    from influence.scorefile import Scores


def to_frame(
    scores: Scores,
    *,
    texts: bool = False,
    train: Examples | None = None,
    queries: Examples | None = None,
) -> pd.DataFrame:
    """Scores as a long frame, the first query's rows first.

    Parameters
    ----------
    texts
        Add what queries and rows say, and their groups.
    train, queries
        The rows, for `texts`, where they cannot be read again from where they lay.

    Returns
    -------
    DataFrame
        Columns `query_id`, `train_id` and `score` (float32, in the scores' unit). With `texts` also
        `query_text`, `train_text`, and `query_group`, `train_group` where any row has one. Scores
        of whole sets of queries have no `query_text`.

    Errors: InputError where texts are asked for and not known, or rows are not those scored.
    """
    count, width = scores.values.shape
    query = np.repeat(np.arange(count), width)
    row = np.tile(np.arange(width), count)
    columns: dict[str, Any] = {
        "query_id": _column(scores.query_ids, query),
        "train_id": _column(scores.train_ids, row),
        "score": scores.values.ravel(),
    }
    if texts:
        train = train_rows(scores) if train is None else train
        queries = query_rows(scores) if queries is None else queries
        _check(train, scores.train_ids, "training rows", "train")
        if "aggregate" not in scores.attributes:
            _check(queries, scores.query_ids, "queries", "queries")
            assert queries is not None
            columns |= _texts("query", queries, query)
        assert train is not None
        columns |= _texts("train", train, row)
    return pd.DataFrame(columns)


def to_xarray(scores: Scores) -> xarray.Dataset:
    """Scores as an xarray data set with named coordinates.

    Variables: `scores` [query, train]; `residual` and `converged` [query]; and where they were
    asked for `by_module` [query, module, train], and `by_token` [query, position] with `token_row`
    (the training row's position) and `token_id` [position]. Attributes are those of the score file.

    Errors: InputError where xarray is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise InputError(
            "to_xarray() was called and xarray is not installed: pip install xarray (or "
            "lora-influence[xarray]), or use to_frame()"
        ) from error
    variables: dict[str, Any] = {"scores": (("query", "train"), scores.values)}
    if len(scores.residuals):  # files of others may lack them
        variables["residual"] = ("query", scores.residuals)
        variables["converged"] = ("query", scores.converged)
    coordinates: dict[str, Any] = {"query": scores.query_ids, "train": scores.train_ids}
    if scores.modules is not None:
        variables["by_module"] = (("query", "module", "train"), scores.modules)
        coordinates["module"] = scores.module_names
    if (tokens := scores.tokens) is not None:
        rows = np.repeat(np.arange(len(scores.train_ids)), np.diff(tokens.offsets))
        variables["by_token"] = (("query", "position"), tokens.values)
        coordinates["token_row"] = ("position", rows)
        coordinates["token_id"] = ("position", tokens.token_ids)
    return xarray.Dataset(variables, coordinates, scores.attributes)


def train_rows(scores: Scores) -> Examples | None:
    """The training rows that were scored: those held, or read again where the file's run says that
    they lie. None where they are not found.
    """
    if scores.train_rows is not None or scores.path is None:
        return scores.train_rows
    from influence.answers import rows_fitted_on

    folder = scores.path.parent
    if not (folder / NAME).exists():
        return None
    manifest = read_manifest(folder)
    if scores.attributes.get("run_digest") != manifest.digest:
        return None
    return rows_fitted_on(folder, manifest.data)


def query_rows(scores: Scores) -> Examples | None:
    """The queries that were scored: those held, or read again from where they lay. None where they
    are not found or have changed.
    """
    from influence.answers import rows_scored

    return rows_scored(scores.attributes) if scores.query_rows is None else scores.query_rows


def _check(rows: Examples | None, ids: Sequence[str], what: str, keyword: str) -> None:
    """Refuse rows that are not those scored."""
    if rows is None:
        raise InputError(
            f"texts were asked for, and the {what} are not known here: give "
            f"{keyword}=influence.read_examples(FILE)"
        )
    if list(rows.ids) != list(ids):
        raise MismatchError(
            f"{keyword}= has {len(rows)} rows, and not the {len(ids)} {what} that were scored, in "
            "their order: give those"
        )


def _texts(kind: str, rows: Examples, places: np.ndarray) -> dict[str, Any]:
    """Columns of the texts and groups of rows."""
    found = {f"{kind}_text": _column([text_of(row) for row in rows], places)}
    groups = [row.group for row in rows]
    if any(group is not None for group in groups):
        found[f"{kind}_group"] = _column(groups, places)
    return found


def _column(values: Iterable[str | None], places: np.ndarray) -> pd.Categorical:
    """A column of categories: value `places[k]` at line k, and a missing one for None."""
    values = list(values)
    codes = {
        value: code for code, value in enumerate(dict.fromkeys(v for v in values if v is not None))
    }
    own = np.array([-1 if value is None else codes[value] for value in values], dtype=np.int64)
    taken = own[places] if len(own) else np.zeros(0, np.int64)
    return pd.Categorical.from_codes(taken, categories=list(codes))
