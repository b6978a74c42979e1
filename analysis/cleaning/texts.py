"""Questions and answers of rows as text, their vectors, and each row's nearest others.

Vectors are TF-IDF (Salton and Buckley 1988, with 1 + log of a count, as scikit-learn has it) of runs
of three to five characters within words, each of length one, so that their product is a cosine. They see a changed comma as little and a name as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp

from influence.memory import block_bytes
from influence.rows import Example

#: Characters of a text that its vector is made of, the first ones: a choice, for memory.
MOST = 4_000
#: Texts up to which all pairs are compared. Beyond, those are that `DIRECTIONS` of the vectors put
#: among each text's `CANDIDATES` nearest: 50,000 questions take 2 minutes on one core so, and 13
#: by all pairs (2026-11-29).
ALL_PAIRS, DIRECTIONS, CANDIDATES = 4_096, 128, 40
#: Texts whose cosines with all others are held at once, at most; and bytes that each cosine takes
#: then, with its negative and its place in their order.
AT_ONCE, COSINE_BYTES = 512, 16


@dataclass(frozen=True)
class Said:
    """What a row asks and what it answers; a row that is one text asks nothing."""

    question: str
    answer: str

    @property
    def asked(self) -> str:
        """The question, or the whole text where it asks nothing."""
        return self.question or self.answer

    @property
    def whole(self) -> str:
        """Both in one text."""
        return f"{self.question} {self.answer}".strip()


def said(row: Example, decode: Callable[[list[int]], str]) -> Said:
    """What a row says. `decode` makes text of token ids, for rows that are nothing else."""
    if row.text is not None:
        return Said("", row.text)
    if row.shown is not None:
        return Said(*row.shown)
    if row.input_ids is not None:
        return Said("", decode(list(row.input_ids)))
    if row.messages is None:
        return Said(row.prompt or "", row.completion or "")
    turns = [turn.get("content") for turn in row.messages[:-1]]
    return Said("\n".join(turn for turn in turns if isinstance(turn, str)), row.answer or "")


def plain(text: str) -> str:
    """A text in small letters, with one blank between words: what counts as the same."""
    return " ".join(text.lower().split())


def vectors(texts: Sequence[str]) -> Any:
    """TF-IDF vectors `[n, features]`, sparse float32, each of length one or, of no words, zero."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(text.strip() for text in texts):
        return sp.csr_matrix((len(texts), 1), dtype=np.float32)
    vectoriser = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
    made = vectoriser.fit_transform([plain(text[:MOST]) for text in texts])
    return sp.csr_matrix(made, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Nearest:
    """Each text's nearest others: `rows` [n, k], and their `cosines` [n, k], the nearest first."""

    rows: np.ndarray = field(repr=False)
    cosines: np.ndarray = field(repr=False)


def nearest(texts: Any, k: int, *, all_pairs: int = ALL_PAIRS) -> Nearest:
    """The `k` nearest others of each of n vectors, fewer where there are fewer.

    `texts` [n, features] are of length one or zero. Up to `all_pairs` of them it is exact. Beyond,
    candidates come from the vectors' largest directions (randomized SVD: Halko, Martinsson and Tropp
    2011), and the cosines are exact.
    """
    n = texts.shape[0]
    k = max(0, min(k, n - 1))
    rows, cosines = np.zeros((n, k), dtype=np.int64), np.zeros((n, k))
    if k == 0:
        return Nearest(rows, cosines)
    whole, turned = None, None
    if n > all_pairs and min(texts.shape) > DIRECTIONS:
        from sklearn.decomposition import TruncatedSVD

        made = TruncatedSVD(DIRECTIONS, n_iter=2, random_state=0).fit_transform(texts)
        whole = np.asarray(made, dtype=np.float32)
    else:
        turned = texts.T.tocsr()
    step = rows_at_once(n)
    for start in range(0, n, step):
        part = np.arange(start, min(start + step, n))
        if whole is None:
            near = np.asarray((texts[part] @ turned).todense())
            near[np.arange(len(part)), part] = -np.inf
            chosen = np.argpartition(-near, k - 1, axis=1)[:, :k]
            values = np.take_along_axis(near, chosen, axis=1)
        else:
            near = whole[part] @ whole.T
            near[np.arange(len(part)), part] = -np.inf
            many = min(max(k, CANDIDATES), n - 1)
            chosen = np.argpartition(-near, many - 1, axis=1)[:, :many]
            values = pairwise(texts, np.repeat(part, many), chosen.ravel()).reshape(chosen.shape)
        order = np.lexsort((chosen, -values), axis=1)[:, :k]
        rows[part] = np.take_along_axis(chosen, order, axis=1)
        cosines[part] = np.take_along_axis(values, order, axis=1)
    return Nearest(rows, cosines)


def rows_at_once(n: int) -> int:
    """Texts whose cosines with `n` others are held at once: `AT_ONCE`, or fewer within a bound."""
    each = COSINE_BYTES * max(n, 1)
    return max(1, block_bytes(AT_ONCE * each) // each)


def pairwise(texts: Any, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines `[p]` of the vectors at `first` [p] with those at `second` [p]."""
    found = np.empty(len(first))
    for start in range(0, len(first), AT_ONCE * CANDIDATES):
        part = slice(start, start + AT_ONCE * CANDIDATES)
        product = texts[first[part]].multiply(texts[second[part]])
        found[part] = np.asarray(product.sum(axis=1)).ravel()
    return found
