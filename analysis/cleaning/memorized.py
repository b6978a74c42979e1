"""Rows that hold what looks like personal data, and how well the adapter knows them by heart.

Every such row is listed, those first whose removal would raise their own loss the most
(self-influence: what of them is known from nowhere else). Whether a row is memorized is said by its
loss and by how many of its tokens the model puts first itself. No secret is told: `without_secrets`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from analysis.cleaning.findings import REMOVE, Finding, Found, ranked
from analysis.cleaning.personal import Match, matches
from analysis.cleaning.texts import Said

#: Share of the base's loss below which a row is called memorized: a choice.
MEMORIZED = 0.5


def holding(texts: Sequence[Said]) -> dict[int, list[Match]]:
    """What looks like personal data, by row, of those that hold any."""
    found = {row: matches(text.whole) for row, text in enumerate(texts)}
    return {row: held for row, held in found.items() if held}


def without_personal_answers(found: Found) -> Found:
    """The same, but no answer that holds personal data is suggested: it would go into one more row."""
    told = "; the answer that speaks for it holds personal data and is not suggested"
    return replace(
        found,
        findings=tuple(
            replace(each, answer=None, suggested="", evidence=each.evidence + told)
            if each.answer is not None and matches(each.answer)
            else each
            for each in found.findings
        ),
    )


def personal(
    held: dict[int, list[Match]],
    self_influence: np.ndarray,
    losses: np.ndarray,
    base: np.ndarray,
    right: dict[int, float],
) -> Found:
    """The rows that hold personal data. Score: self-influence, nats per token.

    `self_influence`, `losses` and losses under the `base` are [n], nats per token; `right` has, of
    each row of `held`, the share of its tokens that the model puts first. Those that are memorized
    are suggested for removal.
    """
    scores, findings = np.full(len(losses), -np.inf), []
    for row, found in held.items():
        scores[row] = self_influence[row]
        kinds = Counter(match.kind for match in found)
        shown = ", ".join(
            f"{kind} x{times}" if times > 1 else kind for kind, times in kinds.items()
        )
        known = bool(losses[row] <= MEMORIZED * base[row])
        evidence = (
            f"{shown}: {' '.join(match.masked for match in found[:5])}; "
            f"{'memorized' if known else 'not memorized'}: loss {losses[row]:.2f}, "
            f"{base[row]:.2f} with the base alone, nats a token; {right[row]:.0%} of its tokens are put first"
        )
        findings.append(
            Finding(row, "personal", scores[row], evidence, suggested=REMOVE if known else "")
        )
    rule = "holds what a pattern takes for personal data; the score is its self-influence"
    return Found("personal", rule, scores, ranked(findings))
