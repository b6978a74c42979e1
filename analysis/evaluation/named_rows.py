"""Which training rows a method names as those that help a set of queries most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analysis.evaluation.score_files import helpfulness_in
from influence.errors import InputError
from influence.rows import Examples
from influence.run import Run
from influence.text_search import bm25, text_of

#: What the run's own scores, words in common, and rows drawn at random are called.
OWN, TEXT, RANDOM = "influence", "BM25", "random"


@dataclass(frozen=True, eq=False)
class Ranking:
    """How much each training row helps the queries, by one method.

    Attributes
    ----------
    method : str
        Its name: `influence`, `BM25`, or the file of its scores.
    helpfulness : array [n] float64
        Larger = it helps more. Sums over the queries, in the method's own unit.
    """

    method: str
    helpfulness: np.ndarray

    def first(self, k: int) -> np.ndarray:
        """Positions of the k rows that help most, `[k]`. Ties are broken by the rows' order."""
        return np.argsort(-self.helpfulness, kind="stable")[:k]


def rankings_of_others(
    run: Run, queries: Examples, files: Sequence[Path]
) -> tuple[list[Ranking], dict[str, str]]:
    """Rankings of score files and of BM25; and why others order nothing, by method.

    A method that gives every row the same, as BM25 where no query has a word in common with a row,
    names none. Raises what `helpfulness_in` raises, and `InputError` for a file given twice.
    """
    names = [OWN, TEXT, RANDOM, *map(str, files)]
    if len(set(names)) < len(names):
        raise InputError(
            f"--scores {' '.join(map(str, files))} was given; expected different files, not called "
            f"{OWN}, {TEXT} or {RANDOM}"
        )
    found = [Ranking(str(path), helpfulness_in(path, queries, run.train)) for path in files]
    # of the queries as one text: BM25 adds up over a query's words, so this is their sum
    question = " ".join(_texts(queries, run))
    words = bm25([question], _texts(run.train, run))[0]
    return parted([*found, Ranking(TEXT, words)])


def _texts(rows: Examples, run: Run) -> list[str]:
    """What every row says; of token ids without a text what they decode to."""
    decode = run.model.tokenizer.decode
    return [
        text_of(row) or decode(list(row.input_ids or ()), skip_special_tokens=True) for row in rows
    ]


def own_ranking(run: Run, queries: Examples, out: Path, *, overwrite: bool = False) -> Ranking:
    """The ranking by the run's own scores of all queries together, which a file keeps."""
    run.score(queries, aggregate="sum", out=out, overwrite=overwrite)
    return Ranking(OWN, helpfulness_in(out, queries, run.train))


def parted(rankings: Sequence[Ranking]) -> tuple[list[Ranking], dict[str, str]]:
    """Rankings that order the rows, and why the others do not, by method."""
    left_out = {
        each.method: "it has no word in common with any row"
        if each.method == TEXT and not each.helpfulness.any()
        else "it gives every row the same"
        for each in rankings
        if np.ptp(each.helpfulness) == 0
    }
    return [each for each in rankings if each.method not in left_out], left_out


def random_rows(n: int, draw: int, seed: int) -> np.ndarray:
    """A random order of n rows, `[n]`, which depends on the seed and the draw only.

    The first rows of it are a random set, and a smaller set lies in a larger one.
    """
    return np.random.default_rng([seed, draw]).permutation(n)


def counts_of(shares: Sequence[float], n: int) -> list[int]:
    """How many of n rows each share is: rounded, at least one.

    Raises `InputError` where nothing would be left to train on.
    """
    counts = [max(1, round(share * n)) for share in shares]
    whole = [f"{share:g}" for share, k in zip(shares, counts, strict=True) if k >= n]
    if whole:
        raise InputError(
            f"--share {','.join(whole)} of {n} rows is all of them: nothing is left to train on"
        )
    return counts
