"""Rows that are like no others, by their text.

Listed are rows outside the bulk of the logarithms of that mean cosine: cosines end at zero, and where
rows are short of words in common their own spread reaches down to it (tofu-tiny: none of six strange
rows beyond a z-score of 3.5 by the cosines, all six and no other by their logarithms; the demo 6 of
11, SmolLM2's rows 4 of 4).

Score: 1 less the mean cosine of a row with its `NEIGHBOURS` nearest. On the demo and tofu-tiny this
found planted strange rows with average precision 0.98 and 1.00; an isolation forest on the vectors'
largest directions 0.02, a row's self-influence 0.54 and 0.75, the base's loss 0.59 and 0.78
(benchmarks/cleaning.py, 2026-11-29). So it is the text that is asked.
"""

from __future__ import annotations

import numpy as np

from analysis.cleaning.findings import Finding, Found, ranked
from analysis.cleaning.texts import Nearest

#: Nearest rows whose mean counts, and how far outside the bulk a row must lie to be listed: a
#: modified z-score (Iglewicz and Hoaglin 1993, "How to detect and handle outliers").
NEIGHBOURS, FAR = 5, 3.5
#: Mean cosine below which rows are all alike strange.
LEAST = 1e-3


def modified_z(values: np.ndarray) -> np.ndarray:
    """How many spreads above the median, `[n]`: 0.6745 (x - median) / median |x - median|.

    Where more than half of the values are the same, the mean distance stands for the median one;
    all zero where all are the same.
    """
    away = values - np.median(values)
    spread = np.median(np.abs(away)) / 0.6745
    if spread == 0:
        spread = 1.2533 * np.abs(away).mean()
    return away / spread if spread > 0 else np.zeros(len(values))


def outliers(near: Nearest) -> Found:
    """Rows far from their nearest others, `near` by their whole text."""
    n = len(near.rows)
    rule = f"modified z-score of what it has in common with its {NEIGHBOURS} nearest above {FAR:g}"
    if n <= NEIGHBOURS:
        return Found("outlier", rule, np.full(n, -np.inf), ())
    scores = 1 - near.cosines[:, :NEIGHBOURS].mean(axis=1)
    z = modified_z(-np.log(np.maximum(1 - scores, LEAST)))
    findings = [
        Finding(
            int(row),
            "outlier",
            float(scores[row]),
            f"has {1 - scores[row]:.2f} in common with its {NEIGHBOURS} nearest rows, others "
            f"{1 - np.median(scores):.2f} (z {z[row]:.1f})",
            other=int(near.rows[row, 0]),
        )
        for row in np.flatnonzero(z > FAR)
    ]
    return Found("outlier", rule, scores, ranked(findings))
