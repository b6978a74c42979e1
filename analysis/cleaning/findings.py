"""What is found about rows: a reason, a score, its evidence, and what might be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

#: The reasons, in the order of the list, and what they mean in few words.
MEANINGS = {
    "harms": "works against good rows",
    "label": "perhaps a wrong answer",
    "contradiction": "another row answers the same otherwise",
    "duplicate": "says the same as another row",
    "outlier": "unlike all other rows",
    "unlearnt": "hardly learnt",
    "personal": "may hold personal data",
}
REASONS = tuple(MEANINGS)
#: What may be decided of a row, and what may be suggested.
REMOVE, KEEP, RELABEL = "remove", "keep", "relabel"
DECISIONS = (REMOVE, KEEP, RELABEL)


@dataclass(frozen=True)
class Finding:
    """One row and one reason to look at it.

    Attributes
    ----------
    row : int
        Its position in the training rows.
    reason : str
        One of `REASONS`.
    score : float
        How much the reason holds of it, larger = more. Comparable within a reason only.
    evidence : str
        What was seen, in one sentence.
    gain : float or None
        Predicted fall of the loss of others if the row alone goes, nats per token: of the good
        rows of its kind (`harms`), of its own group or paraphrases (`label`).
    other : int or None
        The position of a row to compare it with.
    suggested : str
        `remove`, `relabel`, or nothing.
    answer : str or None
        A better answer, where the rows hold one.
    """

    row: int
    reason: str
    score: float
    evidence: str
    gain: float | None = None
    other: int | None = None
    suggested: str = ""
    answer: str | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Found:
    """What a reason says of the rows.

    Attributes
    ----------
    reason : str
        One of `REASONS`.
    rule : str
        Which rows are listed, in one sentence.
    scores : array [n] float64
        The score of every row, -inf where the reason says nothing of it.
    findings : tuple of Finding
        The rows that the rule lists, the highest score first.
    """

    reason: str
    rule: str
    scores: np.ndarray = field(repr=False)
    findings: tuple[Finding, ...]

    def most(self, k: int) -> Found:
        """The same with the first k findings."""
        return replace(self, findings=self.findings[:k])


def ranked(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Findings with the highest score first, then the largest gain, then the rows' order."""
    return tuple(sorted(findings, key=lambda each: (-each.score, -(each.gain or 0.0), each.row)))
