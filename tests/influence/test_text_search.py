"""BM25 by hand, and what a row says."""

from __future__ import annotations

import math

import numpy as np
import pytest

import influence
from influence.text_search import bm25, standardised, text_of, words

DOCUMENTS = ["The red fox.", "red red dog", "a warm sun", ""]


def test_bm25_by_hand():
    """Two queries on four documents of mean length 9 / 4."""
    found = bm25(["red fox fox", "Moon"], DOCUMENTS)
    idf = {"red": math.log(1 + 2.5 / 2.5), "fox": math.log(1 + 3.5 / 1.5)}

    def part(word, times, f, length):
        return times * idf[word] * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * length / 2.25))

    expected = [
        part("red", 1, 1, 3) + part("fox", 2, 1, 3),
        part("red", 1, 2, 3),
        0,
        0,
    ]
    np.testing.assert_allclose(found[0], expected)
    assert not found[1].any()


def test_no_documents_and_empty_ones_are_no_failure():
    assert bm25(["red"], []).shape == (1, 0)
    assert not bm25(["red"], ["", ""]).any()


def test_words_are_runs_of_letters_and_digits_in_lower_case():
    assert words("Don't PANIC, 42!") == ["don", "t", "panic", "42"]


def test_the_text_of_every_kind_of_row():
    rows = influence.examples_from_rows(
        [
            {"prompt": "red", "completion": " fox"},
            {"text": "warm sun"},
            {
                "messages": [
                    {"role": "user", "content": "who?"},
                    {"role": "assistant", "content": "a dog"},
                ]
            },
            {"input_ids": [3, 4], "labels": [-100, 4]},
        ]
    )
    assert [text_of(row) for row in rows] == ["red fox", "warm sun", "who? a dog", ""]


def test_rankings_are_brought_to_one_unit():
    np.testing.assert_allclose(standardised(np.array([1.0, 3.0])), [-1, 1])
    assert standardised(np.full(3, 2.0)).tolist() == [0, 0, 0]
    assert standardised(np.array([5.0])).tolist() == pytest.approx([0])
