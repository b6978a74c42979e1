"""Numbers that may not be known: NaN and empty means as None, for records in JSON."""

from __future__ import annotations

import numpy as np


def number_or_none(value: float) -> float | None:
    """The number, or None for NaN."""
    return None if np.isnan(value) else value


def mean_or_none(values: np.ndarray) -> float | None:
    """The mean, or None where there are no values or one is NaN."""
    return number_or_none(float(np.mean(values))) if len(values) else None


def sum_or_none(first: float | None, second: float | None) -> float | None:
    """The sum, or None where one of the two is not known."""
    return None if first is None or second is None else first + second
