"""Rows that are like no others, by their text.

Score: 1 less the mean cosine of a row with its `NEIGHBOURS` nearest. On the demo and tofu-tiny this
found planted strange rows with average precision 0.98 and 1.00, a row's self-influence 0.54 and 0.75,
the base's loss 0.59 and 0.78 (benchmarks/cleaning.py, 2026-11-29). An isolation forest on the
vectors' 16, 50 or 100 largest directions: 0.02 or 0.03 in five of these six settings, and 0.52 in the
sixth, tofu-tiny with 100. So it is the text's nearest rows that are asked.

Listed are rows outside the bulk of the logarithms of that mean cosine: cosines end at zero, and where
rows are short of words in common their own spread reaches down to it (tofu-tiny: none of six strange
rows beyond a z-score of 3.5 by the cosines, all six and no other by their logarithms; the demo 6 of
11, SmolLM2's rows 4 of 4, which were looked at too before the rule was taken).
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


def modified_z(values: np.ndarray, bulk: np.ndarray | None = None) -> np.ndarray:
    """How many spreads of the `bulk` [m], by default the values themselves, the `values` [n] are above
    its median, `[n]`: 0.6745 (x - median) / median |b - median| (Iglewicz and Hoaglin 1993).

    Where more than half of the bulk is the same, 1.2533 times the mean distance is the spread; all
    zero where all of it is the same.
    """
    bulk = values if bulk is None else bulk
    middle = np.median(bulk)
    distances = np.abs(bulk - middle)
    spread = np.median(distances) / 0.6745 or 1.2533 * distances.mean()
    return (values - middle) / spread if spread > 0 else np.zeros(len(values))


def outliers(near: Nearest) -> Found:
    """Rows far from their nearest others, `near` by their whole text.

    Score: 1 less the mean cosine with them, -inf of all where there are no more rows than neighbours.
    """
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
