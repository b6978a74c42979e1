"""Pictures of studies."""

from __future__ import annotations

import warnings

import numpy as np

from analysis.studies.pictures import paths_plot


def test_ways_are_drawn_without_warnings(tmp_path):
    x = np.array([[0, 1, 2], [0, 2, np.nan]], dtype=float)
    empty = np.full((2, 3), np.nan)
    ways = {"a": {"in": (x, x), "other": (empty, empty)}, "b": {"in": (x, -x)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = paths_plot(ways, "title", labels=(("x", "y"), ("u", "v")))
        figure.savefig(tmp_path / "a.png")
    line = figure.axes[0].containers[0][0]
    np.testing.assert_allclose(line.get_xydata(), [[0, 0], [1.5, 1.5], [2, 2]])
