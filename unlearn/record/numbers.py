"""Numbers of records: those that may not be known as None, and means of the lowest."""

from __future__ import annotations

import math

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


def mean_of_lowest(values: np.ndarray, share: float) -> float:
    """Mean of the lowest `max(1, floor(share T))` of T values.

    Of a row's log-probabilities it is Min-K % (Shi et al. 2024, arXiv 2310.16789).
    """
    return float(np.sort(values)[: max(1, whole_part(share * len(values)))].mean())


def whole_part(value: float) -> int:
    """Round down, but 0.29 of 100 is 29 (in floats 28.999...)."""
    return math.floor(value + 1e-9)
