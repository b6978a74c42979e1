"""BM25 by hand and by its formula in a plain loop, and the texts that it reads of rows."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

import influence
from analysis.bm25 import bm25, row_texts, words
from tests.conftest import rows


def test_three_documents_by_hand():
    """Lengths 3, 1, 2: mean 2. `sun` is once in documents 0 and 2, `fox` twice in 0 alone.

    idf(sun) = ln(1 + 1.5 / 2.5) = ln 1.6, idf(fox) = ln(1 + 2.5 / 1.5). With k1 = 1.5 and b = 0.75
    the denominator's second part is 1.5 (0.25 + 0.375 |d|): 2.0625 for document 0 and 1.5 for
    document 2.
    """
    found = bm25(["Sun, fox?", "sun sun moon"], ["fox sun fox", "cat", "sun dog"])
    sun, fox = math.log(1.6), math.log(1 + 2.5 / 1.5)
    first = sun * 2.5 / 3.0625 + fox * 5 / 4.0625
    assert found == pytest.approx(
        np.array([[first, 0, sun * 2.5 / 2.5], [2 * sun * 2.5 / 3.0625, 0, 2 * sun * 2.5 / 2.5]])
    )


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0), (2.0, 1.0)])
def test_many_documents_by_the_formula_word_by_word(k1, b):
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
    assert (expected > 0).any()


@pytest.mark.parametrize(
    ("queries", "documents"),
    [(["sun"], ["fox", "cat dog"]), (["sun", ""], ["", "?!"]), (["?"], ["fox"]), ([], ["fox"])],
)
def test_without_a_word_in_common_every_score_is_zero(queries, documents):
    found = bm25(queries, documents)
    assert found.shape == (len(queries), len(documents))
    assert not found.any()


def test_words_are_runs_in_lower_case():
    assert words("The RED-fox's 2nd naïve_dog") == ["the", "red", "fox", "s", "2nd", "naïve_dog"]


def test_the_text_of_every_kind_of_row(tokenizer):
    turns = [{"role": "user", "content": "the sun"}, {"role": "assistant", "content": "a fox"}]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    given = [
        {"prompt": "red", "completion": " fox"},
        {"text": "old cats"},
        {"messages": turns},
        {"messages": [turns[0], call, *turns]},
        {"input_ids": tokenizer("warm sun")["input_ids"] + [tokenizer.eos_token_id]},
    ]
    texts = row_texts(influence.examples_from_rows(given), tokenizer)
    assert texts[:4] == ["red fox", "old cats", "the sun a fox", "the sun  the sun a fox"]
    assert words(texts[4]) == words(tokenizer.decode(given[4]["input_ids"][:-1]))
