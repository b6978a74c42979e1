"""Advice on how to unlearn a unit: not at all, by retraining, by gradient ascent, or by an edit.

    none      the loss is at its target already
    retrain   the unit is more than half of all rows: an edit keeps what the other rows hold in
              place, and there are too few of them
    ascent    its forecast damage is at most `max_damage` of the retained rows' loss: a few
              gradients do, and nothing need be held
    edit      otherwise, also where the ascent was not forecast to reach its target, of which an
              edit is independent: it holds a sample of retained rows while it moves
              (`unlearn.edits.steps`)

On the testbed's single rows an edit to the same target cost the others nothing and ascent 5 % of
their loss, an edit at twenty-five times the gradients (benchmarks/difficulty.py, 2026-11-21,
LOG.md).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

#: Share of the retained rows' mean loss that ascent may cost where it is recommended. A choice;
#: judged on 15 rows of the testbed and 14 of the demo, it equals always-edit in the one, and in the
#: other costs 0.002 nats more than that for 268 row-gradients in place of 457
#: (benchmarks/difficulty.py, 2026-11-21, LOG.md).
MAX_DAMAGE = 0.01
#: Share of the training rows above which an edit is not recommended. A choice.
MOST = 0.5


def recommended(
    table: pd.DataFrame, retained_loss: float, max_damage: float, steps: int
) -> pd.DataFrame:
    """Add the columns `recommended` and `reason` to a table of forecasts, after `damage_high`.

    They follow from its columns `steps`, `damage`, `gap` and `share`; `steps` are the protocol's,
    and `retained_loss` is in nats per token. Columns of these names are replaced.
    """
    rows = zip(table["steps"], table["damage"], table["gap"], table["share"], strict=True)
    advice = [_method(*row, retained_loss, max_damage, steps) for row in rows]
    out = table.drop(columns=["recommended", "reason"], errors="ignore")
    place = list(out.columns).index("damage_high") + 1
    out.insert(place, "recommended", [method for method, _ in advice])
    out.insert(place + 1, "reason", [reason for _, reason in advice])
    return out


def _method(
    steps: float, damage: float, gap: float, share: float, retained: float, most: float, limit: int
) -> tuple[str, str]:
    if gap <= 0:
        return "none", "its loss is at the target already"
    if share > MOST:
        return "retrain", f"{share:.0%} of all rows: too few are left to hold the adapter in place"
    if not np.isfinite(steps):
        return "edit", f"ascent is not forecast to reach the target in {limit} steps"
    if not np.isfinite(damage):
        return "edit", "no retained row tells the damage of ascent"
    cost = f"{damage / retained:+.1%} of retained loss"
    if damage <= most * retained:
        return "ascent", f"{steps:.0f} steps for {cost}, at most {most:.1%} allowed"
    return "edit", f"ascent would cost {cost}, more than {most:.1%}"
