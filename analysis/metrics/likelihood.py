"""Perplexity and accuracy of rows, and what every metric asks of the arrays it is given.

Losses are in nats; the mean loss of a row is its mean cross-entropy per completion token. Rows
count by their tokens here (the aggregate is over all tokens of all rows), as in language modelling;
most other metrics count every row alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.errors import InputError

LARGEST_EXPONENT = float(np.log(np.finfo(np.float64).max))  # 709.8: exp of more overflows


@dataclass(frozen=True, eq=False)
class PerRow:
    """A metric: `values` [n], one per row, and `value`, the aggregate that its function names."""

    values: NDArray[np.float64]
    value: float


def perplexity(losses: ArrayLike, counts: ArrayLike) -> PerRow:
    """Perplexity: `exp(sum_i T_i l_i / sum_i T_i)`, and `exp(l_i)` of every row.

    `losses` [n] are mean losses, `counts` [n] the numbers T_i of completion tokens. What would
    overflow is the largest float.
    """
    losses = checked(losses, "losses")
    counts = checked(counts, "counts", rows=len(losses))
    if (counts <= 0).any():
        raise InputError(
            f"counts has the value {counts.min():g}; expected the positive number of completion "
            "tokens of each row: leave out rows without any."
        )
    return PerRow(exponential(losses), float(exponential(np.average(losses, weights=counts))))


def accuracy(right: Sequence[ArrayLike]) -> PerRow:
    """Next-token accuracy of every row, and of all tokens.

    The share of completion tokens whose label has the largest logit.

    `right` holds a bool array [T_i] per row, each token read off the right text before it (teacher
    forcing).
    """
    rows = checked_tokens(right, "right", bool)
    return PerRow(np.array([row.mean() for row in rows]), float(np.concatenate(rows).mean()))


def exponential(values: ArrayLike) -> NDArray[np.float64]:
    """`exp(values)`, float64, with the largest float in place of what would overflow."""
    return np.exp(np.minimum(values, LARGEST_EXPONENT))


def checked(
    values: ArrayLike, name: str, ndim: int = 1, rows: int | None = None
) -> NDArray[np.float64]:
    """Give `values` as float64 [n] or [n, k].

    Refuse other shapes, no value at all, NaN, infinity, another n than `rows`.
    """
    shape = "[n], one number per row," if ndim == 1 else "[n, k], as many numbers for every row,"
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} cannot be read as an array of numbers; expected {shape} of floats: pad or "
            "select rows of unequal length."
        ) from None
    if array.ndim != ndim or array.size == 0:
        raise InputError(
            f"{name} has shape {array.shape}; expected {shape} and at least one: pass such an "
            "array."
        )
    _refuse_other_length(len(array), name, rows)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        first = ", ".join(str(int(i)) for i in bad[0])
        raise InputError(
            f"{name} has {len(bad)} NaN or infinite values, the first at [{first}]; expected "
            "finite numbers: look for the rows that gave them, and leave them out of every array "
            "or measure them again."
        )
    return array


def checked_tokens(
    values: Sequence[ArrayLike], name: str, kind: type, rows: int | None = None
) -> list[NDArray[Any]]:
    """Give one array [T_i] per row, of `bool` or `float`.

    Refuse no rows, rows without tokens, NaN, another n than `rows`.
    """
    if len(values) == 0:
        raise InputError(
            f"{name} has no rows; expected one array of tokens per row, at least one: pass some "
            "rows."
        )
    _refuse_other_length(len(values), name, rows)
    if kind is float:
        return [checked(row, f"{name}[{i}]") for i, row in enumerate(values)]
    arrays = [np.asarray(row) for row in values]
    for i, array in enumerate(arrays):
        if array.ndim != 1 or array.size == 0 or array.dtype != np.bool_:
            raise InputError(
                f"{name}[{i}] has shape {array.shape} and type {array.dtype}; expected [T] of "
                "bool, one per completion token: leave out rows without supervised tokens."
            )
    return arrays


def _refuse_other_length(length: int, name: str, rows: int | None) -> None:
    if rows is not None and length != rows:
        raise InputError(
            f"{name} has {length} rows; expected {rows}, as before it: pass the same rows in the "
            "same order."
        )
