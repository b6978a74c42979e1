"""Groups of one difficulty and mixed ones."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.studies.difficulty_groups import by_difficulty, mixtures
from influence.errors import InputError


def test_groups_by_difficulty_and_mixtures():
    names = list("abcdefg")
    groups = by_difficulty(names, [3, np.inf, 1, 2, 7, 5, 4], parts=3)
    assert groups == {"part 1": ["c", "d", "a"], "part 2": ["g", "f"], "part 3": ["e", "b"]}
    mixed = mixtures(groups, count=2)
    assert list(mixed) == [f"mixture {m}, part {k}" for m in (1, 2) for k in (1, 2, 3)]
    for m in (1, 2):
        parts = [mixed[f"mixture {m}, part {k}"] for k in (1, 2, 3)]
        assert [len(part) for part in parts] == [3, 2, 2]
        assert sorted(name for part in parts for name in part) == names
    assert mixed["mixture 1, part 1"] != mixed["mixture 2, part 1"]
    for steps, parts in (([1, 2], 2), ([1, 2, np.nan], 2), ([1, 2, 3], 4), ([1, 2, 3], 1)):
        with pytest.raises(InputError, match="expected"):
            by_difficulty(["a", "b", "c"], steps, parts)
