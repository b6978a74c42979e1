"""The file of a picture: checked before anything is drawn, and the same for the same result."""

from __future__ import annotations

import pytest

from analysis.drawing import checked_target, drawn
from influence.errors import InputError


def test_targets(tmp_path):
    assert checked_target(tmp_path / "a.PNG", False) == tmp_path / "a.PNG"
    (tmp_path / "b.svg").write_text("mine")
    assert checked_target(tmp_path / "b.svg", True) == tmp_path / "b.svg"
    for name, words in (
        ("b.svg", "exists and would be replaced"),
        ("c.pdf", "ends in .png or .svg"),
    ):
        with pytest.raises(InputError, match=words):
            checked_target(tmp_path / name, False)


def test_a_picture_has_no_date_and_text_stays_text(tmp_path):
    def draw(axes):
        axes.set_title("a title")

    first, again = (drawn(draw, tmp_path / f"{k}.svg", height=2, width=3) for k in range(2))
    assert first.read_bytes() == again.read_bytes()
    assert "a title" in first.read_text()
