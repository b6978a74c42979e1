"""How much of a text another one repeats: ROUGE recall of words, and of their longest common run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from influence.errors import InputError


@dataclass(frozen=True, eq=False)
class Rouge:
    """ROUGE recall of every row, [n] each: of words, and of the longest common subsequence."""

    rouge1_recall: NDArray[np.float64]
    rougeL_recall: NDArray[np.float64]


def rouge(references: Sequence[str], generated: Sequence[str]) -> Rouge:
    """ROUGE-1 and ROUGE-L recall of generated texts against the right ones.

    By Google's `rouge_score` with stemming, as TOFU (Maini et al. 2024, arXiv 2401.06121).

    Its words are runs of a-z and 0-9 after lower-casing: a reference without any, in another script
    for instance, has a recall of 0 whatever was generated (`has_words`).
    """
    from rouge_score.rouge_scorer import RougeScorer  # here: it brings nltk with it

    if len(references) != len(generated) or len(references) == 0:
        raise InputError(
            f"rouge was given {len(references)} references and {len(generated)} generated texts; "
            "expected as many, and at least one: pass both for the same rows."
        )
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [
        scorer.score(reference, text) for reference, text in zip(references, generated, strict=True)
    ]
    return Rouge(
        *(
            np.array([float(score[kind].recall) for score in scores])
            for kind in ("rouge1", "rougeL")
        )
    )


def has_words(text: str) -> bool:
    """Whether ROUGE finds a word in a text: a run of a-z or 0-9 after lower-casing."""
    return any(letter.isascii() and letter.isalnum() for letter in text.lower())
