"""Each way to unlearn a row, by its forecast."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from unlearn.difficulty.advice import recommended


@pytest.mark.parametrize(
    ("steps", "damage", "gap", "share", "way", "reason"),
    [
        (0.0, 0.0, 0.0, 0.9, "none", "its loss is at the target already"),
        (0.0, 0.0, -2.0, 0.1, "none", "its loss is at the target already"),
        (
            9.0,
            0.01,
            1.0,
            0.51,
            "retrain",
            "51% of all rows: too few are left to hold the adapter in place",
        ),
        (9.0, 0.01, 1.0, 0.5, "ascent", "9 steps for +0.5% of retained loss, at most 1.0% allowed"),
        (
            np.inf,
            np.nan,
            1.0,
            0.1,
            "edit",
            "ascent is not forecast to reach the target in 30 steps",
        ),
        (9.0, np.nan, 1.0, 0.1, "edit", "no retained row tells the damage of ascent"),
        (9.4, 0.02, 1.0, 0.1, "ascent", "9 steps for +1.0% of retained loss, at most 1.0% allowed"),
        (9.0, 0.0201, 1.0, 0.1, "edit", "ascent would cost +1.0% of retained loss, more than 1.0%"),
        (9.0, 1.0, 1.0, 0.1, "edit", "ascent would cost +50.0% of retained loss, more than 1.0%"),
        (
            9.0,
            -1.0,
            1.0,
            0.1,
            "ascent",
            "9 steps for -50.0% of retained loss, at most 1.0% allowed",
        ),
    ],
)
def test_each_way(steps, damage, gap, share, way, reason):
    table = pd.DataFrame({"id": ["a"], "steps": [steps], "damage": [damage], "damage_high": [1.0]})
    table["gap"], table["share"] = gap, share
    out = recommended(table, 2.0, 0.01, 30)
    assert list(out.columns) == [
        "id",
        "steps",
        "damage",
        "damage_high",
        "recommended",
        "reason",
        "gap",
        "share",
    ]
    assert (out["recommended"][0], out["reason"][0]) == (way, reason)
    assert "nan" not in reason
    pd.testing.assert_frame_equal(recommended(out, 2.0, 0.01, 30), out)  # again: in the same places
    assert "recommended" not in table
