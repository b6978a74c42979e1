"""Progress on standard error: plain lines now and then, and a bar on a terminal."""

from __future__ import annotations

import sys

import pytest

from influence import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns: `clock.seconds += 4`."""

    class Clock:
        seconds = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.seconds)
    return Clock


def test_items_come_unchanged_and_a_short_run_is_silent(capfd):
    assert list(progress.track([3, 1, 2], "rows")) == [3, 1, 2]
    assert capfd.readouterr().err == ""


def test_a_line_cannot_move_the_cursor_by_the_names_in_it(capfd):
    progress.say("note: the tensor 'a\x1b[2J\x1b]0;b\x07\r\u202e' is not used\nnext")
    assert capfd.readouterr().err == "note: the tensor 'a [2J ]0;b   ' is not used\nnext\n"


def test_a_plain_line_every_ten_seconds_with_what_is_left(capfd, clock):
    """Two of four were done before; each takes 6 s, so after two more nothing is left to do."""
    for _ in progress.track(iter("ab"), "rows", total=4, done=2):
        clock.seconds += 6
    assert capfd.readouterr().err.splitlines() == ["rows: 4/4, about 0 s left"]
    for _ in progress.track("abcd", "rows"):
        clock.seconds += 11
    assert capfd.readouterr().err.splitlines() == [
        "rows: 1/4, about 33 s left",
        "rows: 2/4, about 22 s left",
        "rows: 3/4, about 11 s left",
        "rows: 4/4, about 0 s left",
    ]


def test_now_and_then_is_due_once_an_interval(clock):
    due = progress.NowAndThen()
    assert not due()
    clock.seconds = 10.5
    assert due()
    assert not due()
    clock.seconds = 20.6
    assert due()


def test_a_bar_on_a_terminal_yields_every_item(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.track(range(3), "rows", done=1)) == [0, 1, 2]


def test_say_is_one_line_on_standard_error(capfd):
    progress.say("note: two")
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "note: two\n")
