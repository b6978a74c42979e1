"""Which way to unlearn a row: by a closed-form edit, by gradient ascent, or by training again.

    none      the loss is at its target already
    retrain   the unit is more than half of all rows: an edit keeps what the other rows hold in place, and there are
    too few of them ascent    its forecast damage is at most `max_damage` of the retained rows' loss: a few gradients
    do, and nothing need be held edit      otherwise, also where the ascent was not forecast to reach its target, of
    which an edit is independent: it holds a sample of
              retained rows while it moves (`unlearn.edits.steps`)

On the testbed's single rows an edit to the same target cost the others nothing and ascent 5 % of their loss, at
twenty-five times its gradients (LOG.md).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

#: Share of the retained rows' mean loss that ascent may cost where it is recommended.
MAX_DAMAGE = 0.01
#: Share of the training rows above which an edit is not recommended.
MOST = 0.5


def recommended(
    table: pd.DataFrame, retained_loss: float, max_damage: float, steps: int
) -> pd.DataFrame:
    """The table with its columns `recommended` and `reason` after the forecasts, from `steps`, `damage`, `gap` and `share`."""
    told = [
        _method(*row, retained_loss, max_damage, steps)
        for row in zip(table["steps"], table["damage"], table["gap"], table["share"], strict=True)
    ]
    out = table.drop(columns=["recommended", "reason"], errors="ignore")
    place = list(out.columns).index("damage_high") + 1
    out.insert(place, "recommended", [method for method, _ in told])
    out.insert(place + 1, "reason", [reason for _, reason in told])
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
    if damage <= most * retained:
        return (
            "ascent",
            f"{steps:.0f} steps for {damage / retained:+.1%} of retained loss, at most {most:.1%} allowed",
        )
    return (
        "edit",
        f"ascent would cost {damage / retained:+.1%} of retained loss, more than {most:.1%}",
    )
