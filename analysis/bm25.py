"""Okapi BM25 of rows: which rows share words with a query, the rival that reads text alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from influence.rows import Example, Examples


def bm25(
    queries: Sequence[str], documents: Sequence[str], *, k1: float = 1.5, b: float = 0.75
) -> np.ndarray:
    """Okapi BM25 of every document for every query, `[Q, n]` float64, none negative.

    Robertson and Zaragoza 2009, The Probabilistic Relevance Framework, equation 3.15.

    `sum over the words t of q of idf(t) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))`, f = how
    often t is in d, `idf(t) = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))`, n_t = documents with t among
    N; the 1 keeps it positive. Words are runs of letters and digits in lower case; a word that is
    twice in the query counts twice. A script without blanks between its words gives long runs that
    few documents share.
    """
    word_counts = [Counter(words(text)) for text in documents]
    lengths = np.array([sum(counts.values()) for counts in word_counts], dtype=np.float64)
    scores = np.zeros((len(queries), len(documents)))
    if not lengths.any():
        return scores
    longer = k1 * (1 - b + b * lengths / lengths.mean())
    holders: dict[str, list[int]] = {}
    for document, counts in enumerate(word_counts):
        for word in counts:
            holders.setdefault(word, []).append(document)
    for q, text in enumerate(queries):
        for word, times in Counter(words(text)).items():
            with_it = holders.get(word, [])
            idf = math.log(1 + (len(documents) - len(with_it) + 0.5) / (len(with_it) + 0.5))
            f = np.array([word_counts[document][word] for document in with_it], dtype=np.float64)
            scores[q, with_it] += times * idf * f * (k1 + 1) / (f + longer[with_it])
    return scores


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case."""
    return re.findall(r"\w+", text.lower())


def row_texts(rows: Examples, tokenizer: Any) -> list[str]:
    """The text of every row: prompt and completion, all turns, or what its token ids decode to."""
    return [_text(row, tokenizer) for row in rows]


def _text(row: Example, tokenizer: Any) -> str:
    if row.messages is not None:
        return " ".join(str(turn.get("content") or "") for turn in row.messages)
    if row.input_ids is not None:
        return tokenizer.decode(list(row.input_ids), skip_special_tokens=True)
    return row.text if row.text is not None else f"{row.prompt}{row.completion}"
