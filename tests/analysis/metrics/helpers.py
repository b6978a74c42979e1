"""Numbers that metrics are tried on."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

LN2 = math.log(2)


near = functools.partial(pytest.approx, rel=1e-14, abs=1e-14)


def samples(seed=0, n=23, m=17, ties=False):
    """Two groups of numbers. With `ties`, of few values."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.4, 1, n), rng.normal(0, 1, m)
    return (np.round(a), np.round(b)) if ties else (a, b)
