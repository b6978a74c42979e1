"""Sums of scores over the training rows of each group."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

#: Scores that are held at a time.
AT_ONCE = 4_000_000


def group_sums(values: Any, members: np.ndarray, groups: int) -> np.ndarray:
    """Sums of `values` [query, train] over the rows of each group, float64 [query, groups].

    `values` is an array, or a dataset in a file, of which some queries are read at a time; `members`
    [train] has the number of every row's group, -1 for none. Sums are in the unit of the values. A
    NaN makes the sum of its own group one, and no other.
    """
    rows = np.flatnonzero(members >= 0)
    ones = np.ones(len(rows))
    place = sp.csr_array((ones, (members[rows], rows)), shape=(groups, len(members)))
    sums = np.zeros((len(values), groups))
    step = max(1, AT_ONCE // max(1, len(members)))
    for start in range(0, len(sums), step):
        part = np.asarray(values[start : start + step], np.float64)
        sums[start : start + step] = (place @ part.T).T
    return sums
