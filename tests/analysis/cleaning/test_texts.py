"""Texts of rows, cosines by hand, and the nearest by all pairs and by few directions."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.cleaning import texts as module
from analysis.cleaning.texts import Said, nearest, pairwise, plain, said, vectors
from influence.memory import bounded
from influence.rows import Example

WORDS = [
    "amber",
    "bridge",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbor",
    "island",
    "jungle",
    "kettle",
    "ladder",
]


def sentences(n, seed=0, length=6):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) + f" {i}" for i in range(n)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (Example("a", prompt="Q?", completion=" A."), Said("Q?", " A.")),
        (Example("a", text="all"), Said("", "all")),
        (Example("a", input_ids=(1, 2)), Said("", "1-2")),
        (Example("a", input_ids=(1, 2), shown=("ask", "say")), Said("ask", "say")),
        (
            Example(
                "a",
                messages=(
                    {"role": "system", "content": "S"},
                    {"role": "user", "content": "U"},
                    {"role": "assistant", "content": "A"},
                ),
            ),
            Said("S\nU", "A"),
        ),
    ],
)
def test_what_a_row_says(row, expected):
    assert said(row, lambda ids: "-".join(map(str, ids))) == expected


def test_plain_is_what_counts_as_the_same():
    assert plain("  The\nSAME  text ") == "the same text"
    assert Said("ask", "").whole == "ask"


def test_cosines_are_between_nothing_and_all():
    found = vectors(["the red fox", "The  RED fox", "nothing alike", ""])
    cosines = (found @ found.T).toarray()
    assert np.allclose(np.diagonal(cosines), [1, 1, 1, 0], atol=1e-6)
    assert cosines[0, 1] == pytest.approx(1, abs=1e-6)
    assert cosines[0, 2] < 0.1
    assert vectors(["", " "]).shape[0] == 2


def test_the_nearest_are_those_of_all_cosines(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 7)
    found = vectors(sentences(40))
    every = (found @ found.T).toarray()
    np.fill_diagonal(every, -1)
    near = nearest(found, 5)
    assert near.rows.shape == near.cosines.shape == (40, 5)
    for row in range(40):
        best = np.sort(every[row])[::-1][:5]
        assert np.allclose(near.cosines[row], best, atol=1e-6)
        assert np.allclose(every[row, near.rows[row]], near.cosines[row], atol=1e-6)
        assert row not in near.rows[row]


def test_few_directions_find_the_near_copies(monkeypatch):
    monkeypatch.setattr(module, "DIRECTIONS", 16)
    lines = sentences(300, length=9)
    lines += [line.replace("a", "a ", 1) for line in lines[:30]]
    found = vectors(lines)
    exact, rough = nearest(found, 1), nearest(found, 1, all_pairs=10)
    copies = np.arange(300, 330)
    assert (exact.rows[copies, 0] == copies - 300).all()
    assert (rough.rows[copies, 0] == copies - 300).mean() > 0.9
    assert np.allclose(rough.cosines[copies, 0], pairwise(found, copies, rough.rows[copies, 0]))


def test_a_bound_of_memory_holds_fewer_cosines_at_once():
    assert module.rows_at_once(1_000) == module.rows_at_once(10**9) == module.AT_ONCE
    with bounded(memory=16 * 16 * 1_000 * 3 / 1e9):
        assert [module.rows_at_once(n) for n in (1_000, 3_000, 10**6)] == [3, 1, 1]


def test_few_rows_have_few_others():
    assert nearest(vectors(["one"]), 5).rows.shape == (1, 0)
    assert nearest(vectors(["one", "two"]), 5).rows.tolist() == [[1], [0]]
