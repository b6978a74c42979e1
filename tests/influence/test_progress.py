"""Progress on standard error: plain lines now and then, and a bar on a terminal."""

from __future__ import annotations

import re
import sys
from itertools import accumulate

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


def told(capfd) -> list[tuple[int, float]]:
    """What plain lines said: rows done, and seconds left."""
    lines = capfd.readouterr().err.splitlines()
    return [
        (int(rows), float(seconds))
        for line in lines
        for rows, seconds in re.findall(r"^rows: (\d+)/195, about (\d+) s left$", line)
    ]


@pytest.mark.parametrize("overhead", [0, 1.5])
@pytest.mark.parametrize("done", [0, 4])
def test_rows_are_counted_and_time_goes_by_work(capfd, clock, overhead, done):
    """Batches from one row of 4,000 tokens to 64 rows of 20: from the first tenth of the work on
    the time that is left is right within a factor of two, also where a batch costs something of its
    own and attention takes more of long rows.
    """
    rows = [1, 1, 2, 3, 4, 8, 16, 32, 64, 64]
    lengths = [4000, 3000, 1500, 900, 600, 300, 120, 50, 30, 20]
    sizes = [count * length for count, length in zip(rows, lengths, strict=True)]
    seconds = [
        count * length * (1 + length / 8000) / 20 + overhead
        for count, length in zip(rows, lengths, strict=True)
    ]
    left = list(range(done, len(rows)))
    for number in progress.track(iter(left), "rows", done=done, counts=rows, sizes=sizes):
        clock.seconds += seconds[number]
    lines = told(capfd)
    assert [count for count, _ in lines] == list(accumulate(rows))[done:]
    for number, (_, predicted) in zip(left, lines, strict=True):
        truth = sum(seconds[number + 1 :])
        if sum(sizes[: number + 1]) >= sum(sizes) / 10 and truth > 20:
            assert 1 / 2 < predicted / truth < 2


def test_the_whole_is_told_once_after_a_tenth_of_the_first_pass(capfd, clock):
    """Ten batches of 5 s and three passes more: after the first, 45 + 150 s are left."""
    for _ in progress.track(range(10), "rows", passes=3):
        clock.seconds += 5
    lines = [line for line in capfd.readouterr().err.splitlines() if "in all" in line]
    assert lines == ["in all about 3 min left"]
    for _ in progress.track(range(10), "rows", passes=3):
        clock.seconds += 0.2  # 7.8 s are left: nobody waits for that
    assert capfd.readouterr().err == ""


def test_the_bar_goes_by_work_and_shows_the_count(monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    way = progress.Way.of([1, 3], [30, 10], done=0)
    way.step()
    assert (way.shown, way.share) == ("1/4", 0.75)
    assert list(progress.track("ab", "rows", counts=[1, 3], sizes=[30, 10])) == ["a", "b"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0.4 s"),
        (9.96, "10 s"),
        (99, "99 s"),
        (150, "2 min"),
        (7200, "2.0 h"),
        (5 * 86400, "5.0 days"),
    ],
)
def test_times_for_people(seconds, text):
    assert progress.duration(seconds) == text


@pytest.mark.parametrize("width", [24, 40, 80])
def test_in_a_narrow_window_the_count_and_the_time_stay(monkeypatch, capfd, width):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for name, value in {"COLUMNS": str(width), "FORCE_COLOR": "1", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    list(progress.track(range(20), "training rows, forward and backward", counts=[500] * 20))
    raw = capfd.readouterr().err
    told = re.sub(r"\x1b\[[0-9;?]*[KhlA-H]|\r", "\n", re.sub(r"\x1b\[[0-9;]*m", "", raw))
    lines = [line for line in told.splitlines() if line.startswith("tr")]
    assert lines
    for line in lines:
        assert re.search(r" \d+/10000 (\d+:\d\d:\d\d|-:--:--)$", line), line
        assert len(line) <= width
    assert any("━" in line for line in lines) == (width == 80)
    assert re.findall(r"\x1b\[(?:[0-9]+;)*(?:3|9)[0-8][0-9;]*m", raw) == []
