"""Tables of rows in wide and narrow windows, with and without colours, and their marks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from influence.row_table import NARROW, RowTable, marked

LONG, HEBREW = "an-id-" + "x" * 70, "שלום עולם"


def shown(width: int, *, terminal: bool = False, no_color: bool = False) -> str:
    lines = [
        (["+1.00e-02"], [marked("a", ()), marked("group one", ()), marked("the red fox", {"fox"})]),
        (["-2.00e-02"], [marked(LONG, ()), marked("", ()), marked(f"[b]{HEBREW}[/b]", {"שלום"})]),
    ]
    table = RowTable("[b]title[/b]", ["score (nats per token)"], ["id", "group", "row"], lines)
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=terminal, no_color=no_color)
    console.print(table, markup=False, highlight=False)
    return file.getvalue()


@pytest.mark.parametrize("width", [20, 40, NARROW - 1, NARROW, 80, 200])
def test_nothing_is_lost_and_no_line_is_too_long(width):
    text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    joined = "".join(text.split())
    for part in ("[b]title[/b]", "+1.00e-02", "-2.00e-02"):
        assert part in joined
    if width < NARROW:
        assert LONG in joined
        assert "┃" not in text
    else:
        assert "┃" in text
    assert joined.count("x") == 70 + 1
    assert set(HEBREW) <= set(text)


def test_the_heading_of_a_number_leaves_the_room_to_the_row():
    first = next(line for line in shown(80).splitlines() if "│" in line)
    assert first.split("│")[1].strip() == "+1.00e-02"
    assert len(first.split("│")[1]) <= 12


@pytest.mark.parametrize("no_color", [False, True])
def test_marks_are_no_colours_and_only_on_a_terminal(no_color):
    for width in (40, 100):
        text = shown(width, terminal=True, no_color=no_color)
        assert "\x1b[1;4mfox\x1b[0m" in text
        assert "\x1b[1;4mשלום\x1b[0m" in text
        assert not [
            code
            for code in text.split("\x1b[")[1:]
            if code.split("m")[0].startswith(("3;", "3", "9")) and code.split("m")[0] != "3"
        ]
        assert "\x1b" not in shown(width)
