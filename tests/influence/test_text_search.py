"""BM25 by hand, and what a row says."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

import influence
from influence.text_search import bm25, shared_words, spans, standardised, text_of, words
from tests.conftest import rows

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


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0), (2.0, 1.0)])
def test_bm25_by_its_formula_word_by_word(k1, b):
    """And the queries as one text score their sum, since a query's words are added up."""
    documents, queries = (
        [f"{row['prompt']}{row['completion']}" for row in rows(n, seed)]
        for n, seed in ((12, 0), (4, 1))
    )
    split = [text.split() for text in documents]
    mean = sum(map(len, split)) / len(split)
    expected = np.zeros((4, 12))
    for q, query in enumerate(queries):
        for word in query.split():
            n_t = sum(word in document for document in split)
            idf = math.log(1 + (12 - n_t + 0.5) / (n_t + 0.5))
            for i, document in enumerate(split):
                f = Counter(document)[word]
                norm = k1 * (1 - b + b * len(document) / mean)
                expected[q, i] += idf * f * (k1 + 1) / (f + norm) if f else 0.0
    np.testing.assert_allclose(bm25(queries, documents, k1=k1, b=b), expected, rtol=1e-12)
    joined = bm25([" ".join(queries)], documents, k1=k1, b=b)[0]
    np.testing.assert_allclose(joined, expected.sum(axis=0), rtol=1e-12)


def test_no_documents_and_empty_ones_are_no_failure():
    assert bm25(["red"], []).shape == (1, 0)
    assert not bm25(["red"], ["", ""]).any()


def test_words_are_runs_of_letters_and_digits_in_lower_case():
    assert words("Don't PANIC, 42!") == ["don", "t", "panic", "42"]


def test_the_text_of_every_kind_of_row():
    given = influence.examples_from_rows(
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
    assert [text_of(row) for row in given] == ["red fox", "warm sun", "who? a dog", ""]


def test_rankings_are_brought_to_one_unit():
    np.testing.assert_allclose(standardised(np.array([1.0, 3.0])), [-1, 1])
    assert standardised(np.full(3, 2.0)).tolist() == [0, 0, 0]
    assert standardised(np.array([5.0])).tolist() == pytest.approx([0])


def test_words_that_nearly_every_row_has_are_not_shared():
    rows = [f"question {k} of the fox" for k in range(8)] + ["a grey parrot", "the parrot"]
    assert shared_words("The parrot of question 3, a dragon", rows) == {"parrot", "3", "a"}
    assert shared_words("The parrot", rows, share=1.0) == {"parrot", "the"}
    assert shared_words("The parrot", []) == set()


def test_spans_are_where_the_words_stand():
    text = "Zanvira  Yolddahl's cat, the Cat. שלום"
    found = spans(text, {"zanvira", "yolddahl", "cat", "שלום"})
    assert [text[start:end] for start, end in found] == ["Zanvira  Yolddahl", "cat", "Cat", "שלום"]
    assert spans(text, ()) == []
