"""Which rows say what a query says, by their words alone: BM25.

A text search answers another question than influence does: which row *states* this, not which row
the adapter's loss depends on. For paraphrased facts it is the better answer, so it stands beside
the scores (`influence top --by`).
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Container, Sequence

import numpy as np

from influence.rows import Example

#: Share of the rows that a word may be in and still mark what a row shares with a query.
COMMON = 0.2


def bm25(
    queries: Sequence[str], documents: Sequence[str], *, k1: float = 1.5, b: float = 0.75
) -> np.ndarray:
    """Okapi BM25 `[Q, n]`: text alone.

    Robertson and Zaragoza 2009, The Probabilistic Relevance Framework, equation 3.15.

    `sum over the words t of q of idf(t) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))`, f = how
    often t is in d, `idf(t) = ln(1 + (N - n_t + 0.5) / (n_t + 0.5))`, n_t = documents with t among
    N; the 1 keeps it positive. Words are runs of letters and digits in lower case; a word that is
    twice in the query counts twice.
    """
    places: dict[str, list[int]] = defaultdict(list)
    often: dict[str, list[int]] = defaultdict(list)
    lengths = np.zeros(len(documents))
    for number, text in enumerate(documents):
        counts = Counter(words(text))
        lengths[number] = counts.total()
        for word, times in counts.items():
            places[word].append(number)
            often[word].append(times)
    relative = lengths / max(lengths.mean(), 1e-12) if len(documents) else lengths
    scores = np.zeros((len(queries), len(documents)))
    for q, text in enumerate(queries):
        for word, times in Counter(words(text)).items():
            where, f = np.array(places.get(word, []), dtype=int), np.array(often.get(word, []))
            idf = math.log(1 + (len(documents) - len(where) + 0.5) / (len(where) + 0.5))
            scores[q, where] += (
                times * idf * f * (k1 + 1) / (f + k1 * (1 - b + b * relative[where]))
            )
    return scores


def words(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in lower case."""
    return re.findall(r"\w+", text.lower())


def text_of(row: Example) -> str:
    """All that a row says, of whatever kind it is; of token ids what they are shown as."""
    if row.text is not None:
        return row.text
    if row.shown is not None:
        return " ".join(row.shown)
    if row.messages is not None:
        turns = (turn.get("content") for turn in row.messages)
        return " ".join(turn for turn in turns if isinstance(turn, str))
    return f"{row.prompt or ''}{row.completion or ''}"


def shared_words(query: str, documents: Sequence[str], *, share: float = COMMON) -> set[str]:
    """The words of a query that are in some documents, and in at most `share` of them: not those
    that nearly every row has.
    """
    asked = set(words(query))
    counts = Counter(word for text in documents for word in asked.intersection(words(text)))
    most = max(share * len(documents), 2)
    return {word for word, count in counts.items() if count <= most}


def spans(text: str, wanted: Container[str]) -> list[tuple[int, int]]:
    """Where words of `wanted` stand in a text, as (start, end) in order; neighbours are one."""
    found: list[tuple[int, int]] = []
    for match in re.finditer(r"\w+", text):
        if match[0].lower() not in wanted:
            continue
        start, end = match.span()
        if found and not text[found[-1][1] : start].strip():
            start = found.pop()[0]
        found.append((start, end))
    return found


def standardised(values: np.ndarray) -> np.ndarray:
    """Values `[n]` less their mean, over their spread: two rankings in one unit."""
    spread = values.std()
    return (values - values.mean()) / (spread if spread > 0 else 1.0)
