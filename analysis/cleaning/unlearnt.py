"""Rows that nothing was learnt from: their loss is the base's, or there is no answer to learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.cleaning.findings import Finding, Found, ranked
from analysis.cleaning.texts import Said

#: Share of the base's loss that is left, from which on nothing was learnt: a choice.
LEFT = 0.9


def unlearnt(
    losses: np.ndarray, base: np.ndarray, texts: Sequence[Said], cut: Sequence[bool]
) -> Found:
    """Rows whose loss under the adapter `losses` [n] is nearly that under the `base` [n].

    `cut` [n]: whether truncation took some of the answer. Score: the loss that is left, as a share
    of the base's. Rows whose answer is empty, or cut, are listed whatever their loss. Losses are in
    nats per token. (Rows without any supervised token are refused by `fit`.)
    """
    left = np.divide(losses, base, out=np.ones(len(losses)), where=base > 0)
    findings = []
    for row, share in enumerate(left.tolist()):
        reasons = []
        if not texts[row].answer.strip():
            reasons.append("its answer is empty")
        if cut[row]:
            reasons.append("its answer is truncated")
        if share > 1:
            reasons.append("its loss is larger than the base's")
        elif share >= LEFT:
            reasons.append("nearly nothing was learnt")
        if reasons:
            loss = f"loss {losses[row]:.2f}, {base[row]:.2f} with the base alone, nats a token"
            evidence = f"{', '.join(reasons)}: {loss}"
            findings.append(Finding(row, "unlearnt", float(share), evidence))
    rule = f"at least {LEFT:.0%} of the base's loss is left, or the answer is empty or truncated"
    return Found("unlearnt", rule, left, ranked(findings))
