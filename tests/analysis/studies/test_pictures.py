"""Pictures of studies."""

from __future__ import annotations

import io
import warnings

import numpy as np

from analysis.studies.pictures import paths_plot, tokens_plot


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


def test_text_of_rows_is_drawn_as_it_is():
    tokens = ["$\\frac{", "</script>", "\x1b[2J", "\n", "$"]
    figure = tokens_plot({"$\\oops$ \x07": (tokens, np.array([1.0, -2, 0, 0.5, 3]))}, "title")
    figure.savefig(io.BytesIO())
    letters = {text.get_text() for text in figure.axes[0].texts}
    assert {"$", "\u21b5", "\u00b7"} <= letters
    assert not any("\x1b" in letter for letter in letters)
