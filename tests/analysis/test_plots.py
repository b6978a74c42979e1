"""Pictures of results: written whole, and refused with a sentence."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.metrics import lds
from analysis.plots import lds_plot
from influence.errors import InputError
from tests.analysis.metrics.lds_cases import LOSSES, MASKS, SCORES


def test_plot_writes_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    losses = LOSSES.copy()
    losses[:, 2] = 0.7
    result = lds(SCORES, MASKS, losses)
    assert lds_plot(result, tmp_path / "lds.png").read_bytes().startswith(b"\x89PNG")
    svg = lds_plot(result, tmp_path / "lds.svg").read_text()
    for text in (
        "Linear datamodeling score",
        "6 queries, 12 retrained subsets",
        f"mean {result.mean:.3f}",
        "95 % bootstrap interval",
        "query, sorted by its correlation (1 undefined, left out)",
    ):
        assert text in svg
    assert lds_plot(result, tmp_path / "again.svg").read_text() == svg


def test_plot_says_what_is_wrong_with_the_call(tmp_path):
    result = lds(SCORES, MASKS, LOSSES, resamples=5)
    with pytest.raises(
        InputError, match=r"lds\.pdf; expected a name that ends in \.png or \.svg: rename"
    ):
        lds_plot(result, tmp_path / "lds.pdf")
    (tmp_path / "lds.png").write_bytes(b"mine")
    with pytest.raises(
        InputError, match=r"lds\.png exists and would be replaced: choose another name"
    ):
        lds_plot(result, tmp_path / "lds.png")
    assert (tmp_path / "lds.png").read_bytes() == b"mine"
    nothing = lds(SCORES, MASKS, np.ones((12, 6)), resamples=5)
    with pytest.raises(InputError, match=r"None of the 6 queries has a defined correlation"):
        lds_plot(nothing, tmp_path / "nothing.png")
