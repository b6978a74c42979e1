"""Which sides are whole, which are sketched and how far, and what is said of it."""

from __future__ import annotations

import pytest

from influence.curvature.wide_sides import WIDEST_WHOLE, directions, note

ITEM = 4


def summed(widths, kept):
    """Bytes while the moments are summed up, said once more: a sketch has a test matrix."""
    return sum(ITEM * d * d if kept[i] == d else ITEM * 2 * d * kept[i] for i, d in widths.items())


def test_without_a_budget_every_wide_side_keeps_the_rank():
    widths = {0: 2048, 2: 2049, 5: 100_000, 7: 200}
    assert directions(widths, 2048, 256, ITEM, 0) == {0: 2048, 2: 256, 5: 256, 7: 200}
    assert directions({0: 250}, 100, 256, ITEM, 0) == {0: 250}  # no more than there are


def test_the_budget_makes_the_narrowest_whole_and_raises_the_others_in_proportion():
    widths = {0: 3000, 1: 3000, 2: 6000, 3: 8000}
    floor = directions(widths, 2048, 256, ITEM, 0)
    assert set(floor.values()) == {256}
    for budget in (1.5e8, 3e8, 4e8, 6e8):
        kept = directions(widths, 2048, 256, ITEM, budget)
        assert summed(widths, kept) <= max(budget, summed(widths, floor))
        assert all(k >= 256 for k in kept.values())
        assert (kept[0] == 3000) == (kept[1] == 3000)  # alike, or neither
    # 184 MB for everything sketched at least; two whole of 3,000 take 47 MB more
    assert summed(widths, floor) == 2 * ITEM * 256 * 20_000
    pair = 2 * (ITEM * 3000**2 - 2 * ITEM * 3000 * 256)
    exact = summed(widths, floor) + pair
    assert directions(widths, 2048, 256, ITEM, exact) == {0: 3000, 1: 3000, 2: 256, 3: 256}
    short = directions(widths, 2048, 256, ITEM, exact - 1)
    assert short[0] == short[1] < 3000
    # a little is left over: in proportion to the widths
    more = directions(widths, 2048, 256, ITEM, exact + 8e7)
    assert more[2] - 256 == pytest.approx(0.75 * (more[3] - 256), abs=1)
    assert summed(widths, more) == pytest.approx(exact + 8e7, rel=1e-3)
    assert directions(widths, 2048, 256, ITEM, 1e12) == widths


def test_the_widest_are_sketched_whatever_the_memory_and_no_further_than_pays():
    widths = {0: WIDEST_WHOLE, 1: WIDEST_WHOLE + 4, 2: 128_000}
    assert directions(widths, 2048, 256, ITEM, 1e15) == {0: 8192, 1: 2048, 2: 2048}
    assert directions({0: 8200}, 2048, 256, ITEM, 1e15) == {0: 2048}
    assert directions({0: 9000}, 2048, 4000, ITEM, 1e15) == {0: 4000}  # who asked for more has it


def test_the_note_tells_the_sides_and_what_lies_outside():
    assert note([(64, 64), (192, 192)], [0, 0]) is None
    words = note([(64, 64), (4096, 256), (4096, 256), (8192, 512)], [0, 0.1, 0.2, 0.6])
    assert words is not None
    assert "of 3 of 4 LoRA matrices" in words
    assert "256 directions of width 4,096, 512 directions of width 8,192" in words
    assert "30% of its trace, 60% at most, lies outside" in words
