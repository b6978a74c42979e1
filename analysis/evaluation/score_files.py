"""Scores of any tool, `[query, train]`, checked against the queries and rows that they are of.

Two kinds of file are read: HDF5 of this project, and `.npy` or `.npz` arrays of other tools, such
as kronfluence and bergson. What a file says of its rows is checked. A plain array says nothing of
them, so that its shape alone can be.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.truth import check_same_ids
from influence.errors import InputError, MismatchError, StoreError
from influence.rows import Examples
from influence.scorefile import Scores


def helpfulness_in(path: Path, queries: Examples, train: Examples) -> np.ndarray:
    """How much each training row helps the queries by a file of scores, `[n]` float64.

    The sum of the file's scores `[Q, n]` over the queries, positive = it helped. Scores of a
    measurement that falls when the model gets worse (`rises` is false, as of a margin) count the
    other way. A plain array is taken as it is: positive must mean that the row helped, as
    kronfluence and bergson have it. HDF5 of the `sum` or `mean` of all queries is one row, which is
    taken as their sum, but for its size. Of an `.npz` the array `scores` is read, or the only one of two
    dimensions; `query_ids` and `train_ids`, where it has them, must be those of the queries and
    rows, and `rises` counts as in HDF5.

    Raises `InputError` for a file that is none of these, of another shape, or with NaN;
    `MismatchError` for one of other queries or rows, or of the same in another order.
    """
    file = _read_arrays(path) if path.suffix in (".npy", ".npz") else _read_own(path)
    for what, rows, source in (
        ("query", queries, "the file of queries"),
        ("train", train, "the run"),
    ):
        if what in file.ids:
            try:
                check_same_ids(file.ids[what], rows.ids, what, source)
            except MismatchError as error:
                raise MismatchError(f"{path}: {error}") from None
        if file.digests.get(what, rows.digest) != rows.digest:
            raise MismatchError(
                f"{path} is of {what} rows of another content than those in {source}: score again"
            )
    _refuse_unusable(path, file.values, 1 if file.together else len(queries), len(train))
    total = file.values.sum(axis=0, dtype=np.float64)
    return total if file.rises else -total


@dataclass(frozen=True, eq=False)
class _ScoreFile:
    """Values `[Q, n]`, and what the file says of its rows: ids and digests by `query`, `train`.

    `together`: the queries were scored together, values are `[1, n]`.
    """

    values: np.ndarray
    rises: bool
    ids: Mapping[str, list[Any]]
    digests: Mapping[str, str] = field(default_factory=dict)
    together: bool = False


def _read_own(path: Path) -> _ScoreFile:
    """A score file of this project."""
    try:
        scores = Scores.load(path, detail=False)
    except StoreError as error:
        raise InputError(
            f"{error}. Expected a score file of influence score, or a .npy or .npz of another tool"
        ) from None
    about = scores.attributes
    aggregate, keys = about.get("aggregate"), {"query": "query_digest", "train": "data_digest"}
    if aggregate not in (None, "sum", "mean"):
        raise InputError(
            f"{path} has scores of every {aggregate} of queries: score each query, or --aggregate "
            "sum"
        )
    ids = {"query": scores.query_ids, "train": scores.train_ids}
    if aggregate is not None:
        del ids["query"]  # it is that of the sum or mean; the digest tells the queries
    return _ScoreFile(
        scores.values,
        bool(about.get("rises", True)),
        ids,
        {what: about[key] for what, key in keys.items() if key in about},
        together=aggregate is not None,
    )


def _read_arrays(path: Path) -> _ScoreFile:
    """An `.npy` or `.npz` file of plain arrays. Nothing is unpickled."""
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            arrays = {"scores": found}
        else:
            with found:
                arrays = {key: found[key] for key in found.files}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it holds no plain arrays" if "pickle" in str(error) else str(error)
        raise InputError(
            f"{path} cannot be read ({reason}); expected plain arrays: write them with numpy.save "
            "or numpy.savez"
        ) from error
    flat = [name for name, values in arrays.items() if values.ndim == 2]
    name = "scores" if "scores" in arrays else flat[0] if len(flat) == 1 else None
    if name is None:
        raise InputError(
            f"{path} holds {', '.join(sorted(arrays)) or 'nothing'}; expected one array of scores "
            "[query, train]: call it scores"
        )
    ids = {
        what: [id.decode() if isinstance(id, bytes) else id for id in arrays[key].ravel().tolist()]
        for what, key in (("query", "query_ids"), ("train", "train_ids"))
        if key in arrays
    }
    return _ScoreFile(arrays[name], bool(np.all(arrays.get("rises", True))), ids)


def _refuse_unusable(path: Path, values: np.ndarray, queries: int, train: int) -> None:
    """Refuse scores that are no real numbers `[queries, train]`."""
    if values.dtype.kind not in "fiu":
        raise InputError(
            f"{path} holds scores of type {values.dtype}; expected real numbers [query, train]"
        )
    if values.shape != (queries, train):
        turned = values.shape == (train, queries)
        advice = "turn it over (array.T)" if turned else "score these queries and rows, in order"
        raise InputError(
            f"{path} holds scores of shape {list(values.shape)}; expected [query, train], "
            f"{[queries, train]}: {advice}"
        )
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise InputError(
            f"{path} holds {len(bad)} scores that are NaN or infinite, the first at query "
            f"{bad[0][0]}, row {bad[0][1]}: score those again"
        )
